"""The first moment of a matrix in the basis that a refresh is about to replace."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lowrank_optim.engine.offload import on_device
from lowrank_optim.engine.plan import ParamPlan, State, Strategies
from lowrank_optim.engine.state import slot_key
from lowrank_optim.stores import scale_key
from lowrank_optim.subspaces.projector import new_to_old
from lowrank_optim.subspaces.refresh import BasisChange


class Momentum(NamedTuple):
    """A first moment in factors, :math:`P m Q^T`, of what is minimised."""

    mean: Tensor
    """m ``(..., r, n)``, or ``(..., r, r)``."""
    bases: tuple[Tensor, ...]
    """P, and Q where both sides are projected."""
    bias: float
    """``1 - beta^t``: how far m has come from zero."""

    def add_to_(self, x: Tensor, factor: float) -> None:
        """``x <- x + factor P m Q^T``."""
        _add_(x, self.bases, self.mean, factor)

    def add_lost_to_(
        self, x: Tensor, state: State, factor: float, moved: BasisChange | None = None
    ) -> None:
        r"""``x <- x + factor L``, what the new bases cannot hold of it.

        .. math:: L = P_{old} m Q_{old}^T - P_{new} C m D^T Q_{new}^T

        with :math:`C = P_{new}^T P_{old}` and D likewise. The new coordinates of L are zero.

        Args:
            x: the matrix, or columns of it.
            state: with the new bases.
            factor: of L.
            moved: C and D, where others have rows of a basis (default: all of both is here).
        """
        new = _bases(state)
        turns = [None, None] if moved is None else [moved.rotation, moved.right]
        left, *right = (
            new_to_old(p, old) if turn is None else turn()
            for p, old, turn in zip(new, self.bases, turns, strict=False)
        )
        kept = left @ self.mean.to(left.dtype)
        for turned in right:
            kept = kept @ turned.to(kept.dtype).mT
        self.add_to_(x, factor)
        _add_(x, new, kept, -factor)


def _add_(x: Tensor, bases: tuple[Tensor, ...], low: Tensor, factor: float) -> None:
    p, *right = (b.to(x.dtype) for b in bases)
    low = low.to(x.dtype)
    for q in right:
        low = low @ q.mT
    (x.addmm_ if x.dim() == 2 else x.baddbmm_)(p, low, alpha=factor)


def _bases(state: State) -> tuple[Tensor, ...]:
    return tuple(state[key] for key in ("basis", "basis_right") if key in state)


def momentum_of(
    item: ParamPlan, state: State, chosen: Strategies, copied: bool = False
) -> Momentum | None:
    """The first moment as it is before a step; None where there was no basis yet.

    Args:
        item: the matrix.
        state: of it.
        chosen: of its group.
        copied: whether it must outlive a refresh, which writes bases and moments in place.
    """
    if int(state["refresh_step"]) < 0:  # then a part of a state may be all that there is
        return None
    step = int(state["step"])
    assert item.subspace is not None and item.view is not None
    shape = item.subspace.coord_shapes(item.view)["low"]
    n, slot = next((n, slot) for n, slot in enumerate(chosen.rule.slots(shape)) if slot.signed)
    key = slot_key("low", slot.name)
    with on_device(item, state, chosen, [key, scale_key(key)]):
        mean = chosen.store.read(state, key, slot, shape, item.param, dense=True)
    assert isinstance(mean, Tensor)
    mean = mean[..., : shape[-1]]  # without what fills up a block
    bases = _bases(state)
    if copied:
        mean, bases = mean.clone(), tuple(x.clone() for x in bases)
    return Momentum(mean, bases, chosen.rule.biases(float(step))[n])


def sought(item: ParamPlan, state: State, grad: Tensor, chosen: Strategies) -> Tensor:
    r"""What a basis is found from: the gradient, with the first moment mixed into it if asked for.

    .. math:: B = \rho P \hat m + (1 - \rho) G
    """
    rho = 0.0 if item.subspace is None else item.subspace.blend
    held = momentum_of(item, state, chosen) if rho else None
    if held is None:
        return grad
    mixed = grad.to(torch.promote_types(grad.dtype, torch.float32)) * (1 - rho)
    sign = -1 if chosen.maximize else 1  # moments are of what is minimised
    held.add_to_(mixed, sign * rho / held.bias)
    return mixed


def join_lost_(
    held: Momentum | None,
    state: State,
    grad: Tensor,
    chosen: Strategies,
    moved: BasisChange | None = None,
) -> None:
    """What a transport lost of the first moment joins the memory that a residual keeps.

    Args:
        held: the moment before the refresh.
        state: with the new bases.
        grad: the matrix that the residual made, of which it keeps the rest.
        chosen: of the group.
        moved: how bases moved, where others have rows of one (default: all of both is here).
    """
    if held is not None and int(state["refresh_step"]) == int(state["step"]):
        sign = -1 if chosen.maximize else 1
        held.add_lost_to_(grad, state, sign * chosen.residual.lost, moved)
