"""SwitchLoRA with the factors as parameters of their own, and W0 held beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lowrank_optim import ops
from lowrank_optim.subspaces.base import Reduce, RefreshContext, State, Target
from lowrank_optim.subspaces.lora import balance_
from lowrank_optim.subspaces.switched import SIDES, Switched
from lowrank_optim.subspaces.terms import Term
from lowrank_optim.tensors.matrix import MatrixView


@dataclass(frozen=True)
class SwitchedFactors(Switched):
    r""":class:`Switched` of a module: A and B are trained as they are, and a switch moves W0.

    The state handed in holds, besides its own, ``basis_A`` and ``basis_B`` (the parameters) and
    ``grad_A`` and ``grad_B`` (their gradients, B's transposed); the weight of the step is W0.
    """

    def init(self, view: MatrixView, param: Tensor) -> State:
        """As of :class:`Switched`, without factors."""
        state = super().init(view, param)
        return {k: v for k, v in state.items() if not k.startswith("basis_")}

    def _start_factors_(self, state: State) -> None:
        """They were made with the module, and have a gradient already."""

    def balance_(self, state: State) -> None:
        """The gradients were taken at the old factors, and turn with them."""
        turns = balance_(state["basis_A"], state["basis_B"])
        for side, turn in zip(SIDES, turns, strict=True):
            state[f"grad_{side}"] = turn @ state[f"grad_{side}"].to(turn.dtype)

    def _exchange_(
        self,
        state: State,
        side: int,
        slots: Sequence[int],
        old: Sequence[int],
        new: Sequence[int],
        ctx: RefreshContext,
    ) -> None:
        """Also ``W0 <- W0 + s b (a - c)^T``, for all vectors at once and rounded once."""
        factor, other = (state[f"basis_{name}"] for name in (SIDES[side], SIDES[1 - side]))
        index = list(slots)
        before = factor[index]
        super()._exchange_(state, side, slots, old, new, ctx)
        assert ctx.param is not None
        weight = self.natural(ctx.param)
        weight = weight.mT if side else weight
        ops.lift_add_(
            weight,
            other[index].mT,
            before - factor[index],
            None,
            1.0,
            self.s,
            None,
        )

    def coords(self, state: State, grad: Tensor, *, reduce: Reduce) -> dict[str, Tensor]:
        """Gradients of A and of B transposed, zero where frozen; the parameters' own stay."""
        low = {side: state[f"grad_{side}"].to(state[f"basis_{side}"].dtype) for side in SIDES}
        return self.thawed(state, {side: reduce(x.clone()) for side, x in low.items()})

    def push_(
        self, into: Target, state: State, update: dict[str, Tensor], term: Term | None
    ) -> None:
        """Step both factors; W0 only if decay acts on the weight, which it is a part of."""
        moved = self.moved(into, state, update)
        decay = into.guarded_decay() if self.decay_on == "weight" else 1.0
        if isinstance(decay, Tensor) or decay != 1:
            weight = self.natural(into.param)
            left = state["basis_B"].mT * (decay - 1)
            ops.lift_add_(
                weight,
                left,
                state["basis_A"],
                None,
                decay,
                self.s,
                into.rounding,
            )
        self.keep_(state, moved)
