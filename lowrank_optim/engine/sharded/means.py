"""Rules that take means over whole tensors: how theirs lie on the ranks, and what is added up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lowrank_optim.engine.bucket import CHUNK_BYTES, Bucket
from lowrank_optim.engine.dense import dense_phases
from lowrank_optim.engine.offload import Staging, load_of
from lowrank_optim.engine.offload import together as resting
from lowrank_optim.engine.plan import ParamPlan, Strategies
from lowrank_optim.ops.devices import on_accelerator
from lowrank_optim.rules.adafactor import measured
from lowrank_optim.rules.base import Over, Split, Sum, compute_dtype, together
from lowrank_optim.sharding import collectives
from lowrank_optim.sharding.groups import group_over
from lowrank_optim.sharding.parts import local
from lowrank_optim.sharding.regions import region
from lowrank_optim.subspaces.block import Block


def dense_split(item: ParamPlan) -> Split | None:
    """How a dense parameter is split; None where nobody else is asked.

    Experts that are split by their number are whole matrices, each with means of its own.
    """
    part = item.part
    assert part is not None
    dims: dict[int, Over] = {}
    for i in part.dims:
        if hasattr(part.placements[i], "dim"):
            dim = part.placements[i].dim % len(part.shape) - len(part.shape)
            dims[dim] = (*dims.get(dim, ()), i)
    found = Split(part.shape, dims)
    return found if found.over(measured(part.shape)) else None


def coord_splits(item: ParamPlan) -> dict[str, Split]:
    """How coordinates lie on the ranks that step other columns: those that have columns."""
    view, subspace, part = item.view, item.subspace, item.part
    assert view is not None and subspace is not None and part is not None
    wider = subspace.coord_shapes(view._replace(n=view.n + 1))
    shapes = subspace.coord_shapes(view)
    dims = {-1: part.dims}
    return {name: Split(shape, dims) for name, shape in shapes.items() if shape != wider[name]}


def weight_squares(item: ParamPlan, twin: ParamPlan, chosen: Strategies) -> Tensor | None:
    """Sums of squares of the weights here, of each matrix apart, if its rule needs those of all.

    Of experts that are split by their number too, those that are not here have zeros.
    """
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
    squares = norm.square_()
    if dim is None or not dense or squares.shape[0] == part.shape[0]:
        return squares
    start, stop = _experts(item)
    whole = squares.new_zeros(part.shape[0], 1, 1)
    whole[start:stop] = squares
    return whole


def _experts(item: ParamPlan) -> tuple[int, int]:
    """Which of the matrices of a dense parameter are here."""
    part = item.part
    assert part is not None
    return region(part.shape, part.mesh, part.placements)[0]


def weight_rms(item: ParamPlan, twin: ParamPlan, squares: Tensor | None) -> Tensor | None:
    """Root mean square of the whole weights, or of each matrix, from its sums of squares."""
    if squares is None:
        return None
    count = max(1, item.param.numel() // squares.numel())
    if squares.dim() == 3 and twin.param.dim() == 3 and squares.shape[0] != twin.param.shape[0]:
        squares = squares[slice(*_experts(item))]
    return (squares / count).sqrt().to(compute_dtype(item.param.dtype))


def add_up(asked: Sequence[Sum], mesh: Any) -> None:
    """What phases ask for: one all-reduce for each set of ranks."""
    by_ranks: dict[Over, list[Tensor]] = {}
    for x, over in asked:
        by_ranks.setdefault(over, []).append(x)
    for over, own in sorted(by_ranks.items(), key=lambda pair: pair[0]):
        collectives.sum_(own, group_over(mesh, over))


Dense = tuple[ParamPlan, Bucket, Split, Tensor | None]
"""A dense parameter, what is here of it, how it lies, and the root mean square of its weights."""


def step_dense(work: Sequence[Dense], staging: Staging) -> None:
    """Step dense parameters, as many at a time as share their messages."""
    by_mesh: dict[Any, list[Dense]] = {}
    for own in work:
        assert own[0].part is not None
        by_mesh.setdefault((own[0].part.mesh, own[0].part.dims), []).append(own)
    for alike in by_mesh.values():
        part = alike[0][0].part
        assert part is not None
        for places in portions_of([item for item, *_ in alike], part.ranks):
            portion = [alike[n] for n in places]
            buckets = [bucket for _, bucket, _, _ in portion]
            for bucket in buckets:
                bucket.undo.begin(bucket.states[0])
            loads = [load_of([item], b.states, b.chosen) for item, b, _, _ in portion]
            step = partial(_step_portion, portion, part.mesh)
            staging.each([resting(loads)], step, buckets[0].undo)


def _step_portion(portion: Sequence[Dense], mesh: Any, number: int) -> None:
    """One portion, which is the only one of its call."""
    phases = [dense_phases(bucket, split, rms) for _, bucket, split, rms in portion]
    for asked in together(phases):
        add_up(asked, mesh)
    for _, bucket, _, _ in portion:
        bucket.undo.done(bucket.states[0])


def portions_of(items: Sequence[ParamPlan], ranks: int) -> Iterator[list[int]]:
    """Places of so many that their directions are as large as a bucket's, the same on all ranks."""
    portion: list[int] = []
    size = 0
    for n, item in enumerate(items):
        size += 4 * item.param.numel() // ranks
        portion.append(n)
        if size >= CHUNK_BYTES[on_accelerator(local(item.param))]:
            yield portion
            portion, size = [], 0
    if portion:
        yield portion
