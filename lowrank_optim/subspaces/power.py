"""A basis that follows the gradient: one step of a block power iteration at each refresh."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_optim import ops
from lowrank_optim.subspaces.projector import Projector
from lowrank_optim.subspaces.random import orthogonal
from lowrank_optim.subspaces.refresh import RefreshContext
from lowrank_optim.subspaces.searches import Ask, Searching
from lowrank_optim.subspaces.svd import exact, left_singular_vectors, widened


@dataclass(frozen=True)
class PowerIteration(Projector):
    r"""LDAdam's basis: :math:`P \leftarrow \mathrm{qr}(B B^T P)`, from the basis in use.

    B is the gradient, with the lifted first moment mixed into it: see :attr:`blend`. The first
    basis is that of leading singular vectors.

    Args:
        rho: share of the first moment in B.

    References:
        Robert et al. (2024), arXiv:2410.16103.
    """

    rho: float = 0.0

    @property
    def blend(self) -> float:
        """ρ."""
        return self.rho

    def find(self, grad: Tensor, previous: Tensor | None, ctx: RefreshContext) -> Tensor:
        """One product with ``B B^T``, made orthonormal by Householder's reflections."""
        if previous is None:
            return left_singular_vectors(widened(grad))[..., : self.rank]
        return orthogonal(_applied(grad, previous))

    def searching(
        self, grad: Tensor, previous: Tensor | None, ctx: RefreshContext
    ) -> Searching[Tensor]:
        """The same, of all matrices that are due."""
        if previous is None:
            first = yield from exact(widened(grad))
            return first[..., : self.rank]
        found: Tensor = yield Ask(orthogonal, (_applied(grad, previous),))
        return found


def _applied(grad: Tensor, basis: Tensor) -> Tensor:
    """``B B^T P``, of a B of norm one: squares neither overflow nor vanish."""
    norm = ops.matrix_norm(grad)
    norm = torch.where(norm > 0, norm, 1)
    q = basis.to(torch.promote_types(basis.dtype, torch.float32))
    return ops.mixed_matmul(grad, ops.mixed_matmul((q / norm).mT, grad).mT) / norm
