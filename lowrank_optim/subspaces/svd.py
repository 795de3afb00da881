"""The exact basis: leading singular vectors of the gradient, as GaLore was published."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.linalg import LinAlgError

from lowrank_optim.ops.devices import on_accelerator
from lowrank_optim.subspaces.base import register
from lowrank_optim.subspaces.projector import Projector
from lowrank_optim.subspaces.refresh import RefreshContext
from lowrank_optim.subspaces.searches import Ask, Searching


@register("svd")
@dataclass(frozen=True)
class SVD(Projector):
    """Leading left singular vectors of the gradient, by a full factorisation (slow, exact)."""

    fitted: ClassVar[bool] = True

    def find(self, grad: Tensor, previous: Tensor | None, ctx: RefreshContext) -> Tensor:
        """``U[:, :r]`` of ``G = U S V^T``; the factorisation never runs below float32."""
        return left_singular_vectors(widened(grad))[..., : self.rank]

    def searching(
        self, grad: Tensor, previous: Tensor | None, ctx: RefreshContext
    ) -> Searching[Tensor]:
        """The same, of all equal matrices in one call: the host waits for its status once."""
        found = yield from exact(widened(grad))
        return found[..., : self.rank]


def exact(x: Tensor) -> Searching[Tensor]:
    """:func:`left_singular_vectors`; one that does not converge leaves the call to the others.

    Of tall matrices as right ones of wide ones: both sides of a matrix share a call.
    """
    tall = x.shape[-2] > x.shape[-1]
    try:
        u, v = yield Ask(_driven, (x.mT if tall else x,))
    except LinAlgError:
        return left_singular_vectors(x)
    found: Tensor = v if tall else u
    return found


def _driven(x: Tensor) -> tuple[Tensor, Tensor]:
    """``U (..., m, k)`` and ``V (..., n, k)``, with k the smaller side."""
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    return u, vh.mT


def widened(grad: Tensor) -> Tensor:
    """In at least float32."""
    return grad.to(torch.promote_types(grad.dtype, torch.float32))


def left_singular_vectors(x: Tensor) -> Tensor:
    """``U (..., m, min(m, n))`` of ``x (..., m, n)``, singular values descending.

    A factorisation that does not converge, or returns something that is not finite, is tried again
    in float64 and then through the Gram matrix, whose eigenvectors a symmetric solver finds where
    the SVD driver gives up. On an accelerator torch reads the driver's status, and nothing else is
    looked at.

    Raises:
        LinAlgError: all three failed.
    """
    for attempt in (x, x.double()):
        try:
            u, _ = _driven(attempt)
        except LinAlgError:
            continue
        if on_accelerator(u) or bool(u.isfinite().all()):
            return u.to(x.dtype)
    x64 = x.double()
    vectors: Tensor = torch.linalg.eigh(x64 @ x64.mT).eigenvectors.flip(-1)
    return vectors[..., : min(x.shape[-2:])].to(x.dtype)
