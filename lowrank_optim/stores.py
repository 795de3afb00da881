"""How moments are kept between steps: the Store role."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lowrank_optim import ops, quant
from lowrank_optim.quant import Moment, Quantized
from lowrank_optim.rules.base import Slot, compute_dtype
from lowrank_optim.state_checks import check_finite
from lowrank_optim.transports import move_rows_

State = dict[str, Tensor]


class Store(Protocol):
    """Allocates, reads and writes one slot of the state; arithmetic is in ``compute_dtype``."""

    @property
    def rounds(self) -> bool:
        """Whether writes round stochastically, so that torch's own steps may not write."""
        ...

    def alloc(self, state: State, key: str, slot: Slot, shape: Sequence[int], like: Tensor) -> None:
        """Zeros for ``slot`` under ``key``, on the device of ``like``."""
        ...

    def read(
        self, state: State, key: str, slot: Slot, like: Tensor, *, dense: bool = False
    ) -> Moment:
        """The slot in the dtype of arithmetic; the stored tensor itself where that is its dtype.

        What is kept in 8 bits is returned as it is, to be updated in place, if the slot's rule
        takes it so (``fused``) and ``dense`` does not ask for a tensor.
        """
        ...

    def check_state(self, state: Mapping[str, Tensor], key: str, slot: Slot) -> None:
        """Raise ValueError unless a saved slot holds finite numbers, squares no negative ones."""
        ...

    def move_rows_(self, state: State, key: str, slot: Slot, source: Tensor) -> bool:
        """Move rows to the places ``source`` gives them, without a rounding; False if it cannot."""
        ...

    def write_(
        self,
        state: State,
        key: str,
        slot: Slot,
        x: Tensor,
        seed: int,
        sound: Tensor | None = None,
    ) -> None:
        """Keep a tensor that was read and updated.

        Args:
            state: of the parameter.
            key: of the slot.
            slot: what it holds.
            x: its values; nothing is to do where this is the stored tensor itself.
            seed: of the stochastic rounding of narrow formats.
            sound: where False, ``x`` is as it was read and what is stored must not change.
        """
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
        seed: int,
        sound: Tensor | None = None,
    ) -> None:
        """Rounded where the format is narrow; a value that it holds already stays itself."""
        kept = state[key]
        if kept is x:
            return
        narrow = kept.dtype == torch.bfloat16
        kept.copy_(ops.stochastic_round(x.float(), seed) if narrow else x)


@dataclass(frozen=True)
class Block8Store:
    """Moments in 8 bits, one float32 scale a block; small ones in ``float32``.

    ``<slot>`` holds the codes in the slot's shape and ``<slot>_scale`` the scales. A slot of fewer
    than :data:`lowrank_optim.quant.MIN_SIZE` elements is kept in float32, and has no scales.
    """

    small: FloatStore = FloatStore(torch.float32)

    @property
    def rounds(self) -> bool:
        """To the nearest code: a decay below half a code is seen when the block's scale falls."""
        return False

    def alloc(self, state: State, key: str, slot: Slot, shape: Sequence[int], like: Tensor) -> None:
        """The code of 0, and scales of 0."""
        own = slot.shape(shape)
        if math.prod(own) < quant.MIN_SIZE:
            self.small.alloc(state, key, slot, shape, like)
            return
        code, scales = quant.zero_code(slot.signed), quant.layout(own).scales
        state[key] = torch.full(own, code, dtype=torch.uint8, device=like.device)
        state[scale_key(key)] = torch.zeros(scales, dtype=torch.float32, device=like.device)

    def check_state(self, state: Mapping[str, Tensor], key: str, slot: Slot) -> None:
        """Its scales: every byte is a code."""
        if scale_key(key) in state:
            check_finite(state, scale_key(key), least=0)
        else:
            self.small.check_state(state, key, slot)

    def move_rows_(self, state: State, key: str, slot: Slot, source: Tensor) -> bool:
        """Codes and scales, where every row ends in a block of its own."""
        scales, codes = state.get(scale_key(key)), state[key]
        if scales is None:
            return self.small.move_rows_(state, key, slot, source)
        if codes.shape[-1] < quant.BLOCK:
            return False
        move_rows_(codes, source, quant.zero_code(slot.signed))
        move_rows_(scales.view(*codes.shape[:-1], -1), source)
        return True

    def read(
        self, state: State, key: str, slot: Slot, like: Tensor, *, dense: bool = False
    ) -> Moment:
        """The codes and scales themselves, or a decoded copy."""
        scales = state.get(scale_key(key))
        if scales is None:
            return self.small.read(state, key, slot, like)
        kept = Quantized(state[key], scales, slot.signed)
        if slot.fused and not dense:
            return kept
        return ops.dequantize([kept])[0].to(compute_dtype(like.dtype))

    def write_(
        self,
        state: State,
        key: str,
        slot: Slot,
        x: Tensor,
        seed: int,
        sound: Tensor | None = None,
    ) -> None:
        """Encode, to the nearest code.

        Encoding what was decoded can change it, as no code is -1: hence the select on ``sound``.
        """
        scales = state.get(scale_key(key))
        if scales is None:
            self.small.write_(state, key, slot, x, seed)
            return
        kept = Quantized(state[key], scales, slot.signed)
        if sound is None:
            ops.quantize_([x.float()], [kept])
            return
        new = Quantized(torch.empty_like(kept.codes), torch.empty_like(scales), slot.signed)
        ops.quantize_([x.float()], [new])
        kept.codes.copy_(torch.where(sound, new.codes, kept.codes))
        scales.copy_(torch.where(sound, new.scales, scales))


def scale_key(key: str) -> str:
    """State key of the scales of the slot under ``key``."""
    return f"{key}_scale"


STORES: dict[str, Store] = {
    "float32": FloatStore(torch.float32),
    "bfloat16": FloatStore(torch.bfloat16),
    "8bit": Block8Store(),
}
