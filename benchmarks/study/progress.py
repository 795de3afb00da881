"""Runs behind a progress bar, one after the other or beside each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from benchmarks.study.training import (
    HERE,
    Place,
    Record,
    Trial,
    Watch,
    ignore,
    kept,
    run,
    text,
    train,
)

T, R = TypeVar("T"), TypeVar("R")
WAITING = 64
"""Trials asked for at once at most, where runs are made beside each other."""


def _begin(threads: int) -> None:
    torch.set_num_threads(threads)


class Runner:
    """Gives the record of a trial, made if it is not kept, and shows where it is.

    Args:
        out: folder of kept runs; with None every run is made, and none is kept.
        console: where the bar and a line for each run go.
        place: where runs are made, and of which text.
        jobs: processes that make runs. With 1 it is this one; more need ``out``.
    """

    def __init__(
        self, out: Path | None, console: Console, place: Place = HERE, jobs: int = 1
    ) -> None:
        self.out, self.console, self.place = out, console, place
        self.pool = self._pool(jobs) if jobs > 1 else None
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )

    @staticmethod
    def _pool(jobs: int) -> ProcessPoolExecutor:
        threads = torch.get_num_threads()
        return ProcessPoolExecutor(jobs, get_context("spawn"), _begin, (threads,))

    def __enter__(self) -> Runner:
        self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.stop()
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)

    def each(self, work: Callable[[T], R], over: Iterable[T]) -> list[R]:
        """``map``: beside each other where there are several processes."""
        if self.pool is None:
            return [*map(work, over)]
        with ThreadPoolExecutor(WAITING) as threads:
            return [*threads.map(work, over)]

    def record(self, trial: Trial) -> Record:
        """What was measured.

        Raises:
            ValueError: a kept run is of another text, as another version of Python has.
        """
        found = None if self.out is None else kept(trial, self.out)
        if found is not None:
            here = text(self.place.device, self.place.stdlib).digest
            if found["text"] != here:
                raise ValueError(
                    f"the run {found['key']} in {self.out} is of the text {found['text']}, and "
                    f"this is {here}: give --stdlib the library of Python "
                    f"{found['environment']['python']}, or --out another folder and no --records"
                )
            return found
        name = f"{trial.case.name}, lr {trial.lr:g}, seed {trial.seed}"
        record = self._made(trial, name)
        self.console.print(
            f"{name}: {record['final_loss']:.3f} "
            f"({record['cpu_seconds'][-1]:.0f} s of CPU, {record['wall_seconds'][-1]:.0f} s)",
            highlight=False,
        )
        return record

    def _made(self, trial: Trial, name: str) -> Record:
        if self.pool is not None and self.out is not None:
            return self.pool.submit(run, trial, self.out, ignore, self.place).result()
        task = self.bar.add_task(name, total=trial.size.steps, loss="")
        watch = self._watch(task)
        try:
            if self.out is None:
                return train(trial, watch, self.place)
            return run(trial, self.out, watch, self.place)
        finally:
            self.bar.remove_task(task)

    def _watch(self, task: TaskID) -> Watch:
        def watch(step: int, loss: float) -> None:
            self.bar.update(task, completed=step, loss=f"{loss:.3f}")

        return watch

    def loss(self, trial: Trial) -> float:
        """The final loss."""
        return float(self.record(trial)["final_loss"])
