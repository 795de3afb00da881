"""Products or transforms: what ``transform="auto"`` of the cosine basis takes, and what is faster.

Run as ``python -m benchmarks.dct_rule``. One square matrix; a step that refreshes its indices and
one that does not are timed with both forms in turns, and a gap costs one of the first and the rest
of the second. ``kept`` is the time of the choice over that of the faster form.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.common import environment, environment_line, print_table
from benchmarks.timing import interleaved
from lowrank_optim import DCTAdamW
from lowrank_optim.subspaces import DCT
from lowrank_optim.tensors.matrix import matrix_view

NEVER = 10**9
FORMS = ("fft", "matmul")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def times(width: int, rank: int, dtype: torch.dtype, rounds: int) -> dict[tuple[str, int], float]:
    """Milliseconds of a step by form, with a refresh at every one or at none."""
    works = {}
    for form in FORMS:
        for gap in (1, NEVER):
            weight = torch.nn.Parameter(torch.randn(width, width).to(dtype))
            weight.grad = torch.randn(width, width).to(dtype)
            group = {"params": [weight], "rank": rank, "transform": form, "update_proj_gap": gap}
            works[form, gap] = DCTAdamW([group], lr=1e-9).step
    found = interleaved({f"{form} {gap}": work for (form, gap), work in works.items()}, rounds)
    return {(form, gap): statistics.median(found[f"{form} {gap}"]) for form, gap in works}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, write the file."""
    parser = argparse.ArgumentParser(description="Products or transforms for the cosine basis.")
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 768, 1536, 4096])
    parser.add_argument("--gaps", type=int, nargs="+", default=[1, 10, 200])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, help="default: torch's choice")
    parser.add_argument("--out", type=Path, default=Path("runs/dct_rule.json"))
    args = parser.parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    console = Console()
    console.print(environment_line(), highlight=False)
    results: list[dict[str, Any]] = []
    for name in args.dtypes:
        for width in args.widths:
            view = matrix_view((width, width))
            assert view is not None
            for rank in sorted({16, 64, width // 8, width // 4, width // 2}):
                found = times(width, rank, DTYPES[name], args.rounds)
                for gap in args.gaps:
                    cost = {
                        f: found[f, NEVER] + max(0, found[f, 1] - found[f, NEVER]) / gap
                        for f in FORMS
                    }
                    like = torch.empty(0, dtype=DTYPES[name])
                    fast = DCT(rank, update_proj_gap=gap).fast(width, like)
                    chosen = "fft" if fast else "matmul"
                    kept = cost[chosen] / min(cost.values())
                    key = {"dtype": name, "width": width, "rank": rank, "gap": gap}
                    results.append({**key, **cost, "chosen": chosen, "kept": kept})
    rows = [
        (r["dtype"], *(str(r[k]) for k in ("width", "rank", "gap")), f"{r['fft']:.2f}",
         f"{r['matmul']:.2f}", r["chosen"], f"{r['kept']:.2f}")
        for r in results
    ]  # fmt: skip
    header = ("dtype", "width", "rank", "gap", "fft (ms)", "matmul (ms)", "auto", "kept")
    print_table(console, "One step of DCT-AdamW on one square matrix", header, rows)
    kept = [r["kept"] for r in results]
    right = sum(k == 1 for k in kept)
    mean = statistics.mean(kept)
    console.print(f"{right} of {len(kept)} choices are the faster form; kept {mean:.3f} on average")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"environment": environment(), "results": results}, indent=1))
    console.print(f"written: {args.out}", highlight=False)


if __name__ == "__main__":
    main()
