"""What a refresh of a subspace may look at, and what it tells of how coordinates moved."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowrank_optim.tensors.matrix import MatrixView


class BasisChange(NamedTuple):
    """How a refresh moved one coordinate; the Transport decides what the moments do about it."""

    rotation: Callable[[], Tensor] | None = None
    """Lazily ``P_new^T P_old (..., r, r)``, acting on the rows of the coordinate."""
    right: Callable[[], Tensor] | None = None
    """The same for the columns, when both sides are projected."""
    source: Tensor | None = None
    """``(..., r)`` the old row that feeds each new one, -1 for a new one: sets of indices."""
    source_right: Tensor | None = None
    """The same for the columns, when both sides are projected."""
    fresh: Sequence[slice] = ()
    """Rows whose moments and ages start from zero whatever ``on_refresh`` says; others stay."""
    carry: Callable[[Tensor], Tensor] | None = None
    """An exact map of a moment that has no rows to speak of: a set of single entries."""
    low: Tensor | None = None
    """The new coordinates of the gradient, where the search for them came by."""
    ok: Tensor | None = None
    """0-d bool on the device, where the host cannot know: False if nothing moved. Asked for where
    :attr:`RefreshContext.fine` is."""
    finite: Tensor | None = None
    """0-d bool on the device, where the search found out: whether all coordinates of this gradient,
    in any basis that it chooses from, and their squares are finite."""


class Touched(NamedTuple):
    """What a refresh may overwrite at most, where that is rows which the host knows before."""

    keys: Sequence[str]
    """Entries of the state that it may overwrite whole."""
    rows: Mapping[str, Sequence[slice]]
    """Of entries ``(..., r, k)``."""
    fresh: Mapping[str, Sequence[slice]]
    """Of every coordinate: those that :attr:`BasisChange.fresh` may have."""


@dataclass(frozen=True)
class RefreshContext:
    """What a refresh may look at beside the gradient."""

    view: MatrixView
    generator: torch.Generator
    """Seeded by (seed, uid, count): the same on every rank and after a resume."""
    uid: int = 0
    """What stands for the parameter: a hash of its name, or its place where it has none."""
    count: int = 0
    """Steps taken before this refresh."""
    param: Tensor | None = None
    """W ``(..., m, n)``, for subspaces that are factors of it."""
    seen: Any = None
    """What :meth:`Subspace.look` found on its way."""
    fine: Tensor | None = None
    """0-d bool on an accelerator: whether the gradient is finite and not zero, which its host has
    not asked. Where it is False nothing may move. None where the host knows that it is True."""
    first: bool = False
    """Whether there was no refresh before."""
