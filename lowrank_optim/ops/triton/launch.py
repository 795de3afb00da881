"""How kernels are launched: many small tensors at once, or one by one.

An elementwise op over a model is hundreds of tensors, and a Triton launch costs the host more
than most of them cost the device. So a list is one launch over a flat work list: program ``p``
finds its tensor by binary search in the first programs of all tensors, and the tensor's addresses
and numbers in a table of int64 (:mod:`lowrank_optim.ops.triton.tables`). Two cases take one launch
per tensor, with the same kernel: a list of one, which needs no table, and CUDA-graph capture, where
launches are free at replay and a captured upload would read host memory that is gone by then.

GEMM-like ops are launched one by one: each fills the device, and shapes, strides and alignment
specialise the code.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate, chain
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowrank_optim.ops.devices import recording
from lowrank_optim.ops.triton.tables import table_of

ELEMENTS = 1024
WARPS = 8
"""Elements and warps (of 32 lanes) of a program of an elementwise kernel: four elements a lane, so
that a float32 access is 16 bytes and narrower formats need no other layout, which would cost an
exchange through shared memory. With 4 warps AdamW spills a few bytes on sm_80. The kernels are
bound by memory: larger programs bring nothing but a longer tail."""

_ALIGNMENT = 16
"""Bytes of the widest access, of which addresses must be multiples. So must numbers of elements:
else the compiler gives each element of a lane a mask, and an access, of its own."""


@triton.jit
def locate(table, tensors, MANY: tl.constexpr, DEPTH: tl.constexpr):
    """Which tensor this program works on, and which of that tensor's programs it is."""
    program = tl.program_id(0).to(tl.int64)
    t = program * 0
    if MANY:
        for s in tl.static_range(DEPTH):
            candidate = t + (1 << (DEPTH - 1 - s))
            inside = candidate < tensors
            start = tl.load(table + candidate, mask=inside, other=0)
            t = tl.where(inside & (start <= program), candidate, t)
        program = program - tl.load(table + t)
    return t, program


@triton.jit
def pointer(table, tensors, t, ROW: tl.constexpr, one, MANY: tl.constexpr, ALIGNED: tl.constexpr):
    """Address of a tensor of the list: ``one`` itself, or the table's entry with its type."""
    found = one
    if MANY:
        found = tl.load(table + ROW * tensors + t).to(one.dtype)
        if ALIGNED:
            found = tl.multiple_of(found, 16)
    return found


@triton.jit
def number(table, tensors, t, ROW: tl.constexpr, one, MANY: tl.constexpr):
    """A number of a tensor of the list, int64."""
    found = tl.full((), one, tl.int64)
    if MANY:
        found = tl.load(table + ROW * tensors + t)
    return found


@triton.jit
def length(table, tensors, t, ROW: tl.constexpr, one, MANY: tl.constexpr, ALIGNED: tl.constexpr):
    """How many elements a flat tensor has: if a multiple of 16, lanes need no mask each."""
    found = number(table, tensors, t, ROW, one, MANY)
    if ALIGNED:
        found = found // 16 * 16  # Triton 3.6 forgets a hint about a number that was loaded
    return found


@triton.jit
def as_float(bits):
    """The float32 that was stored as its bits: a column of the table is int64."""
    return bits.to(tl.int32).to(tl.float32, bitcast=True)


_INTEGER, _FLOAT = struct.Struct("<i"), struct.Struct("<f")


def float_bits(x: float) -> int:
    """Bits of ``x`` in float32, as a signed integer."""
    return int(_INTEGER.unpack(_FLOAT.pack(x))[0])


def cdiv(size: int, each: int) -> int:
    """How many of ``each`` cover ``size``: Triton's own, which takes constants too, is slow."""
    return -(-size // each)


def next_power_of_2(size: int) -> int:
    """The least power of two that is not less than ``size``; of Triton it holds as of ``cdiv``."""
    return 1 << max(0, size - 1).bit_length()


def signed32(x: int) -> int:
    """``x`` modulo 2^32 as a signed integer: one argument type for every seed."""
    return ((x & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000


_HERE = nullcontext()


def guard(x: Tensor) -> AbstractContextManager[Any]:
    """Kernels run on the current device: make it that of ``x``."""
    if x.device.type == "cpu":
        return _HERE
    context: AbstractContextManager[Any] = torch.get_device_module(x.device).device(x.device)
    return context


def warps(count: int) -> int:
    """``count`` warps of 32 lanes as warps of this build: AMD's have 64."""
    return max(1, count // 2) if torch.version.hip else count


def capturing(x: Tensor) -> bool:
    """Whether work on ``x`` is being recorded into a graph."""
    return x.is_cuda and recording()


def groups(lists: Sequence[Sequence[Tensor]], *keys: Sequence[object]) -> Iterator[list[int]]:
    """Positions of the tensors that can share a launch: same device, dtypes and ``keys``."""
    filled = [tensors for tensors in lists if tensors]
    count = len(filled[0])
    dtypes = [{x.dtype for x in own} for own in filled]
    alike = all([len(set(own)) == 1 for own in (*dtypes, *keys)])
    if alike and len({x.device for x in filled[0]}) == 1 and all([x.numel() for x in filled[0]]):
        yield [*range(count)]
        return
    found: dict[object, list[int]] = {}
    for i, first in enumerate(filled[0]):
        if first.numel():
            key = (first.device, *(x[i].dtype for x in filled), *(k[i] for k in keys))
            found.setdefault(key, []).append(i)
    yield from found.values()


def packed(names: Sequence[str], lists: Sequence[Sequence[Tensor]]) -> None:
    """Raise unless each tensor that is written is contiguous, and the lists are parallel."""
    for name, tensors in zip(names, lists, strict=True):
        if len(tensors) != len(lists[0]):
            raise ValueError(f"{name} has {len(tensors)} tensors, {names[0]} has {len(lists[0])}")
        if not all([x.is_contiguous() for x in tensors]):
            raise ValueError(f"{name} must be contiguous")


def loadable(x: Tensor | None) -> Tensor | None:
    """A flag as a byte: loads of one bit are not portable. Everything else as it is."""
    return x.view(torch.uint8) if x is not None and x.dtype is torch.bool else x


def launch(
    kernel: Any,
    lists: Sequence[Sequence[Tensor]],
    columns: Sequence[Sequence[int]],
    programs: Sequence[int],
    *scalars: object,
    **meta: object,
) -> None:
    """Run ``kernel`` over parallel lists of tensors, all of the same dtypes and device.

    The kernel's arguments are ``table, tensors``, one pointer per list, one number per column,
    the scalars, then the constants ``MANY``, ``DEPTH``, ``ALIGNED`` and ``meta``.

    Args:
        kernel: a jitted function.
        lists: tensors the kernel reads and writes; an empty list is passed as None.
        columns: a number per tensor.
        programs: how many programs each tensor needs.
        *scalars: numbers common to all.
        **meta: constants and launch options.
    """
    count = len(programs)
    tensors = next(x for x in lists if x)
    first, whole = tensors[0], [x.numel() % _ALIGNMENT == 0 for x in tensors]
    # sums and products are rounded one by one, as in the compiled CPU loop
    meta = {"num_warps": warps(WARPS), "enable_fp_fusion": False, **meta}
    with guard(first):
        if count == 1 or capturing(first):
            for i in range(count):
                kernel[(programs[i],)](
                    None, count, *[loadable(x[i]) if x else None for x in lists],
                    *[c[i] for c in columns], *scalars, MANY=False, DEPTH=0, ALIGNED=whole[i],
                    **meta,
                )  # fmt: skip
            return
        starts = [0, *accumulate(programs)]
        addresses = [[x.data_ptr() for x in own] if own else [0] * count for own in lists]
        aligned = all(whole) and not any([a % _ALIGNMENT for row in addresses for a in row])
        table = table_of(chain(starts[:-1], *addresses, *columns), first.device)
        kernel[(starts[-1],)](
            table, count, *[loadable(x[0]) if x else None for x in lists], *[0] * len(columns),
            *scalars, MANY=True, DEPTH=(count - 1).bit_length(), ALIGNED=aligned, **meta,
        )  # fmt: skip


def select(lists: Sequence[Sequence[Any]], at: Sequence[int]) -> Sequence[Sequence[Any]]:
    """Each list at these positions, ascending; an empty list stays empty."""
    if len(at) == max(map(len, lists)):
        return lists  # all of them
    return [[x[i] for i in at] if len(x) else [] for x in lists]
