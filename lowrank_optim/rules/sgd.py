"""SGD's direction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lowrank_optim.rules.base import Rule, Slot, Slots


@dataclass(frozen=True)
class SGD(Rule):
    r"""SGD with torch's momentum: :math:`m \leftarrow \mu m + (1 - d) g`, N = m (or nesterov).

    The momentum starts as the first gradient, as in ``torch.optim.SGD``.
    """

    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False

    @classmethod
    def from_group(cls, group: dict[str, Any]) -> SGD:
        """``momentum``, ``dampening`` and ``nesterov`` of the group."""
        return cls(group["momentum"], group["dampening"], group["nesterov"])

    def slots(self, shape: Sequence[int]) -> tuple[Slot, ...]:
        """The momentum, if there is one."""
        return (Slot("momentum_buffer", signed=True),) if self.momentum else ()

    def directions_(
        self, grads: Sequence[Tensor], slots: Sequence[Slots], steps: Sequence[float]
    ) -> tuple[list[Tensor], list[float]]:
        """Momentum, or the gradient itself, and a correction of 1."""
        directions = []
        for g, own, t in zip(grads, slots, steps, strict=True):
            if not own:
                directions.append(g)
                continue
            (m,) = own
            m.mul_(self.momentum).add_(g, alpha=1.0 if t == 1 else 1 - self.dampening)
            directions.append(g.add(m, alpha=self.momentum) if self.nesterov else m.clone())
        return directions, [1.0] * len(directions)

    def biases(self, step: float) -> tuple[float, ...]:
        """Never corrected: the moments are used as they are."""
        return (1.0,)
