"""A step of the largest model, each optimizer alone on the device.

All of it: matrices that are projected, and embedding, head and norms, which are dense.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from benchmarks.gpu import variants
from benchmarks.gpu.report import Section
from benchmarks.gpu.settings import Settings, Size
from benchmarks.gpu.times import FUSED, Captured
from benchmarks.matrices import NEVER, dense_shapes, linear_shapes, weights
from benchmarks.timing import device_clock, host_clock
from lowrank_optim.cli.display import gib
from lowrank_optim.memory.measuring import free

TITLE = "A step of a whole model"
GAP = 200
STEPS: dict[str, tuple[str, dict[str, Any]]] = {
    "GaLoreAdamW8bit": ("GaLoreAdamW8bit", {}),
    "GaLoreAdamW8bit columns": ("GaLoreAdamW8bit", {"projector": "columns"}),
    "FiraAdamW": ("FiraAdamW", {}),
    "FrugalAdamW columns": ("FrugalAdamW", {"projector": "columns"}),
    "DCTAdamW gap 1": ("DCTAdamW", {"gap": 1}),
}
"""As they are used: a basis is found every 200 steps, each matrix at a step of its own."""
CAPTURED = ("GaLoreAdamW8bit", "FrugalAdamW columns", "DCTAdamW gap 1")
"""Those that are timed once more as a CUDA graph, of a step in which no basis is searched for."""
PEERS = ("bitsandbytes AdamW8bit",)


class Model(NamedTuple):
    """The weights of a LLaMA."""

    low: list[Parameter]
    """The seven matrices of each layer."""
    dense: list[Parameter]

    def groups(self, rank: int) -> list[dict[str, Any]]:
        """For ours."""
        return [{"params": self.low, "rank": rank}, {"params": self.dense, "rank": None}]


def run(section: Section, settings: Settings) -> None:
    """A table; what does not fit the device is in it, too."""
    size = settings.trained
    model = build(size, settings)
    makes = optimizers(model, size, settings.device)
    title = (
        f"One step of {size.name}, rank {size.rank}: {len(model.low)} matrices, and dense "
        f"{len(model.dense)} of embedding, head and norms"
    )
    header = ("", "first step ms", "ms", f"over {FUSED}", "host ms", "state GiB")
    rows, base = section.table(title, header), None
    for label, make in makes.items():
        try:
            found = measured(settings, make)
        except torch.OutOfMemoryError:
            rows.append((label, *["out of memory"] * 5))
            continue
        except Exception as error:
            section.failed(f"{label} raised {type(error).__name__}.", error)
            continue
        finally:
            free(settings.device)
        base = found["ms"] if base is None else base
        section.data[label] = found
        figures = (found["first"], found["ms"], found["ms"] / base, found["host_ms"])
        rows.append((label, *(f"{x:.2f}" for x in figures), gib(int(found["state"]))))


def build(size: Size, settings: Settings) -> Model:
    """All of its layers, with gradients."""
    hidden, mlp, layers, _ = size.shape
    shapes = linear_shapes(hidden, mlp) * layers, dense_shapes(hidden, layers, settings.vocab)
    return Model(*(weights(own, settings.dtype, settings.device) for own in shapes))


def optimizers(
    model: Model, size: Size, device: torch.device
) -> dict[str, Callable[[], Optimizer | Captured]]:
    """By their labels, fused AdamW first: each is made when its turn comes."""
    params, (theirs, _) = [*model.low, *model.dense], variants.peers()
    groups = model.groups(size.rank)
    makes: dict[str, Callable[[], Optimizer | Captured]] = {
        FUSED: partial(torch.optim.AdamW, params, lr=variants.LR, fused=True)
    }
    for label, (name, options) in STEPS.items():
        chosen = {"gap": GAP, "stagger": True, **options}
        makes[label] = partial(variants.ours, name, groups, size.rank, **chosen)
    for label in CAPTURED if device.type == "cuda" else ():
        name, options = STEPS[label]
        chosen = {"gap": NEVER, "capturable": True, **options}
        plain = partial(variants.ours, name, groups, size.rank, **chosen)
        makes[f"{label}, captured"] = partial(Captured, plain)
    for label in PEERS:
        if label in theirs:
            makes[label] = partial(theirs[label], params, size.rank, GAP)
    return makes


def measured(settings: Settings, make: Callable[[], Optimizer | Captured]) -> dict[str, float]:
    """Milliseconds of the first step, which finds all bases, and medians of steps after it."""
    device, host = device_clock(settings.device), host_clock(settings.device)
    optimizer = make()
    first = device(optimizer.step)
    optimizer.step()
    took = [device(optimizer.step) for _ in range(settings.rounds)]
    called = [host(optimizer.step) for _ in range(settings.rounds)]
    tensors = [x for own in optimizer.state.values() for x in own.values() if torch.is_tensor(x)]
    return {
        "first": first,
        "ms": statistics.median(took),
        "host_ms": statistics.median(called),
        "state": sum(x.nbytes for x in tensors),
    }
