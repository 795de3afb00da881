"""What the runs of ``lowrank-optim check`` begin with and are given: rounding decides nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

STEPS, GAP = 6, 3
"""Of a run: a basis, two steps more in it, another; saved and loaded after the fourth step."""
SHAPES = ((256, 384), (384, 256), (64, 129), (2, 32, 48), (384,))
"""Wide, tall, of an odd side, experts, and a vector; two are large enough for moments in codes."""
RANK, SIZE = 0.25, 0.02
"""Of a projection; root mean square of the weights."""


def weights() -> list[Tensor]:
    """Where every run begins."""
    draws = torch.Generator().manual_seed(0)
    return [
        SIZE * (torch.randn(shape, generator=draws) if len(shape) == 1 else _weight(shape, draws))
        for shape in SHAPES
    ]


def _weight(shape: Sequence[int], draws: torch.Generator) -> Tensor:
    return _of_matrices(shape, lambda m, n: _Matrix(m, n, draws).weight()[None])[0]


def gradients(shape: Sequence[int], seed: int) -> list[Tensor]:
    """Of each step."""
    draws = torch.Generator().manual_seed(seed)
    if len(shape) == 1:
        return list(torch.randn(STEPS, *shape, generator=draws))
    return list(_of_matrices(shape, lambda m, n: _Matrix(m, n, draws).gradients()))


def _of_matrices(shape: Sequence[int], make: Callable[[int, int], Tensor]) -> Tensor:
    """``(k, *shape)`` of matrices ``(k, m, n)``, of each expert its own."""
    *experts, m, n = shape
    found = torch.stack([make(m, n) for _ in range(math.prod(experts))], dim=1)
    return found.reshape(len(found), *shape)


class _Matrix:
    """Singular vectors whose order, signs and subspace are clear, so that rounding decides nothing.

    Those of the smaller side are cosines, each with a largest entry of its own. Singular values
    fall by a fiftieth each.
    """

    def __init__(self, m: int, n: int, draws: torch.Generator) -> None:
        side, self.wide = min(m, n), m <= n
        at = torch.arange(side, dtype=torch.float64)
        cosines = torch.cos(math.pi / side * (at[:, None] + 0.5) * at)
        peaks = 0.5 * cosines.diagonal().sign().diag()
        self.short = torch.linalg.qr(cosines / cosines.norm(dim=0) + peaks).Q
        drawn = torch.randn(max(m, n), side, generator=draws, dtype=torch.float64)
        self.long = torch.linalg.qr(drawn).Q
        self.rank, self.values = int(RANK * side), 0.98**at

    def of(self, short: Tensor, values: Tensor) -> Tensor:
        found: Tensor = (short * values) @ self.long.mT
        return (found if self.wide else found.mT).float()

    def weight(self) -> Tensor:
        """As large as normal numbers."""
        found = self.of(self.short, self.values)
        return found / found.square().mean().sqrt()

    def gradients(self) -> Tensor:
        """``(STEPS, m, n)``: a twentieth beyond a rank; after ``GAP`` steps others lead.

        Each vector is near the one before it then, whose sign it takes, and a few enter that were
        beyond the rank: as many as a search finds.
        """
        found, short = [], self.short
        for step in range(STEPS):
            if step == GAP:
                entering = max(1, self.rank // 16)
                short = torch.linalg.qr(short + 0.7 * short.roll(entering, 1)).Q
            values = self.values * (1 + 0.1 * math.cos(step))
            values[self.rank :] = values[self.rank - 1] / 20
            found.append((1 + 0.3 * math.cos(2 * step)) * self.of(short, values))
        return torch.stack(found)
