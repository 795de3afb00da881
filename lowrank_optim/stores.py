"""How moments are kept between steps: the Store role."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lowrank_optim import ops
from lowrank_optim.rules.base import Slot, compute_dtype

State = dict[str, Tensor]


class Store(Protocol):
    """Allocates, reads and writes one slot of the state; arithmetic is in ``compute_dtype``."""

    @property
    def rounds(self) -> bool:
        """Whether a slot read is a copy, to be written back with rounding."""
        ...

    def alloc(self, state: State, key: str, slot: Slot, shape: Sequence[int], like: Tensor) -> None:
        """Zeros for ``slot`` under ``key``, on the device of ``like``."""
        ...

    def read(self, state: State, key: str, like: Tensor) -> Tensor:
        """The slot in the dtype of arithmetic; the stored tensor itself where that is its dtype."""
        ...

    def write_(self, state: State, key: str, x: Tensor, seed: int) -> None:
        """Keep ``x``; ``seed`` is that of the stochastic rounding of narrow formats."""
        ...


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

    def alloc(self, state: State, key: str, slot: Slot, shape: Sequence[int], like: Tensor) -> None:
        """Zeros in this format."""
        wide = compute_dtype(like.dtype)
        dtype = wide if self.dtype == torch.float32 else self.dtype
        state[key] = torch.zeros(slot.shape(shape), dtype=dtype, device=like.device)

    def read(self, state: State, key: str, like: Tensor) -> Tensor:
        """Upcast where the format is narrow."""
        return state[key].to(compute_dtype(like.dtype))

    def write_(self, state: State, key: str, x: Tensor, seed: int) -> None:
        """Nothing to do where ``x`` is the stored tensor, already updated in place."""
        kept = state[key]
        if kept is x:
            return
        narrow = kept.dtype == torch.bfloat16
        kept.copy_(ops.stochastic_round(x.float(), seed) if narrow else x)


STORES: dict[str, Store] = {
    "float32": FloatStore(torch.float32),
    "bfloat16": FloatStore(torch.bfloat16),
}
