"""FRUGAL and SST: moments start again."""

from __future__ import annotations

from lowrank_optim.subspaces.refresh import BasisChange
from lowrank_optim.transports.base import Moments, register


@register("reset")
def reset(moments: Moments, moved: BasisChange) -> None:
    """FRUGAL, SST: start again from zero; the optimizer restarts the bias correction too."""
    for _, x, _ in moments:
        x.zero_()
