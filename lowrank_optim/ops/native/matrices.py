"""Lists of batches as lists of matrices, and tiles that stay in the cache."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lowrank_optim.ops.native.arrays import same

TILE_ELEMENTS = 1 << 18
"""Elements of the buffer that a GEMM writes and a fused apply reads, while it is in the cache."""


def matrices_of(xs: Iterable[Tensor]) -> list[Tensor]:
    """Every 2-D matrix of a list of ``(..., m, n)``; views, whatever the strides."""
    matrices: list[Tensor] = []
    for x in xs:
        _unbind(x, matrices)
    return matrices


def _unbind(x: Tensor, into: list[Tensor]) -> None:
    if x.dim() <= 2:
        into.append(x)
        return
    for part in x.unbind(0):
        _unbind(part, into)


def flags_of(finite: Sequence[Tensor], W: Sequence[Tensor]) -> list[Tensor]:
    """One flag per matrix of a list of batches; none where all are finite."""
    if not finite:
        return []
    same(len(W), finite=finite)
    if any(s.dtype != torch.bool or s.numel() != 1 for s in finite):
        raise TypeError("finite: one bool per tensor")
    return [s for s, w in zip(finite, W, strict=True) for _ in range(math.prod(w.shape[:-2]))]


def skipped(flag: Tensor | None) -> bool:
    """Whether the host knows that there is nothing to do, without waiting for a device."""
    return flag is not None and flag.device.type == "cpu" and not flag


def stored_by_rows(w: Tensor) -> bool:
    """Whether the rows of ``w`` are how it is stored; else its columns are."""
    return w.stride(1) <= w.stride(0)


def tile_length(length: int, width: int) -> int:
    """How many of ``length`` rows of ``width`` elements make a tile, at least one."""
    return max(1, min(length, TILE_ELEMENTS // max(width, 1)))
