"""Faults that a run has to survive, and what is left of it then: docs/reliability.md."""
