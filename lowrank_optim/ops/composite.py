"""Ops made of torch's own GEMMs and reductions: the same on every backend."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lowrank_optim.ops.devices import on_accelerator
from lowrank_optim.ops.noise import Noise
from lowrank_optim.ops.numbers import is_number, number_of, on_device
from lowrank_optim.ops.reference.storage import stochastic_round_
from lowrank_optim.ops.schema import calls
from lowrank_optim.ops.stacked import as_lines, by_copies, in_lines
from lowrank_optim.ops.tiles import tile_rows


def matrix_norm(x: Tensor) -> Tensor:
    """Frobenius norm ``(..., 1, 1)`` of ``x (..., m, n)`` in at least float32, a tile at a time.

    ``vector_norm(x, dtype=float32)`` of a narrow format would cast it whole; without the dtype it
    is rounded to that format, where 300 entries of 4e3 overflow float16.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    x = x if x.numel() else x.to(wide)
    if x.dtype == wide:
        norm: Tensor = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    else:
        if x.stride(-1) != 1:
            x = x.mT  # tiles of whole stored rows
        parts = [
            torch.linalg.vector_norm(tile, dim=(-2, -1), keepdim=True, dtype=wide)
            for tile in torch.split(x, tile_rows(x), -2)
        ]
        norm = torch.linalg.vector_norm(torch.cat(parts, -1), dim=-1, keepdim=True)
    return norm if x.shape[-2:] != (1, 1) else _of_one(norm)


def matrix_norms(xs: Sequence[Tensor]) -> list[Tensor]:
    """:func:`matrix_norm` of each; on an accelerator matrices of one dtype take one kernel."""
    at = [n for n, x in enumerate(xs) if x.dim() == 2 and x.numel() and on_accelerator(x)]
    norms = [matrix_norm(x) if n not in at else x for n, x in enumerate(xs)]
    for dtype in {xs[n].dtype for n in at}:
        own = [n for n in at if xs[n].dtype == dtype]
        wide = torch.promote_types(dtype, torch.float32)
        found = _norms([xs[n] for n in own], None if wide == dtype else wide)
        for n, norm in zip(own, found, strict=True):
            norms[n] = norm.view(1, 1)
    return norms


def total_norms(xs: list[Tensor]) -> Sequence[Tensor]:
    """Norm ``()`` of all entries of each, infinite where one or its square is not a number.

    All of one dtype. Of bfloat16 in bfloat16: it has float32's range, and a cast would be a pass of
    its own.
    """
    return _norms(xs, torch.float32 if xs[0].dtype == torch.float16 else None)


def _norms(xs: list[Tensor], dtype: torch.dtype | None) -> Sequence[Tensor]:
    """Of each in ``dtype``, or in its own."""
    norms: Sequence[Tensor] = torch._foreach_norm(xs, 2, dtype)
    if all([x.numel() != 1 for x in xs]):
        return norms
    return [_of_one(norm) if x.numel() == 1 else norm for x, norm in zip(xs, norms, strict=True)]


def _of_one(norm: Tensor) -> Tensor:
    """A norm of one entry, infinite where its square is: torch takes the absolute value."""
    return torch.where(norm.square() < torch.inf, norm, torch.inf)


def lift_add_(
    param: Tensor,
    basis: Tensor,
    low: Tensor,
    right: Tensor | None,
    decay: float | Tensor,
    alpha: float,
    rounding: Noise | None,
) -> None:
    """``W <- decay W + alpha P N (Q^T)`` in one GEMM call, rounded once into the parameter.

    Args:
        param: W ``(..., m, n)``, any strides.
        basis: P ``(..., m, r)``; like N and Q it is cast where a GEMM takes one dtype.
        low: N ``(..., r, n)``, or ``(..., r, r)`` with ``right``.
        right: Q ``(..., n, r)``.
        decay: factor of the weights; a tensor ``()`` or ``(..., 1, 1)`` is read on its device.
        alpha: factor of the update.
        rounding: of the stochastic rounding into bfloat16; None rounds to nearest.
    """
    if rounding is not None:
        _lift_add_rounded_(param, basis, low, right, decay, alpha, rounding)
        return
    if 1 not in param.stride()[-2:] and not in_lines(param):
        # torch would make a copy itself, that need not lie as the weights
        by_copies(
            as_lines, lambda w: lift_add_(w[0], basis, low, right, decay, alpha, None), [param]
        )
        return
    if isinstance(decay, Tensor):
        param.mul_(decay)
        decay = 1.0
    dtype = param.dtype
    if basis.dtype != dtype or low.dtype != dtype:  # asked first, as each call of to() costs
        basis, low = basis.to(dtype), low.to(dtype)
    if right is not None:
        low = low @ right.mT.to(param.dtype)
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
    rounding: Noise,
) -> None:
    if right is not None:
        low = low @ right.mT.to(low.dtype)
    matrices = param.unbind(0) if param.dim() == 3 else [param]
    bases = basis.unbind(0) if param.dim() == 3 else [basis]
    lows = low.unbind(0) if param.dim() == 3 else [low]
    decays: Sequence[float | Tensor] = [decay] * len(matrices)
    if isinstance(decay, Tensor):
        decays = decay.reshape(-1).expand(len(matrices)).unbind()
    noises = [rounding.select(n) for n in range(len(matrices))] if param.dim() == 3 else [rounding]
    for w, p, x, d, noise in zip(matrices, bases, lows, decays, noises, strict=True):
        rows = tile_rows(w)
        for start in range(0, w.shape[0], rows):
            tile, q = w[start : start + rows], p[start : start + rows]
            new = torch.addmm(tile.float().mul_(d), q.float(), x.float(), alpha=alpha)
            put_(tile, new, noise.narrow(0, start))


def lift_add_term_(
    param: Tensor,
    grad: Tensor,
    basis: Tensor,
    update: Tensor,
    low: Tensor,
    columns: Tensor | None,
    gain: float | Tensor,
    decay: float | Tensor,
    lr: float,
    scale: float,
    rounding: Noise | None,
    finite: Tensor | None,
) -> None:
    """``W <- decay W - lr (a P N + term)`` by tiles of rows, rounded once into the parameter.

    What the fused ops do not do: stochastic rounding, and factors that are tensors on the device.

    Args:
        param: W ``(..., m, n)``, any strides.
        grad: G, alike.
        basis: P ``(..., m, r)``.
        update: N ``(..., r, n)``.
        low: R ``(..., r, n)``.
        columns: c ``(..., 1, n)`` of the term ``(G - a P R) o c``; None means the sign term.
        gain: of the term ``gain sign(G - P R)``.
        decay: factor of the weights; a tensor is read on its device.
        lr: step size.
        scale: a.
        rounding: of the stochastic rounding into bfloat16; None rounds to nearest.
        finite: 0-d bool on the device; where False, W stays as it is.
    """
    wide = torch.promote_types(param.dtype, torch.float32)
    n, r = update.to(wide), low.to(wide)
    small = n * scale if columns is None else n.addcmul(r, columns, value=-1.0).mul_(scale)
    rows = tile_rows(param)
    tiles = zip(*(torch.split(x, rows, -2) for x in (param, grad, basis)), strict=True)
    for tile, (w, g, p) in enumerate(tiles):
        g, p = g.to(wide), p.to(wide)
        change = p @ small
        if columns is None:
            change += g.sub(p @ r).sign_().mul_(gain)
        else:
            change.addcmul_(g, columns)
        new = w.to(wide).mul(decay).sub_(change, alpha=lr)
        new = new if finite is None else torch.where(finite, new, w.to(new.dtype))
        put_(w, new, None if rounding is None else rounding.narrow(-2, tile * rows))


def put_(out: Tensor, x: Tensor, rounding: Noise | None) -> None:
    """``out <- x``, rounded stochastically where that is asked for and ``out`` is bfloat16."""
    rounds = rounding is not None and out.dtype == torch.bfloat16
    out.copy_(stochastic_round(x, rounding) if rounds and rounding is not None else x)


def put_all_(outs: Sequence[Tensor], xs: Sequence[Tensor], rounding: Sequence[Noise]) -> None:
    """:func:`put_` of each; of several that are written as they lie, in one kernel."""
    if outs[0].dtype != torch.bfloat16:
        torch._foreach_copy_(list(outs), list(xs))
    elif all(x.is_contiguous() and x.numel() for x in outs):
        _round_into_(xs, outs, rounding)
    elif all(x.dim() > 1 and x.mT.is_contiguous() and x.numel() for x in outs):
        _round_into_([x.mT for x in xs], [x.mT for x in outs], [own.mT for own in rounding])
    else:
        for out, x, noise in zip(outs, xs, rounding, strict=True):
            put_(out, x, noise)


def stochastic_round(x: Tensor, noise: Noise) -> Tensor:
    """``x`` float32 in bfloat16, rounded without bias from a hash of (position, seed).

    Args:
        x: any shape.
        noise: seed, and positions of the entries of ``x`` in the whole that it is a piece of.
    """
    x = x.contiguous()
    out = torch.empty_like(x, dtype=torch.bfloat16)
    if x.numel():
        _round_into_([x], [out], [noise])
    return out


def _round_into_(xs: Sequence[Tensor], outs: Sequence[Tensor], noises: Sequence[Noise]) -> None:
    pieces: tuple[list[Tensor], list[Tensor]] = [], []
    seeds: list[int | Tensor] = []
    places: list[tuple[int, int, int, int]] = []
    for x, out, noise in zip(xs, outs, noises, strict=True):
        own = noise.layout(x.shape)
        for found, t in zip(pieces, (x.contiguous(), out), strict=True):
            found += t.view(len(own), -1).unbind()
        seeds += [noise.seed & 0x7FFFFFFF] * len(own)
        places += own
    columns = [*map(list, zip(*places, strict=True))]
    if any(isinstance(seed, Tensor) for seed in seeds):  # kernels take numbers of the host
        stochastic_round_(*pieces, seeds, *columns)
    else:
        calls.stochastic_round_(*pieces, seeds, *columns)


def add_(
    param: Tensor,
    update: Tensor,
    decay: float | Tensor,
    alpha: float,
    rounding: Noise | None,
) -> None:
    """``W <- decay W + alpha N`` elementwise, rounded once; ``update`` in at least float32."""
    if on_accelerator(param) and rounding is None and is_number(decay):
        add_all_([param], [update], [decay], [-alpha], [None])
        return
    # a factor that is a tensor would widen what has no dimension
    new = param.to(update.dtype).mul(decay).to(update.dtype)
    put_(param, new.add_(update, alpha=alpha), rounding)


def add_all_(
    params: Sequence[Tensor],
    updates: Sequence[Tensor],
    decays: Sequence[float | Tensor],
    sizes: Sequence[float | Tensor],
    rounding: Sequence[Noise | None],
) -> None:
    """``W <- decay W - size N`` of each; an accelerator rounds all to nearest in one kernel.

    Args:
        params: W.
        updates: N, in at least float32.
        decays: of each, numbers or tensors of one element.
        sizes: likewise.
        rounding: of each; None rounds to nearest.
    """
    alike: dict[tuple[float | None, ...], list[int]] = {}
    for n, (decay, size, noise) in enumerate(zip(decays, sizes, rounding, strict=True)):
        if on_accelerator(params[n]) and noise is None and is_number(decay) and is_number(size):
            key = tuple(None if isinstance(x, Tensor) else x for x in (decay, size))
            alike.setdefault(key, []).append(n)
        else:
            update = (updates[n] * size).to(updates[n].dtype)  # as above
            add_(params[n], update, decay, -1.0, noise)
    for at in alike.values():
        own, step, update = decays[at[0]], sizes[at[0]], updates[at[0]]
        held = ([x[n] for n in at] if isinstance(x[at[0]], Tensor) else [] for x in (sizes, decays))
        factors = [on_device(found, update) for found in held]  # type: ignore[arg-type]
        lists = [params[n] for n in at], [updates[n] for n in at]
        calls.direction_add_(*lists, number_of(own), number_of(step), *factors)
