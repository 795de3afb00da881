"""SGD's direction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowrank_optim import ops
from lowrank_optim.rules.base import Directions, Rule, Slot, Slots, Steps, directions_like


@dataclass(frozen=True)
class SGD(Rule):
    r"""SGD with torch's momentum: :math:`m \leftarrow \mu m + (1 - d) g`, N = m (or nesterov).

    The momentum starts as the first gradient, as in ``torch.optim.SGD``.
    """

    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False

    @property
    def by_row(self) -> bool:
        """Unless it is dampened from the second step on."""
        return not (self.momentum and self.dampening)

    @property
    def host_steps(self) -> str | None:
        """The first, where it is not dampened as the others are."""
        return None if self.by_row else "the momentum of SGD is dampened from its second step on"

    @classmethod
    def from_group(cls, group: dict[str, Any]) -> SGD:
        """``momentum``, ``dampening`` and ``nesterov`` of the group."""
        return cls(group["momentum"], group["dampening"], group["nesterov"])

    def slots(self, shape: Sequence[int]) -> tuple[Slot, ...]:
        """The momentum, if there is one."""
        slot = Slot("momentum_buffer", signed=True, fused=True)
        return (slot,) if self.momentum else ()

    def directions_(
        self,
        grads: Sequence[Tensor],
        slots: Sequence[Slots],
        steps: Steps,
        dtype: torch.dtype | None = None,
        finite: Sequence[Tensor] = (),
        ages: Sequence[Tensor] = (),
    ) -> Directions:
        """Momentum, or the gradient itself, and a correction of 1."""
        outs = directions_like(grads, dtype)
        firsts = [False] * len(outs) if isinstance(steps, Tensor) else [t == 1 for t in steps]
        for n, (g, own, first, out) in enumerate(zip(grads, slots, firsts, outs, strict=True)):
            ok = finite[n : n + 1]
            if own:
                weight = 1.0 if first else 1 - self.dampening
                ops.moment_([g], [own[0]], [out], self.momentum, weight, ok)
                if self.nesterov:
                    out.mul_(self.momentum).add_(g)
            else:
                out.copy_(g)
            if ok and (self.nesterov or not own):
                out.copy_(torch.where(ok[0], out, 0.0))
        return outs, [1.0] * len(outs)

    def biases(self, step: float) -> tuple[float, ...]:
        """Never corrected: the moments are used as they are."""
        return (1.0,)
