"""A world of k processes that runs named jobs one after the other and outlives their failures.

Processes are forked from a server that has imported torch, so that a world costs a fraction of a
second. A job that raises on one rank gives the tracebacks of all; one that hangs is a failure with
its name and the stacks of those that hung. Either way the jobs after it run in new processes: torch
still knows meshes of a group that is gone, and gives them to later tensors.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import logging
import multiprocessing as mp
import os
import pickle
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

GROUP_TIMEOUT = 60.0
"""Seconds that a collective waits for the other ranks."""
GRACE = 25.0
"""Seconds that ranks may go on after the first has finished a job: longer is a hang."""


class World(NamedTuple):
    """What a job is told of where it runs."""

    rank: int
    size: int


@dataclass(frozen=True)
class Outcome:
    """What became of a job: a value or a traceback of each rank."""

    name: str
    values: list[Any]
    errors: list[str | None]

    @property
    def failed(self) -> bool:
        """Whether any rank raised or hung."""
        return any(error is not None for error in self.errors)

    def checked(self) -> list[Any]:
        """The value of each rank.

        Raises:
            AssertionError: with the tracebacks of the ranks that have none.
        """
        told = [f"rank {i}: {error}" for i, error in enumerate(self.errors) if error is not None]
        if told:
            raise AssertionError(f"{self.name} failed on {len(told)} ranks\n" + "\n".join(told))
        return self.values


def _begin(rank: int, size: int, store: dist.Store) -> None:
    """The default group; the environment is that of torchrun."""
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ.update({key: str(value) for key, value in own.items()})
    dist.init_process_group(
        "gloo",
        store=store,
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=GROUP_TIMEOUT),
    )


def _alone(rank: int) -> None:
    """Global numbers of a process that is nobody's twin, and one thread."""
    torch.set_num_threads(1)
    torch.manual_seed(1000 + rank)
    np.random.seed(1000 + rank)
    random.seed(1000 + rank)


class _Pickler(pickle.Pickler):
    """Tensors as bytes: a file of torch.save, or shared memory, takes longer than most jobs."""

    def reducer_override(self, x: Any) -> Any:
        if type(x) is not torch.Tensor or x.layout != torch.strided or x.device.type != "cpu":
            return NotImplemented
        data = x.detach().reshape(-1).view(torch.uint8).numpy().tobytes()
        return _unpacked, (data, x.dtype, tuple(x.shape))


def _packed(value: Any) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, pickle.HIGHEST_PROTOCOL).dump(value)
    return buffer.getvalue()


def _unpacked(data: bytes, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
    if not data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=dtype).view(shape)


def _answer(rank: int, size: int, job: Callable[..., Any], args: dict[str, Any]) -> Any:
    _alone(rank)
    try:
        return None, _packed(job(World(rank, size), **args))
    except BaseException:  # the others wait for this rank: closed connections tell them
        error = traceback.format_exc()
        if dist.is_initialized():
            dist.destroy_process_group()
        return error, None


def serve(pipe: Connection, rank: int, size: int, folder: str, port: int) -> None:
    """One rank: jobs from the pipe, until there are none."""
    stacks = open(f"{folder}/stack{rank}", "w")  # noqa: SIM115  as long as the process
    faulthandler.register(signal.SIGUSR1, stacks, all_threads=True)
    logging.disable(logging.NOTSET)
    logging.lastResort = None  # what is logged is captured by jobs that look
    sys.stderr = open(f"{folder}/stderr{rank}", "w")  # noqa: SIM115
    # a store of files asks every second whether the others are there
    store = dist.TCPStore("127.0.0.1", port, timeout=timedelta(seconds=GROUP_TIMEOUT))
    _begin(rank, size, store)
    with contextlib.suppress(EOFError):  # there are no more
        while True:
            job, args = pipe.recv()
            pipe.send(_answer(rank, size, job, args))


def server() -> ForkServerContext:
    """Makes processes that have torch loaded, and no thread or device of this one."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["tests.sharded.preload"])
    return context


class Ranks:
    """``size`` processes in one gloo group; they start with the first job."""

    def __init__(self, size: int, grace: float = GRACE) -> None:
        self.size = size
        self.grace = grace
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._store: dist.TCPStore | None = None

    def run(self, name: str, job: Callable[..., Any], **args: Any) -> Outcome:
        """What every rank makes of ``job(world, **args)``, a function of a module."""
        self._start()
        for pipe in self._pipes:
            pipe.send((job, args))
        answers = self._gather()
        if any(answer is None for answer in answers):
            stacks = self._hung(answers)
            errors: list[str | None] = []
            for answer, stack in zip(answers, stacks, strict=True):
                lost = f"hung, or died, in {name!r}:\n{stack}"
                errors.append(lost if answer is None else answer[0])
            return Outcome(name, [None] * self.size, errors)
        done = [answer for answer in answers if answer is not None]
        errors = [error for error, _ in done]
        if any(error is not None for error in errors):
            self._end()
            return Outcome(name, [None] * self.size, errors)
        values = [pickle.loads(data) for _, data in done]
        return Outcome(name, values, errors)

    def close(self) -> None:
        """End the processes that this world started."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(2)
            if process.is_alive():
                process.kill()
                process.join()
        if self._folder is not None:
            self._folder.cleanup()
        self._processes, self._pipes, self._folder, self._store = [], [], None, None

    def _start(self) -> None:
        if self._processes:
            return
        context = server()
        self._folder = tempfile.TemporaryDirectory()
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            own = (theirs, rank, self.size, self._folder.name, self._store.port)
            process = context.Process(target=serve, args=own, daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def _gather(self) -> list[Any]:
        """Answers by rank; None of those that gave none in time."""
        answers: list[Any] = [None] * self.size
        open_ = dict(zip(self._pipes, range(self.size), strict=True))
        end = time.monotonic() + GROUP_TIMEOUT + self.grace
        while open_ and time.monotonic() < end:
            for pipe in wait(list(open_), max(0.0, end - time.monotonic())):
                assert isinstance(pipe, Connection)
                rank = open_.pop(pipe)
                with contextlib.suppress(EOFError):  # the process is gone
                    answers[rank] = pipe.recv()
                end = min(end, time.monotonic() + self.grace)
        return answers

    def _hung(self, answers: list[Any]) -> list[str]:
        """Stacks of the ranks that gave no answer; the world ends."""
        assert self._folder is not None
        folder, stacks = Path(self._folder.name), []
        for process, answer in zip(self._processes, answers, strict=True):
            if answer is None and process.is_alive():
                with contextlib.suppress(ProcessLookupError):  # it ended since
                    os.kill(process.pid, signal.SIGUSR1)
        time.sleep(0.3)
        for rank in range(self.size):
            ends = [folder / f"{kind}{rank}" for kind in ("stack", "stderr")]
            stacks.append("\n".join(f.read_text()[-3000:] for f in ends if f.exists()))
        self._end()
        return stacks

    def _end(self) -> None:
        """End the processes at once: their group is broken."""
        for process in self._processes:
            process.kill()
        self.close()
