"""Several processes over gloo, none of which may wait for ever."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SECONDS = 60
"""After which a collective that some rank does not enter, or a rank that does not end, fails."""


def _rank(rank: int, work: Callable[..., None], world: int, folder: str, args: Any) -> None:
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=SECONDS),
    )
    work(rank, *args)
    dist.destroy_process_group()


def together(work: Callable[..., None], folder: Path, *args: Any, world: int = 2) -> None:
    """Call ``work(rank, *args)`` in as many processes; what any of them raises is raised.

    Args:
        work: a function of a module, which the processes import.
        folder: an empty one, where they meet.
        *args: anything that can be pickled.
        world: how many.

    Raises:
        TimeoutError: they have not ended in time.
    """
    context = mp.spawn(  # type: ignore[no-untyped-call]
        _rank, (work, world, str(folder), args), nprocs=world, join=False
    )
    end = time.monotonic() + 2 * SECONDS
    while not context.join(timeout=1):
        if time.monotonic() > end:
            for process in context.processes:
                process.kill()
            raise TimeoutError(f"{work.__name__} has not ended within {2 * SECONDS} s")
