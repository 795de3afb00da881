"""Fused applies: the product with the basis and everything else that happens to the weights.

Both kernels hold a tile of the result in registers, run over the rank, and then touch W and G
once. Nothing of the size of the matrix exists besides them. Not autotuned: trials would each
update the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowrank_optim.ops.triton import interpreted
from lowrank_optim.ops.triton.elements import sign
from lowrank_optim.ops.triton.launch import (
    cdiv,
    guard,
    loadable,
    warps,
)
from lowrank_optim.ops.triton.matrices import (
    batch_strides,
    inside,
    slices,
    tile,
    tile_corner,
    wide,
)


class Blocks(NamedTuple):
    """Tile of the result, step along the rank, warps of 32 lanes, stages of the pipeline."""

    BM: int
    BN: int
    BR: int
    num_warps: int
    num_stages: int


BLOCKS = {
    # (products, operand format): registers of the accumulators are products * BM * BN / threads
    (1, "bf16"): Blocks(128, 64, 32, 4, 3),  # tensor cores, 64 of 255 registers
    (2, "bf16"): Blocks(64, 64, 32, 4, 3),  # the same 64: two tiles of half the size
    (1, "fp32"): Blocks(64, 64, 16, 8, 2),  # scalar FMAs: operands take registers as well
    (2, "fp32"): Blocks(64, 64, 16, 8, 2),
}
"""One choice per kernel and format, so that a run does not depend on timings. bf16: 64 registers of
accumulators leave room for two programs per multiprocessor, where its shared memory does: 99 KiB
hold one scaled lift. fp32 products are exact (no TF32) and run on the scalar units, where 8 warps
share the tile."""

BAND = 8
"""Tile rows that share the operand tiles of a column in L2."""


@triton.jit
def lift_scaled_kernel(
    w, g, p, n_, r_, c, finite, m, n, rank,
    wb, wi, wj, gb, gi, gj, pb, pi, pk, nb, nk, nj, rb, rk, rj, cb, cj,
    decay, lr, scale,
    HALF: tl.constexpr, WIDE: tl.constexpr, SOUND: tl.constexpr, GROUP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """``W <- decay W - lr (P (a N - a R o c) + G o c)``: the residual costs no second product."""
    if SOUND:  # noqa: SIM102 (one is decided at compile time)
        if tl.load(finite) == 0:
            return
    b = tl.program_id(1).to(tl.int64)
    i0, j0 = tile_corner(tl.program_id(0), m, n, BM, BN, GROUP)
    j = tl.arange(0, BN)
    columns = c + b * cb + j0.to(tl.int64) * cj
    factor = tl.load(columns + j.to(tl.int64) * cj, j < n - j0, 0.0)[None, :]
    up = tl.zeros((BM, BN), tl.float32)
    p_at = tile(p + b * pb, i0, i0 * 0, pi, pk, BM, BR, WIDE)
    n_at = tile(n_ + b * nb, j0 * 0, j0, nk, nj, BR, BN, WIDE)
    r_at = tile(r_ + b * rb, j0 * 0, j0, rk, rj, BR, BN, WIDE)
    for k0 in range(0, rank, BR):
        basis = tl.load(p_at, inside(i0, k0, m, rank, BM, BR), 0.0)
        live = inside(k0, j0, rank, n, BR, BN)
        term = tl.load(n_at, live, 0.0).to(tl.float32)
        low = tl.load(r_at, live, 0.0).to(tl.float32)
        term = scale * term - scale * low * factor
        if HALF:
            up = tl.dot(basis, term.to(tl.bfloat16), up)
        else:
            up = tl.dot(basis.to(tl.float32), term, up, input_precision="ieee")
        p_at += BR * pk
        n_at += BR * nk
        r_at += BR * rk
    mask = inside(i0, j0, m, n, BM, BN)
    g_at = tile(g + b * gb, i0, j0, gi, gj, BM, BN, WIDE)
    up += tl.load(g_at, mask, 0.0).to(tl.float32) * factor
    w_at = tile(w + b * wb, i0, j0, wi, wj, BM, BN, WIDE)
    new = decay * tl.load(w_at, mask, 0.0).to(tl.float32) - lr * up
    tl.store(w_at, new.to(w.dtype.element_ty), mask)


@triton.jit
def lift_sign_kernel(
    w, g, p, n_, r_, finite, m, n, rank,
    wb, wi, wj, gb, gi, gj, pb, pi, pk, nb, nk, nj, rb, rk, rj,
    decay, lr, scale, gain,
    HALF: tl.constexpr, WIDE: tl.constexpr, SOUND: tl.constexpr, GROUP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """``W <- decay W - lr (a P N + gain sign(G - P R))``: two products share the tiles of P."""
    if SOUND:  # noqa: SIM102 (one is decided at compile time)
        if tl.load(finite) == 0:
            return
    b = tl.program_id(1).to(tl.int64)
    i0, j0 = tile_corner(tl.program_id(0), m, n, BM, BN, GROUP)
    up = tl.zeros((BM, BN), tl.float32)
    seen = tl.zeros((BM, BN), tl.float32)
    p_at = tile(p + b * pb, i0, i0 * 0, pi, pk, BM, BR, WIDE)
    n_at = tile(n_ + b * nb, j0 * 0, j0, nk, nj, BR, BN, WIDE)
    r_at = tile(r_ + b * rb, j0 * 0, j0, rk, rj, BR, BN, WIDE)
    for k0 in range(0, rank, BR):
        basis = tl.load(p_at, inside(i0, k0, m, rank, BM, BR), 0.0)
        live = inside(k0, j0, rank, n, BR, BN)
        term = tl.load(n_at, live, 0.0).to(tl.float32)
        low = tl.load(r_at, live, 0.0).to(tl.float32)
        if HALF:
            up = tl.dot(basis, term.to(tl.bfloat16), up)
            seen = tl.dot(basis, low.to(tl.bfloat16), seen)
        else:
            basis = basis.to(tl.float32)
            up = tl.dot(basis, term, up, input_precision="ieee")
            seen = tl.dot(basis, low, seen, input_precision="ieee")
        p_at += BR * pk
        n_at += BR * nk
        r_at += BR * rk
    mask = inside(i0, j0, m, n, BM, BN)
    g_at = tile(g + b * gb, i0, j0, gi, gj, BM, BN, WIDE)
    rest = sign(tl.load(g_at, mask, 0.0).to(tl.float32) - seen)
    w_at = tile(w + b * wb, i0, j0, wi, wj, BM, BN, WIDE)
    new = decay * tl.load(w_at, mask, 0.0).to(tl.float32) - lr * (scale * up + gain * rest)
    tl.store(w_at, new.to(w.dtype.element_ty), mask)


def lift_add_scaled_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    bases: Sequence[Tensor],
    terms: Sequence[Tensor],
    lows: Sequence[Tensor],
    columns: Sequence[Tensor],
    decay: float,
    lr: float,
    scale: float,
    finite: Sequence[Tensor] = (),
) -> None:
    """``W <- decay W - lr (P (a N - a R o c) + G o c)`` for each matrix, ``c (..., 1, n)``.

    Args:
        params: W ``(..., m, n)``, any strides.
        grads: G, like W.
        bases: P ``(..., m, r)``; in bfloat16 the product is one of bfloat16, else of float32.
        terms: N ``(..., r, n)``.
        lows: R ``(..., r, n)``.
        columns: c ``(..., 1, n)`` float32.
        decay: factor of the weights.
        lr: learning rate.
        scale: a.
        finite: 0-dim bools; where False, W is left as it is.
    """
    lists = (params, grads, bases, terms, lows, columns)
    _lift(lift_scaled_kernel, 1, lists, (decay, lr, scale), finite)


def lift_add_sign_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    bases: Sequence[Tensor],
    terms: Sequence[Tensor],
    lows: Sequence[Tensor],
    decay: float,
    lr: float,
    scale: float,
    gain: float,
    finite: Sequence[Tensor] = (),
) -> None:
    """``W <- decay W - lr (a P N + gain sign(G - P R))`` for each matrix; arguments as above."""
    lists = (params, grads, bases, terms, lows)
    _lift(lift_sign_kernel, 2, lists, (decay, lr, scale, gain), finite)


def _lift(
    kernel: Any,
    products: int,
    lists: tuple[Sequence[Tensor], ...],
    scalars: tuple[float, ...],
    finite: Sequence[Tensor],
) -> None:
    fine = [*map(loadable, finite)] or [None] * len(lists[0])
    for *operands, flag in zip(*lists, fine, strict=True):
        if operands[0].numel():
            for at in slices(operands[0]):
                own = [x[at] for x in operands] if at else operands
                _lift_one(kernel, products, own, scalars, flag)


def _lift_one(
    kernel: Any,
    products: int,
    operands: Sequence[Tensor],
    scalars: tuple[float, ...],
    flag: Tensor | None,
) -> None:
    w, rank = operands[0], operands[2].shape[-1]
    *batch, m, n = w.shape
    # the interpreter computes nonsense for products of bfloat16: it gets float32 ones
    half = operands[2].dtype == torch.bfloat16 and not interpreted()
    blocks = BLOCKS[products, "bf16" if half else "fp32"]
    each = [batch_strides(x, batch) for x in operands]
    strides = [s for own in each[:5] for s in own]
    for batch_stride, _, stride in each[5:]:
        strides += [batch_stride, stride]
    with guard(w):
        kernel[(cdiv(m, blocks.BM) * cdiv(n, blocks.BN), *(batch or [1]))](
            *operands, flag, m, n, rank, *strides, *scalars,
            HALF=half, WIDE=wide(128, *operands[:5]), SOUND=flag is not None, GROUP=BAND,
            BM=blocks.BM, BN=blocks.BN, BR=blocks.BR,
            num_warps=warps(blocks.num_warps), num_stages=blocks.num_stages,
        )  # fmt: skip
