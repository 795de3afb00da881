"""Rounding by the definition: to codes of a table, and stochastic, in Python's own integers."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

LAYOUTS = {
    "flat": (0, 4000, 0, 1),
    "offset": (12345, 4000, 0, 1),
    "rows of a shard": (96, 25, 160, 1),
    "rows longer than a program": (7, 1500, 4096, 1),
    "transposed": (3, 40, 1, 64),
    "every entry a row": (0, 1, 9, 5),
    "wraps": (2**32 - 100, 33, 2**31 + 7, 2**32 - 1),
}
"""Offset, width, row stride and column stride."""


def nearest_codes(x: Tensor, table: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """The nearest entry of all, the lower of two, by the largest magnitude of each block.

    Those of bitsandbytes: ``test_codes_equal_bitsandbytes``.
    """
    parts = x.float().reshape(-1).split(block)
    scales = torch.stack([part.abs().max() for part in parts])
    units = [part * (1 / scale) for part, scale in zip(parts, scales, strict=True)]
    gaps = (torch.cat(units)[:, None] - table).abs()
    return gaps.argmin(1).to(torch.uint8), scales


def flat_places(xs: Sequence[Tensor]) -> tuple[list[int], list[int], list[int], list[int]]:
    """Positions of whole tensors, as the op takes them."""
    n = len(xs)
    return [0] * n, [max(1, x.numel()) for x in xs], [0] * n, [1] * n


def hashed(x: int) -> int:
    """lowbias32."""
    x ^= x >> 16
    x = x * 0x7FEB352D % 2**32
    x ^= x >> 15
    x = x * 0x846CA68B % 2**32
    return x ^ x >> 16


def rounded(x: Tensor, seed: int, positions: Sequence[int]) -> Tensor:
    """Finite numbers in bfloat16: 16 bits of the hash below those that are kept, and a cut."""
    bits = []
    for value, position in zip(x.reshape(-1).tolist(), positions, strict=True):
        (own,) = struct.unpack("<I", struct.pack("<f", value))
        high = own + (hashed((position ^ seed) % 2**32) & 0xFFFF) >> 16
        bits.append(high - 2**16 if high >= 2**15 else high)
    out = torch.tensor(bits, dtype=torch.int16, device=x.device)
    return out.view(torch.bfloat16).view(x.shape)


def positions(count: int, offset: int, width: int, row: int, column: int) -> list[int]:
    """Of the entries of a tensor, as the op defines them."""
    return [(offset + i // width * row + i % width * column) % 2**32 for i in range(count)]
