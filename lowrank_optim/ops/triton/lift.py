"""Fused applies: the product with the basis and everything else that happens to the weights.

Both kernels hold a tile of the result in registers, run over the rank, and then touch W and G
once. Nothing of the size of the matrix exists besides them. Not autotuned: trials would each
update the weights.

Products of bfloat16 get their right operand ready, in bfloat16, ``2 r n`` bytes that live as long
as the call. Each tile of rows would otherwise read float32 and round it anew, and the matrix units
would wait for that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowrank_optim.ops.cublas import addmm_ as addmm_  # a plain product is none of ours
from lowrank_optim.ops.triton import interpreted
from lowrank_optim.ops.triton.blocks import choose
from lowrank_optim.ops.triton.elements import sign
from lowrank_optim.ops.triton.launch import cdiv, guard, loadable, warps
from lowrank_optim.ops.triton.matrices import (
    batched,
    inside,
    slices,
    tile,
    tile_corner,
    wide,
)

BAND = 8
"""Tile rows that share the operand tiles of a column in L2."""
TERM = (32, 128)
"""Rows and columns of a program of `lift_term_kernel`: 16 elements a lane."""


@triton.jit
def lift_term_kernel(
    out, n_, r_, c, rank, n,
    nb, nk, nj, rb, rk, rj, cb, cj, scale,
    WIDE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """``a N - a R o c``, written one row after the other."""
    b = tl.program_id(1).to(tl.int64)
    k0, j0 = tile_corner(tl.program_id(0), rank, n, BM, BN, 1)
    factor = column_factors(c + b * cb, j0, n, cj, BN)
    live = inside(k0, j0, rank, n, BM, BN)
    term = tl.load(tile(n_ + b * nb, k0, j0, nk, nj, BM, BN, WIDE), live, 0.0).to(tl.float32)
    low = tl.load(tile(r_ + b * rb, k0, j0, rk, rj, BM, BN, WIDE), live, 0.0).to(tl.float32)
    term = scale * term - scale * low * factor
    at = tile(out + b * rank * n, k0, j0, n, 1, BM, BN, WIDE)
    tl.store(at, term.to(out.dtype.element_ty), live)


@triton.jit
def product_mask(
    i0, j0, m, n, AXIS: tl.constexpr, EVEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    """`inside`, of an operand whose ``AXIS`` is the rank: a step that divides it needs no mask."""
    if EVEN:
        if AXIS == 1:
            mask = (tl.arange(0, BM)[:, None] < m - i0) & tl.full((BM, BN), 1, tl.int1)
        else:
            mask = (tl.arange(0, BN)[None, :] < n - j0) & tl.full((BM, BN), 1, tl.int1)
    else:
        mask = inside(i0, j0, m, n, BM, BN)
    return mask


@triton.jit
def part(x, s: tl.constexpr, COUNT: tl.constexpr):
    """The ``s``-th of ``COUNT`` equal groups of columns, 1, 2 or 4: W and G meet one at a time."""
    if COUNT > 1:
        left, right = tl.split(x.reshape(x.shape[0], 2, x.shape[1] // 2).permute(0, 2, 1))
        if COUNT == 2:
            x = left if s == 0 else right
        else:
            x = left if s < 2 else right
            left, right = tl.split(x.reshape(x.shape[0], 2, x.shape[1] // 2).permute(0, 2, 1))
            x = left if s % 2 == 0 else right
    return x


@triton.jit
def write_scaled(
    up, w, g, c, i0, j0, m, n, wi, wj, gi, gj, cj, decay, lr,
    WIDE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Some columns of a tile, once the product is complete."""
    mask = inside(i0, j0, m, n, BM, BN)
    factor = column_factors(c, j0, n, cj, BN)
    up += tl.load(tile(g, i0, j0, gi, gj, BM, BN, WIDE), mask, 0.0).to(tl.float32) * factor
    w_at = tile(w, i0, j0, wi, wj, BM, BN, WIDE)
    new = decay * tl.load(w_at, mask, 0.0).to(tl.float32) - lr * up
    tl.store(w_at, new.to(w.dtype.element_ty), mask)


@triton.jit
def column_factors(c, j0, n, cj, BN: tl.constexpr):
    """C of the columns from j0 on, as a row."""
    j = tl.arange(0, BN)
    columns = c + j0.to(tl.int64) * cj
    return tl.load(columns + j.to(tl.int64) * cj, j < n - j0, 0.0)[None, :]


@triton.jit
def lift_scaled_kernel(
    w, g, p, n_, r_, c, finite, step, shrink, m, n, rank,
    wb, wi, wj, gb, gi, gj, pb, pi, pk, nb, nk, nj, rb, rk, rj, cb, cj,
    decay, lr, scale,
    READY: tl.constexpr, HALF: tl.constexpr, EVEN: tl.constexpr,
    WIDE: tl.constexpr, SOUND: tl.constexpr, STEPPED: tl.constexpr, DECAYED: tl.constexpr,
    GROUP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """``W <- decay W - lr (P (a N - a R o c) + G o c)``: the residual costs no second product.

    READY: N is all of the right operand, as `lift_term_kernel` leaves it, and R is None.
    """
    if SOUND:  # noqa: SIM102 (one is decided at compile time)
        if tl.load(finite) == 0:
            return
    b = tl.program_id(1).to(tl.int64)
    i0, j0 = tile_corner(tl.program_id(0), m, n, BM, BN, GROUP)
    if not READY:
        factor = column_factors(c + b * cb, j0, n, cj, BN)
    up = tl.zeros((BM, BN), tl.float32)
    p_at = tile(p + b * pb, i0, i0 * 0, pi, pk, BM, BR, WIDE)
    n_at = tile(n_ + b * nb, j0 * 0, j0, nk, nj, BR, BN, WIDE)
    if not READY:
        r_at = tile(r_ + b * rb, j0 * 0, j0, rk, rj, BR, BN, WIDE)
    for k0 in range(0, rank, BR):
        basis = tl.load(p_at, product_mask(i0, k0, m, rank, 1, EVEN, BM, BR), 0.0)
        live = product_mask(k0, j0, rank, n, 0, EVEN, BR, BN)
        term = tl.load(n_at, live, 0.0)
        if not READY:
            low = tl.load(r_at, live, 0.0).to(tl.float32)
            term = scale * term.to(tl.float32) - scale * low * factor
            r_at += BR * rk
        if HALF:
            up = tl.dot(basis, term, up)
        else:
            up = tl.dot(basis.to(tl.float32), term.to(tl.float32), up, input_precision="ieee")
        p_at += BR * pk
        n_at += BR * nk
    w += b * wb
    g += b * gb
    c += b * cb
    if STEPPED:  # after the loop: registers are what it needs
        lr *= tl.load(step).to(tl.float32)
    if DECAYED:
        decay *= tl.load(shrink).to(tl.float32)
    for s in tl.static_range(BN // PART):
        write_scaled(
            part(up, s, BN // PART), w, g, c, i0, j0 + s * PART, m, n,
            wi, wj, gi, gj, cj, decay, lr, WIDE, BM, PART,
        )  # fmt: skip


@triton.jit
def write_sign(
    up, seen, w, g, i0, j0, m, n, wi, wj, gi, gj, decay, lr, scale, gain,
    WIDE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Some columns of a tile, once both products are complete."""
    mask = inside(i0, j0, m, n, BM, BN)
    g_at = tile(g, i0, j0, gi, gj, BM, BN, WIDE)
    rest = sign(tl.load(g_at, mask, 0.0).to(tl.float32) - seen)
    w_at = tile(w, i0, j0, wi, wj, BM, BN, WIDE)
    new = decay * tl.load(w_at, mask, 0.0).to(tl.float32) - lr * (scale * up + gain * rest)
    tl.store(w_at, new.to(w.dtype.element_ty), mask)


@triton.jit
def lift_sign_kernel(
    w, g, p, n_, r_, finite, step, shrink, more, m, n, rank,
    wb, wi, wj, gb, gi, gj, pb, pi, pk, nb, nk, nj, rb, rk, rj,
    decay, lr, scale, gain,
    HALF: tl.constexpr, EVEN: tl.constexpr,
    WIDE: tl.constexpr, SOUND: tl.constexpr, STEPPED: tl.constexpr, DECAYED: tl.constexpr,
    GAINED: tl.constexpr, GROUP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, PART: tl.constexpr,
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
        basis = tl.load(p_at, product_mask(i0, k0, m, rank, 1, EVEN, BM, BR), 0.0)
        live = product_mask(k0, j0, rank, n, 0, EVEN, BR, BN)
        term = tl.load(n_at, live, 0.0)
        low = tl.load(r_at, live, 0.0)
        if HALF:
            up = tl.dot(basis, term, up)
            seen = tl.dot(basis, low, seen)
        else:
            basis = basis.to(tl.float32)
            up = tl.dot(basis, term.to(tl.float32), up, input_precision="ieee")
            seen = tl.dot(basis, low.to(tl.float32), seen, input_precision="ieee")
        p_at += BR * pk
        n_at += BR * nk
        r_at += BR * rk
    w += b * wb
    g += b * gb
    if STEPPED:
        lr *= tl.load(step).to(tl.float32)
    if DECAYED:
        decay *= tl.load(shrink).to(tl.float32)
    if GAINED:
        gain *= tl.load(more).to(tl.float32)
    for s in tl.static_range(BN // PART):
        write_sign(
            part(up, s, BN // PART), part(seen, s, BN // PART), w, g, i0, j0 + s * PART, m, n,
            wi, wj, gi, gj, decay, lr, scale, gain, WIDE, BM, PART,
        )  # fmt: skip


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
    steps: Sequence[Tensor] = (),
    decays: Sequence[Tensor] = (),
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
        steps: 0-dim factors of ``lr`` on the device.
        decays: 0-dim factors of ``decay``.
    """
    lists = (params, grads, bases, terms, lows, columns)
    _lift(lift_scaled_kernel, 1, lists, (decay, lr, scale), (finite, steps, decays))


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
    steps: Sequence[Tensor] = (),
    decays: Sequence[Tensor] = (),
    gains: Sequence[Tensor] = (),
) -> None:
    """``W <- decay W - lr (a P N + gain sign(G - P R))`` for each matrix.

    Arguments as above; ``gains`` are factors of ``gain``, as ``steps`` of ``lr``.
    """
    lists = (params, grads, bases, terms, lows)
    _lift(lift_sign_kernel, 2, lists, (decay, lr, scale, gain), (finite, steps, decays, gains))


def _lift(
    kernel: Any,
    products: int,
    lists: tuple[Sequence[Tensor], ...],
    scalars: tuple[float, ...],
    singles: Sequence[Sequence[Tensor]],
) -> None:
    each = [[*map(loadable, own)] or [None] * len(lists[0]) for own in singles]
    for operands, *own in zip(zip(*lists, strict=True), *each, strict=True):
        if operands[0].numel():
            for at in slices(operands[0]):
                some = [x[at] for x in operands] if at else operands
                _lift_one(kernel, products, some, scalars, own)


def _lift_one(
    kernel: Any,
    products: int,
    operands: Sequence[Tensor],
    scalars: tuple[float, ...],
    singles: Sequence[Tensor | None],
) -> None:
    w, g, p, n_, r_, *rest = operands
    flag, step, shrink, *more = singles
    batch = tuple(w.shape[:-2])
    w, g, p, n_, r_ = (batched(x, batch) for x in (w, g, p, n_, r_))
    columns = [batched(x, batch) for x in rest]
    (count, m, n), rank = w.shape, p.shape[-1]
    meta: dict[str, Any] = {}
    low: Tensor | None = r_
    with guard(w):
        if p.dtype == torch.bfloat16:
            if products == 1:
                n_, low = _term(n_, r_, columns[0], scalars[2]), None
            else:
                n_, low = n_.to(p.dtype), r_.to(p.dtype)
        if products == 1:
            meta["READY"] = low is None
        else:
            meta["GAINED"] = more[0] is not None
        # the interpreter computes nonsense for products of bfloat16: it gets float32 ones
        half = p.dtype == torch.bfloat16 and not interpreted()
        blocks = choose(products, half, w.device, count, m, n)
        views = [w, g, p, n_, n_ if low is None else low]
        strides = [s for x in views for s in x.stride()]
        for c in columns:
            strides += [c.stride(0), c.stride(2)]
        kernel[(blocks.tiles(m, n), count)](
            w, g, p, n_, low, *columns, *singles, m, n, rank, *strides, *scalars,
            HALF=half, EVEN=rank % blocks.BR == 0, WIDE=wide(256, *views),
            SOUND=flag is not None, STEPPED=step is not None, DECAYED=shrink is not None,
            GROUP=BAND, BM=blocks.BM, BN=blocks.BN, BR=blocks.BR, PART=blocks.PART,
            num_warps=warps(blocks.num_warps), num_stages=blocks.num_stages, **meta,
        )  # fmt: skip


def _term(n_: Tensor, r_: Tensor, c: Tensor, scale: float) -> Tensor:
    """``a N - a R o c`` in bfloat16; of views ``(b, r, n)``."""
    out = torch.empty(n_.shape, dtype=torch.bfloat16, device=n_.device)
    count, rank, n = out.shape
    if out.numel():
        bm, bn = TERM
        lift_term_kernel[(cdiv(rank, bm) * cdiv(n, bn), count)](
            out, n_, r_, c, rank, n, *n_.stride(), *r_.stride(), c.stride(0), c.stride(2), scale,
            WIDE=wide(bn, out, n_, r_), BM=bm, BN=bn, num_warps=warps(8),
        )  # fmt: skip
    return out
