"""Timing side by side: every round runs every variant, so that a slow moment hits them all."""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

MIN_ROUNDS = 5
Work = Callable[[], object]


def milliseconds(work: Work) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - start)


def interleaved(
    variants: Mapping[str, Work], rounds: int, warmup: int = 1
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
            took = milliseconds(work)
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
