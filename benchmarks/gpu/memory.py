"""Bytes that training holds at once: what the allocator counts beside ``memory.estimate``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch

from benchmarks.allocations import allocations
from benchmarks.gpu.models import build, config
from benchmarks.gpu.report import Section
from benchmarks.gpu.settings import Settings, Size
from benchmarks.timing import peer
from lowrank_optim import LowRankOptimizer, attach_in_backward
from lowrank_optim.cli.display import gib
from lowrank_optim.cli.rows import usual
from lowrank_optim.memory import estimate
from lowrank_optim.memory.measuring import STEPS, free, on_gpu, train

TITLE = "Memory"
MODES = (None, "step", "project")
GAP = 8
"""Steps between refreshes with ``mode="project"``: each has its turn in the run, and so the step
that is the worst is measured. At most two of a layer's matrices have it at once."""
Case = tuple[str, Any, dict[str, Any], Any]
"""Name, class or layout, its options, mode of ``attach_in_backward``."""


def run(section: Section, settings: Settings) -> None:
    """A table for each size."""
    for size in settings.sizes:
        title = (
            f"Peak in GiB, {size.layers} layers of {size.name} with embeddings, rank {size.rank}, "
            f"{settings.tokens} tokens, checkpointed; bases of mode='project' every {GAP} steps"
        )
        rows = section.table(title, ("", "measured", "estimated", "ratio"))
        for case in cases(section, size, settings.dtype):
            name, _, _, mode = case
            label = name if mode is None else f"{name}, mode={mode!r}"
            try:
                found = measured(settings, size, case)
            except torch.OutOfMemoryError:
                found = None
            except Exception as error:
                section.failed(f"{size.name}: {label} raised {type(error).__name__}.", error)
                continue
            expected = estimated(settings, size, case)
            section.data[f"{size.name}: {label}"] = {"measured": found, "estimated": expected}
            words = "out of memory" if found is None else gib(found)
            over = "" if found is None else f"{found / expected:.3f}"
            rows.append((label, words, gib(expected), over))


def cases(section: Section, size: Size, dtype: torch.dtype) -> list[Case]:
    """Every row of ``lowrank-optim memory``, and the modes that its class has."""
    found: list[Case] = []
    for row in usual(size.rank, dtype):
        name, options = row.name, dict(row.options)
        cls: Any = row.optimizer
        if isinstance(cls, str) and peer("bitsandbytes.optim", "AdamW8bit") is None:
            section.notes.append(f"bitsandbytes is not installed: {name} is not measured.")
            continue
        low = not isinstance(cls, str) and issubclass(cls, LowRankOptimizer)
        modes = [m for m in MODES if m is None or (low and (m == "step" or has_coordinates(cls)))]
        gaps = {mode: {"update_proj_gap": GAP} if mode == "project" else {} for mode in modes}
        found += [(name, cls, {**options, **own}, mode) for mode, own in gaps.items()]
    return found


def has_coordinates(cls: Any) -> bool:
    """Whether ``mode="project"`` takes the class: others need whole gradients."""
    probe = torch.nn.Linear(4, 4, bias=False)
    try:
        attach_in_backward(cls(probe.parameters(), rank=2), mode="project")
    except ValueError:
        return False
    return True


def measured(settings: Settings, size: Size, case: Case) -> int:
    """Bytes alive at once while a model is made and takes some steps."""
    _warm(settings)
    free(settings.device)
    try:
        return peak(settings.device, lambda: trained(settings, size, case))
    finally:
        free(settings.device)


@cache
def _warm(settings: Settings) -> None:
    """Let products have their workspace, which a process keeps: else it were the first row's."""
    small = replace(settings.sizes[0], shape=(64, 176, 1, 2), layers=1)
    trained(settings, small, ("", torch.optim.AdamW, {}, None))


def peak(device: torch.device, work: Callable[[], object]) -> int:
    """Bytes of tensors alive at once beyond those at the start."""
    if device.type != "cuda":
        return allocations(work).peak
    return on_gpu(device)(work).allocated


def trained(settings: Settings, size: Size, case: Case) -> None:
    """Some steps of one micro-batch."""
    _, cls, options, mode = case
    train(
        build(settings, shape_of(size), settings.device), cls, shape=(1, settings.tokens),
        in_backward=mode, checkpointing=True,
        steps=GAP + 1 if mode == "project" else STEPS, **options,
    )  # fmt: skip


def estimated(settings: Settings, size: Size, case: Case) -> int:
    """What the package says of the same."""
    _, cls, options, mode = case
    found = estimate(
        config(settings, shape_of(size)), cls, in_backward=mode, tokens=(1, settings.tokens),
        checkpointing=True, dtype=settings.dtype, device=settings.device, **options,
    )  # fmt: skip
    return found.peak


def shape_of(size: Size) -> tuple[int, int, int, int]:
    """The shape with the layers that are measured."""
    hidden, mlp, _, heads = size.shape
    return hidden, mlp, size.layers, heads
