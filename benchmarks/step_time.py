"""Time of an optimizer step over its GEMM floor, beside AdamW and other GaLore and Fira packages.

Run as ``python -m benchmarks.step_time``. Everything compared runs in one process, in turns, on the
same weights and gradients; figures are medians. Bases are random: a step costs the same whatever
they are, and ``benchmarks.refresh`` times the refresh.
"""

from __future__ import annotations

import argparse
import json
import statistics
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from benchmarks import dct, frugal_step
from benchmarks.common import LLAMA_SHAPES, environment, environment_line, print_table
from benchmarks.matrices import NEVER, OURS, galore, gemm_floor, linear_weights
from benchmarks.timing import Work, interleaved, milliseconds, peer, ratio
from lowrank_optim import FiraAdamW

FLOOR, FIRA = "GEMM floor", "FiraAdamW"
TARGETS = {"float32": 1.05, "bfloat16": 1.15}
FIRA_TARGET = 1.15
ELEMENTS = 25_000_000
"""Least number of elements in a model of the scaling table: a few layers of each shape."""


def variants(params: Sequence[Tensor], rank: int) -> dict[str, Work]:
    """Everything compared, each with a state of its own."""
    group = {"params": params, "rank": rank, "update_proj_gap": NEVER, "scale": 0.25}
    fira_keys = {k: v for k, v in group.items() if k != "scale"}
    adamw = torch.optim.AdamW
    found: dict[str, Work] = {
        FLOOR: gemm_floor(params, rank),
        OURS: galore(params, rank).step,
        FIRA: galore(params, rank, FiraAdamW).step,
        "torch AdamW single-tensor": adamw(params, lr=1e-9, foreach=False).step,
        "torch AdamW foreach": adamw(params, lr=1e-9, foreach=True).step,
        "torch AdamW fused": adamw(params, lr=1e-9, fused=True).step,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        released = peer("galore_torch", "GaLoreAdamW")
        if released is not None:
            own = [{**group, "proj_type": "std"}]
            found["galore-torch"] = released(own, lr=1e-9, no_deprecation_warning=True).step
        released = peer("fira", "FiraAdamW")
        if released is not None:
            own = [{**fira_keys, "alpha": 0.25, "proj_type": "std"}]
            found["fira"] = released(own, lr=1e-9, no_deprecation_warning=True).step
        for name in ("GaLore", "Fira"):
            other = peer("pytorch_optimizer", name)
            if other is not None:
                own = [{**group, "projection_type": "std"}]
                found[f"pytorch_optimizer {name}"] = other(own, lr=1e-9).step
    return found


def compare(args: argparse.Namespace, dtype: str) -> dict[str, Any]:
    """P1 and P2: medians, ratios to the floor, and to our GaLore step."""
    params = linear_weights(args.model, args.layers, getattr(torch, dtype))
    # the warm-up holds the first step of the peers: a full SVD of every matrix
    times = interleaved(variants(params, args.rank), args.rounds, warmup=2)
    rows = {
        name: {
            "ms": statistics.median(t),
            "over_floor": ratio(times, name, FLOOR),
            "over_galore": ratio(times, name, OURS),
        }
        for name, t in times.items()
    }
    return {"dtype": dtype, "matrices": len(params), "rows": rows, "target": TARGETS.get(dtype)}


def slowest(args: argparse.Namespace) -> list[dict[str, Any]]:
    """P6: slowest step over the median one, over two gaps, on the shapes of LLaMA-60M."""
    params = linear_weights("llama-60m", LLAMA_SHAPES["llama-60m"][2], torch.float32)
    found = []
    for stagger in (True, False):
        options = {"projector": "rsvd", "update_proj_gap": args.gap, "stagger": stagger}
        optimizer = galore(params, 128, **options)
        times = [milliseconds(optimizer.step) for _ in range(1 + 2 * args.gap)]
        median = statistics.median(times)
        found.append(
            {
                "stagger": stagger,
                "median_ms": median,
                "slowest_over_median": max(times[1:]) / median,
                "second_slowest_over_median": sorted(times[1:])[-2] / median,
                "first_over_median": times[0] / median,
                "target": 1.5 if stagger else None,
            }
        )
    return found


def scaling(args: argparse.Namespace) -> list[dict[str, Any]]:
    """P9: step time per element, at one rank, from the shapes of LLaMA-60M to those of 1B."""
    works: dict[str, Work] = {}
    sizes: dict[str, tuple[int, int]] = {}
    for model in ("llama-60m", "llama-130m", "llama-350m", "llama-1b"):
        hidden, mlp, *_ = LLAMA_SHAPES[model]
        layers = -(-ELEMENTS // (4 * hidden**2 + 3 * hidden * mlp))
        params = linear_weights(model, layers, torch.float32)
        sizes[model] = layers, sum(p.numel() for p in params)
        works[model] = galore(params, args.rank).step
    times = interleaved(works, args.rounds)
    each = {m: [1e6 * t / sizes[m][1] for t in ts] for m, ts in times.items()}  # nanoseconds
    return [
        {
            "model": model,
            "layers": sizes[model][0],
            "elements": sizes[model][1],
            "ns_per_element": statistics.median(each[model]),
            "over_60m": ratio(each, model, "llama-60m"),
            "target": 1.2,
        }
        for model in works
    ]


def show(console: Console, results: dict[str, Any], args: argparse.Namespace) -> None:
    """The tables."""
    for found in results["steps"]:
        target = found["target"]
        rows = [
            (
                name,
                f"{row['ms']:.1f}",
                f"{row['over_floor']:.3f}",
                f"{row['over_galore']:.3f}",
                f"<= {target} of the floor" if name == OURS and target else "",
                f"<= {FIRA_TARGET} of ours" if name == FIRA else "",
            )
            for name, row in found["rows"].items()
        ]
        title = (
            f"P1, P2: one step, {found['dtype']}, {found['matrices']} matrices of {args.model}, "
        )
        title += f"rank {args.rank}, no refresh"
        header = ("", "ms", "over the floor", f"over {OURS}", "P1", "P2")
        print_table(console, title, header, rows)
    rows = [
        (
            "staggered" if r["stagger"] else "all at once",
            f"{r['median_ms']:.1f}",
            f"{r['slowest_over_median']:.2f}",
            f"{r['second_slowest_over_median']:.2f}",
            f"{r['first_over_median']:.2f}",
            f"<= {r['target']}" if r["target"] else "",
        )
        for r in results["slowest"]
    ]
    title = f"P6: slowest over median step, two gaps of {args.gap}, LLaMA-60M, rank 128"
    header = ("refreshes", "median ms", "slowest", "second", "the first step", "target (slowest)")
    print_table(console, title, header, rows)
    rows = [
        (
            r["model"],
            str(r["layers"]),
            f"{r['elements'] / 1e6:.1f} M",
            f"{r['ns_per_element']:.2f}",
            f"{r['over_60m']:.3f}",
            f"<= {r['target']}",
        )
        for r in results["scaling"]
    ]
    title = f"P9: step time per element, rank {args.rank}, a few layers of each shape"
    header = ("shapes", "layers", "elements", "ns per element", "over the smallest", "target")
    print_table(console, title, header, rows)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Step time over the GEMM floor, side by side.")
    parser.add_argument("--model", choices=LLAMA_SHAPES, default="llama-130m")
    parser.add_argument("--layers", type=int, default=4, help="of the model (default: 4)")
    parser.add_argument("--rank", type=int, default=256)
    parser.add_argument("--dtype", default="float32,bfloat16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--gap", type=int, default=60, help="of the slowest-step table")
    parser.add_argument("--threads", type=int, help="default: torch's choice")
    parser.add_argument("--out", type=Path, default=Path("runs/step_time.json"))
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the tables, write the file."""
    args = parse(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    console = Console()
    console.print(environment_line(), highlight=False)
    results: dict[str, Any] = {
        "environment": environment(),
        "arguments": {k: str(v) for k, v in vars(args).items()},
        "steps": [compare(args, dtype) for dtype in args.dtype.split(",")],
        "slowest": slowest(args),
        "scaling": scaling(args),
    }
    show(console, results, args)
    results["dct"] = dct.measure(args, console)
    results["frugal"] = {d: frugal_step.measure(args, d, console) for d in args.dtype.split(",")}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    console.print(f"written: {args.out}", highlight=False)


if __name__ == "__main__":
    main()
