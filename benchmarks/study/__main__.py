"""The command: ``python -m benchmarks.study``. What must show on the task is run and printed first.

Every run is a file of its own in ``--out``, named by all that it depends on: a command that was
ended goes on where it was, and sets share their runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.common import environment_line, print_table
from benchmarks.study import acceptance
from benchmarks.study.progress import Runner
from benchmarks.study.sizes import SIZES
from benchmarks.study.training import machine


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where every fact holds, else 1."""
    args = parse(arguments)
    torch.set_num_threads(args.threads)
    console, size = Console(), SIZES[args.size]
    machine()
    console.print(environment_line(), highlight=False)
    with Runner(args.out, console) as runner:
        measured = acceptance.measure(size, runner.loss)
    found = acceptance.facts(measured)
    print_table(console, "", acceptance.HEADER, acceptance.table(found))
    if not all(fact.holds for fact in found):
        console.print("The task does not show what is known. Nothing is compared on it.")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
