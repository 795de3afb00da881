"""Straight-line code from the papers, torch only."""
