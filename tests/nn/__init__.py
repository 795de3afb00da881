"""Module forms."""
