"""Adam's direction, with torch's conventions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from lowrank_optim import ops
from lowrank_optim.ops import Rows
from lowrank_optim.rules.base import Rule, Slot, Slots, compute_dtype, directions_like

_SLOTS = (
    Slot("exp_avg", signed=True, fused=True),
    Slot("exp_avg_sq", signed=False, fused=True),
)


@dataclass(frozen=True)
class AdamW(Rule):
    r"""Adam: :math:`N = \hat m / (\sqrt{\hat v} + \epsilon)`, eps after bias correction."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

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
        steps: Sequence[float],
        dtype: torch.dtype | None = None,
        finite: Sequence[Tensor] = (),
        ages: Sequence[Tensor] = (),
    ) -> tuple[list[Tensor], list[float]]:
        """``m / (sqrt(v) + eps root)`` and ``root / (1 - b1^t)``, ``root = sqrt(1 - b2^t)``."""
        beta1, beta2 = self.betas
        rows = Rows()
        if ages:
            rows = self.rows(ages, compute_dtype(grads[0].dtype))
        factors = [self.factors(t) for t in steps]
        outs = directions_like(grads, dtype)
        ops.adamw_direction_(
            grads,
            [s[0] for s in slots],
            [s[1] for s in slots],
            outs,
            beta1,
            beta2,
            [eps for eps, _ in factors],
            rows,
            finite,
        )
        if ages:
            return outs, [1.0] * len(outs)
        return outs, [correction for _, correction in factors]

    def factors(self, step: float) -> tuple[float, float]:
        """Eps times ``root``, and the bias correction of the direction."""
        root = (1 - self.betas[1] ** step) ** 0.5
        return self.eps * root, root / (1 - self.betas[0] ** step)

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
