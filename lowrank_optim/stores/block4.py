r"""Moments in 4 bits, one scale a block of a row."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowrank_optim import ops
from lowrank_optim.ops import quant, quant4
from lowrank_optim.ops.moving import move_rows_
from lowrank_optim.ops.quant import Moment
from lowrank_optim.ops.quant4 import Packed
from lowrank_optim.rules.base import Slot, compute_dtype
from lowrank_optim.stores.base import State, Whole, register, scale_key
from lowrank_optim.stores.floating import FloatStore
from lowrank_optim.tensors.values import check_finite


@dataclass(frozen=True)
class Block4Store:
    r"""Moments in 4 bits, two codes a byte, one float32 scale a block; small ones in ``float32``.

    .. math:: m \approx M[c]\, s, \quad s = m_j,\ j = \arg\max_i |m_i|,
              \qquad v \approx \frac{c + 1}{16}\, s, \quad s = \max_i v_i

    over blocks of 128 elements of one row, with M the signed dynamic exponent map (0, ±0.0055,
    ±0.0325, ±0.0775, ±0.2125, ±0.4375, ±0.6625, ±0.8875, 1). v has no code of 0, as a second moment
    of 0 would let a step divide by eps alone: it is 0 where all of its block is, and never where it
    was positive. c is drawn among the two codes beside a value so that its mean is the value, but
    beyond the ends of a map. To nearest, what one step changes is less than half a code for most
    elements, of v at beta2 = 0.999 for all but the largest: they would stay in proportion to the
    first gradients.

    ``<slot>`` holds ``(..., ceil(k / 2))`` bytes of a slot ``(..., k)``, the first element in the
    low half, and ``<slot>_scale`` its scales ``(..., ceil(k / 128))``: 0.53 bytes an element. A
    slot of fewer than :data:`lowrank_optim.ops.quant.MIN_SIZE` elements, or of one column, is kept
    in float32, and has no scales; so is one whose rows ranks would have parts of.

    Differs from Li et al. (2023) and from torchao's ``AdamW4bit``, whose maps and blocks these are:

    - No block has parts of two rows. The coordinates of a row belong to one direction of the basis,
      and those of two may be far apart, where the linear map reaches down to a sixteenth of the
      largest. Rows can also move, and begin again, as they are. (The paper's rank-1 scales of a
      matrix would tie all rows to all columns.)
    - s has the sign of the largest element, so that it is kept exactly. The map has a 1 and no -1:
      with ``|s|`` the largest would lose 11 % at every step wherever it is negative.
    - Rounding has no bias. In both sources a value takes the nearest code.

    References:
        Li et al. (2023), Memory Efficient Optimizers with 4-bit States, arXiv:2309.01507.
    """

    small: FloatStore = field(default_factory=lambda: FloatStore(torch.float32))

    @property
    def rounds(self) -> bool:
        """True, whatever the sign."""
        return True

    def unit(self, shape: Sequence[int]) -> int:
        """Those of a block, or whole bytes of a shorter row; each alone of what is small."""
        return min(quant4.BLOCK, 2 * quant4.packed_width(shape[-1])) if _is_large(shape) else 1

    def passing(self, slot: Slot, shape: Sequence[int], like: Tensor) -> tuple[int, int]:
        """A decoded copy, and what a tile of it is encoded through."""
        own = slot.shape(shape)
        if not own:
            return self.small.passing(slot, shape, like)
        return math.prod(own), quant4.passing(math.prod(own[:-1]), own[-1], like)

    def alloc(
        self,
        state: State,
        key: str,
        slot: Slot,
        shape: Sequence[int],
        like: Tensor,
        of: Whole | None = None,
    ) -> None:
        """Scales of 0."""
        own = slot.shape(shape)
        if not _fits(of or Whole(tuple(shape)), slot):
            self.small.alloc(state, key, slot, shape, like)
            return
        (*rows, cols), device = own, like.device
        size, blocks = (*rows, quant4.packed_width(cols)), (*rows, quant4.scale_count(cols))
        byte = quant4.zero_byte(slot.signed)
        state[key] = torch.full(size, byte, dtype=torch.uint8, device=device)
        state[scale_key(key)] = torch.zeros(blocks, dtype=torch.float32, device=device)

    def check_state(self, state: Mapping[str, Tensor], key: str, slot: Slot) -> None:
        """Its scales: every byte is two codes."""
        if scale_key(key) in state:
            check_finite(state, scale_key(key), least=-math.inf if slot.signed else 0)
        else:
            self.small.check_state(state, key, slot)

    def rows(self, state: State, key: str, slot: Slot) -> list[tuple[Tensor, int]] | None:
        """Codes and scales."""
        scales = state.get(scale_key(key))
        if scales is None:
            return self.small.rows(state, key, slot)
        return [(state[key], quant4.zero_byte(slot.signed)), (scales, 0)]

    def move_rows_(self, state: State, key: str, slot: Slot, source: Tensor) -> bool:
        """Codes and scales."""
        for x, fill in self.rows(state, key, slot) or ():
            move_rows_(x, source, fill)
        return True

    def restarting(self, state: State, key: str, slot: Slot) -> list[tuple[Tensor, int]]:
        """Codes and scales."""
        return self.rows(state, key, slot) or []

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
        """A decoded copy."""
        return self.read_all([state], key, slot, shape, [like])[0]

    def read_all(
        self,
        states: Sequence[State],
        key: str,
        slot: Slot,
        shape: Sequence[int],
        likes: Sequence[Tensor],
    ) -> list[Moment]:
        """Decoded copies of all at once."""
        if scale_key(key) not in states[0]:
            return self.small.read_all(states, key, slot, shape, likes)
        values = quant4.dequantize4(_kept(states, key), slot.signed, slot.shape(shape)[-1])
        return [x.to(compute_dtype(likes[0].dtype)) for x in values]

    def write_(
        self,
        state: State,
        key: str,
        slot: Slot,
        x: Tensor,
        noise: ops.Noise,
        finite: Tensor | None = None,
    ) -> None:
        """As of several."""
        self.write_all_([state], key, slot, [x], [noise], () if finite is None else [finite])

    def write_all_(
        self,
        states: Sequence[State],
        key: str,
        slot: Slot,
        xs: Sequence[Tensor],
        noises: Sequence[ops.Noise],
        finite: Sequence[Tensor] = (),
    ) -> None:
        """Encoded all at once."""
        if scale_key(key) not in states[0]:
            self.small.write_all_(states, key, slot, xs, noises, finite)
            return
        quant4.quantize4_([x.float() for x in xs], _kept(states, key), slot.signed, noises, finite)


def _is_large(shape: Sequence[int]) -> bool:
    """Whether a slot of this shape has enough entries, and is smaller so than in float32."""
    return math.prod(shape) >= quant.MIN_SIZE and bool(shape) and shape[-1] > 1


def _fits(whole: Whole, slot: Slot) -> bool:
    """Whether it is large, and no rank has parts of its rows but such as begin with a block."""
    # of means a split of rows cuts the last dimension
    cut = whole.crossed or (whole.by_rows and slot.averaged is not None)
    return not cut and _is_large(slot.shape(whole.shape))


def _kept(states: Sequence[State], key: str) -> list[Packed]:
    return [Packed(state[key], state[scale_key(key)]) for state in states]


register("4bit", Block4Store())
