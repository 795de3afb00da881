"""Adafactor's direction: a second moment kept as row and column means."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowrank_optim import ops
from lowrank_optim.rules.base import Rule, Slot, Slots, compute_dtype, directions_like


def rms(x: Tensor) -> Tensor:
    """Root mean square of all entries."""
    norm = torch.linalg.vector_norm(x, dtype=compute_dtype(x.dtype))
    return torch.div(norm, max(1, x.numel()) ** 0.5)


def matrix_rms(x: Tensor) -> Tensor:
    """Root mean square of each matrix of a batch, ``(E, 1, 1)``: experts stay apart."""
    if x.dim() != 3:
        return rms(x)
    norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=compute_dtype(x.dtype))
    return torch.div(norm, max(1, x[0].numel()) ** 0.5)


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
        steps: Sequence[float],
        dtype: torch.dtype | None = None,
        finite: Sequence[Tensor] = (),
        ages: Sequence[Tensor] = (),
    ) -> tuple[list[Tensor], list[float]]:
        """The clipped direction, averaged if ``beta1`` is set, and a correction of 1."""
        directions = []
        for n, (g, own, t) in enumerate(zip(grads, slots, steps, strict=True)):
            ok = finite[n : n + 1]
            dense = [x for x in own if isinstance(x, Tensor)]  # the squares, which come first
            squares = dense[: 2 if g.dim() >= 2 else 1]
            kept = [x.clone() for x in squares] if ok else []
            g = g.to(compute_dtype(g.dtype))
            fresh = t**self.decay_rate  # weight of the new square: 1 - beta2(t)
            square = g.square().add_(self.eps[0])
            if g.dim() < 2:
                root = squares[0].lerp_(square, fresh).rsqrt()
            else:
                row, col = squares
                row.lerp_(square.mean(-1), fresh)
                col.lerp_(square.mean(-2), fresh)
                scaled = (row / row.mean(-1, keepdim=True)).rsqrt()
                root = scaled.unsqueeze(-1) * col.rsqrt().unsqueeze(-2)
            direction = root.mul_(g)
            direction.div_((matrix_rms(direction) / self.clip_threshold).clamp_(min=1.0))
            if self.beta1 is not None:
                (average,) = directions_like([direction], None)
                ops.moment_([direction], own[-1:], [average], self.beta1, 1 - self.beta1, ok)
                direction = average
            elif ok:
                direction = torch.where(ok[0], direction, 0.0)
            for x, old in zip(squares, kept, strict=bool(ok)):
                x.copy_(torch.where(ok[0], x, old))
            directions.append(direction if dtype is None else direction.to(dtype))
        return directions, [1.0] * len(directions)

    def biases(self, step: float) -> tuple[float, ...]:
        """The decay of the second moment corrects itself; the first is used as it is."""
        return 1.0, 1.0, 1.0

    def step_size(self, lr: float | Tensor | None, step: float, param: Tensor) -> float | Tensor:
        """``lr``, or ``min(1e-2, 1/sqrt(t))``; times the weights' RMS if ``scale_parameter``."""
        if self.relative_step:
            relative = min(1e-6 * step if self.warmup_init else 1e-2, step**-0.5)
            lr = relative if lr is None else 0.0  # a loader's first step must move nothing
        assert lr is not None
        return lr * matrix_rms(param).clamp(min=self.eps[1]) if self.scale_parameter else lr
