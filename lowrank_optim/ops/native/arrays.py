"""Lists of tensors to arrays of pointers, and the checks that keep calls inside buffers."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def from_host(**factors: Sequence[Tensor]) -> None:
    """Raise where step sizes, decays or gains are tensors: kernels take numbers of the host.

    Raises:
        TypeError: they are; the dispatcher lets the reference serve such a call.
    """
    given = [name for name, xs in factors.items() if xs]
    if given:
        raise TypeError(f"{given[0]} must be empty: the reference serves factors on a device")


class Arrays:
    """Arrays for one call, alive as long as this is.

    Args:
        device: of all tensors of the call: no address of another is taken.
    """

    def __init__(self, device: torch.device) -> None:
        self.kept: list[Any] = []
        self.device = device

    def _keep(self, values: array[Any]) -> int:
        self.kept.append(values)
        return values.buffer_info()[0]

    def pointers(self, tensors: Iterable[Tensor]) -> int:
        """Addresses of the first elements."""
        tensors = list(tensors)
        on(self.device, tensors)
        return self._keep(array("Q", [t.data_ptr() for t in tensors]))

    def int64(self, values: Iterable[int]) -> int:
        """Sizes, strides and counts."""
        return self._keep(array("q", values))

    def uint32(self, values: Iterable[int]) -> int:
        """Seeds, modulo 2^32."""
        return self._keep(array("I", [v & 0xFFFFFFFF for v in values]))

    def float32(self, values: Iterable[float]) -> int:
        """One scalar a tensor."""
        return self._keep(array("f", values))


def on(device: torch.device, tensors: Sequence[Tensor]) -> None:
    """Raise unless all tensors are on ``device``, so that their addresses mean something there."""
    devices = [t.device for t in tensors]
    if devices.count(device) != len(devices):
        other = next(d for d in devices if d != device)
        raise ValueError(f"native ops take tensors of one device, got one on {other} for {device}")


def dtype_of(tensors: Sequence[Tensor], name: str) -> int:
    """The one dtype of a list."""
    dtypes = [t.dtype for t in tensors]
    if dtypes[0] not in DTYPES:
        raise TypeError(f"native ops take float32, bfloat16 and float16 {name}, got {dtypes[0]}")
    if dtypes.count(dtypes[0]) != len(dtypes):
        raise TypeError(f"native ops take {name} of one dtype, got {dtypes}")
    return DTYPES[dtypes[0]]


def floating(tensors: Sequence[Tensor], name: str) -> None:
    """Raise unless all are of some floating dtype: they are converted, and nothing may be lost."""
    wrong = [t.dtype for t in tensors if not t.is_floating_point()]
    if wrong:
        raise TypeError(f"native ops take floating-point {name}, got {wrong[0]}")


def flat(tensors: Sequence[Tensor], name: str) -> None:
    """Raise unless all are contiguous: the library reads and writes flat memory."""
    if not all([t.is_contiguous() for t in tensors]):
        strides = [t.stride() for t in tensors if not t.is_contiguous()]
        raise ValueError(f"native ops take contiguous {name}, got strides {strides[0]}")


def exactly(tensors: Sequence[Tensor], dtype: torch.dtype, name: str) -> None:
    """State that is written in place: this dtype, contiguous."""
    dtypes = [t.dtype for t in tensors]
    if dtypes.count(dtype) != len(dtypes):
        raise TypeError(f"native ops take {dtype} {name}, got {dtypes}")
    flat(tensors, name)


def same(count: int, **lists: Sequence[Any]) -> None:
    """Raise unless every list has ``count`` entries."""
    for name, values in lists.items():
        if len(values) != count:
            raise ValueError(f"expected {count} {name}, got {len(values)}")


def numels(tensors: Sequence[Tensor]) -> list[int]:
    """Number of elements of each: lists are compared faster than their entries."""
    return [t.numel() for t in tensors]


def sizes(
    tensors: Sequence[Tensor], like: Sequence[Tensor], name: str, known: list[int] | None = None
) -> None:
    """Raise unless tensors have the sizes of ``like``, which ``known`` may hold."""
    if numels(tensors) == (known or numels(like)):
        return
    for t, other in zip(tensors, like, strict=True):
        if t.numel() != other.numel():
            raise ValueError(f"{name}: {tuple(t.shape)} beside {tuple(other.shape)}")


def block_counts(rows: Sequence[int], cols: Sequence[int], blocks: Sequence[int]) -> list[int]:
    """Number of blocks of each tensor: every row ends in a block of its own."""
    return [r * -(-c // b) for r, c, b in zip(rows, cols, blocks, strict=True)]


def check_scales(scales: Sequence[Tensor], counts: Sequence[int], name: str) -> None:
    """Raise unless each tensor is float32, contiguous and has its count of entries."""
    exactly(scales, torch.float32, name)
    for s, count in zip(scales, counts, strict=True):
        if s.numel() != count:
            raise ValueError(f"expected {count} {name}, got {s.numel()}")


def check_map(values: Tensor, device: torch.device) -> Tensor:
    """Raise unless it is a map on ``device``."""
    on(device, [values])
    if values.dtype != torch.float32 or values.numel() != 256 or not values.is_contiguous():
        raise ValueError(f"a map has 256 float32 entries, got {values.numel()} {values.dtype}")
    return values


def check_layout(
    layout: tuple[Sequence[int], Sequence[int], Sequence[int]], tensors: Sequence[Tensor]
) -> None:
    """Raise unless rows and columns make up each tensor, and blocks have elements."""
    for r, c, b, t in zip(*layout, tensors, strict=True):
        if r < 0 or c < 0 or b < 1 or r * c != t.numel():
            raise ValueError(f"a layout of {r} x {c} in blocks of {b} for {t.numel()} elements")
