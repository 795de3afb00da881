"""SwitchLoRA with the factors as parameters of their own, and W0 held beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.linalg import LinAlgError

from lowrank_optim import ops
from lowrank_optim.ops.devices import on_accelerator, sent
from lowrank_optim.subspaces.base import State
from lowrank_optim.subspaces.lora import balanced
from lowrank_optim.subspaces.pooled import SIDES
from lowrank_optim.subspaces.refresh import RefreshContext
from lowrank_optim.subspaces.searches import Ask, Searching
from lowrank_optim.subspaces.switched import Switched
from lowrank_optim.subspaces.target import Target
from lowrank_optim.subspaces.terms import Term
from lowrank_optim.tensors.matrix import MatrixView


class First(Protocol):
    """One of the ranks that have the whole of some factors: what it computes all have."""

    @property
    def here(self) -> bool:
        """Whether this rank is that one."""

    def tell(self, tensors: Sequence[Tensor], error: LinAlgError | None) -> list[Tensor]:
        """What the first rank has, on every rank; of others shapes alone count.

        Args:
            tensors: as they are after, or if that failed before.
            error: why it failed, on the first rank.

        Raises:
            LinAlgError: it failed, on all hosts. On an accelerator all go on with what was before.
        """


@dataclass(frozen=True)
class SwitchedFactors(Switched):
    r""":class:`Switched` of a module: A and B are trained as they are, and a switch moves W0.

    The state handed in holds, besides its own, ``basis_A`` and ``basis_B`` (the parameters) and
    ``grad_A`` and ``grad_B`` (their gradients, B's transposed); the weight of the step is W0.

    Args:
        outputs: which of the outputs W0 has here, where others have more; None for all.
        inputs: which of the inputs.
        first: the rank that factors for all; None where the factors are on this rank alone.
    """

    moves_weights: ClassVar[bool] = True

    outputs: tuple[int, int] | None = None
    inputs: tuple[int, int] | None = None
    first: First | None = field(default=None, compare=False, repr=False)

    def _cut(self, x: Tensor, name: str) -> Tensor:
        """Of rows as long as those of A or of B transposed, what belongs to the part of W0."""
        here = self.inputs if name == "A" else self.outputs
        return x if here is None else x[..., here[0] : here[1]]

    def init(self, view: MatrixView, param: Tensor) -> State:
        """As of :class:`Switched`, without factors."""
        state = super().init(view, param)
        return {k: v for k, v in state.items() if not k.startswith("basis_")}

    def _start_factors_(self, state: State) -> None:
        """They were made with the module, and have a gradient already."""

    def balancing_(self, state: State) -> Searching[None]:
        """The gradients were taken at the old factors, and turn with them."""
        names = [f"{kind}_{side}" for kind in ("basis", "grad") for side in SIDES]
        a, b, *grads = (state[name] for name in names)
        grads = [grad.to(x.dtype) for grad, x in zip(grads, (a, b), strict=True)]
        new, error = [a, b, *grads], None
        if self.first is None or self.first.here:
            try:
                own = (yield Ask(balanced, (a, b))) if on_accelerator(a) else balanced(a, b)
            except LinAlgError as failed:
                if self.first is None:
                    raise
                error = failed
            else:
                new = [*own[:2], *(t @ grad for t, grad in zip(own[2:], grads, strict=True))]
        if self.first is not None:
            new = self.first.tell(new, error)
        a.copy_(new[0])
        b.copy_(new[1])
        state.update(zip(names[2:], new[2:], strict=True))

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
        name, counterpart = SIDES[side], SIDES[1 - side]
        factor, other = state[f"basis_{name}"], state[f"basis_{counterpart}"]
        index = sent(torch.tensor(slots), factor.device)
        before = factor[index]
        super()._exchange_(state, side, slots, old, new, ctx)
        assert ctx.param is not None
        weight = self.natural(ctx.param)
        weight = weight.mT if side else weight
        ops.lift_add_(
            weight,
            self._cut(other[index], counterpart).mT,
            self._cut(before - factor[index], name),
            None,
            1.0,
            self.s,
            None,
        )

    def coords(self, state: State, grad: Tensor) -> dict[str, Tensor]:
        """Gradients of A and of B transposed, zero where frozen; the parameters' own stay."""
        low = {}
        for side in SIDES:
            low[side] = state[f"grad_{side}"].to(state[f"basis_{side}"].dtype).clone()
        self.still_([state], [low])
        return low

    def push_(
        self, into: Target, state: State, update: dict[str, Tensor], term: Term | None
    ) -> None:
        """Step both factors; W0 only if decay acts on the weight, which it is a part of."""
        news, _ = self._stepped([into], [state], [update], None)
        decay = into.guarded_decay() if self.decay_on == "weight" else 1.0
        if isinstance(decay, Tensor) or decay != 1:
            weight = self.natural(into.param)
            left = self._cut(state["basis_B"], "B").mT * (decay - 1)
            ops.lift_add_(
                weight,
                left,
                self._cut(state["basis_A"], "A"),
                None,
                decay,
                self.s,
                None if into.rounding is None else self.natural(into.rounding),
            )
        self.keep_([state], news)
