"""GaLore: what the subspace does not see is dropped."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from lowrank_optim.residuals.base import Forgetful, Measured, ResidualInputs
from lowrank_optim.subspaces.terms import Term, Wants
from lowrank_optim.tensors.matrix import MatrixView
from lowrank_optim.tensors.state import State


class Drop(Forgetful):
    """GaLore: what the subspace does not see is not used."""

    wants: ClassVar[Wants] = "nothing"

    def init(self, view: MatrixView, like: Tensor) -> State:
        """Nothing."""
        return {}

    def after(
        self, state: State, seen: ResidualInputs, measured: Measured | None = None
    ) -> Term | None:
        """Nothing."""
        return None
