"""Every op in plain torch, on every device: what the accelerated versions are tested against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

TILE_ELEMENTS = 1 << 18
"""Elements of a tile buffer, so that a temporary never grows with the parameter."""


def project(basis: Tensor, grad: Tensor) -> Tensor:
    """``P^T G (..., r, n)`` in at least float32, from ``basis (..., m, r)``, ``grad (..., m, n)``.

    The product runs in the gradient's dtype, with the accumulation its GEMM has (float32).
    """
    low = basis.mT.to(grad.dtype) @ grad
    return low.to(torch.promote_types(low.dtype, torch.float32))


def matrix_norm(x: Tensor) -> Tensor:
    """Frobenius norm ``(..., 1, 1)`` of ``x (..., m, n)`` in at least float32, a tile at a time.

    ``vector_norm(x, dtype=float32)`` of a narrow format would cast it whole; without the dtype it
    is rounded to that format, where 300 entries of 4e3 overflow float16.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    if x.dtype == wide or x.numel() == 0:
        norm: Tensor = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
        return norm
    if x.stride(-1) != 1:
        x = x.mT  # tiles of whole stored rows
    rows = max(1, TILE_ELEMENTS * x.shape[-2] // x.numel())
    parts = [
        torch.linalg.vector_norm(tile, dim=(-2, -1), keepdim=True, dtype=wide)
        for tile in torch.split(x, rows, -2)
    ]
    norm = torch.linalg.vector_norm(torch.cat(parts, -1), dim=-1, keepdim=True)
    return norm


def lift_add_(
    param: Tensor,
    basis: Tensor,
    low: Tensor,
    right: Tensor | None,
    decay: float | Tensor,
    alpha: float,
    rounding: torch.Generator | None,
) -> None:
    """``W <- decay W + alpha P N (Q^T)`` in one GEMM call, rounded once into the parameter.

    Args:
        param: W ``(..., m, n)``, any strides.
        basis: P ``(..., m, r)`` in the parameter's dtype.
        low: N ``(..., r, n)``, or ``(..., r, r)`` with ``right``.
        right: Q ``(..., n, r)``.
        decay: factor of the weights; a tensor ``()`` or ``(..., 1, 1)`` is read on its device.
        alpha: factor of the update.
        rounding: generator for stochastic rounding into bfloat16; None rounds to nearest.
    """
    if rounding is not None and param.dtype == torch.bfloat16:
        _lift_add_rounded_(param, basis, low, right, decay, alpha, rounding)
        return
    if isinstance(decay, Tensor):
        param.mul_(decay)
        decay = 1.0
    low = low.to(param.dtype)
    if right is not None:
        low = low @ right.mT
    if param.dim() == 2:
        param.addmm_(basis, low, beta=decay, alpha=alpha)
    else:
        param.baddbmm_(basis, low, beta=decay, alpha=alpha)


def _lift_add_rounded_(
    param: Tensor,
    basis: Tensor,
    low: Tensor,
    right: Tensor | None,
    decay: float | Tensor,
    alpha: float,
    rounding: torch.Generator,
) -> None:
    if right is not None:
        low = low @ right.mT.to(low.dtype)
    matrices = param.unbind(0) if param.dim() == 3 else [param]
    bases = basis.unbind(0) if param.dim() == 3 else [basis]
    lows = low.unbind(0) if param.dim() == 3 else [low]
    decays: Sequence[float | Tensor] = [decay] * len(matrices)
    if isinstance(decay, Tensor):
        decays = decay.reshape(-1).expand(len(matrices)).unbind()
    for w, p, x, d in zip(matrices, bases, lows, decays, strict=True):
        rows = max(1, TILE_ELEMENTS // w.shape[1])
        for tile, q in zip(torch.split(w, rows), torch.split(p, rows), strict=True):
            new = torch.addmm(tile.float().mul_(d), q.float(), x.float(), alpha=alpha)
            tile.copy_(stochastic_round(new, rounding))


def add_(
    param: Tensor,
    update: Tensor,
    decay: float | Tensor,
    alpha: float,
    rounding: torch.Generator | None,
) -> None:
    """``W <- decay W + alpha N`` elementwise, rounded once; ``update`` in at least float32."""
    new = param.to(update.dtype).mul(decay).add_(update, alpha=alpha)
    if rounding is not None and param.dtype == torch.bfloat16:
        new = stochastic_round(new, rounding)
    param.copy_(new)


def stochastic_round(x: Tensor, generator: torch.Generator) -> Tensor:
    """``x`` float32 rounded to bfloat16, up or down with the probability that makes it unbiased.

    Random low bits are added to the 16 that bfloat16 drops, and the sum is truncated. Numbers that
    are not finite pass through.
    """
    noise = torch.randint(0, 1 << 16, x.shape, generator=generator, dtype=torch.int32)
    bits = (x.contiguous().view(torch.int32) + noise.to(x.device)) & -(1 << 16)
    return torch.where(x.isfinite(), bits.view(torch.float32), x).to(torch.bfloat16)


def adamw_direction_(
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    beta1: float,
    beta2: float,
    eps: Sequence[float],
) -> list[Tensor]:
    """Update both moments in place; returns ``m / (sqrt(v) + eps)`` of each tensor."""
    directions = []
    for g, m, v, e in zip(grads, exp_avgs, exp_avg_sqs, eps, strict=True):
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        denominator = v.sqrt().add_(e)
        directions.append(torch.div(m, denominator, out=denominator))
    return directions
