"""The apply of a coordinate subspace: one pass over W and G, no product."""

from __future__ import annotations

import math
from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from lowrank_optim.ops.cosine import check_name
from lowrank_optim.ops.reference import coordinate_adamw_  # noqa: F401  (not yet a kernel)
from lowrank_optim.ops.triton.elements import sign
from lowrank_optim.ops.triton.launch import (
    cdiv,
    groups,
    launch,
    locate,
    pointer,
    select,
    warps,
)
from lowrank_optim.ops.triton.matrices import (
    batch_strides,
    batched,
    inside,
    slices,
    tile,
    tile_corner,
    wide,
)

FREE = {"none": 0, "sgd": 1, "sign": 2}
"""What happens to the rows outside the subspace."""

_ROWS_CONTIGUOUS = (16, 128)
_COLUMNS_CONTIGUOUS = (128, 16)
"""Tiles of 2048 elements, long side along memory: 512 bytes of float32 per line."""


@triton.jit
def find(index, rows, rank, DEPTH: tl.constexpr):
    """Where each of ``rows`` is in the sorted ``index (rank,)``, and whether it is there."""
    low = tl.zeros(rows.shape, tl.int32)  # entries known to be less than the row
    for s in tl.static_range(DEPTH):
        step = 1 << (DEPTH - 1 - s)
        known = low + step <= rank
        entry = tl.load(index + low + (step - 1), known, 0)
        low = tl.where(known & (entry < rows), low + step, low)
    entry = tl.load(index + low, low < rank, -1)
    return low, (low < rank) & (entry == rows)


@triton.jit
def coordinate_kernel(
    table, tensors, w, g, index, n_, finite, step, shrink, more, m, n, rank,
    wb, wi, wj, gb, gi, gj, xb, nb, nk, nj,
    decay, lr, scale, gain,
    MANY: tl.constexpr, DEPTH: tl.constexpr, ALIGNED: tl.constexpr,
    FREE: tl.constexpr, PROBES: tl.constexpr, WIDE: tl.constexpr, SOUND: tl.constexpr,
    STEPPED: tl.constexpr, DECAYED: tl.constexpr, GAINED: tl.constexpr,
    GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Rows of ``index``: ``W <- decay W - lr a N[k]``; others: ``W <- decay W - lr gain f(G)``."""
    t, part = locate(table, tensors, MANY, DEPTH)
    if SOUND:  # noqa: SIM102 (one is decided at compile time)
        if tl.load(pointer(table, tensors, t, 5, finite, MANY, False)) == 0:
            return
    if STEPPED:
        lr *= tl.load(pointer(table, tensors, t, 6, step, MANY, False)).to(tl.float32)
    if DECAYED:
        decay *= tl.load(pointer(table, tensors, t, 7, shrink, MANY, False)).to(tl.float32)
    if GAINED:
        gain *= tl.load(pointer(table, tensors, t, 8, more, MANY, False)).to(tl.float32)
    w = pointer(table, tensors, t, 1, w, MANY, ALIGNED)
    g = pointer(table, tensors, t, 2, g, MANY, ALIGNED)
    index = pointer(table, tensors, t, 3, index, MANY, False)
    n_ = pointer(table, tensors, t, 4, n_, MANY, ALIGNED)
    tiles = tl.cdiv(m, BM) * tl.cdiv(n, BN)
    b = part // tiles
    i0, j0 = tile_corner((part % tiles).to(tl.int32), m, n, BM, BN, GROUP)
    mask = inside(i0, j0, m, n, BM, BN)
    k, chosen = find(index + b * xb, i0 + tl.arange(0, BM), rank, PROBES)
    here = mask & chosen[:, None]
    j = j0.to(tl.int64) + tl.arange(0, BN)
    n_at = n_ + b * nb + k.to(tl.int64)[:, None] * nk + j[None, :] * nj
    update = scale * tl.load(n_at, here, 0.0).to(tl.float32)
    if FREE != 0:
        g_at = tile(g + b * gb, i0, j0, gi, gj, BM, BN, WIDE)
        rest = tl.load(g_at, mask & ~chosen[:, None], 0.0).to(tl.float32)
        if FREE == 2:
            rest = sign(rest)
        update = tl.where(here, update, gain * rest)
    w_at = tile(w + b * wb, i0, j0, wi, wj, BM, BN, WIDE)
    new = decay * tl.load(w_at, mask, 0.0).to(tl.float32) - lr * update
    tl.store(w_at, new.to(w.dtype.element_ty), mask)


def coordinate_add_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    indices: Sequence[Tensor],
    terms: Sequence[Tensor],
    decay: float,
    lr: float,
    scale: float,
    gain: float,
    free: str,
    finite: Sequence[Tensor] = (),
    steps: Sequence[Tensor] = (),
    decays: Sequence[Tensor] = (),
    gains: Sequence[Tensor] = (),
) -> None:
    """Update the rows of a coordinate subspace with N, the others with a function of G.

    Args:
        params: W ``(..., m, n)``, any strides.
        grads: G, like W.
        indices: rows of the subspace, ``(..., r)`` int32, sorted.
        terms: N ``(..., r, n)``.
        decay: factor of the weights.
        lr: learning rate.
        scale: factor of N.
        gain: factor of the function of G.
        free: ``sign``, ``sgd`` (G itself) or ``none``.
        finite: 0-dim bools; where False, W is left as it is.
        steps: 0-dim factors of ``lr`` on the device.
        decays: 0-dim factors of ``decay``.
        gains: 0-dim factors of ``gain``.
    """
    check_name("free", free, [*FREE])
    singles = finite, steps, decays, gains
    lists: list[list[Tensor]] = [[] for _ in range(4 + len(singles))]
    for n, (w, g, index, n_) in enumerate(zip(params, grads, indices, terms, strict=True)):
        whole = [w, g, index, n_]
        if w.dim() > 2:
            whole[2] = index.unsqueeze(-2)  # (..., 1, r): batched like the matrices
        for at in slices(w) if w.numel() else ():
            operands = [x[at] if at and x.dim() > 3 else x for x in whole]
            if w.dim() > 2:
                operands = [batched(x, tuple(operands[0].shape[:-2])) for x in operands]
            if operands[2].stride(-1) != 1:
                operands[2] = operands[2].contiguous()
            optional = [own[n : n + 1] for own in singles]
            for own, xs in zip(lists, [*([x] for x in operands), *optional], strict=True):
                own += xs
    keys = [tuple((x.shape, x.stride()) for x in own) for own in zip(*lists[:4], strict=True)]
    for same in groups(lists, keys) if lists[0] else ():
        _coordinates(select(lists, same), (decay, lr, scale, gain), FREE[free])


def _coordinates(lists: Sequence[Sequence[Tensor]], scalars: tuple[float, ...], free: int) -> None:
    """Of matrices of one shape and strides, which the code is compiled for."""
    w, g, index, n_ = (x[0] for x in lists[:4])
    *batch, m, n = w.shape
    down = w.stride(-2) == 1 and w.stride(-1) != 1
    bm, bn = _COLUMNS_CONTIGUOUS if down else _ROWS_CONTIGUOUS
    rank, rows = index.shape[-1], index.stride(0) if batch else 0
    launch(
        coordinate_kernel, lists, [],
        [cdiv(m, bm) * cdiv(n, bn) * math.prod(batch)] * len(lists[0]), m, n, rank,
        *batch_strides(w, batch), *batch_strides(g, batch), rows, *batch_strides(n_, batch),
        *scalars,
        FREE=free, PROBES=rank.bit_length(), WIDE=wide(128, w, g), SOUND=bool(lists[4]),
        STEPPED=bool(lists[5]), DECAYED=bool(lists[6]), GAINED=bool(lists[7]),
        GROUP=8, BM=bm, BN=bn, num_warps=warps(4),
    )  # fmt: skip
