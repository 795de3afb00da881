"""FRUGAL: what the subspace does not see moves by a rule without state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from lowrank_optim.ops.devices import recording
from lowrank_optim.ops.stacked import stacked
from lowrank_optim.residuals.base import Forgetful, Measured, ResidualInputs
from lowrank_optim.subspaces.terms import Term
from lowrank_optim.tensors.matrix import MatrixView
from lowrank_optim.tensors.state import State


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
        return self.after_all([state], [seen])[0]

    def after_all(
        self,
        states: Sequence[State],
        seen: Sequence[ResidualInputs],
        measured: Sequence[Measured] = (),
    ) -> list[Term | None]:
        """As of each; corrections that are on the device divide at once."""
        corrections = [own.correction for own in seen]
        there = [x for x in corrections if isinstance(x, Tensor)]
        gains: Sequence[float | Tensor]
        if len(there) == len(corrections):
            gains = (self.gain / stacked(there)).unbind(0)
        else:
            gains = [self.gain / x for x in corrections]
        return [self._term(*own) for own in zip(states, seen, gains, strict=True)]

    def _term(self, state: State, seen: ResidualInputs, gain: float | Tensor) -> Term | None:
        # a step that is recorded in a graph finds no basis
        last = -1 if recording() else int(state["refresh_step"])
        fresh = last if last >= 0 and last == int(state["step"]) - 1 else None
        m, n = seen.whole or seen.grad.shape[-2:]
        if seen.subspace.complete(m, n, fresh):
            return None
        return Term(self.kind, gain=gain)
