"""Which part of a parameter, and of its matrix, this rank has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch.distributed as dist
from torch import Tensor

from lowrank_optim.ops import Noise
from lowrank_optim.tensors.matrix import MatrixView

Side = Literal["whole", "columns", "rows", "batch", "entries"]


@dataclass(frozen=True, eq=False)
class Part:
    """The part of one parameter that is here, and how its matrix is stepped.

    A matrix is stepped by columns of its canonical view, ``(m, n)`` with m projected: whatever is
    done to a column needs that column and the basis, so that ranks with other columns need not be
    asked. Where rows are here, one exchange makes columns of them.
    """

    side: Side
    """What this rank has of the canonical view: the "whole" (every rank has), "columns", "rows",
    matrices of a "batch", or, of a parameter that is not projected, any "entries"."""
    rank: int
    """Place of this process in the group."""
    sizes: tuple[int, ...]
    """Rows, columns or matrices that each rank of the group has."""
    groups: tuple[dist.ProcessGroup, ...]
    """Of each dimension of the mesh; a matrix lies on one."""
    mesh: Any
    """The DeviceMesh; None of plain tensors that are replicated."""
    placements: tuple[Any, ...]
    """Of the parameter on the mesh."""
    here: MatrixView | None
    """The part as it is stored."""
    stepped: MatrixView | None
    """The part that is stepped: columns where rows are stored."""
    shape: tuple[int, ...]
    """Of the whole parameter."""

    @property
    def sharded(self) -> bool:
        """Whether this is of a DTensor, not of a plain tensor that others have too."""
        return self.mesh is not None

    @property
    def group(self) -> dist.ProcessGroup:
        """The processes that have parts of this matrix."""
        (group,) = self.groups
        return group

    @property
    def ranks(self) -> int:
        """How many processes those are."""
        return self.group.size()

    @property
    def summed(self) -> bool:
        """Whether each rank steps other columns of one matrix."""
        return self.side in ("columns", "rows")

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


def cuts(size: int, ranks: int) -> tuple[int, ...]:
    """How ``torch.chunk``, and so a Shard, cuts ``size`` into as many pieces, empty ones last."""
    most = -(-size // ranks)
    return tuple(max(0, min(most, size - i * most)) for i in range(ranks))


def noise_of(x: Tensor, seed: int) -> Noise:
    """Seed and positions, in the whole tensor, of what is here of it."""
    if not is_sharded(x):
        return Noise.over(seed, x.shape)
    return noise_at(seed, x.shape, x.device_mesh, x.placements)  # type: ignore[attr-defined]


def noise_at(seed: int, shape: Sequence[int], mesh: Any, placements: Sequence[Any]) -> Noise:
    """The same of a DTensor of ``shape`` that lies so on a mesh."""
    return Noise.over(seed, shape, corner(shape, mesh, placements))


def corner(shape: Sequence[int], mesh: Any, placements: Sequence[Any]) -> tuple[int, ...]:
    """The index in a whole tensor of the first entry that is here.

    Dimensions of the mesh that split one of the tensor cut each other's pieces, in their order; a
    ``_StridedShard`` cuts those of the dimensions after it.
    """
    at, left = [0] * len(shape), list(shape)
    order = [*range(len(placements))]
    order.sort(key=lambda k: type(placements[k]).__name__ == "_StridedShard")  # stable
    for k in order:
        if type(placements[k]).__name__ == "Replicate":
            continue
        dim, rank = placements[k].dim % len(shape), mesh.get_local_rank(k)
        sizes = cuts(left[dim], mesh.size(k))
        at[dim] += sum(sizes[:rank])
        left[dim] = sizes[rank]
    return tuple(at)


def part_of(param: Tensor, view: MatrixView | None, name: str) -> Part | None:
    """What this rank has of a parameter; None of one that is plain.

    Args:
        param: the parameter.
        view: of the whole, where it is projected.
        name: for errors.

    Raises:
        NotImplementedError: it is projected, and lies in a way that is not supported.
    """
    if not is_sharded(param):
        return None
    mesh, placements = param.device_mesh, tuple(param.placements)  # type: ignore[attr-defined]
    groups = tuple(mesh.get_all_groups())
    shape = tuple(param.shape)
    if view is None:
        return Part("entries", mesh.get_rank(), (), groups, mesh, placements, None, None, shape)
    if mesh.ndim != 1:
        raise NotImplementedError(
            f"{name} is to be projected and lies on a mesh of {mesh.ndim} dimensions, "
            f"{placements}: low-rank groups support meshes of one. Shard over one dimension, or "
            "give it rank=None"
        )
    side, unit = _side(placements[0], view, name)
    rank, ranks = mesh.get_local_rank(), mesh.size()
    whole = {"whole": 1, "columns": view.n, "rows": view.m, "batch": (view.batch or (1,))[0]}[side]
    sizes = tuple(unit * x for x in cuts(whole // unit, ranks))
    if side == "columns" and sizes != cuts(whole, ranks):
        raise NotImplementedError(
            f"{name} {shape} is to be projected, and {placements[0]} splits it into uneven pieces "
            f"of {unit} columns: take Shard(0), or a size that {ranks} ranks divide"
        )
    here = stepped = _cut(view, param, side, sizes[rank] if side != "whole" else 0)
    if side == "rows":
        mine = cuts(view.n, ranks)[rank]
        stepped = MatrixView((*view.batch, view.m, mine), view.batch, view.m, mine, False)
    return Part(side, rank, sizes, groups, mesh, placements, here, stepped, shape)


def replica(view: MatrixView | None, group: dist.ProcessGroup, shape: Sequence[int]) -> Part:
    """A plain parameter that every rank of ``group`` has, as under DistributedDataParallel."""
    return Part("whole", dist.get_rank(group), (), (group,), None, (), view, view, tuple(shape))


def _side(placement: object, view: MatrixView, name: str) -> tuple[Side, int]:
    """What a placement cuts of the canonical view, and the least piece that it cuts."""
    kind = type(placement).__name__
    if kind == "Replicate":
        return "whole", 1
    if kind != "Shard":
        raise NotImplementedError(
            f"{name} is to be projected and lies as {placement}, which is no interval of its rows "
            "or columns: use Shard(0), Shard(1) or Replicate on a mesh of one dimension, or give "
            "it rank=None"
        )
    dim = placement.dim % len(view.shape)  # type: ignore[attr-defined]
    first = len(view.batch)
    if dim < first:
        return "batch", 1
    if dim == first:
        return ("columns" if view.flip else "rows"), 1
    if any(size > 1 for size in view.shape[first + 1 : dim]):
        raise NotImplementedError(
            f"{name} {view.shape} is seen as one matrix, which {placement} does not split into "
            f"intervals of columns: use Shard({first}) or Shard({first + 1}), or give it rank=None"
        )
    unit = 1
    for size in view.shape[dim + 1 :]:
        unit *= size
    return ("rows" if view.flip else "columns"), unit


def _cut(view: MatrixView, param: Tensor, side: Side, size: int) -> MatrixView:
    """The view of what is stored here."""
    if side == "whole":
        return view
    shape = tuple(local(param).shape)
    if side == "batch":
        return view._replace(shape=shape, batch=(size,))
    if side == "columns":
        return view._replace(shape=shape, n=size)
    return view._replace(shape=shape, m=size)
