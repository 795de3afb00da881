"""Bases that ignore the gradient: uniform on the Stiefel manifold, or of normal entries."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowrank_optim.ops.devices import sent
from lowrank_optim.subspaces.base import register
from lowrank_optim.subspaces.projector import Projector
from lowrank_optim.subspaces.refresh import RefreshContext
from lowrank_optim.subspaces.searches import Ask, Searching


def gaussian(like: Tensor, shape: tuple[int, ...], ctx: RefreshContext) -> Tensor:
    """Standard normal numbers, drawn on the CPU so that every device sees the same ones."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return sent(torch.randn(shape, generator=ctx.generator, dtype=dtype), like.device)


def orthogonal(x: Tensor) -> Tensor:
    """Householder's orthonormal columns of ``x (..., m, k)``."""
    q: Tensor = torch.linalg.qr(x).Q
    return q


@register("random")
@dataclass(frozen=True)
class Random(Projector):
    """Haar-random orthonormal basis; with ``keep`` its moments average over subspaces."""

    reads_grad: ClassVar[bool] = False
    takes_any: ClassVar[bool] = True

    def find(self, grad: Tensor, previous: Tensor | None, ctx: RefreshContext) -> Tensor:
        """``Q`` of the QR factorisation of a Gaussian ``(..., m, r)``."""
        return orthogonal(self._drawn(grad, ctx))

    def searching(
        self, grad: Tensor, previous: Tensor | None, ctx: RefreshContext
    ) -> Searching[Tensor]:
        """The same, of all matrices that are due."""
        found: Tensor = yield Ask(orthogonal, (self._drawn(grad, ctx),))
        return found

    def _drawn(self, grad: Tensor, ctx: RefreshContext) -> Tensor:
        return gaussian(grad, (*grad.shape[:-1], self.rank), ctx)


@dataclass(frozen=True)
class Gaussian(Random):
    """Normal entries of variance 1/r: they keep the norm of each column, on average.

    It is no orthonormal basis, and so none that a gradient is split by: ``P R`` is not the share of
    it that P sees. Hence it has no name as a projector, and a method that measures its coordinates
    alone takes it with ``scale=0``.
    """

    def find(self, grad: Tensor, previous: Tensor | None, ctx: RefreshContext) -> Tensor:
        """Drawn ``(..., m, r)``, whatever the gradient."""
        return self._drawn(grad, ctx) / math.sqrt(self.rank)

    def searching(
        self, grad: Tensor, previous: Tensor | None, ctx: RefreshContext
    ) -> Searching[Tensor]:
        """The same: there is nothing to share."""
        yield from ()
        return self.find(grad, previous, ctx)
