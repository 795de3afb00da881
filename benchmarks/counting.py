"""What a step would launch on an accelerator, counted op by op without one.

Under :func:`pretended_accelerator` tensors have no data, so that the shapes of a 7B model cost
nothing, and the package takes them for tensors of an accelerator; tensors that do have data are
the host's, such as counters, and their ops are not counted.

    with pretended_accelerator():
        ...  # parameters, gradients, an optimizer and its first step
        with Launches() as seen:
            optimizer.step()
    seen.bytes, seen.flops, seen.launches

Bytes are those of each operand once a kernel, from and to memory, whatever a cache holds.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lowrank_optim
from lowrank_optim.ops.cosine import TILE_ELEMENTS as COSINE_TILE
from lowrank_optim.ops.tiles import FLAT, TILE_ELEMENTS

aten = torch.ops.aten
PACKAGE = lowrank_optim.__name__
MATRIX, SCALAR = "matrix", "scalar"
"""Units that do the arithmetic of a kernel: those of 16-bit products, or those of float32."""


class Kernel(NamedTuple):
    """One call on the device."""

    op: str
    launches: int
    bytes: int
    """Read and written."""
    flops: int = 0
    """Of products, of transforms and of the package's ops; of other torch ops none are counted."""
    unit: str = SCALAR


@contextmanager
def pretended_accelerator() -> Iterator[None]:
    """Tensors without data, taken by the package for those of an accelerator."""
    own = [m for name, m in sys.modules.items() if name.partition(".")[0] == PACKAGE]
    asks = [m for m in own if "on_accelerator" in vars(m)]
    before = [m.on_accelerator for m in asks]
    for module in asks:
        module.on_accelerator = lambda tensor: True  # type: ignore[attr-defined]
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        for module, function in zip(asks, before, strict=True):
            module.on_accelerator = function  # type: ignore[attr-defined]


class Launches(TorchDispatchMode):
    """Records the kernels of its ``with`` block."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.kernels += kernels(func, args, kwargs or {}, out)
        return out

    @property
    def bytes(self) -> int:
        """Of all kernels."""
        return sum(k.bytes for k in self.kernels)

    @property
    def launches(self) -> int:
        """Of all kernels."""
        return sum(k.launches for k in self.kernels)

    @property
    def flops(self) -> int:
        """Of all kernels."""
        return sum(k.flops for k in self.kernels)


def kernels(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> list[Kernel]:
    """What one call of an op launches: none if it is one of the host, or moves nothing."""
    packet, name = func.overloadpacket, func._opname
    tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
    on_device = any(isinstance(x, FakeTensor) for x in tensors)
    if not on_device or func.is_view or packet in FREE or func.namespace in ("prim", "profiler"):
        return []
    given = named(func, args, kwargs)
    if func.namespace == PACKAGE:
        return package_kernels(name, given, out)
    flops, unit = product(packet, args)
    return [Kernel(name, launches_of(name, given), traffic(func, given, out), flops, unit)]


# ---------------------------------------------------------------- torch's own ops

FREE = {
    aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided,
    aten.detach, aten.alias, aten.lift_fresh, aten._unsafe_view, aten._reshape_alias, aten.set_,
    aten.resize_, aten._local_scalar_dense, aten.promote_types, aten.is_same_size, aten.sym_size,
}  # fmt: skip
"""No kernel, besides views."""
WRITTEN_ONLY = {aten.copy_, aten.zero_, aten.fill_, aten.normal_, aten.uniform_, aten.random_}
"""Of torch: what these mutate they do not read."""
GATHERS = {aten.index_select, aten.index, aten.gather}
"""They read what they return, of a source that may be larger."""
SCATTERS = {aten.index_copy_, aten.index_put_, aten.index_copy, aten.scatter_}
"""They write as much as their last tensor has, into what may be larger."""
ONLY_WITH_SCALER = {("_fused_adamw_", "grads"), ("_fused_adam_", "grads")}
"""Arguments that a schema has as mutated, and that a step without a GradScaler leaves alone."""
GEMMS = {
    **dict.fromkeys((aten.mm, aten.bmm), (0, 1)),
    **dict.fromkeys((aten.addmm, aten.addmm_, aten.baddbmm, aten.baddbmm_), (1, 2)),
}
"""Where the factors of a product are among its arguments."""
TENSORS, BLOCKS, CHUNK = 36, 320, 65536
"""Of torch's multi-tensor kernels: tensors of one launch at four lists, its blocks, and elements of
a block (ATen/native/cuda/MultiTensorApply.cuh)."""


def named(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by the names of the schema."""
    names = [a.name for a in func._schema.arguments]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def size(x: Tensor) -> int:
    """Bytes of a tensor that lie in memory: dimensions that are expanded count once."""
    return x.element_size() * math.prod(
        n for n, stride in zip(x.shape, x.stride(), strict=True) if stride or n == 0
    )


def _tensors(value: Any) -> list[Tensor]:
    return [x for x in tree_leaves(value) if isinstance(x, Tensor)]


def _sizes(tensors: Sequence[Tensor]) -> int:
    """Of each once, however often it is named."""
    seen = {(x.untyped_storage()._cdata, x.storage_offset(), x.shape, x.stride()): x
            for x in tensors}  # fmt: skip
    return sum(map(size, seen.values()))


def traffic(func: Any, given: Mapping[str, Any], out: Any) -> int:
    """Bytes that a kernel of torch reads and writes."""
    packet = func.overloadpacket
    results, operands = _tensors(out), _tensors(list(given.values()))
    if packet in GATHERS:
        return 2 * _sizes(results) + _sizes(operands[1:])
    if packet in SCATTERS:
        return 2 * size(operands[-1]) + _sizes(operands[1:-1])
    written = [
        x
        for argument in func._schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write
        if (func._opname, argument.name) not in ONLY_WITH_SCALER
        for x in _tensors(given.get(argument.name))
    ]
    mutated = {id(x) for x in written}
    read = operands
    if packet in WRITTEN_ONLY:
        read = [x for x in operands if id(x) not in mutated]
    storages = {x.untyped_storage()._cdata for x in operands}
    new = [x for x in results if x.untyped_storage()._cdata not in storages]
    return _sizes(read) + _sizes([*written, *new])


def product(packet: Any, args: Sequence[Any]) -> tuple[int, str]:
    """Flops of a matrix product, and the unit that has its format."""
    if packet not in GEMMS:
        return 0, SCALAR
    left, right = (args[i] for i in GEMMS[packet])
    unit = MATRIX if left.dtype in (torch.bfloat16, torch.float16) else SCALAR
    return 2 * left.numel() * right.shape[-1], unit


def launches_of(name: str, given: Mapping[str, Any]) -> int:
    """One, but for lists, which go as many tensors and blocks at once as a kernel's table holds."""
    first = next(iter(given.values()), None)
    if not name.startswith(("_foreach_", "_fused_adam")) or not isinstance(first, list):
        return 1
    chunks = sum(-(-x.numel() // CHUNK) for x in first)
    count = max(1, -(-len(first) // TENSORS), -(-chunks // BLOCKS))
    return count + (name == "_foreach_norm")  # whose sums of chunks are a kernel of their own


# ---------------------------------------------------------------- the package's ops


class Floor(NamedTuple):
    """What an op costs at least: docs/kernels.md has the formulas."""

    bytes: int
    flops: int


EACH = {
    "adamw_direction_": 10, "lion_direction_": 6, "moment_": 3, "adamw_direction_8bit_": 10,
    "lion_direction_8bit_": 6, "moment_8bit_": 6, "dequantize_blockwise_": 1, "column_norms": 2,
}  # fmt: skip
"""Flops an element of the first argument; searches are not flops."""
OUTPUTS = {
    "quantize_blockwise_": ("codes", "scales"), "top_rows_": ("sources",),
}  # fmt: skip
"""What is written and not read, besides ``outs``."""
LISTS = {name for name in EACH if name != "column_norms"} | {
    "quantize_blockwise_", "stochastic_round_",
}  # fmt: skip
"""A list of these is one launch; of all others a matrix is."""


def floor(name: str, given: Mapping[str, Any]) -> Floor:
    """Bytes and flops of a call of ``lowrank_optim::name``, arguments by name."""
    if name.startswith("cosine_"):
        return _cosine_floor(name, given)
    read = {k: v for k, v in given.items() if k != "outs" and k not in OUTPUTS.get(name, ())}
    total = sum(_sizes(_tensors(x)) for x in read.values())
    total += sum(_sizes(_tensors(given[k])) for k in written(name))
    first: list[Tensor] = next(iter(given.values()))
    flops = sum(EACH.get(name, 0) * x.numel() for x in first)
    if name == "column_norms":
        total += sum(4 * x.numel() // x.shape[-2] for x in first)
    elif name == "top_rows_":
        flops = sum(31 * x.numel() for x in first)
    elif name.startswith("lift_add"):
        products = 2 if name == "lift_add_sign_" else 1
        flops = sum(w.numel() * (2 * products * p.shape[-1] + 6) for w, p in
                    zip(first, given["bases"], strict=True))  # fmt: skip
    elif name.startswith("coordinate_"):
        rows = given["updates" if name == "coordinate_add_" else "exp_avgs"]
        flops = sum(4 * w.numel() for w in first)
        if name == "coordinate_adamw_":
            flops += sum(10 * x.numel() for x in rows)
        else:  # rows in the set take nothing of G
            grads = given["grads"]
            unread = sum(x.numel() * g.element_size() for x, g in zip(rows, grads, strict=True))
            total -= _sizes(grads) if given["free"] == "none" else unread
    return Floor(total, flops)


def written(name: str) -> list[str]:
    """Arguments that an op of the package writes."""
    schema = getattr(getattr(torch.ops, PACKAGE), name).default._schema
    return [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]


def _cosine_floor(name: str, given: Mapping[str, Any]) -> Floor:
    first: list[Tensor] = next(iter(given.values()))
    total = sum(_sizes([x]) for x in first)  # W, or G where there is no W
    flops = sum(2.5 * x.numel() * math.log2(max(2, x.shape[0])) for x in first)
    if name == "cosine_project_":
        total += _sizes(given["outs"])
    elif name == "cosine_lift_add_":
        total += _sizes(first) + _sizes(given["updates"])
    elif name == "cosine_adamw_":
        total += _sizes(first) + _sizes(given["grads"])
        total += 2 * (_sizes(given["exp_avgs"]) + _sizes(given["exp_avg_sqs"]))
        flops = 2 * flops + 10 * sum(x.numel() for x in given["exp_avgs"])
    return Floor(total, round(flops))


def package_kernels(name: str, given: Mapping[str, Any], out: Any) -> list[Kernel]:
    """What Triton's backend launches for a call; a list of elementwise work is one kernel."""
    first: list[Tensor] = next(iter(given.values()))
    if name in COSINES:
        found = []
        for i in range(len(first)):
            own = {k: v[i] for k, v in given.items() if isinstance(v, list) and k != "plan" and v}
            found += COSINES[name](own)
        return found
    least = floor(name, given)
    if name == "top_rows_":  # plain torch: two sorts, what makes them one, and the places
        return [Kernel(name, 9 * len(first), 9 * least.bytes, least.flops)]
    unit = SCALAR
    if name.startswith("lift_add") and given["bases"][0].dtype == torch.bfloat16:
        unit = MATRIX
    count, gathered = (1 if name in LISTS else len(first)), []
    if name in FLAT:  # a gradient of other strides is gathered a tile at a time
        for x in first:
            if not x.is_contiguous():
                tiles = -(-x.numel() // TILE_ELEMENTS)
                gathered.append(Kernel("gather", tiles, 2 * size(x)))
                count += tiles
    return [*gathered, Kernel(name, count, least.bytes, least.flops, unit)]


def _passes(x: Tensor, *each: tuple[str, float], flops: float = 2.5) -> list[Kernel]:
    """Kernels over all columns of ``x (m, n)``, a tile at a time: names and bytes an element."""
    m, n = x.shape
    tiles = -(-n // max(1, COSINE_TILE[True] // m))
    work = round(flops * x.numel() * math.log2(max(2, m)))
    return [
        Kernel(op, tiles, round(share * x.numel()), work if "fft" in op else 0)
        for op, share in each
    ]


FFT = 8.0
"""Bytes an element of a transform of float32: it reads all and writes half a complex spectrum, in
one pass if all stages of a column fit a multiprocessor, as they do up to some thousand rows."""


def _scores(own: Mapping[str, Tensor]) -> list[Kernel]:
    x = own["grads"]
    return _passes(x, ("cosine_fold", x.element_size() + 4), ("fft_r2c", FFT), ("cosine_score", 4))


def _project(own: Mapping[str, Tensor]) -> list[Kernel]:
    x, out = own["grads"], own["outs"]
    picked = ("cosine_pick", 2 * out.element_size() * out.shape[0] / x.shape[0])
    return _passes(x, ("cosine_fold", x.element_size() + 4), ("fft_r2c", FFT), picked)


def _lift(own: Mapping[str, Tensor]) -> list[Kernel]:
    w, low = own["params"], own["updates"]
    placed = ("cosine_fold", low.element_size() * low.shape[0] / w.shape[0] + 4)
    added = ("cosine_add", 4 + 2 * w.element_size())
    copied = ("copy of the spectrum", 8)  # the inverse transform overwrites what it reads
    places = Kernel("cosine_place", 1, 4 * (w.shape[0] + low.shape[0]))
    return [places, *_passes(w, placed, copied, ("fft_c2r", FFT), added)]


COSINES: dict[str, Callable[[Mapping[str, Tensor]], list[Kernel]]] = {
    "cosine_scores": _scores,
    "cosine_project_": _project,
    "cosine_lift_add_": _lift,
}
