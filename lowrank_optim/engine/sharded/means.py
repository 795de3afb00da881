"""Rules that take means over whole tensors: how theirs lie on the ranks, and what is added up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lowrank_optim.engine.bucket import Bucket
from lowrank_optim.engine.dense import dense_phases
from lowrank_optim.engine.plan import ParamPlan, Strategies
from lowrank_optim.engine.step import CHUNK_BYTES
from lowrank_optim.ops.devices import on_accelerator
from lowrank_optim.rules.base import Split, compute_dtype, together
from lowrank_optim.sharding import collectives
from lowrank_optim.subspaces.block import Block


def dense_split(item: ParamPlan) -> Split | None:
    """How a dense parameter is split by one dimension of a mesh; None where nobody else is asked.

    Experts that are split are whole matrices, each with means of its own.
    """
    part = item.part
    assert part is not None
    split = [part.placements[i] for i in part.dims if hasattr(part.placements[i], "dim")]
    if len(split) != 1:
        return None
    dims = len(part.shape)
    dim = split[0].dim % dims - dims
    return None if dims == 3 and dim == -3 else Split(part.shape, dim)


def coord_splits(item: ParamPlan) -> dict[str, Split]:
    """How coordinates lie on the ranks that step other columns: those that have columns."""
    view, subspace = item.view, item.subspace
    assert view is not None and subspace is not None
    wider = subspace.coord_shapes(view._replace(n=view.n + 1))
    shapes = subspace.coord_shapes(view)
    return {name: Split(shape, -1) for name, shape in shapes.items() if shape != wider[name]}


def weight_squares(item: ParamPlan, twin: ParamPlan, chosen: Strategies) -> Tensor | None:
    """Sums of squares of the weights here, of each matrix apart, if its rule needs those of all."""
    part = item.part
    assert part is not None
    if not chosen.rule.weighs() or part.side in ("whole", "batch"):
        return None
    dense = item.subspace is None or isinstance(item.subspace, Block)
    if dense and dense_split(item) is None:
        return None
    weights = twin.param if dense or twin.view is None else twin.view.of(twin.param)
    dim = (1, 2) if weights.dim() == 3 else None
    wide = torch.float64
    norm: Tensor = torch.linalg.vector_norm(weights, dim=dim, keepdim=dim is not None, dtype=wide)
    return norm.square_()


def weight_rms(item: ParamPlan, squares: Tensor | None) -> Tensor | None:
    """Root mean square of the whole weights, or of each matrix, from its sums of squares."""
    if squares is None:
        return None
    count = max(1, item.param.numel() // squares.numel())
    return (squares / count).sqrt().to(compute_dtype(item.param.dtype))


Dense = tuple[ParamPlan, Bucket, Split, Tensor | None]
"""A dense parameter, what is here of it, how it lies, and the root mean square of its weights."""


def step_dense(work: Sequence[Dense]) -> None:
    """Step dense parameters, as many at a time as share their messages."""
    by_group: dict[int, list[Dense]] = {}
    for own in work:
        assert own[0].part is not None
        by_group.setdefault(id(own[0].part.group), []).append(own)
    for alike in by_group.values():
        part = alike[0][0].part
        assert part is not None
        for portion in _portions(alike, part.ranks):
            buckets = [bucket for _, bucket, _, _ in portion]
            for bucket in buckets:
                bucket.undo.begin(bucket.states[0])
            phases = [dense_phases(bucket, split, rms) for _, bucket, split, rms in portion]
            for asked in together(phases):
                collectives.sum_(asked, part.group)
            for bucket in buckets:
                bucket.undo.done(bucket.states[0])


def _portions(work: Sequence[Dense], ranks: int) -> Iterator[list[Dense]]:
    """So many that their directions are as large as a bucket's; the same on every rank."""
    portion: list[Dense] = []
    size = 0
    for own in work:
        size += 4 * own[0].param.numel() // ranks
        portion.append(own)
        if size >= CHUNK_BYTES[on_accelerator(own[1].items[0].param)]:
            yield portion
            portion, size = [], 0
    if portion:
        yield portion
