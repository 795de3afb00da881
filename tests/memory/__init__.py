"""Estimates, reports and traces of memory."""
