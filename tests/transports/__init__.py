"""Moments when the basis moves."""
