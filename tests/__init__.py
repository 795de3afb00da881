"""Tests of lowrank_optim."""
