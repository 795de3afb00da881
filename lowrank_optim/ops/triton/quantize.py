"""Block quantisation to 256 values and back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowrank_optim.ops.quant import dynamic_map
from lowrank_optim.ops.triton import interpreted
from lowrank_optim.ops.triton.elements import block_layout, block_scale, requantize
from lowrank_optim.ops.triton.launch import (
    capturing,
    cdiv,
    groups,
    launch,
    locate,
    next_power_of_2,
    number,
    packed,
    pointer,
    select,
    warps,
)

BLOCKS, WARPS = 4 if interpreted() else 1, 1
"""Blocks and warps (of 32 lanes) of a program. A maximum within a warp needs no barrier and no
shared memory; eight elements a lane hide each other's waits. The interpreter runs one program after
the other, and gets fewer."""

Layouts = tuple[Sequence[int], Sequence[int], Sequence[int]]
"""Rows, columns and block of each tensor."""


def edges(signed: bool) -> Tensor:
    """The largest float32 that each code of a dynamic map is nearest to, the last one infinity.

    Distances to both neighbours are float32 and monotone, so all below an edge take its code. It
    is the float nearest to the middle, or the next.
    """
    table = dynamic_map(signed, torch.device("cpu"))
    low, high = table[:-1], table[1:]
    middle = ((low + high) / 2).view(torch.int32)
    near = torch.stack([(middle + step).view(torch.float32) for step in range(-4, 5)])
    stays = (high - near).abs() >= (near - low).abs()
    last = torch.where(stays, near, -torch.inf).amax(0)
    return torch.cat([last, torch.full((1,), torch.inf)])


_EDGES: dict[tuple[bool, torch.device], Tensor] = {}


def form(map: Tensor) -> tuple[int, Tensor]:
    """How a kernel finds codes of ``map``: 1 and 2 by the edges of the dynamic maps, 0 by search.

    Only the maps of this package are known, by their address: to compare values, the host would
    have to wait. Nor are they while a graph is recorded that would have to copy the edges.
    """
    for kind, signed in ((1, True), (2, False)):
        if map.data_ptr() == dynamic_map(signed, map.device).data_ptr():
            key = signed, map.device
            if key not in _EDGES and not capturing(map):
                _EDGES[key] = edges(signed).to(map.device)
            return (kind, _EDGES[key]) if key in _EDGES else (0, map)
    return 0, map


def lanes(blocks: Sequence[int]) -> list[int]:
    """Tile widths: the next power of two, in which the block is masked."""
    return [next_power_of_2(b) for b in blocks]


def block_groups(
    lists: Sequence[Sequence[Tensor]], layouts: Layouts
) -> Iterator[tuple[list[int], dict[str, object]]]:
    """Tensors that can share a launch, and the constants of it that say how they are cut."""
    widths = lanes(layouts[2])
    whole = [
        c % b == 0 and b == width and r * c % (BLOCKS * b) == 0
        for r, c, b, width in zip(*layouts, widths, strict=True)
    ]
    for at in groups(lists, widths, whole):
        tile = {"COUNT": BLOCKS, "LANES": widths[at[0]], "WHOLE": whole[at[0]]}
        yield at, {**tile, "num_warps": warps(WARPS)}


def block_programs(rows: Sequence[int], cols: Sequence[int], blocks: Sequence[int]) -> list[int]:
    """Programs per tensor."""
    return [cdiv(r * cdiv(c, b), BLOCKS) for r, c, b in zip(rows, cols, blocks, strict=True)]


@triton.jit(do_not_specialize=["rows", "cols", "block"])
def quantize_kernel(
    table, tensors, x, codes, scales, rows, cols, block, entries,
    MANY: tl.constexpr, DEPTH: tl.constexpr, ALIGNED: tl.constexpr,
    FORM: tl.constexpr, COUNT: tl.constexpr, LANES: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """``scale = max |x|`` of the block, ``code`` of the entry nearest to ``x / scale``."""
    t, part = locate(table, tensors, MANY, DEPTH)
    lane = tl.arange(0, LANES)
    rows = number(table, tensors, t, 4, rows, MANY)
    cols = number(table, tensors, t, 5, cols, MANY)
    block = number(table, tensors, t, 6, block, MANY)
    b, start, live, mask = block_layout(part, rows, cols, block, lane, COUNT, LANES, WHOLE)
    at = start[:, None] + lane[None, :]
    x = tl.load(pointer(table, tensors, t, 1, x, MANY, ALIGNED) + at, mask, 0.0).to(tl.float32)
    scale = block_scale(x)
    tl.store(pointer(table, tensors, t, 3, scales, MANY, False) + b, scale, live)
    codes = pointer(table, tensors, t, 2, codes, MANY, ALIGNED)
    tl.store(codes + at, requantize(x, scale, entries, FORM), mask)


@triton.jit(do_not_specialize=["rows", "cols", "block"])
def dequantize_kernel(
    table, tensors, codes, scales, out, rows, cols, block, entries,
    MANY: tl.constexpr, DEPTH: tl.constexpr, ALIGNED: tl.constexpr,
    COUNT: tl.constexpr, LANES: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """``out = map[code] * scale``."""
    t, part = locate(table, tensors, MANY, DEPTH)
    lane = tl.arange(0, LANES)
    rows = number(table, tensors, t, 4, rows, MANY)
    cols = number(table, tensors, t, 5, cols, MANY)
    block = number(table, tensors, t, 6, block, MANY)
    b, start, live, mask = block_layout(part, rows, cols, block, lane, COUNT, LANES, WHOLE)
    at = start[:, None] + lane[None, :]
    code = tl.load(pointer(table, tensors, t, 1, codes, MANY, ALIGNED) + at, mask, 0)
    scale = tl.load(pointer(table, tensors, t, 2, scales, MANY, False) + b, live, 0.0)
    out = pointer(table, tensors, t, 3, out, MANY, ALIGNED)
    x = tl.load(entries + code.to(tl.int32)) * scale[:, None]
    tl.store(out + at, x.to(out.dtype.element_ty), mask)


def quantize_blockwise_(
    xs: Sequence[Tensor],
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    map: Tensor,
    rows: Sequence[int],
    cols: Sequence[int],
    blocks: Sequence[int],
) -> None:
    """Quantise each tensor, read as ``rows`` rows of ``cols`` elements, in blocks of a row."""
    packed(("codes", "scales"), (codes, scales))
    lists = [[x.contiguous() for x in xs], codes, scales]
    kind, table = form(map)
    _run(quantize_kernel, lists, table, (rows, cols, blocks), FORM=kind)


def dequantize_blockwise_(
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    outs: Sequence[Tensor],
    map: Tensor,
    rows: Sequence[int],
    cols: Sequence[int],
    blocks: Sequence[int],
) -> None:
    """The inverse of `quantize_blockwise_`, up to the quantisation."""
    packed(("codes", "scales", "outs"), (codes, scales, outs))
    _run(dequantize_kernel, [codes, scales, outs], map, (rows, cols, blocks))


def _run(
    kernel: object,
    lists: list[Sequence[Tensor]],
    entries: Tensor,
    layouts: Layouts,
    **meta: object,
) -> None:
    for at, tiles in block_groups(lists, layouts):
        layout = select(layouts, at)
        launch(kernel, select(lists, at), layout, block_programs(*layout), entries, **tiles, **meta)
