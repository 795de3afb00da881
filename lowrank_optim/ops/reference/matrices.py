"""Norms of columns, the fused updates of weights, and the choice of rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lowrank_optim.ops.cosine import check_name, cosine_project_, cosine_scores
from lowrank_optim.ops.reference.arguments import Tensors, or_none, times, wide
from lowrank_optim.ops.reference.moments import adamw
from lowrank_optim.ops.rows import check_rows
from lowrank_optim.ops.stacked import stacked
from lowrank_optim.ops.tiles import tile_rows


def column_norms(xs: Tensors) -> list[Tensor]:
    """Norm of each column, ``(..., 1, n)`` in float32 (or wider), a tile of rows at a time."""
    norms = []
    for x in xs:
        total = x.new_zeros(*x.shape[:-2], 1, x.shape[-1], dtype=wide(x[..., :0, :0]).dtype)
        for tile in torch.split(x, tile_rows(x), dim=-2):
            total += wide(tile).square().sum(-2, keepdim=True)
        norms.append(total.sqrt_())
    return norms


def _update_by_tiles_(
    w: Tensor,
    decay: float | Tensor,
    update: Callable[..., Tensor],
    finite: Tensor | None,
    *others: Tensor,
) -> None:
    """``W <- decay W - update(tiles of others)`` by tiles of rows, each rounded once into W."""
    rows = tile_rows(w)
    tiles = (torch.split(x, rows, dim=-2) for x in (w, *others))
    for tile, *rest in zip(*tiles, strict=True):
        new = wide(tile).mul(decay).sub_(update(*map(wide, rest))).to(w.dtype)
        tile.copy_(new if finite is None else torch.where(finite, new, tile))


def addmm_(
    params: Tensors, lefts: Tensors, rights: Tensors, steps: Tensors, decays: Tensors
) -> None:
    """``W <- d W + s P N`` by tiles of rows, rounded once."""
    for w, left, right, step, decay in zip(params, lefts, rights, steps, decays, strict=True):
        moved = wide(right) * -step
        _update_by_tiles_(w, decay, lambda rows, moved=moved: rows @ moved, None, left)


def _own(
    decay: float, lr: float, finite: Tensors, steps: Tensors, decays: Tensors, count: int
) -> Iterator[tuple[float | Tensor, float | Tensor, Tensor | None]]:
    """Decay, step size and flag of each matrix."""
    factors = times(decay, decays, count), times(lr, steps, count)
    return zip(*factors, or_none(finite, count), strict=True)


def _scaled(size: float | Tensor, x: Tensor, c: Tensor, g: Tensor, p: Tensor) -> Tensor:
    return size * (p @ x + g * c)


def _signed(
    size: float | Tensor, scale: float, gain: float | Tensor, n: Tensor, r: Tensor, g: Tensor,
    p: Tensor,
) -> Tensor:  # fmt: skip
    return size * (scale * (p @ n) + gain * (g - p @ r).sign_())


def lift_add_scaled_(
    params: Tensors,
    grads: Tensors,
    bases: Tensors,
    updates: Tensors,
    lows: Tensors,
    columns: Tensors,
    decay: float,
    lr: float,
    scale: float,
    finite: Tensors = (),
    steps: Tensors = (),
    decays: Tensors = (),
) -> None:
    """``W <- decay W - lr (P (a N - a R o c) + G o c)``: one GEMM and one pass."""
    matrices = zip(params, grads, bases, updates, lows, columns, strict=True)
    own = _own(decay, lr, finite, steps, decays, len(params))
    for (w, g, p, n, r, c), (d, size, ok) in zip(matrices, own, strict=True):
        small = scale * (wide(n) - wide(r) * c)
        lifted = partial(_scaled, size, small, c)
        _update_by_tiles_(w, d, lifted, ok, g, p)


def lift_add_sign_(
    params: Tensors,
    grads: Tensors,
    bases: Tensors,
    updates: Tensors,
    lows: Tensors,
    decay: float,
    lr: float,
    scale: float,
    gain: float,
    finite: Tensors = (),
    steps: Tensors = (),
    decays: Tensors = (),
    gains: Tensors = (),
) -> None:
    """``W <- decay W - lr (a P N + gain sign(G - P R))``: two products on the same tiles of P."""
    matrices = zip(params, grads, bases, updates, lows, strict=True)
    own = _own(decay, lr, finite, steps, decays, len(params))
    each = zip(matrices, own, times(gain, gains, len(params)), strict=True)
    for (w, g, p, n, r), (d, size, ok), more in each:
        lifted = partial(_signed, size, scale, more, wide(n), wide(r))
        _update_by_tiles_(w, d, lifted, ok, g, p)


FREE: dict[str, Callable[[Tensor], Tensor]] = {
    "sign": torch.sign,
    "sgd": lambda g: g,
    "none": torch.zeros_like,
}
"""What a free rule does with the gradient outside the subspace."""


def coordinate_add_(
    params: Tensors,
    grads: Tensors,
    indices: Tensors,
    updates: Tensors,
    decay: float,
    lr: float,
    scale: float,
    gain: float,
    free: str,
    finite: Tensors = (),
    steps: Tensors = (),
    decays: Tensors = (),
    gains: Tensors = (),
) -> None:
    """Rows in ``index``: ``W <- decay W - lr a N``; the others: ``W <- decay W - lr gain f(G)``."""
    check_name("free", free, [*FREE])
    for w, index in zip(params, indices, strict=True):
        check_rows("coordinate_add_", index, w.shape[-2])
    matrices = zip(params, grads, indices, updates, strict=True)
    own = _own(decay, lr, finite, steps, decays, len(params))
    each = zip(matrices, own, times(gain, gains, len(params)), strict=True)
    for (w, g, index, n), (d, size, ok), more in each:
        at = index.long().unsqueeze(-1).expand(n.shape)
        old = w.gather(-2, at)
        rows = wide(old).mul(d)
        if isinstance(size, Tensor):  # what multiplies in sub_ is read by the host
            rows.sub_(wide(n) * (size * scale))
        else:
            rows.sub_(wide(n), alpha=size * scale)
        _update_by_tiles_(w, d, lambda g, s=size * more: s * FREE[free](g), ok, g)
        rows = rows.to(w.dtype)
        w.scatter_(-2, at, rows if ok is None else torch.where(ok, rows, old))


def coordinate_adamw_(
    params: Tensors,
    grads: Tensors,
    indices: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    beta1: float,
    beta2: float,
    eps: Sequence[float],
    steps: Sequence[float],
    free_steps: Sequence[float],
    decay: float,
    free: str,
) -> None:
    """Rows in ``index``: AdamW on their moments; the others: ``W <- decay W - free_step f(G)``."""
    check_name("free", free, [*FREE])
    for w, index in zip(params, indices, strict=True):
        check_rows("coordinate_adamw_", index, w.shape[-2])
    matrices = zip(params, grads, indices, exp_avgs, exp_avg_sqs, strict=True)
    factors = zip(eps, steps, free_steps, strict=True)
    for (w, g, index, m, v), (e, step, free_step) in zip(matrices, factors, strict=True):
        at = index.long().unsqueeze(-1).expand(m.shape)
        rows = wide(w.gather(-2, at)).mul(decay)
        rows.sub_(adamw(wide(g.gather(-2, at)), m, v, beta1, beta2, e, None), alpha=step)
        _update_by_tiles_(w, decay, lambda g, s=free_step: s * FREE[free](g), None, g)
        w.scatter_(-2, at, rows.to(w.dtype))


MOVED_ELEMENTS = 1 << 24
"""Elements that are moved at once."""


def move_rows_(xs: Tensors, sources: Tensors, fills: Sequence[int]) -> None:
    """Rows of each ``(r, k)`` from where they stood; ``fill`` where that is nowhere.

    What has one form is copied into one tensor, as much at a time as fills the device.
    """
    alike: dict[tuple[Any, ...], list[int]] = {}
    for n, (x, fill) in enumerate(zip(xs, fills, strict=True)):
        alike.setdefault((x.shape, x.dtype, x.device, fill), []).append(n)
    for (shape, *_, fill), at in alike.items():
        count = max(1, MOVED_ELEMENTS // max(1, math.prod(shape)))
        for start in range(0, len(at), count):
            some = at[start : start + count]
            own, source = [xs[n] for n in some], stacked([sources[n] for n in some]).unsqueeze(-1)
            old = torch.stack(own)
            new = old.gather(1, source.clamp(min=0).long().expand(old.shape))
            torch._foreach_copy_(own, list(new.masked_fill_(source < 0, fill).unbind(0)))


def top_rows_(
    scores: Tensors, indices: Tensors, sources: Tensors, finite: Tensors, usable: Tensors
) -> None:
    """The indices of the largest scores in place of ``indices``, and where each stood."""
    alike: dict[tuple[Any, ...], list[int]] = {}
    for n, (score, index, _) in enumerate(zip(scores, indices, sources, strict=True)):
        alike.setdefault((score.shape, score.dtype, index.shape, index.device), []).append(n)
    for at in alike.values():
        own, places = [indices[n] for n in at], [sources[n] for n in at]
        old, count = stacked(own), own[0].shape[0]
        given = stacked([scores[n] for n in at])
        # sorted stably: among equals the lowest index, on every device
        best = torch.sort(given, descending=True, stable=True).indices
        new = best[:, :count].sort().values.to(old.dtype)
        moves = _told_(given, [finite[n] for n in at], [usable[n] for n in at]) if finite else None
        if count:
            place = torch.searchsorted(old, new).clamp_(max=count - 1)
            stood = torch.where(old.gather(1, place) == new, place, -1).to(old.dtype)
            if moves is not None:
                stay = torch.arange(count, dtype=old.dtype, device=old.device)
                stood, new = torch.where(moves, stood, stay), torch.where(moves, new, old)
            torch._foreach_copy_(places, list(stood.unbind(0)))
        torch._foreach_copy_(own, list(new.unbind(0)))


def cosine_top_project_(
    grads: Tensors,
    indices: Tensors,
    sources: Tensors,
    finite: Tensors,
    usable: Tensors,
    outs: Tensors,
    plan: Tensors,
    basis: str,
    ranking: str,
) -> None:
    """Scores, the indices of the largest, and their coefficients: the gradients twice."""
    scores = cosine_scores(grads, plan, basis, ranking)
    top_rows_(scores, indices, sources, finite, usable)
    cosine_project_(grads, indices, outs, plan, basis)


def _told_(scores: Tensor, finite: Tensors, usable: Tensors) -> Tensor:
    """Write whether sums of ``scores (k, m)`` are finite, and not 0 either: ``(k, 1)``."""
    total = scores.sum(1)
    fine = total < math.inf
    moves = fine & (total > 0)
    torch._foreach_copy_(list(finite), list(fine.unbind(0)))
    torch._foreach_copy_(list(usable), list(moves.unbind(0)))
    return moves.unsqueeze(1)
