"""What a step may send and allocate: assertions on what a meter saw."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from benchmarks.meter import Collective, Meter, New, kind_of, sent

__all__ = [
    "Collective",
    "Meter",
    "New",
    "allowed",
    "assert_collectives",
    "assert_small",
    "kind_of",
    "local_bytes",
    "sent",
]


def assert_collectives(meter: Meter, expected: Mapping[str, tuple[int, int]]) -> None:
    """Exactly these: of each kind a count, and the bytes that it sends.

    Raises:
        AssertionError: with both tables.
    """
    counts, sizes = meter.counts, meter.bytes
    found = {kind: (counts[kind], sizes[kind]) for kind in counts}
    wanted = {kind: own for kind, own in expected.items() if own[0]}
    assert found == wanted, (
        f"collectives {found}, expected {wanted}; one by one {meter.collectives}"
    )


def assert_small(meter: Meter, limit: int) -> None:
    """No new storage above ``limit`` bytes.

    Raises:
        AssertionError: naming the op that made it.
    """
    large = [new for new in meter.news if new.bytes > limit]
    assert not large, f"storages above {limit} bytes: {sorted(set(large), reverse=True)[:5]}"


def local_bytes(tensors: Iterable[Tensor]) -> int:
    """The largest of what a rank holds of each."""
    return max((_local(x).numel() * x.element_size() for x in tensors), default=0)


def _local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


def allowed(optimizer: torch.optim.Optimizer) -> int:
    """The largest shard, or entry of the state, that this rank has."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    entries = [x for own in optimizer.state.values() for x in own.values()]
    return max(local_bytes(params), local_bytes(x for x in entries if isinstance(x, Tensor)))
