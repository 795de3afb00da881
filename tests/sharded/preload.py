"""What the server of worlds imports once, so that none of its processes does."""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import os
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

LATER = (
    "pytest",
    "torch._dynamo",
    "torch._functorch.aot_autograd",
    "torch._inductor.utils",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.optim",
    "torch.distributed.tensor.experimental",
    "torch.nn.parallel",
    "tests.sharded.ranks",
    "tests.sharded.training",
)
"""With what torch imports when a weight is first sharded."""

for name in LATER:
    importlib.import_module(name)


def as_on_a_gpu() -> None:
    """FSDP2 of torch 2.6 runs on GPUs alone: what it misses on a CPU, as later ones have it.

    Streams of a CPU have no events. What an all-gather writes is counted as a change of the
    weights, of which the forward pass keeps a version, as it is not where a GPU writes it. And
    gloo gives a sum where reduce-scatter is asked for an average.
    """
    from torch.distributed.fsdp._fully_shard import _fsdp_collectives, _fsdp_param_group

    event = SimpleNamespace(record=lambda *_: None, wait=lambda *_: None)
    torch.cpu.Stream.record_event = lambda *_: event  # type: ignore[attr-defined]
    torch.cpu.Stream.wait_event = lambda *_: None  # type: ignore[attr-defined]
    copy_out = _fsdp_collectives.foreach_all_gather_copy_out

    @functools.wraps(copy_out)
    def uncounted(result: Any, params: Any, group: Any) -> None:
        with ExitStack() as kept:
            for x in (x for p in params for x in getattr(p, "all_gather_outputs", ())):
                kept.enter_context(torch.autograd._unsafe_preserve_version_counter(x))
            copy_out(result, params, group)

    _fsdp_param_group.foreach_all_gather_copy_out = uncounted
    reduce_scatter = dist.reduce_scatter_tensor

    @functools.wraps(reduce_scatter)
    def averaging(output: Any, input: Any, op: Any = dist.ReduceOp.SUM, **other: Any) -> Any:
        if op == dist.ReduceOp.AVG:
            input = input / dist.get_world_size(other.get("group"))
            op = dist.ReduceOp.SUM
        return reduce_scatter(output, input, op=op, **other)

    dist.reduce_scatter_tensor = averaging


if not hasattr(torch.cpu.Stream, "record_event"):
    as_on_a_gpu()

# as it ends, Triton's bindings list the objects that its caches still hold
atexit.register(lambda: os.dup2(os.open(os.devnull, os.O_WRONLY), 2))

# some hundred thousand objects stay in every process: no collection walks them, nor writes beside
# them what makes a page a process's own
gc.collect()
gc.freeze()
