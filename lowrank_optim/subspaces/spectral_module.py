"""Spectral factors that are a module's own parameters: there is no weight to read or write."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_optim.subspaces.base import State
from lowrank_optim.subspaces.refresh import RefreshContext
from lowrank_optim.subspaces.spectral import Spectral, of_all
from lowrank_optim.subspaces.target import Target
from lowrank_optim.subspaces.terms import Term
from lowrank_optim.tensors.matrix import MatrixView

GRADIENTS = ("grad_u", "grad_v", "grad_s")
"""Keys of the factors' gradients, beside the state."""


class FactorView(MatrixView):
    """The matrix that a layer's factors multiply to; what is viewed is a factor and stays so."""

    def of(self, x: Tensor) -> Tensor:
        """``x``."""
        return x


@dataclass(frozen=True)
class SpectralModule(Spectral):
    """Factors and gradients are a module's, the state beside them the optimizer's.

    The module came with its first factorisation, so the state begins after it.
    """

    @property
    def stepped_keys(self) -> tuple[str, ...]:
        """State keys of the factors that a step reads or writes where no iteration begins."""
        used = ("basis_u", "basis_v", "basis_s", "basis_order")
        return (*used, "basis_u_rest") if self.negative == "flip" else used

    def init(self, view: MatrixView, param: Tensor) -> State:
        """Counters alone."""
        return {
            "host.iteration": torch.ones((), dtype=torch.float32),
            "refresh_step": torch.zeros((), dtype=torch.float32),
        }

    def weight(self, state: State, ctx: RefreshContext) -> Tensor:
        """It exists while a round begins."""
        values = state["basis_s"].unsqueeze(-1)
        return self.in_order(state, "u").mT @ (values * self.in_order(state, "v"))

    def coords(self, state: State, grad: Tensor) -> dict[str, Tensor]:
        """The module's gradients, copied: they may be turned by ``maximize``."""
        gu, gv, gs = (state[key].clone() for key in GRADIENTS)
        return {"u": gu, "s": gs.unsqueeze(-2), "v": gv}

    def push_(
        self, into: Target, state: State, update: dict[str, Tensor], term: Term | None
    ) -> None:
        """The factors alone."""
        values = self.values([state], [update], into.lr, of_all(into.guarded_decay()))
        self.keep_([state], self.vectors([state], [update], into.lr, values, None), values)
