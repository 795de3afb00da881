"""Lion's direction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowrank_optim import ops
from lowrank_optim.rules.base import Directions, Rule, Slot, Slots, Steps, directions_like


@dataclass(frozen=True)
class Lion(Rule):
    r"""Lion: :math:`N = \mathrm{sign}(\beta_1 m + (1 - \beta_1) g)`, then m follows with beta2.

    References:
        Chen et al. (2023), arXiv:2302.06675, algorithm 2.
    """

    betas: tuple[float, float] = (0.9, 0.99)

    @classmethod
    def from_group(cls, group: dict[str, Any]) -> Lion:
        """``betas`` of the group."""
        beta1, beta2 = group["betas"]
        return cls((float(beta1), float(beta2)))

    @property
    def host_steps(self) -> None:
        """No step matters."""
        return None

    def slots(self, shape: Sequence[int]) -> tuple[Slot, ...]:
        """One momentum."""
        return (Slot("exp_avg", signed=True, fused=True),)

    def directions_(
        self,
        grads: Sequence[Tensor],
        slots: Sequence[Slots],
        steps: Steps,
        dtype: torch.dtype | None = None,
        finite: Sequence[Tensor] = (),
        ages: Sequence[Tensor] = (),
    ) -> Directions:
        """Signs, and a correction of 1."""
        beta1, beta2 = self.betas
        outs = directions_like(grads, dtype)
        ops.lion_direction_(grads, [s[0] for s in slots], outs, beta1, beta2, finite)
        return outs, [1.0] * len(outs)

    def biases(self, step: float) -> tuple[float, ...]:
        """Never corrected: the moments are used as they are."""
        return (1.0,)
