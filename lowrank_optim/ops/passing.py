"""What ops of the package hold in passing on a device: buffers that nobody sees come and go."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from lowrank_optim.ops import native, reference, triton
from lowrank_optim.ops.cosine import SPAN, at_once, tile_width, whole_at_once
from lowrank_optim.ops.devices import GPUS, kind_of
from lowrank_optim.ops.dispatch import serving
from lowrank_optim.ops.schema import NAMESPACE
from lowrank_optim.ops.stacked import in_lines

Given = Mapping[str, Any]
"""Arguments by the names of the schema."""


def of_direction(like: Tensor, moments: int) -> int:
    """Tensors like ``like`` that the op of a direction has in passing, in the format of arithmetic.

    Kernels have none. Plain torch has the gradient in that format, the moments as they were, and
    the direction before a flag chooses; of moments in 8 bits it has small tiles.

    Args:
        like: a parameter that the rule steps.
        moments: how many are not in 8 bits.
    """
    if not moments or _server(like) in (native, triton):
        return 0
    return _is_narrow(like) + moments + 2


def of_sum(like: Tensor, stepped: bool) -> int:
    """Those of ``direction_add_``: the new weights, and the old or the moves.

    Triton has none, but for a copy of weights that have gaps in memory.

    Args:
        like: the parameter.
        stepped: whether step sizes may be on the device.
    """
    if _server(like) is triton:
        return int(not like.is_contiguous())
    return 1 + max(_is_narrow(like), stepped)


def _is_narrow(like: Tensor) -> bool:
    return like.dtype.itemsize < torch.float32.itemsize


def _server(like: Tensor) -> ModuleType:
    """What serves ops on a parameter; without memory it stands for one where Triton is."""
    if like.is_meta or isinstance(like, FakeTensor):
        return triton if kind_of(like) in GPUS and like.dtype != torch.float64 else reference
    return serving(like.dtype, like.device.type)


def passing(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[int]:
    """Bytes of the buffers that a call of an op has at once, beside its arguments and results.

    Args:
        func: the op.
        args: by position.
        kwargs: by name.
    """
    if func is torch.ops.aten._linalg_eigh.default:
        (x, *_) = args
        return [int(EIGH * _size(x))] if kind_of(x) in GPUS else []
    if func.namespace != NAMESPACE or func._opname not in BUFFERS:
        return []
    given = named(func, args, kwargs)
    first: list[Tensor] = next(iter(given.values()))
    if not first or kind_of(first[0]) not in GPUS:
        return []
    return BUFFERS[func._opname](given)


def named(func: Any, args: Sequence[Any], kwargs: Given) -> dict[str, Any]:
    """Arguments by the names of the schema."""
    names = [a.name for a in func._schema.arguments]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _transforms(xs: Sequence[Tensor], each: Callable[[int, int], int]) -> list[int]:
    """Of the alike matrices ``(m, n)`` that hold most.

    Args:
        xs: whose columns are transformed.
        each: bytes that a matrix ``(m, n)`` has from begin to end.
    """
    found: list[list[int]] = [[]]
    for m, n in {(int(x.shape[0]), int(x.shape[1])) for x in xs if x.numel()}:
        alike = sum(x.shape == (m, n) for x in xs)
        columns = min(alike, at_once(m, n, True)) * min(n, tile_width(m, True))
        found.append([4 * columns * m, 8 * columns * (m // 2 + 1), alike * each(m, n)])
    return max(found, key=sum)


def _sums(m: int, n: int) -> int:
    width = tile_width(m, True)
    return 4 * m * sum(-(-min(width, n - at) // SPAN) for at in range(0, n, width))


def _scores(given: Given) -> list[int]:
    return _transforms(given["grads"], _sums)


def _project(given: Given) -> list[int]:
    return _transforms(given["grads"], lambda m, n: 0)


def _top_project(given: Given) -> list[int]:
    """Whole transforms beside the tile that is folded; of what is too large those of two ops."""
    large = [x for x in given["grads"] if not whole_at_once(x.shape[0], x.shape[1], True)]
    found = [_scores({**given, "grads": large}), _project({**given, "grads": large})]
    for m, n in {(int(x.shape[0]), int(x.shape[1])) for x in given["grads"] if x.numel()}:
        count = sum(x.shape == (m, n) for x in given["grads"])
        count = min(count, whole_at_once(m, n, True))
        width, spectrum = tile_width(m, True), 8 * count * (m // 2 + 1)
        tiles = [(min(width, n - at), min(n, at + width)) for at in range(0, n, width)]
        held = [[4 * count * m * own, spectrum * until] for own, until in tiles]
        found.append([*max(held, key=sum), count * _sums(m, n)])
    return max(found, key=sum)


def _lift(given: Given) -> list[int]:
    return _transforms(given["params"], lambda m, n: 4 * m)


def _scaled(given: Given) -> list[int]:
    """The right operand in bfloat16, of one matrix after the other."""
    pairs = zip(given["bases"], given["updates"], strict=True)
    return [max((2 * n.numel() for p, n in pairs if p.dtype == torch.bfloat16), default=0)]


def _sign(given: Given) -> list[int]:
    """Both right operands in bfloat16, those that are not."""
    lists = zip(given["bases"], given["updates"], given["lows"], strict=True)
    found = [[]] + [
        [2 * x.numel() for x in own if x.dtype != p.dtype]
        for p, *own in lists
        if p.dtype == torch.bfloat16
    ]
    return max(found, key=sum)


def _copies(given: Given) -> list[int]:
    """Weights that do not lie row after row, one after the other, and directions that do not."""
    loose = [w for w in given["params"] if not w.is_contiguous()]
    updates = [x for x in given["updates"] if not x.is_contiguous()]
    return [max(map(_size, loose), default=0), *map(_size, updates)]


def _copy(given: Given) -> list[int]:
    """Weights that lie neither by rows nor by columns, one after the other."""
    return [max((_size(w) for w in given["params"] if not in_lines(w)), default=0)]


def _size(x: Tensor) -> int:
    return x.numel() * x.element_size()


BUFFERS: dict[str, Callable[[Given], list[int]]] = {
    "cosine_scores": _scores,
    "cosine_project_": _project,
    "cosine_top_project_": _top_project,
    "cosine_lift_add_": _lift,
    "lift_add_scaled_": _scaled,
    "lift_add_sign_": _sign,
    "direction_add_": _copies,
    "decay_": _copy,
    "addmm_": _copy,
}
"""By op. Others have tables of addresses, of some KiB."""
EIGH = 29.4
"""Workspace of ``eigh`` on CUDA over the bytes of its matrices. cuSOLVER documents no formula: with
it estimates are what an H200 measured where four bases were found at once, at two sizes
(``tests/memory/test_measured.py``)."""
