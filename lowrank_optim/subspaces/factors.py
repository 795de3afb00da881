"""Singular triplets that depend on the matrix alone, and the drawing of some of them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.linalg import LinAlgError

from lowrank_optim.ops.devices import sent

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
    later[chosen] = 0
    return later.sort(stable=True).indices


def unit(x: Tensor, norm: Tensor | None = None) -> Tensor:
    """Rows of length 1; ``norm (..., r, 1)`` is what they have, if not all of them is here."""
    if norm is None:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / norm.clamp(min=torch.finfo(x.dtype).tiny)


def stepped(x: Tensor, direction: Tensor, lr: float, across: Tensor | None = None) -> Tensor:
    """Rows moved and of length 1 again; one that does not move keeps its bits.

    Args:
        x: rows ``(..., r, n)``.
        direction: of each.
        lr: how far.
        across: of rows of which others have columns, ``(2, ..., r)``: the square of the length
            after the move, and 0 where none of the row moves.
    """
    step = direction.to(x.dtype) * lr
    if across is None:
        return torch.where((step != 0).any(-1, keepdim=True), unit(x - step), x)
    squares, moves = across.unsqueeze(-1)
    return torch.where(moves != 0, unit(x - step, squares.sqrt().to(x.dtype)), x)


def triplets(
    w: Tensor, previous: tuple[Tensor, Tensor] | None, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """``u (k, m), s (k,), v (k, n)``: ``W = u^T diag(s) v``, s descending, rows orthonormal.

    Singular vectors are not unique: signs are free, vectors of equal singular values turn freely
    among themselves, and those of zero are any completion. All of these are fixed here as functions
    of the spaces that W does determine, so that drivers, devices and ranks agree: signs by the
    largest entry of u, equal ones by fixed Gaussian vectors, and the completion by the previous
    null vectors where there are any. What is within rounding of zero is set to zero.

    Args:
        w: ``(m, n)`` in at least float32.
        previous: u and v of the last factorisation, the least important last.
        generator: of the Gaussian vectors.

    Raises:
        LinAlgError: no factorisation took the matrix.
    """
    if w.is_meta:  # nothing to factor, and shapes are all that anybody asks for
        k = min(w.shape)
        return w.new_empty(k, w.shape[0]), w.new_empty(k), w.new_empty(k, w.shape[1])
    u, s, v = _svd(w)
    eps = torch.finfo(w.dtype).eps
    top = float(s[0])
    full = int((s > 4 * max(w.shape) ** 0.5 * eps * top).sum())
    for start, stop in _clusters(s[:full].tolist(), 8 * eps * top):
        turn = _canonical(u[:, start:stop].mT @ _gaussian(u, stop - start, generator))
        u[:, start:stop] = u[:, start:stop] @ turn
        v[:, start:stop] = v[:, start:stop] @ turn
    s[full:] = 0
    for i, x in enumerate((u, v)):
        old = None if previous is None else previous[i][full:].to(x.dtype).mT
        x[:, full:] = _complete(x[:, :full], x.shape[1] - full, old, generator)
    peak = u.gather(0, u.abs().argmax(0, keepdim=True))
    signs = torch.where(peak < 0, -1.0, 1.0).to(u.dtype)
    signs[:, full:] = 1
    return (u * signs).mT.contiguous(), s, (v * signs).mT.contiguous()


def _svd(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``U (m, k), s, V (n, k)``: in the dtype of w, else in float64, else by the Gram matrix."""
    if not bool(w.isfinite().all()):
        raise LinAlgError("the matrix is not finite")
    for attempt in (w, w.double()):
        try:
            u, s, vh = torch.linalg.svd(attempt, full_matrices=False)
        except LinAlgError:
            continue
        if all(bool(x.isfinite().all()) for x in (u, s, vh)):
            return u.to(w.dtype), s.to(w.dtype), vh.mT.to(w.dtype).contiguous()
    x = w.double() if w.shape[0] <= w.shape[1] else w.double().mT
    values, vectors = torch.linalg.eigh(x @ x.mT)
    u, s = vectors.flip(-1), values.flip(-1).clamp(min=0).sqrt()
    s = torch.where(s > 1e-7 * s[0], s, 0.0)  # the square root of what eigh resolves
    v = x.mT @ (u / torch.where(s > 0, s, 1.0))
    u, v = (u, v) if w.shape[0] <= w.shape[1] else (v, u)
    return u.to(w.dtype), s.to(w.dtype), v.to(w.dtype)


def _clusters(s: list[float], tolerance: float) -> Iterator[tuple[int, int]]:
    """Runs of two or more values that differ from their neighbours by no more than rounding."""
    start = 0
    for stop in range(1, len(s) + 1):
        if stop == len(s) or s[stop - 1] - s[stop] > tolerance:
            if stop - start > 1:
                yield start, stop
            start = stop


def _gaussian(like: Tensor, count: int, generator: torch.Generator) -> Tensor:
    shape = like.shape[0], count
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(like)


def _canonical(x: Tensor) -> Tensor:
    """Q of ``x = Q R`` with the diagonal of R positive, which makes it unique."""
    q: Tensor
    q, r = torch.linalg.qr(x)
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0).to(q)


def _complete(basis: Tensor, count: int, old: Tensor | None, generator: torch.Generator) -> Tensor:
    """``count`` orthonormal columns orthogonal to ``basis``: the old ones, as far as they are."""

    def remainder(x: Tensor) -> Tensor:
        for _ in range(2):  # once leaves rounding of the size of what it removed
            x = x - basis @ (basis.mT @ x)
        return x

    if count == 0:
        return basis[:, :0]
    rest = None if old is None else remainder(old)
    if rest is None or float(torch.linalg.qr(rest, mode="r").R.diagonal().abs().min()) < 1e-3:
        rest = remainder(_gaussian(basis, count, generator))
    return _canonical(remainder(_canonical(rest)))  # twice, as rest may be ill-conditioned
