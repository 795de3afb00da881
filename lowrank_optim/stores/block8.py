"""Moments in 8 bits, one scale a block."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowrank_optim import ops
from lowrank_optim.ops import quant
from lowrank_optim.ops.moving import move_rows_
from lowrank_optim.ops.quant import Moment, Quantized
from lowrank_optim.rules.base import Slot, compute_dtype
from lowrank_optim.stores.base import OneByOne, State, Whole, register, scale_key
from lowrank_optim.stores.floating import FloatStore
from lowrank_optim.tensors.values import check_finite


@dataclass(frozen=True)
class Block8Store(OneByOne):
    """Moments in 8 bits, one float32 scale a block; small ones in ``float32``.

    ``<slot>`` holds the codes in the slot's shape and ``<slot>_scale`` the scales. A slot of fewer
    than :data:`lowrank_optim.ops.quant.MIN_SIZE` elements is kept in float32, and has no scales; so
    is one whose blocks ranks would have parts of.
    """

    small: FloatStore = field(default_factory=lambda: FloatStore(torch.float32))

    @property
    def rounds(self) -> bool:
        """To the nearest code: a decay below half a code is seen when the block's scale falls."""
        return False

    def unit(self, shape: Sequence[int]) -> int:
        """Those of a block; all, where blocks hold whole rows; each alone of what is small."""
        return 1 if math.prod(shape) < quant.MIN_SIZE else min(quant.BLOCK, shape[-1])

    def passing(self, slot: Slot, shape: Sequence[int], like: Tensor) -> tuple[int, int]:
        """A decoded copy where no op reads and writes codes."""
        return (0 if slot.fused else math.prod(slot.shape(shape))), 0

    def alloc(
        self,
        state: State,
        key: str,
        slot: Slot,
        shape: Sequence[int],
        like: Tensor,
        of: Whole | None = None,
    ) -> None:
        """The code of 0, and scales of 0."""
        own, whole = slot.shape(shape), of or Whole(tuple(shape))
        if not self._fits(whole, slot):
            self.small.alloc(state, key, slot, shape, like)
            return
        code, scales = quant.zero_code(slot.signed), quant.layout(own).scales
        state[key] = torch.full(own, code, dtype=torch.uint8, device=like.device)
        state[scale_key(key)] = torch.zeros(scales, dtype=torch.float32, device=like.device)

    def _fits(self, whole: Whole, slot: Slot) -> bool:
        """Whether it is large enough, and every block of it lies on one rank."""
        shape = slot.shape(whole.shape)
        if math.prod(shape) < quant.MIN_SIZE or whole.crossed:
            return False
        # of means a split of rows cuts the last dimension
        return not whole.by_rows or (shape[-1] >= quant.BLOCK and slot.averaged is None)

    def check_state(self, state: Mapping[str, Tensor], key: str, slot: Slot) -> None:
        """Its scales: every byte is a code."""
        if scale_key(key) in state:
            check_finite(state, scale_key(key), least=0)
        else:
            self.small.check_state(state, key, slot)

    def rows(self, state: State, key: str, slot: Slot) -> list[tuple[Tensor, int]] | None:
        """Codes and scales, where every row ends in a block of its own."""
        scales, codes = state.get(scale_key(key)), state[key]
        if scales is None:
            return self.small.rows(state, key, slot)
        if codes.shape[-1] < quant.BLOCK:
            return None
        return [(codes, quant.zero_code(slot.signed)), (scales.view(*codes.shape[:-1], -1), 0)]

    def move_rows_(self, state: State, key: str, slot: Slot, source: Tensor) -> bool:
        """Codes and scales."""
        rows = self.rows(state, key, slot)
        for x, fill in rows or ():
            move_rows_(x, source, fill)
        return rows is not None

    def restarting(self, state: State, key: str, slot: Slot) -> list[tuple[Tensor, int]]:
        """Codes: others may share the scale."""
        code = quant.zero_code(slot.signed) if scale_key(key) in state else 0
        return [(state[key], code)]

    def read(
        self,
        state: State,
        key: str,
        slot: Slot,
        shape: Sequence[int],
        like: Tensor,
        *,
        dense: bool = False,
    ) -> Moment:
        """The codes and scales themselves, or a decoded copy."""
        scales = state.get(scale_key(key))
        if scales is None:
            return self.small.read(state, key, slot, shape, like)
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
        noise: ops.Noise,
        finite: Tensor | None = None,
    ) -> None:
        """Encode, to the nearest code.

        Encoding what was decoded can change it, as no code is -1: hence the select on ``finite``.
        """
        scales = state.get(scale_key(key))
        if scales is None:
            self.small.write_(state, key, slot, x, noise)
            return
        kept = Quantized(state[key], scales, slot.signed)
        if finite is None:
            ops.quantize_([x.float()], [kept])
            return
        new = Quantized(torch.empty_like(kept.codes), torch.empty_like(scales), slot.signed)
        ops.quantize_([x.float()], [new])
        kept.codes.copy_(torch.where(finite, new.codes, kept.codes))
        scales.copy_(torch.where(finite, new.scales, scales))


register("8bit", Block8Store())
