"""``lowrank-optim memory --measure``: every peak of the table beside that of real steps on a GPU.

Each runs in a process of its own, ``python -m lowrank_optim.cli.measure``: what one leaves behind,
or breaks, is not in the next.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import click
import torch
from rich.text import Text

from lowrank_optim.cli.display import gib
from lowrank_optim.cli.errors import Refused
from lowrank_optim.cli.models import load
from lowrank_optim.cli.rows import CLASSES, Column, Row
from lowrank_optim.memory import GIB
from lowrank_optim.memory.losses import LOSSES, Loss
from lowrank_optim.memory.measuring import STEPS, Meter, Peak, capped, on_gpu, real, train

Job = dict[str, Any]
"""What a process is told, as JSON."""

NO_GPU = (
    "--measure trains for some steps on a GPU, and torch sees none here "
    "(torch.cuda.is_available() is False): leave it out for the estimates, which need none"
)
HEADER = ("", "inside backward", "estimated", "measured", "difference", "reserved")
OUT = "out of memory"


@dataclass(frozen=True)
class Run:
    """What is the same for every row."""

    model: str
    """As ``--model`` gives it."""
    dtype: str | None
    shape: tuple[int, int]
    """Of a micro-batch: sequences, and their length."""
    checkpointing: bool
    budget: int
    """Bytes that the allocator may have."""
    autocast: str | None = None
    loss: Loss = LOSSES[0]
    loss_chunk: int | None = None


class Found(NamedTuple):
    """Of one row and column: a peak, or why there is none."""

    peak: Peak | None
    error: str = ""

    def figures(self) -> dict[str, Any]:
        """For ``--json``."""
        return {"error": self.error} if self.peak is None else self.peak._asdict()


Measured = dict[tuple[str, Column], Found]
"""By the name of the row, and the column."""


def check(
    tokens: int | None,
    budget: int,
    device: str | None = None,
    loss: Loss | None = None,
    autocast: str | None = None,
) -> None:
    """Raise for what cannot be measured, before anything is; say where the card is the limit.

    Raises:
        Refused: there is no GPU, nothing to train on, or estimates are asked for of another device
            or of a loss that this does not train with.
    """
    if loss == "fused":
        raise Refused(
            "--measure trains with the loss of transformers or with chunked, and --loss fused asks "
            "for the estimates of another: leave one out"
        )
    if loss == "chunked" and autocast is not None:
        raise Refused(
            "--measure trains under --autocast with the loss of transformers alone: leave --loss "
            "out"
        )
    if device == "cpu":
        raise Refused(
            "--measure trains on a GPU, and --device cpu asks for the estimates of another: "
            "leave it out"
        )
    if not torch.cuda.is_available():
        raise Refused(NO_GPU)
    if tokens is None:
        raise Refused("--measure has no effect without --tokens: a real step has activations")
    card = torch.cuda.get_device_properties(0)
    if card.total_memory < budget:
        click.echo(
            f"Note: {card.name} has {gib(card.total_memory)} GiB, less than the budget of "
            f"{gib(budget)}: what needs more is out of memory",
            err=True,
        )


def measured(rows: Sequence[Row], run: Run, of: Callable[[Job], Found] | None = None) -> Measured:
    """Every peak of the table, in turn; which is being measured is said on stderr.

    Args:
        rows: of the table.
        run: what they have in common.
        of: measures one (default: a process of its own).
    """
    of = of or in_process
    found: Measured = {}
    for row in rows:
        for column, estimated in row.peaks.items():
            if estimated is None:
                continue
            click.echo(f"Measuring {row.name}, {' '.join(column.header.split())} ...", err=True)
            found[row.name, column] = of(job(row, column, run))
    return found


def job(row: Row, column: Column, run: Run) -> Job:
    """What a process is told."""
    return {
        "model": run.model,
        "dtype": run.dtype,
        "budget": run.budget,
        "optimizer": row.chosen.called,
        "options": dict(row.chosen.options),
        "shape": run.shape,
        "checkpointing": run.checkpointing,
        "autocast": run.autocast,
        "loss": run.loss,
        "loss_chunk": run.loss_chunk,
        "in_backward": column.in_backward,
        "accumulation_steps": column.accumulation_steps,
        "coords_dtype": column.coords_dtype,
    }


def in_process(
    told: Job, command: Sequence[str] = (sys.executable, "-m", "lowrank_optim.cli.measure")
) -> Found:
    """What a process of its own found; if it died, its last words are the error."""
    done = subprocess.run(command, input=json.dumps(told), capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    try:
        said = json.loads(lines[-1])
        peak = said["peak"]
        return Found(None if peak is None else Peak(*peak), said["error"])
    except (IndexError, ValueError, TypeError, KeyError):
        words = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        return Found(None, f"the process ended with {done.returncode}: {words[0]}")


def one(told: Mapping[str, Any], device: torch.device, meter: Meter) -> Found:
    """The peak of some steps, the model's making included; or why there is none."""
    own: Any = {key: told[key] for key in ("in_backward", "accumulation_steps", "coords_dtype")}
    options: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in told["options"].items()}
    dtype = None if told["dtype"] is None else getattr(torch, told["dtype"])
    kind = CLASSES[told["optimizer"]]

    def work() -> None:
        model = load(told["model"], dtype, runs=True, device=str(device))
        sequences, length = told["shape"]
        train(
            model,
            kind,
            shape=(sequences, length),
            checkpointing=told["checkpointing"],
            autocast=told["autocast"],
            loss=told["loss"],
            loss_chunk=told["loss_chunk"],
            **own,
            **options,
        )

    try:
        real(kind)
        with capped(device, told["budget"]):
            return Found(meter(work))
    except torch.OutOfMemoryError:
        return Found(None, OUT)
    except Exception as error:  # of a model, an optimizer or a driver: the row says which
        words = error.message if isinstance(error, Refused) else str(error)
        return Found(None, f"{type(error).__name__}: {' '.join(words.split())}")


def main() -> None:
    """Read what is asked for from stdin, and print what was found as the last line."""
    device = torch.device("cuda", 0)
    found = one(json.load(sys.stdin), device, on_gpu(device))
    print(json.dumps(found._asdict()))


def lines(rows: Sequence[Row], found: Measured) -> list[list[str | Text]]:
    """The table: a line for each peak, in GiB."""
    body: list[list[str | Text]] = []
    for row in rows:
        for column, estimated in row.peaks.items():
            if estimated is None:
                continue
            told = [row.name, " ".join(column.header.split()), gib(estimated.peak)]
            peak, error = found[row.name, column]
            if peak is None:
                body.append([*told, Text(error, "red"), "", ""])
                continue
            over = f"{100 * (peak.allocated / estimated.peak - 1):+.1f} %"
            body.append([*told, gib(peak.allocated), over, gib(peak.reserved)])
    return body


def title(budget: float) -> str:
    """What the table shows."""
    return (
        f"Measured in {STEPS} steps under a cap of {budget / GIB:g} GiB, by the counters of the "
        "allocator of torch (figures in GiB).\nReserved is what it took from the device; what the "
        "driver takes for itself, some hundred MiB, is in neither."
    )


if __name__ == "__main__":
    main()
