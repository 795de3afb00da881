"""Matrices of any strides as (batch, m, n), and tiles of them."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

_SPAN = 2**31 - 1
"""Largest offset inside a tile that is computed in 32 bits."""


@triton.jit
def tile(base, i0, j0, si, sj, BM: tl.constexpr, BN: tl.constexpr, WIDE: tl.constexpr):
    """Addresses of the (BM, BN) tile at (i0, j0).

    The corner is a 64-bit scalar; offsets from it are 32-bit unless the strides are enormous,
    which halves the registers that addresses take.
    """
    i = tl.arange(0, BM)
    j = tl.arange(0, BN)
    if WIDE:
        i = i.to(tl.int64)
        j = j.to(tl.int64)
    corner = base + i0.to(tl.int64) * si + j0.to(tl.int64) * sj
    return corner + (i[:, None] * si + j[None, :] * sj)


@triton.jit
def inside(i0, j0, m, n, BM: tl.constexpr, BN: tl.constexpr):
    """Which entries of the tile at (i0, j0) are in the (m, n) matrix."""
    return (tl.arange(0, BM)[:, None] < m - i0) & (tl.arange(0, BN)[None, :] < n - j0)


@triton.jit
def tile_corner(program, m, n, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """Corner of a program's tile: bands of GROUP tile rows, so that operands stay in L2."""
    down = tl.cdiv(m, BM)
    across = tl.cdiv(n, BN)
    band = program // (GROUP * across)
    height = tl.minimum(down - band * GROUP, GROUP)
    within = program % (GROUP * across)
    return (band * GROUP + within % height) * BM, (within // height) * BN


def batched(x: Tensor, batch: tuple[int, ...]) -> Tensor:
    """``x (..., m, n)`` as a view ``(b, m, n)``; its batch broadcast to ``batch``, (b,) or ()."""
    if not batch:
        return x.unsqueeze(0)
    return x.expand(*batch, *x.shape[-2:])


def batch_strides(x: Tensor, batch: Sequence[int]) -> tuple[int, ...]:
    """Strides of ``x (..., m, n)`` as of :func:`batched`; of one matrix no entry is asked for."""
    return batched(x, tuple(batch)).stride() if batch else (0, *x.stride())


def slices(w: Tensor) -> list[tuple[int, ...]]:
    """Indices of the sub-tensors of at most 3 dims that ``w (..., m, n)`` consists of.

    Leading dims of a strided view need not collapse into one, and more than one is rare.
    """
    found: list[tuple[int, ...]] = [()]
    for size in w.shape[:-3]:
        found = [(*at, i) for at in found for i in range(size)]
    return found


def wide(span: int, *tensors: Tensor) -> bool:
    """Whether a tile of ``span`` by ``span`` overruns 32-bit offsets in one of ``tensors``."""
    return any([span * (x.stride(-2) + x.stride(-1)) > _SPAN for x in tensors])
