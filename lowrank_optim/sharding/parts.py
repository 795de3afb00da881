"""Which part of a parameter, and of its matrix, this rank has."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch.distributed as dist
from torch import Tensor

from lowrank_optim.sharding.grid import Cut, Grid, Interval, coordinates, length
from lowrank_optim.sharding.groups import (
    check_backend,
    check_order,
    coordinate,
    group_over,
    members,
    ranks_over,
)
from lowrank_optim.sharding.shares import axes_of, shares
from lowrank_optim.tensors.matrix import MatrixView

Side = Literal["whole", "columns", "blocks", "batch", "entries"]


@dataclass(frozen=True, eq=False)
class Part:
    """The part of one parameter that is here, and how its matrix is stepped.

    A matrix is stepped by columns of its canonical view, ``(m, n)`` with m projected: whatever is
    done to a column needs that column and the basis, so that ranks with other columns need not be
    asked. Where other blocks are here, one exchange makes columns of them.

    Some dimensions of the mesh split the matrix, and along the others there are copies of it. All
    that ranks share of a matrix is shared by those of the first kind; what one of them finds goes
    from the first copy to the others, which stay the same to the bit.
    """

    side: Side
    """What this rank has of the canonical view: the "whole" (every rank has), the "columns" that
    it steps, other "blocks", matrices of a "batch", or, of a parameter that is not projected, any
    "entries"."""
    rank: int
    """Place of this process in the group."""
    ranks: int
    """Processes that have parts of this matrix."""
    spans: tuple[Interval, ...]
    """Columns that each rank of the group steps, or matrices of the batch."""
    place: int
    """Of what is here among all parts: the same for all copies of it."""
    mesh: Any
    """The DeviceMesh; None of plain tensors that are replicated."""
    placements: tuple[Any, ...]
    """Of the parameter on the mesh."""
    here: MatrixView | None
    """The part as it is stored."""
    stepped: MatrixView | None
    """The part that is stepped: columns where blocks are stored."""
    shape: tuple[int, ...]
    """Of the whole parameter."""
    dims: tuple[int, ...] = ()
    """Dimensions of the mesh over which the group goes: those that split it, or all."""
    copied: tuple[int, ...] = ()
    """Dimensions of the mesh along which there are copies of what the group has."""
    cut: Cut | None = None
    """How ``dims`` split columns, or a batch, among them."""
    grid: Grid | None = None
    """Of blocks: what each rank of the group has, and what it steps."""
    view: MatrixView | None = None
    """Of the whole."""
    unit: int = 1
    """Columns that are kept together: entries of a state are in blocks of so many."""
    alike: dist.ProcessGroup | None = None
    """Of plain tensors: the ranks that have them too."""

    @property
    def sharded(self) -> bool:
        """Whether this is of a DTensor, not of a plain tensor that others have too."""
        return self.mesh is not None

    @functools.cached_property
    def groups(self) -> tuple[dist.ProcessGroup, ...]:
        """Of each dimension of the mesh."""
        return tuple(self.mesh.get_all_groups())

    @functools.cached_property
    def group(self) -> dist.ProcessGroup:
        """The processes that have parts of this matrix."""
        return self.alike or group_over(self.mesh, self.dims)

    @functools.cached_property
    def copies(self) -> dist.ProcessGroup | None:
        """The processes that have the same part; None where there is no other."""
        return group_over(self.mesh, self.copied) if self.copied else None

    @functools.cached_property
    def first(self) -> int:
        """Place of the first copy among :attr:`copies`."""
        return members(self.mesh, self.copied).index(ranks_over(self.mesh, self.copied)[0])

    @functools.cached_property
    def leads(self) -> bool:
        """Whether this rank is of the first copy."""
        at = coordinate(self.mesh) if self.copied else []
        return all(at[dim] == 0 for dim in self.copied)

    @functools.cached_property
    def times(self) -> int:
        """How many ranks of the mesh have what this one has."""
        return int(self.mesh.size()) // (1 if self.side == "whole" else self.ranks)

    @property
    def summed(self) -> bool:
        """Whether each rank steps other columns of one matrix."""
        return self.side in ("columns", "blocks")

    @property
    def padding(self) -> int:
        """Columns that fill up the last block of what is stepped here."""
        return 0 if self.stepped is None else -self.stepped.n % self.unit

    @property
    def crossed(self) -> bool:
        """Of entries: whether ranks have parts of rows, however many they are."""
        last = len(self.shape) - 1
        split = any(
            type(p).__name__ != "Replicate" and p.dim % (last + 1) == last for p in self.placements
        )
        return last < 1 or split

    @property
    def layout(self) -> tuple[Any, ...]:
        """With the view of a matrix, what tells how it is shared."""
        mesh = () if self.mesh is None else tuple(self.mesh.shape)
        return self.side, mesh, self.placements, id(self.group)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Columns that each rank steps, or matrices of the batch."""
        return tuple(map(length, self.spans))

    def placed(self, dim: int | None) -> tuple[Any, ...]:
        """Placements of an entry of the state that is split along ``dim``, or not at all."""
        from torch.distributed.tensor import Replicate, Shard  # slow; who has a DTensor has it
        from torch.distributed.tensor.placement_types import _StridedShard

        found: list[Any] = [Replicate()] * self.mesh.ndim
        if dim is not None and self.cut is not None:
            for at, factor in zip(self.dims, self.cut.factors, strict=True):
                strided = factor > 1
                found[at] = _StridedShard(dim, split_factor=factor) if strided else Shard(dim)
        return tuple(found)

    def of(self, x: Tensor) -> Tensor:
        """The part of a DTensor that is here; a gradient is brought to the parameter's places.

        Args:
            x: the parameter, its gradient or an entry of its state; plain tensors are here.
        """
        if not is_sharded(x):
            return x
        whole: Any = x
        if x.shape == self.shape and tuple(whole.placements) != self.placements:
            whole = whole.redistribute(placements=self.placements)
        return local(whole)


def is_sharded(x: Tensor) -> bool:
    """Whether this is a DTensor, in words that need no import of it."""
    return hasattr(x, "placements")


def local(x: Tensor) -> Tensor:
    """The plain tensor of this rank, once it has arrived."""
    if not is_sharded(x):
        return x
    part: Any = x.to_local()  # type: ignore[attr-defined]
    part = part.wait() if hasattr(part, "wait") else part
    found: Tensor = part.detach() if part.requires_grad else part
    return found


def part_of(param: Tensor, view: MatrixView | None, name: str, unit: int = 1) -> Part | None:
    """What this rank has of a parameter; None of one that is plain.

    Args:
        param: the parameter.
        view: of the whole, where it is projected.
        name: for errors.
        unit: columns that a rank steps together: what it steps begins at a multiple (default: 1).

    Raises:
        NotImplementedError: it is projected, and lies in a way that is not supported; or the ranks
            of its mesh do not ascend.
        RuntimeError: its process group has no backend for its device.
    """
    if not is_sharded(param):
        return None
    mesh, placements = param.device_mesh, tuple(param.placements)  # type: ignore[attr-defined]
    for group in mesh.get_all_groups():
        check_backend(group, local(param).device, name)
    split = [i for i, p in enumerate(placements) if type(p).__name__ != "Replicate"]
    check_order(mesh, split, name)
    axes = {} if view is None else axes_of(placements, mesh, view, name)
    dims = tuple([i for i in split if mesh.size(i) > 1] or split[:1])
    copied = tuple(i for i in range(mesh.ndim) if i not in split and mesh.size(i) > 1)
    at = coordinate(mesh)
    sizes, at = [mesh.size(i) for i in dims], [at[i] for i in dims]
    place = list(coordinates(sizes)).index(tuple(at))
    shape = tuple(param.shape)
    if view is None:
        return Part(
            "entries", place, math.prod(sizes), (), place, mesh, placements, None, None, shape,
            dims, copied,
        )  # fmt: skip
    if not dims:
        dims = copied or (0,)
        order = members(mesh, dims)
        rank = order.index(mesh.get_rank())
        return Part(
            "whole", rank, len(order), (), 0, mesh, placements, view, view, shape, dims,
            view=view, unit=unit,
        )  # fmt: skip
    # the order of ranks in their group, which need not be that of the mesh
    over = ranks_over(mesh, dims)
    ordered = tuple(over.index(rank) for rank in members(mesh, dims))
    cut, spans, grid = shares(view, tuple(sizes), dims, tuple(axes.items()), unit, ordered)
    rank = ordered.index(place)
    side: Side = "batch" if grid is None else "blocks" if grid.moves else "columns"
    here = _stored(view, tuple(local(param).shape), grid, spans, rank)
    stepped = here
    if side == "blocks":
        mine = length(spans[rank])
        stepped = MatrixView((*view.batch, view.m, mine), view.batch, view.m, mine, False)
    kept = grid if side == "blocks" else None
    return Part(
        side, rank, len(ordered), spans, place, mesh, placements, here, stepped, shape, dims,
        copied, cut, kept, view, unit,
    )  # fmt: skip


def as_if_sharded(view: MatrixView | None, shape: Sequence[int], unit: int = 1) -> Part:
    """What a plain parameter would be on some mesh: only for the forms of its state."""
    side: Side = "entries" if view is None else "whole"
    return Part(side, 0, 1, (), 0, (), (), view, view, tuple(shape), view=view, unit=unit)


def replica(view: MatrixView | None, group: dist.ProcessGroup, shape: Sequence[int]) -> Part:
    """A plain parameter that every rank of ``group`` has, as under DistributedDataParallel."""
    rank, ranks = dist.get_rank(group), group.size()
    return Part("whole", rank, ranks, (), 0, None, (), view, view, tuple(shape), alike=group)


def _stored(
    view: MatrixView,
    shape: tuple[int, ...],
    grid: Grid | None,
    spans: Sequence[Interval],
    rank: int,
) -> MatrixView:
    """The view of what is stored here."""
    if grid is None:
        return view._replace(shape=shape, batch=(length(spans[rank]),))
    rows, columns = grid.stored[rank]
    return view._replace(shape=shape, m=length(rows), n=length(columns))
