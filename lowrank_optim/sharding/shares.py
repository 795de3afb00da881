"""How a mesh splits rows, columns and batch of a matrix, and which columns each rank steps."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from lowrank_optim.sharding.grid import Block, Cut, Grid, Interval, coordinates, cut_of
from lowrank_optim.tensors.matrix import MatrixView


class Axis(NamedTuple):
    """How one side of a matrix, or its batch, is split."""

    dim: int
    """Of the tensor."""
    unit: int
    """Rows or columns of the matrix to an index of that dimension."""
    dims: tuple[int, ...]
    """Of the mesh."""
    cut: Cut


@functools.lru_cache(maxsize=4096)
def shares(
    view: MatrixView,
    sizes: tuple[int, ...],
    dims: tuple[int, ...],
    axes: tuple[tuple[str, Axis], ...],
    unit: int,
    ordered: tuple[int, ...],
) -> tuple[Cut, tuple[Interval, ...], Grid | None]:
    """How columns, or matrices, are shared, what of them each rank has, and blocks if any."""
    named = dict(axes)
    ats = [list(coordinates(sizes))[i] for i in ordered]

    def own(side: str, whole: int, at: Sequence[int]) -> Interval:
        if side not in named:
            return 0, whole
        axis = named[side]
        inner = [at[dims.index(dim)] for dim in axis.dims]
        start, stop = axis.cut.interval(view.shape[axis.dim], inner)
        return start * axis.unit, stop * axis.unit

    if "batch" in named:
        batch = named["batch"]
        cut = Cut(sizes, tuple(dims.index(batch.dims[i]) for i in batch.cut.order))
        return cut, tuple(own("batch", view.batch[0], at) for at in ats), None
    # who has whole columns keeps them, as near as can be: what splits columns splits them first,
    # where pieces are even, as torch's loaders of whole states take no strided split of others
    columns = named.get("columns")
    first = [] if columns is None else [dims.index(columns.dims[i]) for i in columns.cut.order]
    cut = Cut(sizes, (*first, *(i for i in range(len(dims)) if i not in first)))
    if -(-view.n // unit) % math.prod(sizes):
        cut = Cut(sizes, tuple(range(len(dims))))
    stored = tuple(Block(own("rows", view.m, at), own("columns", view.n, at)) for at in ats)
    stepped = tuple(cut.interval(view.n, at, unit) for at in ats)
    return cut, stepped, Grid(view.m, view.n, stored, stepped)


def axes_of(placements: Sequence[Any], mesh: Any, view: MatrixView, name: str) -> dict[str, Axis]:
    """What splits rows, columns and batch of the canonical view."""
    by_dim: dict[int, list[int]] = {}
    for i, place in enumerate(placements):
        kind = type(place).__name__
        if kind not in ("Replicate", "Shard", "_StridedShard"):
            raise NotImplementedError(
                f"{name} is to be projected and lies as {place}, which is no interval of its rows "
                "or columns: use Shard or Replicate, or give it rank=None"
            )
        if kind != "Replicate":
            by_dim.setdefault(place.dim % len(view.shape), []).append(i)
    found: dict[str, Axis] = {}
    for dim, dims in by_dim.items():
        side, unit = _side(dim, view, name)
        dims = [i for i in dims if mesh.size(i) > 1] or dims[:1]
        sizes = [mesh.size(i) for i in dims]
        cut = cut_of(sizes, [int(getattr(placements[i], "split_factor", 1)) for i in dims])
        if cut is None or not cut.is_read_alike(view.shape[dim]) or side in found:
            raise NotImplementedError(
                f"{name} {view.shape} is to be projected, and {tuple(placements)} on a mesh of "
                f"{tuple(mesh.shape)} does not give each rank one interval of dimension {dim} that "
                "DTensor knows: take a size that the ranks divide, or give it rank=None"
            )
        found[side] = Axis(dim, unit, tuple(dims), cut)
    some = {side: axis for side, axis in found.items() if max(axis.cut.sizes) > 1}
    found = some or dict(list(found.items())[:1])
    if "batch" in found and len(found) > 1:
        raise NotImplementedError(
            f"{name} {view.shape} is to be projected, and {tuple(placements)} splits both the "
            "matrices and their number: split one of the two, or give it rank=None"
        )
    return found


def _side(dim: int, view: MatrixView, name: str) -> tuple[str, int]:
    """What a split of a tensor's dimension cuts of the canonical view, and the least piece."""
    first = len(view.batch)
    if dim < first:
        return "batch", 1
    if dim == first:
        return ("columns" if view.flip else "rows"), 1
    if any(size > 1 for size in view.shape[first + 1 : dim]):
        raise NotImplementedError(
            f"{name} {view.shape} is seen as one matrix, which Shard({dim}) does not split into "
            f"intervals of columns: use Shard({first}) or Shard({first + 1}), or give it rank=None"
        )
    unit = 1
    for size in view.shape[dim + 1 :]:
        unit *= size
    return ("rows" if view.flip else "columns"), unit
