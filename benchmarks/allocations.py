"""What torch takes from its CPU allocator."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch.profiler import ProfilerActivity, profile


class Allocations(NamedTuple):
    """Of one piece of work."""

    largest: int
    """Bytes of the largest single allocation."""
    peak: int
    """Bytes alive at once, beyond what was alive at the start."""


def allocations(work: Callable[[], object]) -> Allocations:
    """What ``work`` takes from torch's CPU allocator, temporaries inside operators included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = largest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak, largest = max(peak, live), max(largest, event.nbytes())
    return Allocations(largest, peak)
