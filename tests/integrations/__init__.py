"""Trainers and other frameworks."""
