"""What is not done for parameters that lie on several ranks: said before anything changes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lowrank_optim.engine.draws import rounds
from lowrank_optim.engine.plan import ParamPlan, Strategies
from lowrank_optim.ops import quant
from lowrank_optim.sharding.parts import is_sharded
from lowrank_optim.sharding.regions import lies_in_intervals
from lowrank_optim.stores import STORES, Block4Store, Block8Store, FloatStore
from lowrank_optim.subspaces.base import PROJECTORS, Subspace
from lowrank_optim.subspaces.block import Block


def _name(kind: type[Subspace]) -> str:
    """As a group calls it, or else the class."""
    names = [name for name, known in PROJECTORS.items() if known is kind]
    return f"projector={names[0]!r}" if names else kind.__name__


def _format(chosen: Strategies) -> str:
    """As a group calls it, or else the class."""
    names = [name for name, known in STORES.items() if known is chosen.store]
    return f"state_dtype={names[0]!r}" if names else type(chosen.store).__name__


def _inner(item: ParamPlan) -> bool:
    """Whether a dimension behind the second of a kernel is split."""
    assert item.part is not None
    dims = [p.dim % item.param.dim() for p in item.part.placements if hasattr(p, "dim")]
    return item.param.dim() > 3 and max(dims, default=0) > 1


def check_layer(
    name: str,
    members: Sequence[Tensor],
    method: str,
    instead: str,
) -> None:
    """Raise for a layer of factors that lie on several ranks in a way that is not supported.

    Whole numbers among its parameters may be plain, the same on every rank: see
    :func:`lowrank_optim.engine.sharded.layers.with_copies`.

    Args:
        name: of the layer's first factor.
        members: all its parameters.
        method: the optimizer's name.
        instead: what trains the weights themselves on several ranks.

    Raises:
        NotImplementedError: with what to use in its place.
    """
    if not any(is_sharded(x) for x in members):
        return
    members = [x for x in members if is_sharded(x) or x.is_floating_point()]
    places = [tuple(getattr(x, "placements", ())) for x in members]
    meshes = {getattr(x, "device_mesh", None) for x in members}
    why = ""
    if len(meshes) > 1:
        why = "all its parameters must be DTensors of one mesh"
    elif not all(
        lies_in_intervals(x.shape, x.device_mesh, own)  # type: ignore[attr-defined]
        for x, own in zip(members, places, strict=True)
    ):
        why = (
            "each rank must have one interval of every dimension, as of Shard and Replicate, and "
            "of FSDP2 over tensor parallel where the ranks divide it"
        )
    if why:
        raise NotImplementedError(
            f"{method} does not support {name}, a layer of factors, DTensors with {places}: {why}. "
            f"Train the weights themselves, not modules: {instead}; or train under "
            "DistributedDataParallel"
        )


def _crosses_matrices(item: ParamPlan, chosen: Strategies) -> bool:
    """Whether a block of moments holds rows of two matrices, which may lie on two ranks."""
    assert item.subspace is not None and item.view is not None
    if not isinstance(chosen.store, Block8Store):
        return False  # others have no block of two rows
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
        why = f"{_name(type(subspace))}: {subspace.whole}, or train under DistributedDataParallel"
    elif isinstance(subspace, Block) and chosen.residual.stepped:
        why = (
            "projector='block' beside a residual that is scaled by whole matrices. Take a FRUGAL "
            "class, or projector='columns' or 'rsvd'"
        )
    elif not chosen.rule.elementwise and isinstance(subspace, Block):
        why = (
            f"projector='block' beside {type(chosen.rule).__name__}, which takes means over whole "
            "tensors. Take projector='columns' or 'rsvd', or an AdamW, Lion or SGD class"
        )
    elif isinstance(subspace, Block) and rounds(item, chosen) and _inner(item):
        why = (
            "stochastic_rounding of a block whose inner dimensions are split. Take Shard(0), or "
            "stochastic_rounding=False"
        )
    elif not isinstance(chosen.store, FloatStore | Block8Store | Block4Store):
        why = (
            f"{_format(chosen)} is not known to be split. Take state_dtype='8bit', 'bfloat16' or "
            "'float32', or train under DistributedDataParallel"
        )
    elif part.side == "batch" and _crosses_matrices(item, chosen):
        why = (
            "blocks of state_dtype='8bit' go over several matrices where a moment has fewer than "
            f"{quant.BLOCK} columns. Split the rows or the columns of each matrix, or "
            "take state_dtype='bfloat16' or 'float32'"
        )
    if why:
        raise NotImplementedError(
            f"{method} does not support {item.name}, a DTensor with {part.placements}: {why}"
        )
