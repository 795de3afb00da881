"""The demo: one small model of bytes, trained once per optimizer, with one line swapped.

Run as ``python -m benchmarks.demo``. The task is that of :mod:`benchmarks.study`, on which frozen
matrices end far above trained ones, and the rates are those found there. Both runs start from the
same weights and see the same batches.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.common import environment_line, markdown_table, print_table
from benchmarks.study.figures import draw
from benchmarks.study.progress import Runner
from benchmarks.study.recipes import Case
from benchmarks.study.sizes import SIZES
from benchmarks.study.training import Record, Trial, machine, text

LINES = (
    (Case("torch.optim.AdamW", "adamw"), 1e-2),
    (Case("GaLoreAdamW8bit", "galore8bit", {"rank": 16}), 3e-2),
)
"""Of GaLore this is 31 % of AdamW's state, and 42 % with moments in float32."""

HEADER = (
    "optimizer",
    "val loss\n(nats a byte)",
    "bits\na byte",
    "state\n(KiB)",
    "CPU a step\n(ms)",
)


def table(records: dict[str, Record]) -> list[list[str]]:
    """One line per optimizer."""
    rows = []
    for name, record in records.items():
        steps, loss = record["validation"][-1]
        rows.append(
            [
                name,
                f"{loss:.3f}",
                f"{loss / math.log(2):.3f}",
                f"{record['state_bytes'] / 1024:.0f}",
                f"{1e3 * record['cpu_seconds'][-1] / steps:.0f}",
            ]
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, print the table, write the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=SIZES["small"].steps)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="default: torch's choice")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    args = parser.parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    console, size = Console(), replace(SIZES["small"], steps=args.steps)
    machine()
    console.print(environment_line(), highlight=False)
    console.print(
        f"{len(text().train):,} bytes of the standard library to train on, {len(text().held):,} "
        "held out",
        highlight=False,
    )
    with Runner(None, console) as runner:
        records = {case.name: runner.record(Trial(size, case, lr, args.seed)) for case, lr in LINES}
    print_table(console, "", HEADER, table(records))
    some = next(iter(records.values()))
    shape = size.shape
    rates = ", ".join(f"{case.name} {lr:g}" for case, lr in LINES)
    said = (
        f"A model of {some['parameters'] / 1e6:.2f} M parameters, {args.steps} steps of "
        f"{shape.batch} x {shape.context} bytes, seed {args.seed}; peak rates: {rates}.\n\n"
        f"{environment_line()}"
    )
    console.print(said, highlight=False)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "results.json").write_text(json.dumps(records))
    header = [name.replace("\n", " ") for name in HEADER]
    (args.out / "table.md").write_text(markdown_table(header, table(records)) + f"\n\n{said}\n")
    draw({name: [record] for name, record in records.items()}, args.out / "curves.png")
    console.print(f"\nwritten: {args.out}/results.json, table.md, curves.png", highlight=False)


if __name__ == "__main__":
    main()
