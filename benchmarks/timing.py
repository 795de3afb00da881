"""Timing side by side: every round runs every variant, so that a slow moment hits them all."""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

MIN_ROUNDS = 5
Work = Callable[[], object]
Clock = Callable[[Work], float]
"""Milliseconds of one call."""


def milliseconds(work: Work) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - start)


def cpu_milliseconds(work: Work) -> float:
    """CPU time of this process in one call: what other processes do does not count."""
    start = time.process_time()
    work()
    return 1e3 * (time.process_time() - start)


def device_clock(device: torch.device) -> Clock:
    """What a call takes a device: by events of its stream on a GPU, by wall time on a CPU."""
    if device.type != "cuda":
        return milliseconds

    def took(work: Work) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        work()
        end.record()
        torch.cuda.synchronize(device)
        return float(start.elapsed_time(end))

    return took


def host_clock(device: torch.device) -> Clock:
    """What a call takes the host: until it returns, while the device may be behind."""
    if device.type != "cuda":
        return milliseconds

    def took(work: Work) -> float:
        torch.cuda.synchronize(device)
        return milliseconds(work)

    return took


def interleaved(
    variants: Mapping[str, Work], rounds: int, warmup: int = 1, clock: Clock = milliseconds
) -> dict[str, list[float]]:
    """Milliseconds of each variant in each of ``rounds`` rounds, after ``warmup`` untimed ones.

    Raises:
        ValueError: fewer rounds than a median needs.
    """
    if rounds < MIN_ROUNDS:
        raise ValueError(f"rounds must be at least {MIN_ROUNDS}, got {rounds}")
    times: dict[str, list[float]] = {name: [] for name in variants}
    for i in range(warmup + rounds):
        # odd rounds run backwards: no variant always finds the caches another one left
        order = list(variants.items())[:: -1 if i % 2 else 1]
        for name, work in order:
            took = clock(work)
            if i >= warmup:
                times[name].append(took)
    return times


def ratio(times: Mapping[str, list[float]], name: str, base: str) -> float:
    """Median over rounds of a variant's time over the base's in the same round."""
    return statistics.median(a / b for a, b in zip(times[name], times[base], strict=True))


def peer(module: str, name: str) -> Any | None:
    """``module.name`` where the package is installed."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        return None
