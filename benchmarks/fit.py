"""Ranks by calibration beside one rank for all, at equal bytes.

Run as ``python -m benchmarks.fit``. The task is :mod:`benchmarks.bytes_task`, the optimizer
GaLoreAdamW. :func:`lowrank_optim.fit` plans three times within the bytes of one rank for all:
without calibration, and with it by relative and by absolute energy. What steps need in passing is
not among these bytes: ranks that differ are stepped apart, and would be given more state for it.
Seeds give weights, batches and calibration, so that plans are compared in pairs. Every run is
written as it ends, and read again.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.bytes_task import Shape, Text, evaluate, load_text, make_model
from benchmarks.common import environment_line, markdown_table
from benchmarks.pretrain import schedule
from benchmarks.runs import Settings
from lowrank_optim import GaLoreAdamW, fit, lowrank_groups, memory
from lowrank_optim.fitting import Plan

PLANS: dict[str, str | None] = {"uniform": None, "relative": "relative", "absolute": "absolute"}
"""How each plan weighs energy; None without calibration."""


@dataclass(frozen=True)
class Setup:
    """What a run depends on beside its plan and seed."""

    shape: Shape = field(default_factory=Shape)
    steps: int = 150
    lr: float = 3e-3
    rank: int = 8
    multiple: int = 2
    """Of which calibrated ranks are."""
    gap: int = 50
    calibration: int = 4
    """Micro-batches, drawn by a seed of their own."""
    windows: int = 256


def planned(name: str, setup: Setup, model: nn.Module, text: Text, seed: int) -> Plan:
    """The plan of one run, within the bytes of one rank for all."""
    options: dict[str, Any] = {"update_proj_gap": setup.gap, "transients": False}
    even = memory.estimate(
        model, GaLoreAdamW, groups=lambda m: lowrank_groups(m, rank=setup.rank), **options
    )
    energy = PLANS[name]

    def losses(own: nn.Module) -> Any:
        return (own(b) for b in text.batches(setup.calibration, setup.shape, 10_000 + seed))

    return fit(
        model,
        even.peak / memory.GIB,
        optimizers=["GaLoreAdamW"],
        in_backward=[None],
        state_dtypes=["float32"],
        calibrate=None if energy is None else losses,
        energy=energy,  # type: ignore[arg-type]
        multiple=setup.multiple,
        **options,
    )


def train(name: str, setup: Setup, text: Text, seed: int) -> dict[str, Any]:
    """One run."""
    begun = time.process_time()
    model = make_model(setup.shape, seed)
    plan = planned(name, setup, model, text, seed)
    optimizer = plan.optimizer(model, lr=setup.lr, betas=(0.9, 0.95), weight_decay=0.0)
    rates = schedule(optimizer, Settings(steps=setup.steps))
    for window in text.batches(setup.steps, setup.shape, seed):
        optimizer.zero_grad()
        model(window).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rates.step()
    held = memory.report(optimizer)
    if held.total != plan.estimate.state:
        raise AssertionError(f"planned {plan.estimate.state} bytes of state, held {held.total}")
    return {
        "plan": name,
        "seed": seed,
        "setup": asdict(setup),
        "loss": evaluate(model, text.validation(setup.windows, setup.shape)),
        "state": held.total,
        "energy": plan.energy,
        "ranks": dict(plan.ranks),
        "cpu_seconds": time.process_time() - begun,
    }


def kept(name: str, setup: Setup, text: Text, seed: int, out: Path) -> dict[str, Any]:
    """The run: read if it was made with this setup, else made."""
    path = out / f"{name}-{setup.rank}-{setup.steps}-{seed}.json"
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text())
        if found["setup"] == asdict(setup):
            return found
    found = train(name, setup, text, seed)
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1))
    return found


def table(runs: dict[str, list[dict[str, Any]]]) -> list[list[str]]:
    """Means over seeds, and paired differences from the first with their standard error."""
    first, rows = next(iter(runs.values())), []
    for name, own in runs.items():
        gains = [b["loss"] - a["loss"] for a, b in zip(first, own, strict=True)]
        error = statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else math.nan
        ranks = [r for run in own for r in run["ranks"].values()]
        rows.append(
            [
                name,
                f"{statistics.fmean(run['loss'] for run in own):.4f}",
                "" if own is first else f"{statistics.fmean(gains):+.4f} ± {error:.4f}",
                f"{min(ranks)} to {max(ranks)}",
                f"{max(run['state'] for run in own):,}",
            ]
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, and print the table."""
    s = Setup()
    parser = argparse.ArgumentParser(description="Ranks by calibration beside one rank for all.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--plans", nargs="+", choices=PLANS, default=list(PLANS))
    parser.add_argument("--steps", type=int, default=s.steps)
    parser.add_argument("--rank", type=int, default=s.rank)
    parser.add_argument("--multiple", type=int, default=s.multiple)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/fit"))
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    setup = Setup(steps=args.steps, rank=args.rank, multiple=args.multiple)
    text = load_text()
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in args.plans}
    for seed in args.seeds:
        for name in args.plans:
            run = kept(name, setup, text, seed, args.out)
            runs[name].append(run)
            print(f"seed {seed}, {name}: {run['loss']:.4f}", flush=True)
    header = ["ranks", "nats per byte", "less the first", "from, to", "state (bytes, most)"]
    print(markdown_table(header, table(runs)))
    print(f"\n{setup.steps} steps, rank {setup.rank}, seeds {args.seeds}")
    print("Mean, and mean ± standard error of pairs.")
    print(environment_line())


if __name__ == "__main__":
    main()
