"""Small numbers of a bucket: the decay of weights, the steps of rows, a residual's factors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowrank_optim.ops.reference.arguments import Tensors, or_none, times


def decay_(params: Tensors, decay: float, factors: Tensors, finite: Tensors) -> None:
    """``W <- decay f W`` where finite, rounded once; f is 1 where none are given."""
    ones = or_none(factors, len(params))
    for w, f, ok in zip(params, ones, or_none(finite, len(params)), strict=True):
        new = w * decay if f is None else w * (f * decay)
        w.copy_(new if ok is None else torch.where(ok, new, w))


def direction_add_(
    params: Tensors,
    updates: Tensors,
    decay: float,
    lr: float,
    steps: Tensors = (),
    decays: Tensors = (),
) -> None:
    """``W <- decay d W - lr s N`` elementwise, rounded once; N in at least float32."""
    factors = times(decay, decays, len(params)), times(lr, steps, len(params))
    for w, update, own, step in zip(params, updates, *factors, strict=True):
        new = w.to(update.dtype).mul(own).to(update.dtype)  # a tensor would widen a number
        if isinstance(step, Tensor):
            w.copy_(new.sub_((update * step).to(update.dtype)))
        else:
            w.copy_(new.add_(update, alpha=-step))


def count_(counts: Tensors, finite: Tensors) -> None:
    """One more of each entry, where finite."""
    alike: dict[Any, list[int]] = {}
    for n, x in enumerate(counts):
        alike.setdefault((x.shape, x.dtype) if finite else None, []).append(n)
    for at in alike.values():
        own = [counts[n] for n in at]
        if not finite:
            torch._foreach_add_(own, 1)
            continue
        every = torch.stack(own)
        every.add_(torch.stack([finite[n] for n in at]).view(-1, *[1] * own[0].dim()))
        torch._foreach_copy_(own, list(every.unbind(0)))


def row_steps_(
    ages: Tensors, eps_rows: Tensors, scale_rows: Tensors, beta1: float, beta2: float, eps: float
) -> None:
    """``eps root`` and ``root / (1 - b1^t)``, ``root = sqrt(1 - b2^t)``, 0 where the age t is 0."""
    # 1 - 0.999^t has lost half its digits in float32
    every = torch.cat([age.reshape(-1) for age in ages]).double()
    time = every.clamp(min=1)
    root = (1 - beta2**time).sqrt()
    scale = torch.where(every > 0, root / (1 - beta1**time), 0.0)
    sizes = [age.numel() for age in ages]
    for outs, found in ((eps_rows, eps * root), (scale_rows, scale)):
        for out, own in zip(outs, torch.split(found, sizes), strict=True):
            out.copy_(own.view_as(out))


def scaled_squares(factor: Tensor, norms: Tensor) -> Tensor:
    """The square ``(..., 1, 1)`` of ``f o norms (..., 1, n)``, added up."""
    return (factor * norms).square().sum(-1, keepdim=True)


def limited_(
    factor: Tensor,
    whole: Tensor,
    inside: Tensor,
    before: Tensor,
    tiny: float,
    share: float,
    noise: float,
    limiter: float,
    finite: Tensor | None,
) -> Tensor:
    """``factor`` such that the norm of the residual grows by ``limiter`` at most; it is kept.

    Args:
        factor: of each column ``(..., 1, n)``.
        whole: square of the scaled gradient ``(..., 1, 1)``.
        inside: square of its scaled coordinates, alike.
        before: norm of the residual of the step before ``(...)``; overwritten.
        tiny: added to a norm that is multiplied.
        share: how much of ``inside`` is not of the residual.
        noise: what remains is 0 where it is less than this part of ``whole``.
        limiter: the growth that is allowed, from a norm that is not 0.
        finite: 0-d bool on the device; where False, ``before`` stays.
    """
    left = whole - share * inside
    norm = torch.where(left <= noise * whole, 0.0, left).sqrt()  # NaN stays NaN
    last = before.reshape(norm.shape)
    allowed = limiter * (last + tiny) / norm
    limit = torch.where(last > 0, allowed.clamp(max=1.0), 1.0)
    new = norm * limit
    fine = new.isfinite() if finite is None else new.isfinite() & finite
    last.copy_(torch.where(fine, new, last))
    return factor * limit


def residual_factors_(
    lows: Tensors,
    directions: Tensors,
    grads: Tensors,
    norms: Tensors,
    outs: Tensors,
    tiny: float,
    share: float,
    noise: float,
    limiter: float,
    finite: Tensors,
) -> None:
    """``f = |N_j| / (|R_j| + tiny)``, limited so that the residual grows by ``limiter`` at most."""
    matrices = zip(lows, directions, grads, norms, outs, strict=True)
    for (low, direction, grad, norm, out), ok in zip(
        matrices, or_none(finite, len(lows)), strict=True
    ):
        factor = direction / (low + tiny)
        squares = scaled_squares(factor, grad), scaled_squares(factor, low)
        out.copy_(limited_(factor, *squares, norm, tiny, share, noise, limiter, ok))
