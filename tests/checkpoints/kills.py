"""Kills at any point of a run: a clock that counts operations and bytes, and dies at its time.

The processes are forked from a server that has torch loaded, so that a hundred cost a minute and
not ten: see test_crash.py. Not from this one: a process whose autograd has met a GPU has no
backward in those that are forked from it.
"""

from __future__ import annotations

import io
import os
import signal
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.checkpoints import crash
from tests.sharded.ranks import server

PIECES = 16
"""Writes of a checkpoint, each a point at which a run may be killed."""


class Clock(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations of torch, in backward and in steps too, and writes of a file.

    Args:
        end: what dies, by SIGKILL, before the point of this number (default: nothing).
    """

    def __init__(self, end: int = -1) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now, self.end = 0, end

    def tick(self) -> None:
        if self.now == self.end:
            crash.die()
        self.now += 1

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.tick()
        return func(*args, **(kwargs or {}))

    def save(self, folder: Path, what: Any, torn: bool) -> None:
        """As ``crash.save``, in pieces."""
        buffer = io.BytesIO()
        torch.save(what, buffer)
        data, partial = buffer.getvalue(), folder / "last.pt.partial"
        size = -(-len(data) // PIECES)
        with partial.open("wb") as file:
            for i in range(0, len(data), size):
                self.tick()
                file.write(data[i : i + size])
                file.flush()
        self.tick()
        os.replace(partial, folder / "last.pt")
        self.tick()


def run(folder: Path, mode: str, end: int = -1) -> Clock:
    """A run from the last checkpoint in a folder, if there is one, to its end or its death."""
    clock = Clock(end)
    kept, crash.save = crash.save, clock.save
    try:
        with clock:
            crash.main(folder, mode)
    finally:
        crash.save = kept
    return clock


def forked(folder: Path, mode: str, end: int) -> int:
    """What a process of :func:`run` ends with: its exit code, or minus the signal."""
    process = server().Process(target=run, args=(folder, mode, end))
    process.start()
    process.join()
    code = process.exitcode
    assert code is not None
    return code


def killed_until_done(folder: Path, mode: str, ends: list[int]) -> int:
    """Runs that are killed one after the other, and one that is not; how many died."""
    died = 0
    for end in [*ends, -1]:
        code = forked(folder, mode, end)
        assert code in (0, -signal.SIGKILL), code
        died += code == -signal.SIGKILL
        if code == 0:
            break
    return died
