"""Runs behind a progress bar."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

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

from benchmarks.study.training import Record, Trial, Watch, kept, run, train


class Runner:
    """Gives the record of a trial, made if it is not kept, and shows where it is.

    Args:
        out: folder of kept runs; with None every run is made, and none is kept.
        console: where the bar and a line for each run go.
    """

    def __init__(self, out: Path | None, console: Console) -> None:
        self.out, self.console = out, console
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )

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

    def record(self, trial: Trial) -> Record:
        """What was measured."""
        found = None if self.out is None else kept(trial, self.out)
        if found is not None:
            return found
        name = f"{trial.case.name}, lr {trial.lr:g}, seed {trial.seed}"
        task = self.bar.add_task(name, total=trial.size.steps, loss="")
        watch = self._watch(task)
        record = train(trial, watch) if self.out is None else run(trial, self.out, watch)
        self.bar.remove_task(task)
        self.console.print(
            f"{name}: {record['final_loss']:.3f} "
            f"({record['cpu_seconds'][-1]:.0f} s of CPU, {record['wall_seconds'][-1]:.0f} s)",
            highlight=False,
        )
        return record

    def _watch(self, task: TaskID) -> Watch:
        def watch(step: int, loss: float) -> None:
            self.bar.update(task, completed=step, loss=f"{loss:.3f}")

        return watch

    def loss(self, trial: Trial) -> float:
        """The final loss."""
        return float(self.record(trial)["final_loss"])
