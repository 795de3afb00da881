"""A matrix on its way through the phases of a step, and what is asked of all of a bucket."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from lowrank_optim.engine.plan import ParamPlan, State, Strategies
from lowrank_optim.ops.devices import on_accelerator
from lowrank_optim.residuals import Measured, ResidualInputs

_T = TypeVar("_T")

CACHED_ELEMENTS = 1 << 16
"""Weights of a portion on a CPU, 256 KiB in float32."""


@dataclass(eq=False, slots=True)
class MatrixStep:
    """One matrix on its way through a step."""

    item: ParamPlan
    state: State
    grad: Tensor
    coords: dict[str, Tensor]
    time: float
    """Steps that the moments have seen, this one included; NaN where the device counts them."""
    norm: Tensor = field(init=False)
    """Of its coordinates, on its device: not finite where the gradient is not."""
    finite: Tensor | None = None
    """Whether it is, where no host may wait for the answer."""
    based: bool = True
    """Whether there was a basis before this step: else its coordinates may be those of none, zeros
    whatever the gradient."""
    directions: dict[str, tuple[Tensor, float | Tensor]] = field(default_factory=dict)
    """Of each coordinate, with the factor that corrects its bias."""
    whole: tuple[int, int] | None = None
    """Sides of the whole matrix, where only columns are here."""
    rms: Tensor | None = None
    """Root mean square of all weights, where step sizes depend on it and a part of them is here."""
    measured: Measured | None = None
    """What its residual needs of the whole matrix, where others have columns of it."""


def portions(work: Sequence[tuple[ParamPlan, _T]]) -> Iterator[Sequence[tuple[ParamPlan, _T]]]:
    """Matrices of a bucket that a phase takes at once.

    All of them on an accelerator, which is asked for as few kernels as there can be. On a CPU as
    many as a cache holds, so that what is computed of a matrix is there when its weights are
    written: one, unless they are so small that asking for one takes longer than computing it.
    """
    if not work:
        return
    param, size = work[0][0].param, len(work)
    if not on_accelerator(param):
        size = max(1, CACHED_ELEMENTS // max(1, param.numel()))
    for start in range(0, len(work), size):
        yield work[start : start + size]


def count_(steps: list[Tensor]) -> None:
    """One step more of each, on the host or on a device."""
    if on_accelerator(steps[0]):
        torch._foreach_add_(steps, 1)
    else:  # as torch: a number would be made a tensor for each
        torch._foreach_add_(steps, [torch.ones(())] * len(steps))


def mark(work: Sequence[MatrixStep]) -> None:
    """Whether gradients are finite, of all at once, where no host may wait for the answer."""
    # a norm is not negative: it is less than infinity, or not a number, or infinite
    if len(work) == 1:
        work[0].finite = work[0].norm < math.inf
        return
    flags = torch.stack([w.norm for w in work]) < math.inf
    for w, flag in zip(work, flags.unbind(0), strict=True):
        w.finite = flag


def begun(
    item: ParamPlan,
    state: State,
    grad: Tensor,
    coords: dict[str, Tensor],
    chosen: Strategies,
    finite: Tensor | None = None,
) -> MatrixStep:
    """A matrix whose coordinates are known, before its step is counted."""
    time = math.nan
    if not chosen.capturable:
        last = max(int(state["refresh_step"]), 0) if chosen.on_refresh == "reset" else 0
        time = float(int(state["step"]) + 1 - last)
    return MatrixStep(item, state, grad, coords, time, finite)


def turn_(works: Sequence[MatrixStep], chosen: Strategies) -> None:
    """Coordinates of gradients become those of what is minimised."""
    if chosen.maximize:
        torch._foreach_neg_([x for w in works for x in w.coords.values()])


def finite_of(work: Sequence[MatrixStep]) -> list[Tensor]:
    """Flags for ops that select on the device; none where the host has looked."""
    return [w.finite for w in work if w.finite is not None]


def inputs_of(w: MatrixStep) -> ResidualInputs | None:
    """What its residual looks at; None where coordinates are not those of a basis."""
    low, subspace = w.coords.get("low"), w.item.subspace
    if low is None or subspace is None:
        return None
    return ResidualInputs(w.grad, low, *w.directions["low"], subspace, w.finite, w.whole)
