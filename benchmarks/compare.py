"""Methods at equal state memory: validation loss over seeds, each with its own learning rate.

Run as ``python -m benchmarks.compare``. The task is the demo's (:mod:`benchmarks.pretrain`). The
learning rate of each method is searched first, on a seed that is not compared; then every method
runs once for each seed, and seeds give weights and batches, so that methods are compared in pairs.
Runs are kept, one file each, and are not repeated: a search or a comparison can be continued.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.common import Corpus, environment_line, load_corpus, markdown_table, print_table
from benchmarks.pretrain import METHODS, train
from benchmarks.runs import Settings

SEARCH_SEED = 100
HEADER = (
    "optimizer",
    "lr",
    "val loss\n(nats)",
    "less than\nthe first",
    "state\n(MiB)",
    "step\n(ms)",
)


def kept_run(out: Path, name: str, lr: float, settings: Settings, corpus: Corpus) -> dict[str, Any]:
    """The run of one method, learning rate and seed: read if it was made, else made."""
    path = out / f"{name}-{lr:g}-{settings.seed}.json"
    wanted = asdict(settings)
    if path.exists():
        kept: dict[str, Any] = json.loads(path.read_text())
        if kept["settings"] == wanted:
            return kept
    run = train(name, settings, corpus, lr=lr)
    result = {**asdict(run), "final_loss": run.final_loss, "settings": wanted}
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result))
    return result


def search(
    name: str, settings: Settings, corpus: Corpus, out: Path, console: Console
) -> tuple[float, bool]:
    """The best of the method's learning rates, and whether it is inside what was tried.

    The ends of the grid are moved outward while the best is at one of them, three times at most.
    """
    grid = sorted(METHODS[name].grid or (METHODS[name].lr,))
    own = replace(settings, seed=SEARCH_SEED)
    losses: dict[float, float] = {}
    for _ in range(4):
        for lr in grid:
            if lr not in losses:
                losses[lr] = kept_run(out, name, lr, own, corpus)["final_loss"]
                console.print(f"{name} lr {lr:g}: {losses[lr]:.3f}", highlight=False)
        best = min(grid, key=lambda lr: losses[lr] if math.isfinite(losses[lr]) else math.inf)
        if len(grid) == 1 or best not in (grid[0], grid[-1]):
            return best, len(grid) > 1
        grid = [grid[0] / 2, *grid] if best == grid[0] else [*grid, grid[-1] * 2]
    return best, False


def table(runs: dict[str, list[dict[str, Any]]]) -> list[list[str]]:
    """Mean and standard deviation over seeds; paired differences with their standard error."""
    first = next(iter(runs.values()))
    rows = []
    for name, own in runs.items():
        losses = [run["final_loss"] for run in own]
        gains = [a["final_loss"] - b["final_loss"] for a, b in zip(first, own, strict=True)]
        several = len(own) > 1
        spread = f" ± {statistics.stdev(losses):.3f}" if several else ""
        error = f" ± {statistics.stdev(gains) / math.sqrt(len(gains)):.3f}" if several else ""
        rows.append(
            [
                name,
                f"{own[0]['lr']:g}",
                f"{statistics.fmean(losses):.3f}{spread}",
                "" if own is first else f"{statistics.fmean(gains):+.3f}{error}",
                f"{own[0]['state']['total'] / 2**20:.2f}",
                f"{statistics.median(run['optimizer_ms'] for run in own):.1f}",
            ]
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Search, compare, print and write the table."""
    s = Settings()
    parser = argparse.ArgumentParser(description="Compare optimizers over seeds.")
    parser.add_argument("--optimizers", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--search", action="store_true", help="search each learning rate first")
    parser.add_argument("--steps", type=int, default=s.steps)
    parser.add_argument("--threads", type=int, help="default: torch's choice")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    args = parser.parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    console, corpus = Console(), load_corpus()
    settings = Settings(steps=args.steps)
    rates, inside = {name: METHODS[name].lr for name in args.optimizers}, {}
    if args.search:
        for name in args.optimizers:
            rates[name], inside[name] = search(name, settings, corpus, args.out, console)
    runs = {
        name: [
            kept_run(args.out, name, lr, replace(settings, seed=seed), corpus)
            for seed in args.seeds
        ]
        for name, lr in rates.items()
    }
    rows = table(runs)
    print_table(console, "", HEADER, rows)
    edge = [name for name, found in inside.items() if not found]
    notes = [
        f"{settings.steps} steps, seeds {args.seeds}: mean ± standard deviation of the loss, and "
        "mean ± standard error of its paired difference. Step times are of runs that may have "
        "shared the machine.",
        environment_line(),
    ]
    if edge:
        notes.insert(1, f"The best rate is the lowest or highest tried for: {', '.join(edge)}.")
    console.print("\n".join(notes), highlight=False)
    header = [name.replace("\n", " ").strip() for name in HEADER]
    text = markdown_table(header, rows) + "\n\n" + "\n\n".join(notes) + "\n"
    (args.out / "table.md").write_text(text)


if __name__ == "__main__":
    main()
