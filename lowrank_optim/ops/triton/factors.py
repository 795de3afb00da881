"""Small numbers of a bucket, a launch for all of its matrices, and the decay of their weights."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from lowrank_optim.ops.stacked import as_lines, by_copies, in_lines
from lowrank_optim.ops.triton.launch import (
    ELEMENTS,
    cdiv,
    groups,
    launch,
    length,
    locate,
    number,
    packed,
    pointer,
    select,
)


@triton.jit(do_not_specialize=["count"])
def decay_kernel(
    table, tensors, w, factor, finite, count, decay,
    MANY: tl.constexpr, DEPTH: tl.constexpr, ALIGNED: tl.constexpr,
    FACTORS: tl.constexpr, SOUND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``W <- decay f W``."""
    t, part = locate(table, tensors, MANY, DEPTH)
    if SOUND:  # noqa: SIM102 (one is decided at compile time)
        if tl.load(pointer(table, tensors, t, 3, finite, MANY, False)) == 0:
            return
    if FACTORS:
        decay *= tl.load(pointer(table, tensors, t, 2, factor, MANY, False)).to(tl.float32)
    w = pointer(table, tensors, t, 1, w, MANY, ALIGNED)
    start = part * BLOCK
    lane = tl.arange(0, BLOCK)
    mask = lane < length(table, tensors, t, 4, count, MANY, ALIGNED) - start
    new = decay * tl.load(w + start + lane, mask, 0.0).to(tl.float32)
    tl.store(w + start + lane, new.to(w.dtype.element_ty), mask)


def decay_(
    params: Sequence[Tensor], decay: float, factors: Sequence[Tensor], finite: Sequence[Tensor]
) -> None:
    """``W <- decay f W`` where finite: over flat memory; weights that have gaps go by copies."""
    lists = [params, factors, finite]
    dense = [in_lines(x) for x in params]
    for at in groups(lists, dense):
        own = select(lists, at)
        if not dense[at[0]]:
            by_copies(as_lines, lambda w, f, ok: decay_(w, decay, f, ok), *own)
            continue
        sizes = [params[i].numel() for i in at]
        launch(
            decay_kernel, own, [sizes], [cdiv(n, ELEMENTS) for n in sizes],
            decay, FACTORS=len(factors) > 0, SOUND=len(finite) > 0, BLOCK=ELEMENTS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["count"])
def direction_add_kernel(
    table, tensors, w, n_, step, shrink, count, decay, lr,
    MANY: tl.constexpr, DEPTH: tl.constexpr, ALIGNED: tl.constexpr,
    STEPPED: tl.constexpr, DECAYED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``W <- decay d W - lr s N``."""
    t, part = locate(table, tensors, MANY, DEPTH)
    if STEPPED:
        lr *= tl.load(pointer(table, tensors, t, 3, step, MANY, False)).to(tl.float32)
    if DECAYED:
        decay *= tl.load(pointer(table, tensors, t, 4, shrink, MANY, False)).to(tl.float32)
    start = part * BLOCK
    w = pointer(table, tensors, t, 1, w, MANY, ALIGNED) + start
    n_ = pointer(table, tensors, t, 2, n_, MANY, ALIGNED) + start
    lane = tl.arange(0, BLOCK)
    mask = lane < length(table, tensors, t, 5, count, MANY, ALIGNED) - start
    move = lr * tl.load(n_ + lane, mask, 0.0).to(tl.float32)
    new = decay * tl.load(w + lane, mask, 0.0).to(tl.float32) - move
    tl.store(w + lane, new.to(w.dtype.element_ty), mask)


def direction_add_(
    params: Sequence[Tensor],
    updates: Sequence[Tensor],
    decay: float,
    lr: float,
    steps: Sequence[Tensor] = (),
    decays: Sequence[Tensor] = (),
) -> None:
    """``W <- decay d W - lr s N`` over flat memory; weights that have gaps go by copies."""
    lists = [params, [x.contiguous() for x in updates], steps, decays]
    dense = [w.is_contiguous() for w in params]
    for at in groups(lists, dense):
        own = select(lists, at)
        if not dense[at[0]]:
            by_copies(
                Tensor.contiguous,
                lambda w, x, s, d: direction_add_(w, x, decay, lr, s, d),
                *own,
            )
            continue
        sizes = [params[i].numel() for i in at]
        launch(
            direction_add_kernel, own, [sizes], [cdiv(n, ELEMENTS) for n in sizes], decay, lr,
            STEPPED=len(steps) > 0, DECAYED=len(decays) > 0, BLOCK=ELEMENTS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["count"])
def count_kernel(
    table, tensors, x, finite, count,
    MANY: tl.constexpr, DEPTH: tl.constexpr, ALIGNED: tl.constexpr,
    SOUND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One more of each entry."""
    t, part = locate(table, tensors, MANY, DEPTH)
    if SOUND:  # noqa: SIM102 (one is decided at compile time)
        if tl.load(pointer(table, tensors, t, 2, finite, MANY, False)) == 0:
            return
    x = pointer(table, tensors, t, 1, x, MANY, ALIGNED) + part * BLOCK
    lane = tl.arange(0, BLOCK)
    mask = lane < length(table, tensors, t, 3, count, MANY, ALIGNED) - part * BLOCK
    tl.store(x + lane, tl.load(x + lane, mask, 0) + 1, mask)


def count_(counts: Sequence[Tensor], finite: Sequence[Tensor]) -> None:
    """One more of each entry, where finite."""
    lists = [counts, finite]
    for at in groups(lists):
        sizes = [counts[i].numel() for i in at]
        launch(
            count_kernel, select(lists, at), [sizes], [cdiv(n, ELEMENTS) for n in sizes],
            SOUND=len(finite) > 0, BLOCK=ELEMENTS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["count", "log1", "log2", "eps"])
def row_steps_kernel(
    table, tensors, age, row_eps, row_scale, count, log1, log2, eps,
    MANY: tl.constexpr, DEPTH: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``eps root`` and ``root / (1 - b1^t)``, ``root = sqrt(1 - b2^t)``; betas as logarithms.

    In float64, as bits: 1 - 0.999^t has lost half its digits in float32, and a number of the host
    is one of float32.
    """
    t, part = locate(table, tensors, MANY, DEPTH)
    start = part * BLOCK
    lane = tl.arange(0, BLOCK)
    mask = lane < number(table, tensors, t, 4, count, MANY) - start
    own = pointer(table, tensors, t, 1, age, MANY, ALIGNED)
    steps = tl.load(own + start + lane, mask, 0.0)
    time = tl.maximum(steps, 1.0).to(tl.float64)
    root = tl.sqrt(1.0 - tl.exp2(time * as_double(log2)))
    scale = tl.where(steps > 0, root / (1.0 - tl.exp2(time * as_double(log1))), 0.0)
    out = pointer(table, tensors, t, 2, row_eps, MANY, ALIGNED)
    tl.store(out + start + lane, (root * as_double(eps)).to(out.dtype.element_ty), mask)
    out = pointer(table, tensors, t, 3, row_scale, MANY, ALIGNED)
    tl.store(out + start + lane, scale.to(out.dtype.element_ty), mask)


@triton.jit
def as_double(bits):
    """The float64 that was given as its bits."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


def double_bits(x: float) -> int:
    """Bits of ``x`` in float64, as a signed integer."""
    return int(struct.unpack("<q", struct.pack("<d", x))[0])


def row_steps_(
    ages: Sequence[Tensor],
    eps_rows: Sequence[Tensor],
    scale_rows: Sequence[Tensor],
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """``eps root`` and ``root / (1 - b1^t)`` of each age t, 0 where it is 0."""
    lists = [[x.contiguous() for x in ages], eps_rows, scale_rows]
    logarithms = [math.log2(beta) if beta else -math.inf for beta in (beta1, beta2)]
    for at in groups(lists):
        sizes = [ages[i].numel() for i in at]
        launch(
            row_steps_kernel, select(lists, at), [sizes],
            [cdiv(n, ELEMENTS) for n in sizes],
            *map(double_bits, (*logarithms, eps)), BLOCK=ELEMENTS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["count"])
def residual_factors_kernel(
    table, tensors, low, direction, grad, norm, out, finite, count,
    tiny, share, noise, limiter,
    MANY: tl.constexpr, DEPTH: tl.constexpr, ALIGNED: tl.constexpr, SOUND: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """``f = |N_j| / (|R_j| + tiny)`` of the columns of one matrix, limited; a program a matrix."""
    t, b = locate(table, tensors, MANY, DEPTH)
    columns = number(table, tensors, t, 7, count, MANY)
    start = b * columns
    low = pointer(table, tensors, t, 1, low, MANY, False) + start
    direction = pointer(table, tensors, t, 2, direction, MANY, False) + start
    grad = pointer(table, tensors, t, 3, grad, MANY, False) + start
    norm = pointer(table, tensors, t, 4, norm, MANY, False) + b
    out = pointer(table, tensors, t, 5, out, MANY, False) + start
    lane = tl.arange(0, BLOCK)
    whole = tl.zeros((BLOCK,), tl.float32)
    inside = tl.zeros((BLOCK,), tl.float32)
    for j in range(0, columns, BLOCK):
        mask = lane < columns - j
        of_low = tl.load(low + j + lane, mask, 0.0)
        factor = tl.div_rn(tl.load(direction + j + lane, mask, 0.0), of_low + tiny)
        of_low *= factor
        of_grad = tl.load(grad + j + lane, mask, 0.0) * factor
        whole += of_grad * of_grad
        inside += of_low * of_low
    total = tl.sum(whole, axis=0)
    left = total - share * tl.sum(inside, axis=0)
    left = tl.where(left <= noise * total, 0.0, left)  # NaN stays NaN
    size = tl.sqrt_rn(left)
    last = tl.load(norm)
    allowed = tl.div_rn(limiter * (last + tiny), size)
    # a minimum that keeps NaN; the norm is then not kept
    limit = tl.where((last > 0) & ((allowed < 1) | (allowed != allowed)), allowed, 1.0)
    new = size * limit
    fine = (new == new) & (new < float("inf"))
    if SOUND:
        fine = fine & (tl.load(pointer(table, tensors, t, 6, finite, MANY, False)) != 0)
    tl.store(norm, tl.where(fine, new, last))
    for j in range(0, columns, BLOCK):
        mask = lane < columns - j
        of_low = tl.load(low + j + lane, mask, 0.0)
        factor = tl.div_rn(tl.load(direction + j + lane, mask, 0.0), of_low + tiny)
        tl.store(out + j + lane, factor * limit, mask)


def residual_factors_(
    lows: Sequence[Tensor],
    directions: Sequence[Tensor],
    grads: Sequence[Tensor],
    norms: Sequence[Tensor],
    outs: Sequence[Tensor],
    tiny: float,
    share: float,
    noise: float,
    limiter: float,
    finite: Sequence[Tensor],
) -> None:
    """``f = |N_j| / (|R_j| + tiny)``, limited so that the residual grows by ``limiter`` at most."""
    packed(("lows", "directions", "grads", "norms", "outs"), (lows, directions, grads, norms, outs))
    lists = [lows, directions, grads, norms, outs, finite]
    for at in groups(lists):
        launch(
            residual_factors_kernel, select(lists, at), [[outs[i].shape[-1] for i in at]],
            [norms[i].numel() for i in at], tiny, share, noise, limiter,
            SOUND=len(finite) > 0, BLOCK=ELEMENTS,
        )  # fmt: skip
