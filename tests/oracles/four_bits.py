"""Moments in 4 bits, from the definitions: maps, scales, and AdamW on what is kept of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

BLOCK = 128
TIED = 1e-6
"""Between magnitudes that only rounding tells apart, relative to them."""
POSITIVE = [0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875]
SIGNED = torch.tensor([*(-x for x in reversed(POSITIVE)), 0.0, *POSITIVE, 1.0], dtype=torch.float64)
"""Li et al.: a bit of sign, up to two of exponent base 10, the rest a fraction of (0.1, 1)."""
SQUARES = torch.arange(1, 17, dtype=torch.float64) / 16
"""Li et al.: linear, without 0."""

Draw = Callable[[Tensor], Tensor]


def levels(x: Tensor, table: Tensor, signs: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Where entries of ``x (..., k)`` lie among the codes 0 to 15, and the scale of each.

    The scale is the block's entry of largest magnitude, with its sign; 0 where all are. Where the
    largest and the smallest are as far from 0 but for rounding, either is: that of ``signs``, which
    has one for each block, if it is given.
    """
    at, scales = [], []
    for n, block in enumerate(x.split(BLOCK, -1)):
        scale = block.gather(-1, block.abs().argmax(-1, keepdim=True))
        if signs is not None:
            high, low = block.amax(-1, keepdim=True), block.amin(-1, keepdim=True)
            tied = (high + low).abs() <= TIED * scale.abs()
            scale = torch.where(tied, torch.where(signs[..., n : n + 1] < 0, low, high), scale)
        scale = scale.expand(block.shape)
        unit = torch.where(scale == 0, 0.0, block / scale)
        level = torch.zeros_like(unit)
        for code in range(15):
            low, high = table[code], table[code + 1]
            level = torch.where(unit >= low, code + (unit - low) / (high - low), level)
        at.append(level.clamp(0, 15))
        scales.append(scale)
    return torch.cat(at, -1), torch.cat(scales, -1)


def kept(x: Tensor, table: Tensor, draw: Draw, signs: Tensor | None = None) -> Tensor:
    """What is kept of ``x``; ``draw`` takes a level to one of the two codes beside it."""
    level, scale = levels(x, table, signs)
    return scale * table[draw(level).long()]


def adamw(
    w: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights and moments after a step, before these are kept."""
    m = betas[0] * m + (1 - betas[0]) * g
    v = betas[1] * v + (1 - betas[1]) * g * g
    m_hat, v_hat = m / (1 - betas[0] ** step), v / (1 - betas[1] ** step)
    return w - lr * m_hat / (v_hat.sqrt() + eps), m, v
