"""Methods: one file per paper, each a composition of roles."""

from lowrank_optim.methods.fira import FiraAdamW, FiraAdamW8bit
from lowrank_optim.methods.galore import (
    GaLoreAdafactor,
    GaLoreAdamW,
    GaLoreAdamW8bit,
    GaLoreLion,
    GaLoreSGD,
)

__all__ = [
    "FiraAdamW",
    "FiraAdamW8bit",
    "GaLoreAdafactor",
    "GaLoreAdamW",
    "GaLoreAdamW8bit",
    "GaLoreLion",
    "GaLoreSGD",
]
