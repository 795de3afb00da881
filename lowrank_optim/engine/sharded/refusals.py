"""What is not done for parameters that lie on several ranks: said before anything changes."""

from __future__ import annotations

import torch

from lowrank_optim.engine.plan import ParamPlan, Strategies
from lowrank_optim.ops import quant
from lowrank_optim.stores import Block8Store, FloatStore
from lowrank_optim.subspaces.base import PROJECTORS, Subspace
from lowrank_optim.subspaces.block import Block


def _name(kind: type[Subspace]) -> str:
    """As a group calls it, or else the class."""
    names = [name for name, known in PROJECTORS.items() if known is kind]
    return f"projector={names[0]!r}" if names else kind.__name__


def _crosses_matrices(item: ParamPlan, chosen: Strategies) -> bool:
    """Whether a block of moments holds rows of two matrices, which may lie on two ranks."""
    assert item.subspace is not None and item.view is not None
    shapes = [
        slot.shape(shape)
        for shape in item.subspace.coord_shapes(item.view).values()
        for slot in chosen.rule.slots(shape)
    ]
    return any(chosen.store.unit(x) > 1 and x[-1] < quant.BLOCK for x in shapes)


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
        why = (
            f"{_name(type(subspace))}: {subspace.whole}. Take another class with "
            "projector='columns', 'rsvd' or 'dct', or train under DistributedDataParallel"
        )
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
    elif not isinstance(chosen.store, FloatStore | Block8Store):
        why = (
            f"{type(chosen.store).__name__} is not known to be split. Take state_dtype='8bit', "
            "'bfloat16' or 'float32'"
        )
    elif part.side == "batch" and _crosses_matrices(item, chosen):
        why = (
            "blocks of state_dtype='8bit' go over several matrices where their coordinates have "
            f"fewer than {quant.BLOCK} columns. Split the rows or the columns of each matrix, or "
            "take state_dtype='bfloat16' or 'float32'"
        )
    elif chosen.rounding and item.param.dtype == torch.bfloat16:
        why = (
            "its noise would depend on the number of ranks. Keep float32 weights with a "
            "MixedPrecisionPolicy(param_dtype=torch.bfloat16), or pass stochastic_rounding=False"
        )
    elif not item.alone:
        why = "factors of one layer need each other. Train the weights themselves, not modules"
    if why:
        raise NotImplementedError(
            f"{method} does not support {item.name}, a DTensor with {part.placements}: {why}"
        )
