"""Arguments of the ops: in the format that they are computed in, and lists that may be empty."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Tensors = Sequence[Tensor]


def wide(x: Tensor) -> Tensor:
    """``x`` in float32, or wider where it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def times(number: float, factors: Tensors, count: int) -> Sequence[float | Tensor]:
    """``number`` times each of an optional list; itself for each of ``count`` where it is empty."""
    return [number * x for x in factors] if len(factors) else [number] * count


def or_none(xs: Tensors, count: int) -> Sequence[Tensor | None]:
    """An optional list: None for each of ``count`` where it is empty."""
    return xs if len(xs) else [None] * count
