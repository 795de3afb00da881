"""Methods: one file per paper, each a composition of roles."""

from lowrank_optim.methods.galore import (
    GaLoreAdafactor,
    GaLoreAdamW,
    GaLoreAdamW8bit,
    GaLoreLion,
    GaLoreSGD,
)

__all__ = ["GaLoreAdafactor", "GaLoreAdamW", "GaLoreAdamW8bit", "GaLoreLion", "GaLoreSGD"]
