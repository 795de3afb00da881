"""One-liners for training frameworks; each module imports its framework only when used."""

from lowrank_optim.integrations.released import as_apollo_torch, as_galore_torch

__all__ = ["as_apollo_torch", "as_galore_torch"]
