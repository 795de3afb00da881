"""Tables of addresses and numbers on a device, kept by what is in them.

A step asks for the same lists of tensors as the one before it, and allocators give the same
addresses again. To make a table and to upload it costs the host more than the rest of a launch, so
one that holds these very numbers already is used again. Nothing can make a kept table wrong: it is
found by its contents, whatever tensors they are of.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from threading import Lock
from typing import Any

import torch
from torch import Tensor

MOST = 1 << 18
"""Numbers kept of all tables: 2 MiB on the devices, and as much on the host."""

Key = tuple[torch.device, Any, bytes]

_kept: dict[Key, Tensor] = {}
"""The oldest first."""
_changing = Lock()
_size = 0


def table_of(numbers: Iterable[int], device: torch.device) -> Tensor:
    """The numbers as int64 on a device, uploaded from pinned memory without waiting, or kept.

    They are for what is launched next: in another stream it could come before their upload.

    Args:
        numbers: int64.
        device: where they are read; the current one of its type.
    """
    on_host = device.type == "cpu"
    stream = None if on_host else torch.get_device_module(device).current_stream(device)
    key = device, stream, array("q", numbers).tobytes()
    found = _kept.get(key)
    return _made(key) if found is None else found


def _made(key: Key) -> Tensor:
    global _size
    device, _, contents = key
    table = torch.frombuffer(bytearray(contents), dtype=torch.int64)
    if device.type != "cpu":
        table = table.pin_memory().to(device, non_blocking=True)
    with _changing:
        _size += table.numel() if key not in _kept else 0
        _kept[key] = table
        while _size > MOST:
            oldest = next(iter(_kept))
            _size -= _kept.pop(oldest).numel()
    return table
