"""FRUGAL: what the subspace does not see moves by a rule without state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from lowrank_optim.ops.devices import recording
from lowrank_optim.residuals.base import Forgetful, Measured, ResidualInputs, State
from lowrank_optim.subspaces.terms import Term
from lowrank_optim.tensors.matrix import MatrixView


@dataclass(frozen=True)
class Free(Forgetful):
    """FRUGAL: the rest of the gradient moves the weights by a rule that keeps no state.

    Args:
        kind: ``"sign"`` or ``"raw"``.
        gain: factor of its step.
    """

    kind: Literal["sign", "raw"]
    gain: float = 1.0

    def init(self, view: MatrixView, like: Tensor) -> State:
        """Nothing."""
        return {}

    def after(
        self, state: State, seen: ResidualInputs, measured: Measured | None = None
    ) -> Term | None:
        """``gain f(G - P R)``; nothing where that is rounding, of which a sign makes full steps."""
        # a step that is recorded in a graph finds no basis
        last = -1 if recording() else int(state["refresh_step"])
        fresh = last if last >= 0 and last == int(state["step"]) - 1 else None
        m, n = seen.whole or seen.grad.shape[-2:]
        if seen.subspace.complete(m, n, fresh):
            return None
        return Term(self.kind, gain=self.gain / seen.correction)
