"""Moments in one floating-point format."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_optim import ops
from lowrank_optim.ops.moving import move_rows_
from lowrank_optim.ops.quant import Moment
from lowrank_optim.ops.stacked import empty_like_all
from lowrank_optim.rules.base import Slot, compute_dtype
from lowrank_optim.stores.base import State, Whole, register
from lowrank_optim.tensors.values import check_finite


@dataclass(frozen=True)
class FloatStore:
    """Moments in one floating-point format.

    ``float32`` means the dtype of arithmetic: float64 parameters keep float64 moments. Writes into
    bfloat16 round stochastically: to nearest, a second moment with beta2 = 0.999 never decays,
    because 1e-3 of it is less than half a unit in the last place.
    """

    dtype: torch.dtype

    @property
    def rounds(self) -> bool:
        """True below float32."""
        return self.dtype != torch.float32

    def unit(self, shape: Sequence[int]) -> int:
        """Each column alone."""
        return 1

    def passing(self, slot: Slot, shape: Sequence[int], like: Tensor) -> tuple[int, int]:
        """A copy below float32, rounded as it is written."""
        return (math.prod(slot.shape(shape)) if self.rounds else 0), 0

    def alloc(
        self,
        state: State,
        key: str,
        slot: Slot,
        shape: Sequence[int],
        like: Tensor,
        of: Whole | None = None,
    ) -> None:
        """Zeros in this format."""
        wide = compute_dtype(like.dtype)
        dtype = wide if self.dtype == torch.float32 else self.dtype
        state[key] = torch.zeros(slot.shape(shape), dtype=dtype, device=like.device)

    def check_state(self, state: Mapping[str, Tensor], key: str, slot: Slot) -> None:
        """Its numbers."""
        check_finite(state, key, least=-math.inf if slot.signed else 0)

    def rows(self, state: State, key: str, slot: Slot) -> list[tuple[Tensor, int]] | None:
        """As they are stored."""
        return [(state[key], 0)]

    def move_rows_(self, state: State, key: str, slot: Slot, source: Tensor) -> bool:
        """As they are stored."""
        move_rows_(state[key], source)
        return True

    def restarting(self, state: State, key: str, slot: Slot) -> list[tuple[Tensor, int]]:
        """As they are stored."""
        return [(state[key], 0)]

    def read(
        self,
        state: State,
        key: str,
        slot: Slot,
        shape: Sequence[int],
        like: Tensor,
        *,
        dense: bool = False,
    ) -> Tensor:
        """Upcast where the format is narrow."""
        kept, wide = state[key], compute_dtype(like.dtype)
        return kept if kept.dtype == wide else kept.to(wide)

    def read_all(
        self,
        states: Sequence[State],
        key: str,
        slot: Slot,
        shape: Sequence[int],
        likes: Sequence[Tensor],
    ) -> list[Moment]:
        """As of each, upcast at once."""
        kept, wide = [state[key] for state in states], compute_dtype(likes[0].dtype)
        if kept[0].dtype == wide:
            return [*kept]
        outs = empty_like_all(kept, kept[0].shape, wide)
        torch._foreach_copy_(outs, kept)
        return [*outs]

    def write_(
        self,
        state: State,
        key: str,
        slot: Slot,
        x: Tensor,
        noise: ops.Noise,
        finite: Tensor | None = None,
    ) -> None:
        """Rounded where the format is narrow; a value that it holds already stays itself."""
        self.write_all_([state], key, slot, [x], [noise])

    def write_all_(
        self,
        states: Sequence[State],
        key: str,
        slot: Slot,
        xs: Sequence[Tensor],
        noises: Sequence[ops.Noise],
        finite: Sequence[Tensor] = (),
    ) -> None:
        """As of each, rounded at once."""
        pairs = zip(states, xs, noises, strict=True)
        work = [(state[key], x, noise) for state, x, noise in pairs if state[key] is not x]
        if work:
            kept, values, rounding = zip(*work, strict=True)
            narrow = kept[0].dtype == torch.bfloat16
            ops.put_all_(kept, [x.float() if narrow else x for x in values], rounding)


register("float32", FloatStore(torch.float32))
register("bfloat16", FloatStore(torch.bfloat16))
