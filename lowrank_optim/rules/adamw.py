"""Adam's direction, with torch's conventions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from lowrank_optim import ops
from lowrank_optim.ops import Rows
from lowrank_optim.rules.base import (
    Directions,
    Rule,
    Slot,
    Slots,
    Steps,
    compute_dtype,
    directions_like,
)

_SLOTS = Slot("exp_avg", signed=True, fused=True), Slot("exp_avg_sq", signed=False, fused=True)


@dataclass(frozen=True)
class AdamW(Rule):
    r"""Adam: :math:`N = \hat m / (\sqrt{\hat v} + \epsilon)`, eps after bias correction."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    @property
    def host_steps(self) -> None:
        """Corrections are computed where the steps are."""
        return None

    @classmethod
    def from_group(cls, group: dict[str, Any]) -> AdamW:
        """``betas`` and ``eps`` of the group."""
        beta1, beta2 = group["betas"]
        return cls((float(beta1), float(beta2)), group["eps"])

    def slots(self, shape: Sequence[int]) -> tuple[Slot, ...]:
        """First and second moment."""
        return _SLOTS

    def directions_(
        self,
        grads: Sequence[Tensor],
        slots: Sequence[Slots],
        steps: Steps,
        dtype: torch.dtype | None = None,
        finite: Sequence[Tensor] = (),
        ages: Sequence[Tensor] = (),
    ) -> Directions:
        """``m / (sqrt(v) + eps root)`` and ``root / (1 - b1^t)``, ``root = sqrt(1 - b2^t)``."""
        beta1, beta2 = self.betas
        rows, eps = Rows(), [self.eps] * len(grads)
        corrections: list[float] | list[Tensor] = [1.0] * len(grads)
        if ages:
            rows = self.rows(ages, compute_dtype(grads[0].dtype))
        elif isinstance(steps, Tensor):
            rows, corrections = self._factors_on_device(steps, grads)
        else:
            known = {t: self.factors(t) for t in {*steps}}  # most are at the same step
            eps, corrections = [known[t][0] for t in steps], [known[t][1] for t in steps]
        outs = directions_like(grads, dtype)
        ops.adamw_direction_(
            grads,
            [s[0] for s in slots],
            [s[1] for s in slots],
            outs,
            beta1,
            beta2,
            eps,
            rows,
            finite,
        )
        return outs, corrections

    def factors(self, step: float) -> tuple[float, float]:
        """Eps times ``root``, and the bias correction of the direction."""
        root = (1 - self.betas[1] ** step) ** 0.5
        return self.eps * root, root / (1 - self.betas[0] ** step)

    def _factors_on_device(
        self, steps: Tensor, grads: Sequence[Tensor]
    ) -> tuple[Rows, list[Tensor]]:
        """:meth:`factors` of steps ``(k,)``: the first for each row, the second ``()`` of each."""
        time = steps.double()  # 1 - 0.999^t has lost half its digits in float32
        root = (1 - self.betas[1] ** time).sqrt()
        correction = root / (1 - self.betas[0] ** time)
        dtype, count = compute_dtype(grads[0].dtype), max(1, math.prod(grads[0].shape[:-1]))
        every = (self.eps * root).to(dtype).unsqueeze(1).expand(-1, count).contiguous()
        return Rows(every.unbind(), torch.ones_like(every).unbind()), list(correction.unbind())

    def rows(self, ages: Sequence[Tensor], dtype: torch.dtype) -> Rows:
        """What eps and the direction of each row are multiplied by; one of age 0 stays still."""
        return ops.row_steps(ages, self.betas, self.eps, dtype)

    def biases(self, step: float) -> tuple[float, ...]:
        """``1 - b1^t`` and ``1 - b2^t``."""
        return 1 - self.betas[0] ** step, 1 - self.betas[1] ** step

    def step_dense_(
        self,
        param: Tensor,
        grad: Tensor,
        slots: Sequence[Tensor],
        step: Tensor,
        *,
        lr: float | Tensor,
        weight_decay: float,
        maximize: bool,
    ) -> bool:
        """``torch.optim.AdamW``'s single-tensor path, so that its arithmetic is the same bits."""
        adamw(
            [param],
            [grad],
            [slots[0]],
            [slots[1]],
            [],
            [step],
            foreach=False,
            fused=False,
            amsgrad=False,
            beta1=self.betas[0],
            beta2=self.betas[1],
            lr=lr,
            weight_decay=weight_decay,
            eps=self.eps,
            maximize=maximize,
        )
        return True
