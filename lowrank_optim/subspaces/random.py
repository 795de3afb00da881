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


def drawn(like: Tensor, shape: tuple[int, ...], ctx: RefreshContext) -> Tensor:
    """Standard normal numbers on the host, so that those of every device are the same."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return torch.randn(shape, generator=ctx.generator, dtype=dtype)


def there(x: Tensor, device: torch.device) -> Tensor:
    """What was :func:`drawn`, on a device: as a call that matrices share, one copy for all."""
    return sent(x, device)


def orthogonal(x: Tensor) -> Tensor:
    """Householder's orthonormal columns of ``x (..., m, k)``."""
    q: Tensor = torch.linalg.qr(x).Q
    return q


def haar(x: Tensor, device: torch.device) -> Tensor:
    """:func:`orthogonal` of what was :func:`drawn`, likewise."""
    return orthogonal(sent(x, device))


def normal(x: Tensor, device: torch.device, rank: int) -> Tensor:
    """``x / sqrt(rank)`` of what was :func:`drawn`, likewise."""
    return sent(x, device) / math.sqrt(rank)


@register("random")
@dataclass(frozen=True)
class Random(Projector):
    """Haar-random orthonormal basis; with ``keep`` its moments average over subspaces."""

    reads_grad: ClassVar[bool] = False
    takes_any: ClassVar[bool] = True

    def find(self, grad: Tensor, previous: Tensor | None, ctx: RefreshContext) -> Tensor:
        """``Q`` of the QR factorisation of a Gaussian ``(..., m, r)``."""
        return haar(self._drawn(grad, ctx), grad.device)

    def searching(
        self, grad: Tensor, previous: Tensor | None, ctx: RefreshContext
    ) -> Searching[Tensor]:
        """The same, of all matrices that are due."""
        found: Tensor = yield Ask(haar, (self._drawn(grad, ctx),), (grad.device,))
        return found

    def _drawn(self, grad: Tensor, ctx: RefreshContext) -> Tensor:
        return drawn(grad, (*grad.shape[:-1], self.rank), ctx)


@dataclass(frozen=True)
class Gaussian(Random):
    """Normal entries of variance 1/r: they keep the norm of each column, on average.

    It is no orthonormal basis, and so none that a gradient is split by: ``P R`` is not the share of
    it that P sees. Hence it has no name as a projector, and a method that measures its coordinates
    alone takes it with ``scale=0``.
    """

    def find(self, grad: Tensor, previous: Tensor | None, ctx: RefreshContext) -> Tensor:
        """Drawn ``(..., m, r)``, whatever the gradient."""
        return normal(self._drawn(grad, ctx), grad.device, self.rank)

    def searching(
        self, grad: Tensor, previous: Tensor | None, ctx: RefreshContext
    ) -> Searching[Tensor]:
        """The same, of all matrices that are due."""
        options = grad.device, self.rank
        found: Tensor = yield Ask(normal, (self._drawn(grad, ctx),), options)
        return found
