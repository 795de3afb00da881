"""GaLore: moments stay as they are."""

from __future__ import annotations

from lowrank_optim.subspaces.refresh import BasisChange
from lowrank_optim.transports.base import Moments, register


@register("keep")
def keep(moments: Moments, moved: BasisChange) -> None:
    """GaLore: moments stay as they are, now read in the new coordinates."""
