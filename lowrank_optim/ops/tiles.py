"""Elementwise ops on inputs of any strides: the backends read flat memory, a tile of it at a time.

A gradient that is not contiguous (a transposed weight's, a slice's) is gathered into a buffer of
one tile, and the op runs on matching pieces of all else. No copy is ever as large as the tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from lowrank_optim.ops.devices import on_accelerator

TILE_ELEMENTS = 1 << 18
"""Elements of a tile buffer on a CPU, so that a temporary never grows with the parameter and stays
in the cache."""
ACCELERATOR_TILE_ELEMENTS = 1 << 24
"""Those on an accelerator, 64 MiB in float32: enough to fill it, and few launches."""

FLAT = frozenset(
    f"{name}{suffix}_"
    for name in ("adamw_direction", "lion_direction", "moment")
    for suffix in ("", "_8bit")
) | {"quantize_blockwise_"}
"""Ops whose first list is only read, and read as flat memory."""

_ROWS = ("row_eps", "row_scale")

_SIZES_ALONE = ContextVar("sizes_alone", default=False)


@contextmanager
def sizes_alone() -> Iterator[None]:
    """Loops over alike tiles take the first two and the last: of tensors without values.

    What is asked for is how much memory they need at once. The others need no more: what a tile
    leaves is there while the next one is worked on, and only the last may be smaller.
    """
    before = _SIZES_ALONE.set(True)
    try:
        yield
    finally:
        _SIZES_ALONE.reset(before)


def tiles(length: int, width: int) -> Iterable[slice]:
    """``range(length)`` in pieces of ``width``, the last one of what is left."""
    starts: Sequence[int] = range(0, length, width)
    if _SIZES_ALONE.get() and len(starts) > 3:
        starts = starts[0], starts[1], starts[-1]
    return [slice(i, min(i + width, length)) for i in starts]


def tile_elements(x: Tensor) -> int:
    """Elements of a tile on the device of ``x``."""
    return ACCELERATOR_TILE_ELEMENTS if on_accelerator(x) else TILE_ELEMENTS


def fillings(count: int, size: int, like: Tensor) -> list[range]:
    """Which of alike matrices are computed as one: as many as fill a tile of an accelerator.

    Args:
        count: of the matrices.
        size: elements of what is copied of each.
        like: one of them; of a batch, and on a host, each comes alone.
    """
    together = on_accelerator(like) and like.dim() == 2
    most = max(1, tile_elements(like) // max(1, size)) if together else 1
    return [range(i, min(i + most, count)) for i in range(0, count, most)]


def spans(
    rows: int, cols: int, block: int, tile: int | None = None
) -> Iterator[tuple[slice, slice]]:
    """Pieces of whole blocks of about a tile: elements of the flat tensor, and their scales.

    By default of a CPU's tile, on every device: plain torch makes temporaries of many times a tile
    in 8 bits.
    """
    tile = TILE_ELEMENTS if tile is None else tile
    each = -(-cols // block)
    if cols >= tile:
        width = tile // block * block
        for row in range(rows):
            for i in range(0, cols, width):
                j = min(i + width, cols)
                start = row * each + i // block
                yield (
                    slice(row * cols + i, row * cols + j),
                    slice(start, start - (-(j - i) // block)),
                )
        return
    height = max(1, tile // max(1, cols))
    for row in range(0, rows, height):
        end = min(row + height, rows)
        yield slice(row * cols, end * cols), slice(row * each, end * each)


def tile_rows(x: Tensor) -> int:
    """How many rows of ``x (..., m, n)`` make a tile."""
    return max(1, tile_elements(x) * x.shape[-2] // max(1, x.numel()))


def by_tiles(call: Callable[..., None], arguments: Sequence[str], values: Sequence[Any]) -> None:
    """``call`` on what is contiguous at once, then on the tiles of each input that is not.

    Args:
        call: an op of :data:`FLAT` as a backend has it.
        arguments: names of its arguments.
        values: the arguments, parallel lists and scalars.
    """
    xs = values[0]
    packed = [i for i, x in enumerate(xs) if x.is_contiguous()]
    if packed:
        call(*(_select(v, packed) for v in values))
    for i, x in enumerate(xs):
        if x.is_contiguous():
            continue
        of_one = [_select(v, [i]) for v in values]
        for piece in _pieces(dict(zip(arguments, of_one, strict=True)), x):
            call(*piece.values())


def _select(value: Any, at: Sequence[int]) -> Any:
    return [value[i] for i in at] if isinstance(value, list) and value else value


def _pieces(given: dict[str, Any], x: Tensor) -> Iterator[dict[str, Any]]:
    """The arguments of one call a tile: whole rows of the last dimension, or a part of one."""
    width = x.shape[-1]
    first = next(iter(given))
    rows, cols, block = x.numel() // width, width, 1
    if "blocks" in given:
        rows, cols, block = given["rows"][0], given["cols"][0], given["blocks"][0]
    buffer: Tensor | None = None
    for span, blocks in spans(rows, cols, block, tile_elements(x)):
        count, row = span.stop - span.start, span.start // width
        shape = (count // width, width) if count >= width else (1, count)
        if buffer is None:  # the first tile is the largest
            buffer = torch.empty(count, dtype=x.dtype, device=x.device)
        at = slice(row, row + max(1, count // width))
        piece = dict(given)
        for name, value in given.items():
            if name == first:
                flat = buffer[:count]
                gather_(x, span.start, span.stop, flat)
                piece[name] = [flat.view(shape)]
            elif name.startswith("scales"):
                piece[name] = [value[0].view(-1)[blocks]]
            elif name in _ROWS and value:
                piece[name] = [value[0].reshape(-1)[at]]
            elif name.rstrip("12") in ("exp_avgs", "exp_avg_sqs", "moments", "codes", "outs"):
                piece[name] = [value[0].view(-1)[span].view(shape)]
        if "blocks" in given:
            whole = rows > 1 and count >= cols
            piece["rows"], piece["cols"] = ([count // cols], [cols]) if whole else ([1], [count])
        yield piece


def gather_(x: Tensor, start: int, stop: int, out: Tensor) -> None:
    """Elements ``start`` to ``stop`` of ``x`` in row-major order, into ``out (stop - start,)``."""
    if x.dim() == 1:
        out.copy_(x[start:stop])
        return
    inner = x[0].numel()
    first, last = -(-start // inner), stop // inner
    if first > last:  # all within one
        gather_(x[last], start - last * inner, stop - last * inner, out)
        return
    head, tail = first * inner - start, stop - last * inner
    if head:
        gather_(x[first - 1], inner - head, inner, out[:head])
    if last > first:
        out[head : out.numel() - tail].view(last - first, *x.shape[1:]).copy_(x[first:last])
    if tail:
        gather_(x[last], 0, tail, out[out.numel() - tail :])
