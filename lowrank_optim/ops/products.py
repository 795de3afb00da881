"""Products of a small matrix with a gradient, in a format that holds what comes of them."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_optim.ops.devices import GPUS, kind_of, on_accelerator
from lowrank_optim.ops.tiles import ACCELERATOR_TILE_ELEMENTS, tiles

TILE_ELEMENTS = 1 << 20
"""Elements that a product on a CPU casts at once."""
WRITES_WIDE = hasattr(torch.ops.aten.mm, "dtype") and not torch.version.hip
"""Whether torch has GEMMs whose result is wider than their operands; CUDA alone runs them."""
HALVED = (torch.float32, torch.bfloat16)
"""Formats of a product that two of the narrow one are as good as."""


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """The format of products with gradients of ``dtype``.

    That of the gradient, but float32 of float16: a sum of m of its numbers needs a range of
    sqrt(m) times its own, and gradients under a loss scale are near the end of it.
    """
    return torch.float32 if dtype == torch.float16 else dtype


def project(basis: Tensor, grad: Tensor, out: Tensor | None = None) -> Tensor:
    """``P^T G (..., r, n)`` from ``basis (..., m, r)`` and ``grad (..., m, n)``.

    In :func:`product_dtype` of the gradient. The product accumulates in float32, as GEMMs of narrow
    formats do.

    Args:
        basis: P.
        grad: G.
        out: where the product goes, of one matrix (default: new memory).
    """
    left, wide = basis.mT, product_dtype(grad.dtype)
    if wide == grad.dtype:
        if basis.dtype != grad.dtype:
            left = left.to(grad.dtype)
        return torch.mm(left, grad, out=out) if grad.dim() == 2 else left @ grad
    if WRITES_WIDE and kind_of(grad) in GPUS and grad.dim() in (2, 3):
        left, product = left.to(grad.dtype), torch.mm if grad.dim() == 2 else torch.bmm
        if out is None:
            return product(left, grad, out_dtype=wide)
        return product(left, grad, out_dtype=wide, out=out)
    low = mixed_matmul(left.to(wide), grad)
    return low if out is None else out.copy_(low)


def mixed_matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` in the wider of the two dtypes, a tile of the narrow one at a time.

    A bfloat16 gradient is the largest tensor of a refresh: it is never copied whole. A tile is cast
    to float32, or on CUDA multiplied as it is, by both halves of ``a``.
    """
    if a.dtype == b.dtype:
        return a @ b
    if torch.promote_types(a.dtype, b.dtype) == b.dtype:
        return mixed_matmul(b.mT, a.mT).mT
    *batch, k, n = b.shape
    if WRITES_WIDE and kind_of(b) in GPUS and (a.dtype, b.dtype) == HALVED and b.dim() in (2, 3):
        return by_halves(a, b)
    out = a.new_zeros(*batch, a.shape[-2], n)
    by_column = n >= k  # cut the longer side of b
    most = ACCELERATOR_TILE_ELEMENTS if on_accelerator(b) else TILE_ELEMENTS
    width = max(1, min(most // min(k, n), -(-max(k, n) // 8)))
    for tile in tiles(max(k, n), width):
        if by_column:
            out[..., tile] = a @ b[..., tile].to(a.dtype)
        else:
            out += a[..., tile] @ b[..., tile, :].to(a.dtype)
    return out


def by_halves(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of float32 and bfloat16, as ``h b + l b`` with ``a = h + l`` in bfloat16.

    Matrix units of bfloat16 are ten times as fast as those of float32, and add up in float32. What
    two such halves leave of ``a`` is 2^-17 of it, beside a gradient that was rounded at 2^-9.

    Args:
        a: ``(..., w, k)``.
        b: ``(..., k, n)``, of two or three dimensions.
    """
    high = a.to(b.dtype)
    halves = torch.cat([high, (a - high).to(b.dtype)], -2)
    product = torch.mm if b.dim() == 2 else torch.bmm
    width, n = a.shape[-2], b.shape[-1]
    out = a.new_empty(*a.shape[:-1], n)
    most = ACCELERATOR_TILE_ELEMENTS // (2 * width * max(1, b.shape[:-2].numel()))
    for tile in tiles(n, max(1, min(most, -(-n // 8)))):
        both = product(halves, b[..., tile], out_dtype=a.dtype)
        torch.add(both[..., :width, :], both[..., width:, :], out=out[..., tile])
    return out
