"""The package's own kernels as steps call them: their time, and the rate of what must move."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu import variants
from benchmarks.gpu.report import Section
from benchmarks.gpu.settings import Settings
from benchmarks.matrices import NEVER, linear_shapes, weights
from benchmarks.op_costs import PACKAGE, Floor, floor
from benchmarks.timing import device_clock
from lowrank_optim.memory.measuring import free
from lowrank_optim.ops.passing import named

TITLE = "Kernels"
STEPS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "GaLoreAdamW": ("GaLoreAdamW", NEVER, {}),
    "GaLoreAdamW8bit": ("GaLoreAdamW8bit", NEVER, {}),
    "FiraAdamW": ("FiraAdamW", NEVER, {}),
    "FrugalAdamW rsvd": ("FrugalAdamW", NEVER, {"projector": "rsvd"}),
    "FrugalAdamW columns": ("FrugalAdamW", NEVER, {"projector": "columns"}),
    "DCTAdamW gap 1": ("DCTAdamW", 1, {}),
}
OPTIONS = {"weight_decay": 0.01}
REPEATS = 10
"""Calls between two readings of a clock: one call may take the host longer than the device."""


class Call(NamedTuple):
    """One call of an op of the package; its arguments stay alive."""

    func: Any
    args: Sequence[Any]
    kwargs: Mapping[str, Any]


class Calls(TorchDispatchMode):
    """Records the calls of its ``with`` block, by the names of the ops."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, list[Call]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == PACKAGE:
            name = func.overloadpacket.__name__
            self.found.setdefault(name, []).append(Call(func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def run(section: Section, settings: Settings) -> None:
    """A row for each op of each step, of the largest size."""
    size = settings.trained
    params = weights(linear_shapes(*size.shape[:2]) * size.layers, settings.dtype, settings.device)
    title = f"Kernels of one step, {size.layers} layers of {size.name}, rank {size.rank}"
    rows = section.table(title, ("", "op", "calls", "us", "GB/s", "Tflop/s"))
    for label, (name, gap, options) in STEPS.items():
        optimizer = variants.ours(name, params, size.rank, gap, **OPTIONS, **options)
        for _ in range(2):
            optimizer.step()
        with Calls() as calls:
            optimizer.step()
        for op, made in calls.found.items():
            took, least = timed(settings, made), least_of(made)
            section.data[f"{label}: {op}"] = {"ms": took, "calls": len(made), **least._asdict()}
            ms = statistics.median(took)
            rates = f"{least.bytes / ms / 1e6:.0f}", f"{least.flops / ms / 1e9:.1f}"
            rows.append((label, op, str(len(made)), f"{1e3 * ms:.1f}", *rates))
        del optimizer, calls, made
        free(settings.device)


def least_of(calls: Sequence[Call]) -> Floor:
    """What these calls must move and compute."""
    each = [floor(c.func.overloadpacket.__name__, named(*c)) for c in calls]
    return Floor(sum(x.bytes for x in each), sum(x.flops for x in each))


def timed(settings: Settings, calls: Sequence[Call]) -> list[float]:
    """Milliseconds of all of them, one after the other, in each round."""

    @torch.no_grad()
    def work() -> None:
        for _ in range(REPEATS):
            for func, args, kwargs in calls:
                func(*args, **kwargs)

    again = replayed(work) if settings.device.type == "cuda" else work
    clock = partial(device_clock(settings.device), again)
    clock()
    return [clock() / REPEATS for _ in range(settings.rounds)]


def replayed(work: Callable[[], None]) -> Callable[[], None]:
    """The same as a CUDA graph: a host that takes longer than its device is not timed."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay
