"""Block-wise dynamic 8-bit quantisation: the maps, and how a tensor is cut into blocks."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

BLOCK = 256
"""Elements that share a scale."""
MIN_SIZE = 4096
"""Tensors with fewer elements keep float32 moments."""


@functools.cache
def values_of(signed: bool, decades: int) -> list[float]:
    """Of a dynamic exponent map, ascending: 256 of seven decades, 16 of three with a sign.

    With data whatever mode asks first, as they are kept for the whole process.
    """
    with unset_fake_temporarily():
        values = [0.0, 1.0]
        for decade in range(decades):
            parts = 2**decade if signed else 2 ** (decade + 1)
            edges = torch.linspace(0.1, 1, parts + 1, dtype=torch.float32)
            means = (edges[:-1] + edges[1:]) / 2.0
            values += ((10 ** (decade + 1 - decades)) * means).tolist()
            if signed:
                values += (-(10 ** (decade + 1 - decades)) * means).tolist()
        return sorted(values)


@functools.cache
def dynamic_map(signed: bool, device: torch.device) -> Tensor:
    r"""The 256 values of a dynamic-exponent byte, ascending, on ``device``.

    Each decade from 1e-6 to 1 holds the midpoints of equal parts of (0.1, 1), twice as many as the
    decade below; the signed map mirrors them. 0 and 1 complete it. The values equal those of
    ``bitsandbytes.functional.create_dynamic_map``.

    References:
        Dettmers (2015), arXiv:1511.04561; Dettmers et al. (2021), arXiv:2110.02861.
    """
    return torch.tensor(values_of(signed, 7), dtype=torch.float32, device=device)


class Layout(NamedTuple):
    """A tensor read as ``rows`` rows of ``cols`` elements, each cut into blocks of ``block``."""

    rows: int
    cols: int
    block: int

    @property
    def scales(self) -> int:
        """Number of blocks: every row ends in a block of its own."""
        return self.rows * -(-self.cols // self.block)


def layout(shape: Sequence[int]) -> Layout:
    """How a tensor of ``shape`` is cut.

    Blocks run along the last dimension and no block holds parts of two rows, so that a shard of
    rows holds whole blocks; rows shorter than a block are grouped whole. Where the last dimension
    is a multiple of 256 these are the blocks of the flattened tensor, as bitsandbytes has them.
    """
    cols = shape[-1] if shape else 1
    numel = math.prod(shape)
    if cols >= BLOCK or numel == 0:
        return Layout(numel // cols if cols else 0, cols, BLOCK)
    return Layout(1, numel, BLOCK // cols * cols)


@functools.cache
def zero_code(signed: bool) -> int:
    """The code that stands for 0."""
    return int((dynamic_map(signed, torch.device("cpu")) == 0).nonzero())


class Quantized(NamedTuple):
    """A moment in 8 bits: codes in the moment's shape, and one float32 scale a block."""

    codes: Tensor
    scales: Tensor
    signed: bool

    @property
    def layout(self) -> Layout:
        """How the codes are cut into blocks."""
        return layout(self.codes.shape)

    @property
    def map(self) -> Tensor:
        """The values that the codes stand for."""
        return dynamic_map(self.signed, self.codes.device)

    @property
    def period(self) -> int:
        """Rows of the first dimension after which a block begins: any tile holds whole blocks."""
        shape = self.codes.shape
        cols, block = self.layout[1:]
        if not shape or (len(shape) > 1 and cols == shape[-1]):
            return 1
        inner = math.prod(shape[1:])
        return block // math.gcd(inner, block)

    def split(self, rows: int) -> Iterator[Quantized]:
        """Views of ``rows`` rows of the first dimension each, a multiple of :attr:`period`."""
        start = 0
        for codes in torch.split(self.codes, rows):
            count = layout(codes.shape).scales
            yield Quantized(codes, self.scales[start : start + count], self.signed)
            start += count


Moment = Tensor | Quantized
"""What a rule updates in place: a tensor, or its 8-bit form, which no one need decode whole."""
