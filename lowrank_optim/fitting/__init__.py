"""The best plan under a memory budget: method, mode inside backward, store, and ranks."""

from lowrank_optim.fitting.best import fit
from lowrank_optim.fitting.plan import Plan

__all__ = ["Plan", "fit"]
