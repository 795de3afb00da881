"""The default basis: randomized SVD, started from the basis in use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.linalg import LinAlgError

from lowrank_optim import ops
from lowrank_optim.ops.devices import on_accelerator
from lowrank_optim.subspaces.base import register
from lowrank_optim.subspaces.projector import Projector, drawn_there, replaced, usable
from lowrank_optim.subspaces.random import drawn, orthogonal, there
from lowrank_optim.subspaces.refresh import RefreshContext
from lowrank_optim.subspaces.searches import Ask, Searching, alone
from lowrank_optim.subspaces.svd import exact, left_singular_vectors, widened


@register("rsvd")
@dataclass(frozen=True)
class RandomizedSVD(Projector):
    r"""Leading singular vectors by block power iteration on a sketch of r + oversample columns.

    One iteration reads the gradient twice and gives two energies, as fractions of the whole:

    .. math::
        Y = G G^T Q, \qquad S = Q^T Y = L L^T, \qquad Z = Y L^{-T} = G V, \qquad
        Z^T Z = U \Sigma^2 U^T, \qquad Q \leftarrow Z U \Sigma^{-1}

    with V orthonormal, so that the trace of S over the leading r columns is what the old basis
    captures, and the sum of the leading r of :math:`\Sigma^2` no more than what the new one does.
    It stops when a half step gains less than half the tolerance, or when less than the tolerance
    is left to gain, which on gradients of real text one iteration reaches, warm or cold.
    The first start is Gaussian.

    An accelerator is not asked for these energies: it takes two iterations, four from a Gaussian
    start, and tries all shifts of a factorisation at once. Its host waits once, for the status of
    the last step's ``eigh``, which torch reads: one call for all equal matrices.

    Args:
        oversample: columns beyond the rank, so that a direction can enter the basis.
        tolerance: relative gain in captured energy below which the iteration stops.
        max_iterations: bound on the iterations of one refresh.

    References:
        Halko, Martinsson, Tropp (2011), arXiv:0909.4061, algorithm 4.4; Fukaya et al. (2020),
        arXiv:1809.11085, on shifted Cholesky QR.
    """

    fitted: ClassVar[bool] = True
    takes_any: ClassVar[bool] = True

    oversample: int = 8
    tolerance: float = 0.01
    max_iterations: int = 8

    def find(self, grad: Tensor, previous: Tensor | None, ctx: RefreshContext) -> Tensor:
        """Singular vectors of a sketch, largest first; exact where a sketch would not be thin."""
        if on_accelerator(grad):
            return alone(self.searching(grad, previous, ctx))
        if self._width < min(grad.shape[-2:]):
            more = there(self._drawn(grad, previous, ctx), grad.device)
            start = self._start(more, previous)
            start = orthogonal(start) if previous is None else start
            try:
                basis = self._iterate(grad, start)
            except LinAlgError:  # the exact factorisation below has fall-backs of its own
                basis = start.new_full((), torch.nan)
            if bool(basis.isfinite().all()):
                return basis
        return left_singular_vectors(widened(grad))[..., : self.rank]

    @property
    def _width(self) -> int:
        """Columns of a sketch."""
        return self.rank + self.oversample

    def _drawn(self, grad: Tensor, previous: Tensor | None, ctx: RefreshContext) -> Tensor:
        """What a search starts from beside the basis in use, on the host."""
        known = 0 if previous is None else self.rank
        return drawn(grad, (*grad.shape[:-1], self._width - known), ctx)

    def _start(self, more: Tensor, previous: Tensor | None) -> Tensor:
        """``(..., m, r + oversample)``: the basis in use and some directions ``more``."""
        if previous is None:
            return more
        # no need to orthonormalise: S takes care of any full-rank start
        return torch.cat([previous.to(more.dtype), more / more.shape[-2] ** 0.5], -1)

    def _iterate(self, grad: Tensor, q: Tensor) -> Tensor:
        norm = ops.matrix_norm(grad)
        left = self.tolerance / 2  # of each half of an iteration
        captured = norm.new_zeros(norm.shape[:-2])
        for _ in range(self.max_iterations):
            sketch = ops.mixed_matmul((q / norm).mT, grad)  # (..., width, n), of norm <= 1
            before = sketch[..., : self.rank, :].square().sum((-2, -1))
            if bool((before <= (1 + left) * captured).all()):
                break
            y = ops.mixed_matmul(grad, sketch.mT) / norm
            z = whiten(y, q)
            values, vectors = eigh(z.mT @ z)
            captured = values[..., -self.rank :].sum(-1)
            q = unit_columns(z @ vectors.flip(-1))
            if bool(((captured <= (1 + left) * before) | (captured >= 1 - self.tolerance)).all()):
                break
        return orthonormal(q[..., : self.rank])

    def searching(
        self, grad: Tensor, previous: Tensor | None, ctx: RefreshContext
    ) -> Searching[Tensor]:
        """As many iterations whatever they gain; the start where a gradient is zero or not finite.

        Factors of the last iteration alone are made singular vectors: before, any basis of the
        same directions does, and Cholesky's is found without waiting.
        """
        norm = ops.matrix_norm(grad)
        known, cold = usable(norm), previous is None
        if self._width >= min(grad.shape[-2:]):
            # a driver must not be given what is not finite
            full = yield from exact(replaced(widened(grad), known, ctx))
            return full[..., : self.rank]
        more = yield Ask(there, (self._drawn(grad, previous, ctx),), (grad.device,))
        start = self._start(more, previous)
        del more  # a part of what all have, which would stay as long
        if cold:
            start = yield Ask(orthonormal_start, (start,))
        q, norm = start, torch.where(known, norm, 1)
        for left in range(min(self.max_iterations, ITERATIONS[cold]) - 1, -1, -1):
            sketch = ops.mixed_matmul((q / norm).mT, grad)
            y = ops.mixed_matmul(grad, sketch.mT) / norm
            if left:
                q = yield Ask(next_start, (y, q))
        # small matrices alone are factored while a host waits: sketches of both sides share that
        z, gram = yield Ask(_sketched, (y, q))
        del y, q  # each is as large as a basis
        _, vectors = yield Ask(eigh, (gram,))
        del gram
        q = yield Ask(last_basis, (z, vectors), (self.rank,))
        return torch.where(known, q, start[..., : self.rank])


ITERATIONS = {False: 2, True: 4}
"""Power iterations on an accelerator: from the basis in use, and from a Gaussian start."""
NEAR = 0.5
"""Below it in norm, what a Gram matrix differs from the identity by leaves Cholesky a factor."""
OWN = 0.7
"""Length that a column of length one keeps when it is whitened, if what it has outside of those
before it is more than the shift."""
FILLING = 0x9E3779B9
"""Seed of the noise that takes the place of columns without a direction."""
SHIFTS = 4
"""Shifts by which a matrix is made definite, each ten times the one before."""


def next_start(y: Tensor, q: Tensor) -> Tensor:
    """Where the next iteration starts from ``Y = G G^T Q``: a basis of the same directions."""
    z = whiten(y, q)
    return whiten(z, z)


def _sketched(y: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """``Z``, and ``Z^T Z`` as LAPACK takes it, where it is finite."""
    z = whiten(y, q)
    gram = z.mT @ z
    size = torch.linalg.matrix_norm(gram)[..., None, None]
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    # of numbers near the least of their format LAPACK makes NaN; these are less than its rounding
    gram = torch.where(gram.abs() > torch.finfo(gram.dtype).eps ** 2 * size, gram, 0)
    return z, torch.where(size < torch.inf, gram, eye)  # NaN is not


def last_basis(z: Tensor, vectors: Tensor, rank: int) -> Tensor:
    """The leading singular vectors ``(..., m, r)`` that an iteration has found, as ``Q``.

    Columns that lie in those before them have no direction of their own, as beyond the rank of a
    gradient: noise takes their place. So Cholesky's factor serves whatever the gradient, and nobody
    has to look whether it does.
    """
    x = unit_columns(z @ vectors.flip(-1))[..., :rank]
    x = unit_columns(x)  # squares of the smallest are less than any number: they got too long
    x = whiten(x, x)
    empty = torch.linalg.vector_norm(x, dim=-2, keepdim=True) < OWN  # NaN is not, and stays
    x = torch.where(empty, drawn_there(x, x.shape[-2:], FILLING) / x.shape[-2] ** 0.5, x)
    x = whiten(x, x)
    factor, _ = torch.linalg.cholesky_ex(x.mT @ x)
    last: Tensor = torch.linalg.solve_triangular(factor.mT, x, upper=True, left=False)
    return last


def orthonormal_start(x: Tensor) -> Tensor:
    """Orthonormal columns of normal numbers ``x (..., m, k)``.

    By Cholesky where they are far from square, and so well conditioned.
    """
    if x.shape[-2] < 2 * x.shape[-1]:
        return orthogonal(x)
    x = whiten(x, x)
    return whiten(x, x)


def eigh(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and vectors of a symmetric matrix; float64 if float32 fails."""
    try:
        values, vectors = torch.linalg.eigh(gram)
    except LinAlgError:
        values, vectors = torch.linalg.eigh(gram.double())
    return values.to(gram.dtype), vectors.to(gram.dtype)


def whiten(y: Tensor, q: Tensor) -> Tensor:
    """``Y L^-T`` with ``Q^T Y = L L^T``, shifted by rounding error so that it is definite.

    Args:
        y: what is to be whitened.
        q: the other side of the Gram matrix. It is made here, as what a caller makes for a call may
            stay until that returns: it does where torch.compile watches frames.
    """
    gram = q.mT @ y
    gram = (gram + gram.mT) / 2
    info = torch.finfo(gram.dtype)
    shift = info.eps * gram.diagonal(dim1=-2, dim2=-1).sum(-1) + info.tiny
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    if on_accelerator(y):
        factor = _first_factor(gram, shift)
    else:
        for _ in range(SHIFTS):
            factor, failed = torch.linalg.cholesky_ex(gram + shift[..., None, None] * eye)
            if not bool(failed.any()):
                break
            shift = shift * 10
    white: Tensor = torch.linalg.solve_triangular(factor.mT, y, upper=True, left=False)
    return white


def _first_factor(gram: Tensor, shift: Tensor) -> Tensor:
    """Cholesky's factor with the least of all shifts that gives one, chosen on the device."""
    tries = torch.arange(SHIFTS, dtype=gram.dtype, device=gram.device)
    tries = tries.view(SHIFTS, *[1] * (gram.dim() - 1))
    shifted = gram.repeat(SHIFTS, *[1] * gram.dim())
    shifted.diagonal(dim1=-2, dim2=-1).add_(shift[..., None] * 10.0**tries)
    factors, failed = torch.linalg.cholesky_ex(shifted)
    at = (failed != 0).sum(0, keepdim=True).clamp_(max=SHIFTS - 1)
    factor: Tensor = factors.gather(0, at[..., None, None].expand(1, *gram.shape)).squeeze(0)
    return factor


def orthonormal(x: Tensor) -> Tensor:
    """Orthonormal columns spanning those of ``x (..., m, r)``, which are nearly orthogonal.

    Cholesky QR: half the time of Householder's. One round leaves an error of eps times the squared
    condition of ``x``, so it is repeated until ``x`` was well conditioned; Householder takes over
    where a factor does not exist, as beyond the rank of a gradient.
    """
    x = unit_columns(x)
    for _ in range(3):
        gram = x.mT @ x
        factor, failed = torch.linalg.cholesky_ex(gram)
        if bool(failed.any()):
            break
        x = torch.linalg.solve_triangular(factor.mT, x, upper=True, left=False)
        if bool((_error(gram) < NEAR).all()):
            return x
    return orthogonal(x)


def _error(gram: Tensor) -> Tensor:
    """How far a Gram matrix is from the identity, in norm."""
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    found: Tensor = torch.linalg.matrix_norm(gram - eye)
    return found


def unit_columns(x: Tensor) -> Tensor:
    """``x (..., m, r)`` with columns of length one, or zero."""
    return torch.nn.functional.normalize(x, dim=-2, eps=torch.finfo(x.dtype).tiny)
