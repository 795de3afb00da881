"""Moments in one floating-point format."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_optim import ops
from lowrank_optim.ops.moving import move_rows_
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

    def move_rows_(self, state: State, key: str, slot: Slot, source: Tensor) -> bool:
        """As they are stored."""
        move_rows_(state[key], source)
        return True

    def read(
        self, state: State, key: str, slot: Slot, like: Tensor, *, dense: bool = False
    ) -> Tensor:
        """Upcast where the format is narrow."""
        kept, wide = state[key], compute_dtype(like.dtype)
        return kept if kept.dtype == wide else kept.to(wide)

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
        kept = state[key]
        if kept is x:
            return
        ops.put_(kept, x.float() if kept.dtype == torch.bfloat16 else x, noise)


register("float32", FloatStore(torch.float32))
register("bfloat16", FloatStore(torch.bfloat16))
