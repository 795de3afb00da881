"""Where in a whole tensor lies what a rank has of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lowrank_optim.ops import Noise
from lowrank_optim.sharding.grid import Cut, Interval, cut_of
from lowrank_optim.sharding.groups import coordinate
from lowrank_optim.sharding.parts import is_sharded


def noise_of(x: Tensor, seed: int | Tensor) -> Noise:
    """Seed and positions, in the whole tensor, of what is here of it."""
    if not is_sharded(x):
        return Noise.over(seed, x.shape)
    return noise_at(seed, x.shape, x.device_mesh, x.placements)  # type: ignore[attr-defined]


def noise_at(
    seed: int | Tensor, shape: Sequence[int], mesh: Any, placements: Sequence[Any]
) -> Noise:
    """The same of a DTensor of ``shape`` that lies so on a mesh."""
    return Noise.over(seed, shape, corner(shape, mesh, placements))


def corner(shape: Sequence[int], mesh: Any, placements: Sequence[Any]) -> tuple[int, ...]:
    """The index in a whole tensor of the first entry that is here."""
    return tuple(start for start, _ in region(shape, mesh, placements))


def region(
    shape: Sequence[int],
    mesh: Any,
    placements: Sequence[Any],
    at: Sequence[int] | None = None,
) -> tuple[Interval, ...]:
    """Where what a rank has of a tensor begins and ends in each dimension.

    Args:
        shape: of the whole.
        mesh: where it lies.
        placements: how.
        at: coordinates of the rank (default: this one's).
    """
    found = [(0, size) for size in shape]
    at = coordinate(mesh) if at is None else at
    for dim, dims in _by_dim(shape, placements).items():
        cut = _cut_by(mesh, placements, dims)
        cut = cut or Cut(tuple(mesh.size(k) for k in dims), tuple(range(len(dims))))
        found[dim] = cut.interval(shape[dim], [at[k] for k in dims])
    return tuple(found)


def lies_in_intervals(shape: Sequence[int], mesh: Any, placements: Sequence[Any]) -> bool:
    """Whether :func:`region` is what each rank has, and what DTensor takes it to have."""
    known = ("Replicate", "Shard", "_StridedShard")
    if any(type(place).__name__ not in known for place in placements):
        return False
    cuts = {d: _cut_by(mesh, placements, dims) for d, dims in _by_dim(shape, placements).items()}
    return all(cut is not None and cut.is_read_alike(shape[dim]) for dim, cut in cuts.items())


def _by_dim(shape: Sequence[int], placements: Sequence[Any]) -> dict[int, list[int]]:
    """Dimensions of a tensor that are split, and those of the mesh that split each."""
    found: dict[int, list[int]] = {}
    for k, place in enumerate(placements):
        if type(place).__name__ != "Replicate":
            found.setdefault(place.dim % len(shape), []).append(k)
    return found


def _cut_by(mesh: Any, placements: Sequence[Any], dims: Sequence[int]) -> Cut | None:
    """How some dimensions of a mesh split one of a tensor; None if they leave no intervals."""
    factors = [int(getattr(placements[k], "split_factor", 1)) for k in dims]
    return cut_of([mesh.size(k) for k in dims], factors)
