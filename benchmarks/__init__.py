"""Benchmarks and the demo: run as modules from the root of the repository."""
