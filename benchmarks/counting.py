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

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.op_costs import (
    MATRIX,
    PACKAGE,
    SCALAR,
    Kernel,
    package_kernels,
    size,
    sizes,
    tensors,
)
from lowrank_optim.ops import devices, dispatch, triton
from lowrank_optim.ops.passing import named

aten = torch.ops.aten


@contextmanager
def served_by_triton() -> Iterator[None]:
    """Tensors of the host taken for those of an accelerator, whose ops are Triton's.

    What a host has compiled decides nothing then.
    """
    with (
        devices.as_accelerators(),
        mock.patch.dict(dispatch.ORDER, {"cpu": ("triton", "reference")}),
        mock.patch.object(triton, "available", lambda device_type: (True, "")),
        mock.patch.dict(os.environ),
    ):
        os.environ.pop(dispatch.VARIABLE, None)
        dispatch._choose.cache_clear()
        try:
            yield
        finally:
            dispatch._choose.cache_clear()


@contextmanager
def pretended_accelerator() -> Iterator[None]:
    """Tensors without data, taken by the package for those of an accelerator."""
    with served_by_triton(), FakeTensorMode(allow_non_fake_inputs=True):
        yield


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
        return package_kernels(name, given)
    flops, unit = product(packet, args)
    return [Kernel(name, launches_of(func, args, kwargs), traffic(func, given, out), flops, unit)]


# ---------------------------------------------------------------- torch's own ops

FREE = {
    aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided,
    aten.detach, aten.alias, aten.lift_fresh, aten._unsafe_view, aten._reshape_alias, aten.set_,
    aten.resize_, aten._local_scalar_dense, aten.promote_types, aten.is_same_size, aten.sym_size,
    aten.sym_stride, aten.is_pinned, aten.record_stream,
}  # fmt: skip
"""No kernel, besides views."""
WRITTEN_ONLY = {
    aten.copy_, aten.zero_, aten.fill_, aten.normal_, aten.uniform_, aten.random_,
    aten._foreach_copy_, aten._foreach_zero_,
}  # fmt: skip
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
TENSORS = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
BLOCKS, CHUNK = 320, 65536
"""Of torch's multi-tensor kernels: tensors of one launch by how many lists there are, its blocks,
and elements of a block (ATen/native/cuda/MultiTensorApply.cuh)."""


def traffic(func: Any, given: Mapping[str, Any], out: Any) -> int:
    """Bytes that a kernel of torch reads and writes."""
    packet = func.overloadpacket
    outs = [x for a in func._schema.arguments if a.is_out for x in tensors(given.get(a.name))]
    operands = [x for x in tensors(list(given.values())) if all(x is not own for own in outs)]
    results = tensors(out)
    if packet in GATHERS:
        return 2 * sizes(results) + sizes(operands[1:])
    if packet in SCATTERS:
        return 2 * size(operands[-1]) + sizes(operands[1:-1])
    written = [
        x
        for argument in func._schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write
        if (func._opname, argument.name) not in ONLY_WITH_SCALER
        for x in tensors(given.get(argument.name))
    ]
    mutated = {id(x) for x in written}
    read = operands
    if packet in WRITTEN_ONLY:
        read = [x for x in operands if id(x) not in mutated]
    storages = {x.untyped_storage()._cdata for x in (*operands, *outs)}
    new = [x for x in results if x.untyped_storage()._cdata not in storages]
    return sizes(read) + sizes([*written, *new])


def product(packet: Any, args: Sequence[Any]) -> tuple[int, str]:
    """Flops of a matrix product, and the unit that has its format."""
    if packet not in GEMMS:
        return 0, SCALAR
    left, right = (args[i] for i in GEMMS[packet])
    unit = MATRIX if left.dtype in (torch.bfloat16, torch.float16) else SCALAR
    return 2 * left.numel() * right.shape[-1], unit


def launches_of(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """How many kernels a call of an op is that is not free.

    One, but for the package's ops and for torch's of lists. Those go as many tensors and blocks at
    once as a kernel's table holds, if torch's multi-tensor kernels take them: of dense tensors, and
    beside each others of its shape and strides. Else they go one by one.
    """
    name = func._opname
    if func.namespace == PACKAGE:
        return sum(k.launches for k in package_kernels(name, named(func, args, kwargs)))
    if not name.startswith(("_foreach_", "_fused_adam")):
        return 1
    lists = [x for x in args if isinstance(x, (list, tuple)) and x and isinstance(x[0], Tensor)]
    first = lists[0]
    for own in zip(*lists, strict=True) if name.startswith("_foreach_") else ():
        alike = all(x.shape == own[0].shape and x.stride() == own[0].stride() for x in own)
        if not alike or not is_dense(own[0]):
            return len(first)
    chunks = sum(-(-x.numel() // CHUNK) for x in first)
    depth = len(lists) + (not name.endswith(("_", "_norm")))
    count = max(1, -(-len(first) // TENSORS.get(depth, TENSORS[5])), -(-chunks // BLOCKS))
    return count + (name == "_foreach_norm")  # whose sums of chunks are a kernel of their own


def is_dense(x: Tensor) -> bool:
    """Whether its elements are all of a piece of memory, in any order."""
    expected = 1
    for stride, length in sorted(zip(x.stride(), x.shape, strict=True)):
        if length != 1 and stride != expected:
            return False
        expected *= length
    return True
