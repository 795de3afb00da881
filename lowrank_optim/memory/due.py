"""Which bases a rehearsed step finds, and the counters at which it does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from torch import Tensor

from lowrank_optim.engine.plan import ParamPlan
from lowrank_optim.engine.schedule import phase
from lowrank_optim.groups import Group
from lowrank_optim.optimizer import LowRankOptimizer
from lowrank_optim.subspaces.block import Block
from lowrank_optim.subspaces.spectral import Spectral

Due = Literal["first", "none", "all"] | frozenset[int]
"""Bases that a step finds: the first of all, none, all again, or those of some parameters."""


def set_counters(
    optimizer: LowRankOptimizer,
    group: Group,
    items: Sequence[ParamPlan],
    due: Mapping[Tensor, bool],
) -> None:
    """A step at which these bases are due, and no other that need not be at every step."""
    chosen = optimizer._strategies(group)
    for item in items:
        state = optimizer.state.get(item.param)
        if not state or item.subspace is None:
            continue
        if isinstance(item.subspace, Block):
            state["clock"].fill_(chosen.gap if due[item.param] else max(1, chosen.gap // 2))
            continue
        if isinstance(item.subspace, Spectral) and item.view is not None:  # a round begins
            while due[item.param] and not item.subspace.factors_anew(state, item.view):
                state["host.iteration"] += 1
        turn = chosen.gap + phase(item, chosen)
        late = 0 if due[item.param] else 1
        state["step"].fill_(turn + late)
        state["refresh_step"].fill_(turn + late - 1)
