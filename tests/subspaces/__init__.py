"""Projectors: the contract of each, and what is known of some."""
