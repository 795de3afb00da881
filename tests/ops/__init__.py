"""Ops and their backends."""
