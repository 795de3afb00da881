"""What is not done for parameters that lie on several ranks: said before anything changes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lowrank_optim.engine.plan import ParamPlan, Strategies
from lowrank_optim.sharding.parts import is_sharded
from lowrank_optim.stores import FloatStore
from lowrank_optim.subspaces.base import PROJECTORS, Subspace
from lowrank_optim.subspaces.block import Block


def _name(kind: type[Subspace]) -> str:
    """As a group calls it, or else the class."""
    names = [name for name, known in PROJECTORS.items() if known is kind]
    return f"projector={names[0]!r}" if names else kind.__name__


def check_layer(name: str, members: Iterable[Tensor], method: str, instead: str) -> None:
    """Raise for a layer of factors of which some are DTensors.

    Args:
        name: of the layer's first factor.
        members: all its parameters.
        method: the optimizer's name.
        instead: what trains the weights themselves on several ranks.

    Raises:
        NotImplementedError: with what to use in its place.
    """
    places = [x.placements for x in members if is_sharded(x)]  # type: ignore[attr-defined]
    if places:
        raise NotImplementedError(
            f"{method} does not support {name}, a DTensor with {places[0]}: the factors of a layer "
            "need each other, and lie on several ranks. Train the weights themselves, not modules: "
            f"{instead}, or train under DistributedDataParallel"
        )


def check_supported(item: ParamPlan, chosen: Strategies, method: str) -> None:
    """Raise for a DTensor that no step could take as one process would.

    Raises:
        NotImplementedError: with what to use in its place.
    """
    part, subspace = item.part, item.subspace
    if part is None or not part.sharded:
        return
    why = ""
    if subspace is not None and subspace.whole is not None:
        why = f"{_name(type(subspace))}: {subspace.whole}, or train under DistributedDataParallel"
    elif isinstance(subspace, Block) and chosen.residual.stepped:
        why = (
            "projector='block' beside a residual that is scaled by whole matrices. Take a FRUGAL "
            "class, or projector='columns' or 'rsvd'"
        )
    elif not chosen.rule.elementwise:
        why = (
            f"{type(chosen.rule).__name__} takes means over whole tensors. Take an AdamW, Lion or "
            "SGD class"
        )
    elif not isinstance(chosen.store, FloatStore):
        why = (
            "state_dtype='8bit' keeps blocks that would cross the edges of shards. Take "
            "state_dtype='bfloat16' or 'float32'"
        )
    elif chosen.rounding and item.param.dtype == torch.bfloat16:
        why = (
            "its noise would depend on the number of ranks. Keep float32 weights with a "
            "MixedPrecisionPolicy(param_dtype=torch.bfloat16), or pass stochastic_rounding=False"
        )
    if why:
        raise NotImplementedError(
            f"{method} does not support {item.name}, a DTensor with {part.placements}: {why}"
        )
