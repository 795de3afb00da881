"""Adafactor's direction: a second moment kept as row and column means."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowrank_optim import ops
from lowrank_optim.ops.stacked import as_lines
from lowrank_optim.rules.base import (
    Asking,
    Directions,
    Rule,
    Slot,
    Slots,
    Split,
    Steps,
    Sum,
    compute_dtype,
    directions_like,
    filled_up,
    finished,
    together,
)


def norms(x: Tensor) -> Tensor:
    """Norm of all entries ``()``; of each matrix of a batch ``(E, 1, 1)``: experts stay apart."""
    dim = (1, 2) if x.dim() == 3 else None
    norm: Tensor = torch.linalg.vector_norm(  # the layout decides how a sum rounds
        as_lines(x), dim=dim, keepdim=dim is not None, dtype=compute_dtype(x.dtype)
    )
    return norm


def measured(shape: Sequence[int]) -> range:
    """The dimensions that a norm goes over, counted from the end: not the number of experts."""
    return range(-2 if len(shape) == 3 else -len(shape), 0)


def rms_of(norm: Tensor, shape: Sequence[int]) -> Tensor:
    """Root mean square of what has this norm, of a tensor of ``shape``."""
    count = math.prod(shape[1:] if len(shape) == 3 else shape)
    return torch.div(norm, max(1, count) ** 0.5)


def matrix_rms(x: Tensor) -> Tensor:
    """Root mean square of all entries, or of each matrix of a batch, as :func:`norms`."""
    return rms_of(norms(x), x.shape)


@dataclass(frozen=True)
class Adafactor(Rule):
    r"""Adafactor: :math:`N = g / \sqrt{\hat V}`, clipped to an RMS of ``clip_threshold``.

    :math:`\hat V = \mathrm{row}\,\mathrm{col}^T / \mathrm{mean}(\mathrm{row})` from two moving
    means of :math:`g^2 + \epsilon_1`, with decay :math:`1 - t^{\mathrm{decay\_rate}}`. Tensors of
    fewer than two dimensions keep the whole second moment.

    References:
        Shazeer and Stern (2018), arXiv:1804.04235, algorithms 4 and 5.
    """

    elementwise: ClassVar[bool] = False

    eps: tuple[float, float] = (1e-30, 1e-3)
    clip_threshold: float = 1.0
    decay_rate: float = -0.8
    beta1: float | None = None
    scale_parameter: bool = True
    relative_step: bool = False
    warmup_init: bool = False

    @property
    def host_steps(self) -> None:
        """The weight of a new square is computed where the steps are."""
        return None

    @property
    def by_row(self) -> bool:
        """No: columns share their mean with all rows."""
        return False

    @classmethod
    def from_group(cls, group: dict[str, Any]) -> Adafactor:
        """Every argument, under its own name."""
        names = ("clip_threshold", "decay_rate", "beta1", "scale_parameter", "relative_step")
        own = {name: group[name] for name in names}
        return cls(eps=tuple(group["eps"]), warmup_init=group["warmup_init"], **own)

    def slots(self, shape: Sequence[int]) -> tuple[Slot, ...]:
        """Row and column means (or all of the second moment), then the first moment if asked."""
        first = () if self.beta1 is None else (Slot("exp_avg", signed=True, fused=True),)
        if len(shape) < 2:
            return (Slot("exp_avg_sq", signed=False), *first)
        return (
            Slot("exp_avg_sq_row", signed=False, averaged=-1),
            Slot("exp_avg_sq_col", signed=False, averaged=-2),
            *first,
        )

    def directions_(
        self,
        grads: Sequence[Tensor],
        slots: Sequence[Slots],
        steps: Steps,
        dtype: torch.dtype | None = None,
        finite: Sequence[Tensor] = (),
        ages: Sequence[Tensor] = (),
    ) -> Directions:
        """The clipped direction, averaged if ``beta1`` is set, and a correction of 1."""
        each = zip(grads, slots, self._fresh(steps, grads), _each(finite, len(grads)), strict=True)
        directions = [finished(self._phases_(g, own, x, dtype, ok, None)) for g, own, x, ok in each]
        return directions, [1.0] * len(directions)

    def phases_(
        self,
        grads: Sequence[Tensor],
        slots: Sequence[Slots],
        steps: Steps,
        dtype: torch.dtype | None = None,
        finite: Sequence[Tensor] = (),
        ages: Sequence[Tensor] = (),
        split: Split | None = None,
    ) -> Asking[Directions]:
        """The same of what is here: means are asked for, and then the norm of the direction."""
        if split is None:
            return self.directions_(grads, slots, steps, dtype, finite, ages)
        each = zip(grads, slots, self._fresh(steps, grads), _each(finite, len(grads)), strict=True)
        work = [self._phases_(g, own, x, dtype, ok, split) for g, own, x, ok in each]
        directions = yield from together(work)
        return directions, [1.0] * len(directions)

    def _fresh(self, steps: Steps, grads: Sequence[Tensor]) -> Sequence[float | Tensor]:
        """Weights of new squares, ``1 - beta2(t)``."""
        if isinstance(steps, Tensor):
            weights = steps.double() ** self.decay_rate
            return weights.to(compute_dtype(grads[0].dtype)).unbind()
        return [step**self.decay_rate for step in steps]

    def _phases_(
        self,
        g: Tensor,
        own: Slots,
        fresh: float | Tensor,
        dtype: torch.dtype | None,
        ok: Sequence[Tensor],
        split: Split | None,
    ) -> Asking[Tensor]:
        """The direction of one gradient, whose square has the weight ``fresh``."""
        dense = [x for x in own if isinstance(x, Tensor)]  # the squares, which come first
        squares = kept = dense[: 2 if g.dim() >= 2 else 1]
        if ok:  # what is stored changes at the end, or not at all
            squares = [x.clone() for x in kept]
        g = g.to(compute_dtype(g.dtype)).contiguous()  # as above
        square = g.square().add_(self.eps[0])
        if g.dim() < 2:
            root = squares[0].lerp_(square, fresh).rsqrt()
        else:
            row, col = squares
            mean = yield from _update_(row, col, square, fresh, split)
            scaled = (row / mean).rsqrt()
            root = scaled.unsqueeze(-1) * col.rsqrt().unsqueeze(-2)
        direction = root.mul_(g)
        norm, shape = norms(direction), g.shape if split is None else split.shape
        if split is not None and (over := split.over(measured(shape))):
            total = norm.square()
            yield [Sum(total, over)]
            norm = total.sqrt()
        direction.div_((rms_of(norm, shape) / self.clip_threshold).clamp_(min=1.0))
        if self.beta1 is not None:
            wide = filled_up(direction, own[-1])
            (average,) = directions_like([wide], None)
            ops.moment_([wide], own[-1:], [average], self.beta1, 1 - self.beta1, ok)
            direction = average if wide is direction else average[..., : direction.shape[-1]]
        elif ok:
            direction = torch.where(ok[0], direction, 0.0)
        for x, old in zip(squares, kept, strict=True) if ok else ():
            old.copy_(torch.where(ok[0], x, old))
        return direction if dtype is None else direction.to(dtype)

    def weighs(self) -> bool:
        """With ``scale_parameter``."""
        return self.scale_parameter

    def biases(self, step: float) -> tuple[float, ...]:
        """The decay of the second moment corrects itself; the first is used as it is."""
        return 1.0, 1.0, 1.0

    def step_size(
        self,
        lr: float | Tensor | None,
        step: float | Tensor,
        param: Tensor,
        rms: Tensor | None = None,
    ) -> float | Tensor:
        """``lr``, or ``min(1e-2, 1/sqrt(t))``; times the weights' RMS if ``scale_parameter``."""
        if self.relative_step:
            # a loader's first step must move nothing
            lr = self._relative(step, param) if lr is None else 0.0
        assert lr is not None
        if not self.scale_parameter:
            return lr
        rms = matrix_rms(param) if rms is None else rms
        return lr * rms.clamp(min=self.eps[1])

    def _relative(self, step: float | Tensor, param: Tensor) -> float | Tensor:
        if not isinstance(step, Tensor):
            return min(1e-6 * step if self.warmup_init else 1e-2, float(step**-0.5))
        time = step.double()
        most = time * 1e-6 if self.warmup_init else torch.full_like(time, 1e-2)
        size: Tensor = torch.minimum(most, time.pow(-0.5)).to(compute_dtype(param.dtype))
        return size


def _each(finite: Sequence[Tensor], count: int) -> list[Sequence[Tensor]]:
    return [finite[n : n + 1] for n in range(count)]


def _update_(
    row: Tensor, col: Tensor, square: Tensor, fresh: float | Tensor, split: Split | None
) -> Asking[Tensor]:
    """Take a square into the means of rows and columns; the mean of the rows ``(..., 1)``."""
    rows, columns = square.shape[-2:] if split is None else split.shape[-2:]
    across, down = ((), ()) if split is None else (split.over((-1,)), split.over((-2,)))
    by_row, by_column = square.sum(-1), square.sum(-2)
    if across:
        yield [Sum(by_row, across)]
    row.lerp_(by_row / max(1, columns), fresh)  # of none it is 0, not a quotient of zeros
    total = row.sum(-1, keepdim=True)
    if down:
        yield [Sum(by_column, down), Sum(total, down)]
    col.lerp_(by_column / max(1, rows), fresh)
    return total / rows
