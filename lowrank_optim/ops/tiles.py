"""Elementwise ops on inputs of any strides: the backends read flat memory, a tile of it at a time.

A gradient that is not contiguous (a transposed weight's, a slice's) is gathered into a buffer of
one tile, and the op runs on matching pieces of all else. No copy is ever as large as the tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lowrank_optim.ops.reference import spans

FLAT = frozenset(
    f"{name}{kept}_"
    for name in ("adamw_direction", "lion_direction", "moment")
    for kept in ("", "_8bit")
) | {"quantize_blockwise_"}
"""Ops whose first list is only read, and read as flat memory."""

_ROWS = ("row_eps", "row_scale")


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
        own = [_select(v, [i]) for v in values]
        for piece in _pieces(dict(zip(arguments, own, strict=True)), x):
            call(*piece.values())


def _select(value: Any, at: Sequence[int]) -> Any:
    return [value[i] for i in at] if isinstance(value, list) and value else value


def _pieces(own: dict[str, Any], x: Tensor) -> Iterator[dict[str, Any]]:
    """The arguments of one call a tile: whole rows of the last dimension, or a part of one."""
    width = x.shape[-1]
    first = next(iter(own))
    rows, cols, block = x.numel() // width, width, 1
    if "blocks" in own:
        rows, cols, block = own["rows"][0], own["cols"][0], own["blocks"][0]
    buffer: Tensor | None = None
    for span, blocks in spans(rows, cols, block):
        count, row = span.stop - span.start, span.start // width
        shape = (count // width, width) if count >= width else (1, count)
        if buffer is None:  # the first tile is the largest
            buffer = torch.empty(count, dtype=x.dtype, device=x.device)
        at = slice(row, row + max(1, count // width))
        piece = dict(own)
        for name, value in own.items():
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
        if "blocks" in own:
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
