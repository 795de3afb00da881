"""Singular triplets that depend on the matrix alone, and the drawing of some of them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.linalg import LinAlgError

from lowrank_optim.ops.devices import on_accelerator, sent
from lowrank_optim.ops.noise import hash32
from lowrank_optim.ops.tiles import TILE_ELEMENTS
from lowrank_optim.subspaces.searches import Ask, Searching

SAMPLING = ("mixed", "multinomial", "uniform", "sequential", "topr")
"""How singular vectors are chosen, see :func:`sample`."""


def sample(how: str, s: Tensor, rank: int, iteration: int, noise: Tensor) -> Tensor:
    r"""Indices of ``rank`` singular values, distinct and ascending.

    =============== ================================================================
    ``mixed``       drawn with weights ``(1/k + s_i / sum s) / 2``
    ``multinomial`` drawn with weights ``s_i``; zero ones only when no others are left
    ``uniform``     drawn, all alike
    ``sequential``  the next ``rank`` in turn
    ``topr``        the largest
    =============== ================================================================

    Drawn means one after the other without replacement: the ``rank`` largest of ``p_i / e_i`` with
    ``e_i`` exponential.

    Args:
        how: one of the above.
        s: singular values ``(k,)``, not negative.
        rank: how many.
        iteration: number of the iteration, for ``sequential``.
        noise: ``(k,)`` exponential variates, of the host.
    """
    k, s = s.numel(), s.double()
    if how == "sequential":
        return sent(torch.sort((iteration * rank + torch.arange(rank)) % k).values, s.device)
    if how == "topr":
        keys = s
    else:
        total = s.sum()
        share, noise = torch.where(total > 0, s / total, 1 / k), sent(noise, s.device)
        every = {"mixed": (share + 1 / k) / 2, "multinomial": share, "uniform": torch.ones_like(s)}
        share = every[how]
        keys = torch.where(share > 0, share / noise, -noise)
    chosen = torch.sort(keys, descending=True, stable=True).indices[:rank]
    return torch.sort(chosen).values


def order_of(chosen: Tensor, k: int) -> Tensor:
    """The chosen indices, then all others, both ascending."""
    later = torch.ones(k, dtype=torch.uint8, device=chosen.device)
    later.index_fill_(0, chosen, 0)  # an accelerator would get the number of `later[chosen] = 0`
    return later.sort(stable=True).indices


def unit(x: Tensor) -> Tensor:
    """Rows of length 1."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    found: Tensor = x / norm.clamp(min=torch.finfo(x.dtype).tiny)
    return found


Old = tuple[()] | tuple[Tensor, Tensor]
"""u ``(..., k, m)`` and v ``(..., k, n)`` of the last factorisation, the least important last."""


def triplets(w: Tensor, previous: Old = ()) -> tuple[Tensor, Tensor, Tensor]:
    """``u (k, m), s (k,), v (k, n)``: ``W = u^T diag(s) v``, s descending, rows orthonormal.

    Singular vectors are not unique: signs are free, vectors of equal singular values turn freely
    among themselves, and those of zero are any completion. All of these are fixed here as functions
    of the spaces that W does determine, so that drivers, devices and ranks agree: signs by the
    largest entry of u, equal ones by vectors that are the same everywhere, and the completion by
    the previous null vectors where there are any. What is within rounding of zero is set to zero.

    Args:
        w: ``(m, n)`` in at least float32, on the host.
        previous: what completes it (default: as equal ones).

    Raises:
        LinAlgError: no factorisation took the matrix.
    """
    return settled(*_svd(w), *previous)


def triplets_of(w: Tensor, previous: Old = ()) -> Searching[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """:func:`triplets` of ``w (..., m, n)`` on an accelerator, and whether they are.

    Its host waits once for all equal matrices, for the status that torch reads. The flag ``()``
    stays on the device: it is False where W, or what was found, is not finite.
    """
    fine = w.isfinite().all()
    w = torch.where(fine, w, 0.0)
    try:
        found = yield Ask(_driven, (w,))
    except LinAlgError:
        found = tuple(torch.stack(own) for own in zip(*map(_gave_up, _matrices(w)), strict=True))
        found = tuple(x.unflatten(0, w.shape[:-2]) if w.dim() > 2 else x[0] for x in found)
    u, s, v = yield Ask(settled, (*found, *previous))
    for x in (u, s, v):
        fine = fine & x.isfinite().all()
    return u, s, v, fine


def settled(u: Tensor, s: Tensor, v: Tensor, *previous: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Any factors ``(..., m, k), (..., k), (..., n, k)`` as the ones of :func:`triplets`.

    A host leaves out what no value asks for; an accelerator does all of it without a look.
    """
    eps, top = torch.finfo(s.dtype).eps, s[..., :1]
    known = s > 4 * max(u.shape[-2], v.shape[-2]) ** 0.5 * eps * top
    close = (s[..., :-1] - s[..., 1:] <= 8 * eps * top) & known[..., 1:]
    if _perhaps(close):
        u, v = _turned(u, v, close)
    if _perhaps(~known):
        old_u, old_v = [x.to(u.dtype).mT for x in previous] if previous else (None, None)
        u, v = _completed(u, known, old_u, 1), _completed(v, known, old_v, 2)
        s = torch.where(known, s, 0.0)
    peak = u.gather(-2, u.abs().argmax(-2, keepdim=True))
    signs = torch.where((peak < 0) & known.unsqueeze(-2), -1.0, 1.0).to(u.dtype)
    return (u * signs).mT.contiguous(), s, (v * signs).mT.contiguous()


def _perhaps(x: Tensor) -> bool:
    """Whether any is True, or nobody may look."""
    return on_accelerator(x) or bool(x.any())


def _matrices(x: Tensor) -> Iterable[Tensor]:
    return x.reshape(-1, *x.shape[-2:]).unbind(0)


def _driven(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``U (..., m, k), s, V (..., n, k)``."""
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    return u, s, vh.mT.contiguous()


def _svd(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``U (m, k), s, V (n, k)``: in the dtype of w, else in float64, else by the Gram matrix."""
    if not bool(w.isfinite().all()):
        raise LinAlgError("the matrix is not finite")
    try:
        found = _driven(w)
    except LinAlgError:
        return _gave_up(w)
    return found if all(bool(x.isfinite().all()) for x in found) else _gave_up(w)


def _gave_up(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same where a driver gave up in the dtype of w."""
    try:
        found = tuple(x.to(w.dtype) for x in _driven(w.double()))
    except LinAlgError:
        pass
    else:
        if on_accelerator(w) or all(bool(x.isfinite().all()) for x in found):
            return found  # type: ignore[return-value]
    x = w.double() if w.shape[0] <= w.shape[1] else w.double().mT
    values, vectors = torch.linalg.eigh(x @ x.mT)
    u, s = vectors.flip(-1), values.flip(-1).clamp(min=0).sqrt()
    s = torch.where(s > 1e-7 * s[0], s, 0.0)  # the square root of what eigh resolves
    v = x.mT @ (u / torch.where(s > 0, s, 1.0))
    u, v = (u, v) if w.shape[0] <= w.shape[1] else (v, u)
    return u.to(w.dtype), s.to(w.dtype), v.to(w.dtype)


def _turned(u: Tensor, v: Tensor, close: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors of runs of singular values that differ by no more than rounding, turned alike.

    Args:
        u: ``(..., m, k)``.
        v: ``(..., n, k)``.
        close: ``(..., k - 1)``, whether a value is that of the one before.
    """
    run = F.pad((~close).long().cumsum(-1), (1, 0))
    same = run.unsqueeze(-1) == run.unsqueeze(-2)
    turn, _ = _canonical((u.mT @ _fixed(u, 0)) * same)
    several = (same.sum(-1) > 1).unsqueeze(-2)
    return torch.where(several, u @ turn, u), torch.where(several, v @ turn, v)


def _canonical(x: Tensor) -> tuple[Tensor, Tensor]:
    """Q of ``x = Q R`` with the diagonal of R positive, which makes it unique; and that."""
    q, r = torch.linalg.qr(x)
    diagonal = r.diagonal(dim1=-2, dim2=-1)
    return q * torch.where(diagonal < 0, -1.0, 1.0).to(q).unsqueeze(-2), diagonal.abs()


def _completed(x: Tensor, known: Tensor, old: Tensor | None, salt: int) -> Tensor:
    """Columns of ``x (..., m, k)`` that are not known, anew: the old ones, as far as they are left.

    Where those are lost in the others, fixed ones.
    """
    columns = known.unsqueeze(-2)
    basis = torch.where(columns, x, 0.0)

    def found(others: Tensor) -> tuple[Tensor, Tensor]:
        rest = torch.where(columns, 0.0, others)
        for _ in range(2):  # once leaves rounding of the size of what it removed
            rest = rest - basis @ (basis.mT @ rest)
        q, sizes = _canonical(basis + torch.where(columns, 0.0, rest))
        return q, ((sizes < 1e-3) & ~known).any(-1)[..., None, None]

    if old is None:
        return torch.where(columns, x, found(_fixed(x, salt))[0])
    new, lost = found(old)
    if _perhaps(lost):
        new = torch.where(lost, found(_fixed(x, salt))[0], new)
    return torch.where(columns, x, new)


def _fixed(like: Tensor, salt: int) -> Tensor:
    """Vectors ``(m, k)`` in no special position, the same on every device."""
    m, k = like.shape[-2:]
    out = like.new_empty(m * k)
    for start in range(0, m * k, TILE_ELEMENTS):
        place = torch.arange(start, min(start + TILE_ELEMENTS, m * k), device=like.device)
        out[start : start + TILE_ELEMENTS] = (hash32(place ^ (salt << 30)) >> 8) / 2.0**23 - 1
    return out.view(m, k)
