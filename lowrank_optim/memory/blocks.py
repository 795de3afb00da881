"""What an allocator takes for a tensor: blocks, which are larger than what was asked for.

The caching allocator of torch for GPUs gives multiples of 512 bytes, and those are what
``torch.cuda.max_memory_allocated`` counts. It cuts them from segments that it takes from the
device: of 2 MiB for tensors of up to 1 MiB, of 20 MiB for larger ones below 10 MiB, and of the size
itself, rounded up to 2 MiB, from there on. Where no more than 1 MiB of a segment is left over, a
tensor of more than 1 MiB has that too.
"""

from __future__ import annotations

from collections.abc import Callable

BLOCK = 512
REST = 2**20
"""What is left of a segment goes with a large block up to this size."""
ALONE = 10 * 2**20
"""From this size on, a segment has one block."""
SEGMENT = 2 * 2**20
"""Of which segments of such blocks are multiples."""

CACHING = frozenset({"cuda", "xpu", "meta"})
"""Types of devices that have such an allocator; ``"meta"`` stands for an accelerator."""

Sized = Callable[[int], int]
"""Bytes that are taken for a tensor of so many."""


def sized_on(device_type: str) -> Sized:
    """What the allocator of a device takes for a tensor: on a CPU what was asked for."""
    return in_blocks if device_type in CACHING else _as_asked


def in_blocks(size: int) -> int:
    """A multiple of 512 bytes."""
    return -(-size // BLOCK) * BLOCK


def of_a_new_segment(size: int) -> int:
    """The same of one that comes first, as weights do: with the rest of a segment of its own."""
    size = in_blocks(size)
    rest = -size % SEGMENT
    return size + (rest if size >= ALONE and rest <= REST else 0)


def _as_asked(size: int) -> int:
    return size
