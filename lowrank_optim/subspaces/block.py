"""Whole tensors as the coordinates: some of a group hold moments, and they take turns."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from lowrank_optim import ops
from lowrank_optim.subspaces.base import State, Subspace, register
from lowrank_optim.subspaces.refresh import BasisChange, RefreshContext
from lowrank_optim.subspaces.target import Target
from lowrank_optim.subspaces.terms import Term, Wants
from lowrank_optim.tensors.matrix import MatrixView

BLOCK_ORDERS = ("random", "ascending", "descending", "mirror", "shuffled")


def takes_blocks(group: Mapping[str, Any]) -> bool:
    """Whether whole tensors of a group take turns: of a projector, or of whole layers."""
    return group.get("projector") == "block" or group.get("layers") is not None


@register("block")
@dataclass(frozen=True)
class Block(Subspace):
    """One tensor among the N of its group, of which ``k = round(density N)`` are active at a time.

    An active block is a parameter without a subspace: the rule on all of it. An inactive one holds
    no moments, zero bytes of them, and moves by the residual alone. Which are active is a function
    of the number of switches, so that every rank and every resumed run agree:

    ============== =======================================================================
    ``random``     a new set at each switch
    ``ascending``  the next k, cyclically
    ``descending`` the same from the last tensor down, as all published pre-training ran
    ``mirror``     k/2 from the front, and as many mirrored from the back
    ``shuffled``   in an order that is drawn anew when all had a turn
    ============== =======================================================================

    With ``layers`` a block is a layer of a model: all tensors of one have its position, and take
    turns together.

    Args:
        rank: not used.
        scale: not used: a block is a dense parameter.
        density: share of the tensors that are active.
        block_order: in which order they take turns.
        layers: regular expression; parameters whose names it finds the same text in are a layer.
            None: every tensor is a block.
        active_layers: k, in place of a share; None takes the share.
        layer_weights: of ``random``, how likely each block is in a draw without replacement; None
            is all alike.
        frozen: whether an idle one stays as it is: no decay, no residual, no step counted.
        position: of this one among the blocks of its group; of ``random``, in the order of their
            ``uid``.
        count: N.
        first: ``uid`` of the block in position 0, which seeds ``random``.

    References:
        Zmushko et al. (2025), arXiv:2411.07837; Luo et al. (2024), arXiv:2404.02827 (BAdam).
    """

    needs_grad: ClassVar[bool] = False

    def reproducible(self, count: int) -> bool:
        """Turns are counted, and no number is computed."""
        return True

    density: float = 0.25
    block_order: str = "random"
    layers: str | None = None
    active_layers: int | None = None
    layer_weights: tuple[float, ...] | None = None
    frozen: bool = False
    position: int = 0
    count: int = 1
    first: int = 0

    @classmethod
    def side(cls, proj_type: str) -> str:
        """None: as stored."""
        return "left"

    @classmethod
    def directions(cls, rank: int | float, view: MatrixView) -> int:
        """All of them, while it is active."""
        return view.m

    @classmethod
    def limit(cls, view: MatrixView) -> int:
        """All of them."""
        return view.m

    @classmethod
    def covers(cls, rank: int | float, view: MatrixView) -> bool:
        """The tensor is in or out, whatever the density."""
        return False

    @classmethod
    def from_group(cls, group: dict[str, Any], view: MatrixView) -> Self:
        """The rank of a group is the density of its blocks."""
        order = group.get("block_order", "random")
        weights = group.get("layer_weights")
        return cls(
            rank=view.m,
            density=float(group["rank"]),
            block_order=order,
            layers=group.get("layers"),
            active_layers=group.get("active_layers"),
            layer_weights=None if weights is None else tuple(map(float, weights)),
        )

    @property
    def meaning(self) -> tuple[Any, ...]:
        """All of the tensor: how many are active, and in which order, may change in mid-run."""
        return (type(self).__name__,)

    @property
    def size(self) -> int:
        """How many are active at a time."""
        if self.active_layers is not None:
            return min(self.active_layers, self.count)
        return max(round(self.density * self.count), int(self.density > 0))

    def draw(self, switches: int) -> int:
        """Which draw the blocks after a number of switches are of."""
        if self.block_order != "shuffled":
            return switches
        return switches // max(1, math.ceil(self.count / max(1, self.size)))

    def active(self, switches: int, generator: torch.Generator) -> frozenset[int]:
        """Positions of the active blocks after a number of switches.

        Args:
            switches: how often the blocks have switched.
            generator: of what is drawn, seeded by :meth:`draw`.
        """
        n, k = self.count, self.size
        if self.block_order == "random" and self.layer_weights is not None and k:
            weights = torch.tensor(self.layer_weights, dtype=torch.float64)
            return frozenset(torch.multinomial(weights, k, generator=generator).tolist())
        if self.block_order == "shuffled":
            turn = switches - self.draw(switches) * max(1, math.ceil(n / max(1, k)))
            order: list[int] = torch.randperm(n, generator=generator).tolist()
            return frozenset(order[(turn * k + i) % n] for i in range(k))
        if self.block_order == "random":
            return frozenset(torch.randperm(n, generator=generator)[:k].tolist())
        if self.block_order == "ascending":
            return frozenset((switches * k + i) % n for i in range(k))
        if self.block_order == "descending":
            return frozenset((n - 1 - switches * k - i) % n for i in range(k))
        half, pairs = n // 2, k // 2
        front = {(switches * pairs + i) % half for i in range(pairs)}
        return frozenset(front | {n - 1 - i for i in front})

    def refuses(self, wants: Wants) -> str | None:
        """Error feedback, which an idle block would never read."""
        return "a block uses all of a gradient or nothing" if wants == "memory" else None

    def init(self, view: MatrixView, param: Tensor) -> State:
        """When its group last stepped it, and how many steps it had taken when its moments began.

        ``clock`` counts the steps of the group from 1; ``refresh_step`` is -1 without moments.
        """
        counters = {"clock": 0.0, "refresh_step": -1.0}
        return {key: torch.tensor(x, dtype=torch.float32) for key, x in counters.items()}

    def refresh_(self, state: State, grad: Tensor, ctx: RefreshContext) -> dict[str, BasisChange]:
        """Nothing: blocks switch together, whatever their gradients."""
        return {}

    def coord_shapes(self, view: MatrixView) -> dict[str, tuple[int, ...]]:
        """One coordinate, all of the tensor."""
        return {"low": (*view.batch, view.m, view.n)}

    def coords(self, state: State, grad: Tensor) -> dict[str, Tensor]:
        """The gradient."""
        return {"low": grad.clone()}

    def bases(self, state: State, view: MatrixView) -> list[Tensor]:
        """The identity."""
        return [torch.eye(view.m, dtype=torch.float64)]

    def push_(
        self, into: Target, state: State, update: dict[str, Tensor], term: Term | None
    ) -> None:
        """``W <- decay W - lr N``, of an active block."""
        ops.add_(into.param, update["low"], into.guarded_decay(), -into.lr, into.rounding)
