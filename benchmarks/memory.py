"""What a LLaMA needs with each optimizer, beside the memory of one card.

Run as ``python -m benchmarks.memory --model llama-7b --rank 1024 --budget-gib 24``. With
``--tokens 4096`` activations are in the peaks, of checkpointed layers with ``--checkpointing``.
Nothing is allocated: :func:`lowrank_optim.memory.estimate` makes the state on the meta device.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.text import Text
from torch.optim import Optimizer

from benchmarks.common import LLAMA_SHAPES, llama_config, print_table
from lowrank_optim import DCTAdamW, DCTAdamW8bit, FrugalAdamW8bit, GaLoreAdamW, GaLoreAdamW8bit
from lowrank_optim.memory import GIB, Estimate, estimate

HEADER = (
    "moments in",
    "basis",
    "moments",
    "all grads\nlive",
    "step, one\nmicro-batch",
    "step,\nmore",
    "project,\nany number",
)
PARTS = {"weights": "█", "gradient": "▓", "basis": "▒", "moments": "░", "activations": "▪"}
LABEL = 16
"""Columns for the name of a bar."""
COLOURS = {
    "weights": "#4c72b0",
    "gradient": "#c44e52",
    "basis": "#55a868",
    "moments": "#dd8452",
    "activations": "#8172b3",
}


@dataclass(frozen=True)
class Row:
    """One optimizer, and what it needs by what happens to gradients inside backward."""

    name: str
    live: Estimate
    """Nothing: one micro-batch, all gradients live."""
    step: Estimate
    """``mode="step"`` and one micro-batch: the largest gradient lives."""
    accumulated: Estimate
    """``mode="step"`` and more of them: all gradients live until the last, one is in flight."""
    project: Estimate | None
    """``mode="project"`` and any number; None where the method needs whole gradients."""

    @property
    def peaks(self) -> dict[str, Estimate | None]:
        """By name, in the order of the table."""
        return {f.name: getattr(self, f.name) for f in fields(self)[1:]}


def methods(rank: int) -> dict[str, tuple[type[Optimizer] | str, dict[str, Any]]]:
    """The rows: a class or layout, and its arguments."""
    return {
        "AdamW bf16": (torch.optim.AdamW, {}),
        "AdamW 8-bit": ("adamw-8bit", {}),
        "GaLore fp32": (GaLoreAdamW, {"rank": rank}),
        "GaLore bf16": (GaLoreAdamW, {"rank": rank, "state_dtype": "bfloat16"}),
        "GaLore 8-bit": (GaLoreAdamW8bit, {"rank": rank}),
        "FRUGAL 8-bit": (FrugalAdamW8bit, {"rank": rank, "projector": "columns"}),
        "DCT fp32": (DCTAdamW, {"rank": rank}),
        "DCT 8-bit": (DCTAdamW8bit, {"rank": rank}),
    }


def measure(
    model: str,
    rank: int,
    tokens: int | None = None,
    checkpointing: bool = False,
    only: Sequence[str] | None = None,
) -> list[Row]:
    """The rows of ``model``, a key of :data:`~benchmarks.common.LLAMA_SHAPES`; ``only`` these."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):  # once for all rows
        module = AutoModelForCausalLM.from_config(llama_config(model), dtype=torch.bfloat16)
    counted: dict[Any, int] = {}

    def one(
        optimizer: type[Optimizer] | str,
        options: dict[str, Any],
        how: Literal["step", "project"] | None,
        micro_batches: int,
    ) -> Estimate:
        # but for coordinates, forward and backward know nothing of the optimizer: once is enough
        key = (how, micro_batches, optimizer if how == "project" else None)
        asked = {"tokens": tokens, "checkpointing": checkpointing} if key not in counted else {}
        found = estimate(
            module, optimizer, in_backward=how, accumulation_steps=micro_batches, **asked, **options
        )
        if tokens is None:
            return found
        activations = counted.setdefault(key, found.activations or 0)
        return replace(found, activations=activations)

    rows = []
    for name, (optimizer, options) in methods(rank).items():
        if only is not None and name not in only:
            continue
        live, step, accumulated = (
            one(optimizer, options, how, n) for how, n in ((None, 1), ("step", 1), ("step", 2))
        )
        try:
            project = one(optimizer, options, "project", 2)
        except ValueError:  # the method needs whole gradients
            project = None
        rows.append(Row(name, live, step, accumulated, project))
    return rows


def gib(size: float) -> str:
    """Bytes as GiB, to two places."""
    return f"{size / GIB:.2f}"


def verdict(e: Estimate | None, budget: float) -> str:
    """A peak, and whether it fits."""
    return "–" if e is None else f"{gib(e.peak)} {'fits' if e.fits(budget) else 'no  '}"


def cells(row: Row, budget: float) -> list[str]:
    """One line of the table, in GiB."""
    sizes = [row.live.basis, row.live.moments]
    return [row.name, *map(gib, sizes), *(verdict(e, budget) for e in row.peaks.values())]


def listed(rows: Sequence[Row], kind: str, budget: float) -> str:
    """Who fits, as the subject of a sentence."""
    found = {row.name: row.peaks[kind] for row in rows}
    names = [name for name, e in found.items() if e is not None and e.fits(budget)]
    if not names:
        return "nothing fits"
    if len(names) == 1:
        return f"only {names[0]} fits"
    return f"{', '.join(names[:-1])} and {names[-1]} fit"


def reading(rows: Sequence[Row], budget: float) -> str:
    """The table in words, from its figures."""
    line, first = f"{budget / GIB:g} GiB", rows[0].live
    text = f"With all gradients live, {listed(rows, 'live', budget)} in {line}"
    if first.weights + first.gradients > budget:
        both = f"weights ({gib(first.weights)}) and gradients ({gib(first.gradients)})"
        text += f", and no optimizer could: {both} alone pass it"
    text += (
        '. With attach_in_backward(mode="step") and one micro-batch, at most '
        f"{gib(first.largest_gradient)} GiB of gradients lives at once, and "
        f"{listed(rows, 'step', budget)}; accumulated, all live until the last micro-batch, and "
        f"{listed(rows, 'accumulated', budget)}. "
        'With mode="project" and any number of micro-batches, coordinates live, dense gradients '
        f"and those that a refresh waits for, and {listed(rows, 'project', budget)} (–: the method "
        "needs whole gradients)"
    )
    fits = [e for row in rows if (e := row.project) is not None and e.fits(budget)]
    counted = first.activations is not None
    others = "Not counted is what" if counted else "Activations are not counted, nor what"
    if counted and fits:
        text += f". Activations take {gib(fits[-1].activations or 0)} GiB of its peak"
    if not fits:
        return f"{text}."
    spare = budget - min(e.peak for e in fits)
    return (
        f"{text}. {others} a step, a refresh of the bases and the allocator need in passing: what "
        f'the least of mode="project" leaves, {gib(spare)} GiB here, is for them.'
    )


def segments(e: Estimate) -> dict[str, int]:
    """What a bar is made of; counters, a few KiB, count as moments."""
    return {
        "weights": e.weights,
        "gradient": e.live_gradients,
        "basis": e.basis,
        "moments": e.moments + e.other - e.host,
        **({} if e.activations is None else {"activations": e.activations}),
    }


def drawn(row: Row) -> list[tuple[str, Estimate]]:
    """What has a bar, and its label: not ``accumulated``, which is ``live`` and one gradient."""
    named = ((row.name, row.live), ("  step", row.step), ("  project", row.project))
    return [(label, e) for label, e in named if e is not None]


def bars(rows: Sequence[Row], budget: float, width: int) -> Text:
    """Peaks of every row as bars, with the budget as a line through them."""
    longest = max(row.live.peak for row in rows)
    scale = width / max(longest, budget)
    mark = round(budget * scale)
    text = Text()
    for row in rows:
        for label, e in drawn(row):
            text.append(f"{label:<{LABEL}}")
            ends, total, done = [], 0, 0
            for part, size in segments(e).items():
                total += size
                ends.append((part, round(total * scale)))
            for part, end in ends:
                for at in range(done, end):
                    style = "bold" if at == mark else COLOURS[part]
                    text.append("│" if at == mark else PARTS[part], style)
                done = max(done, end)
            if done <= mark:
                text.append(" " * (mark - done) + "│", "bold")
            text.append(f" {gib(e.peak)}\n")
    text.append(" " * (LABEL + mark) + f"│ {budget / GIB:g} GiB\n", "bold")
    for part in segments(rows[0].live):
        text.append(f"{PARTS[part]} {part}   ", COLOURS[part])
    return text


def plot(rows: Sequence[Row], title: str, budget: float, path: Path) -> None:
    """The bars as a figure."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    named = [(n, name, e) for n, row in enumerate(rows) for name, e in drawn(row)]
    height = 1.4 + 0.28 * len(named) + 0.1 * len(rows)
    figure, axes = plt.subplots(figsize=(9, height), layout="constrained")
    labels = []
    for bar, (n, name, e) in enumerate(named):
        y, left = bar + 0.4 * n, 0.0
        labels.append((y, f'mode="{name.strip()}"' if name.startswith(" ") else name))
        for part, size in segments(e).items():
            label = part if bar == 0 else None
            axes.barh(y, size / GIB, left=left, color=COLOURS[part], label=label)
            left += size / GIB
        text = f"{left:.1f} fits" if e.fits(budget) else f"{left:.1f}"
        inside = left < budget / GIB < left + 4.4  # beside the bar it would lie on the line
        at, side = (left - 0.4, "right") if inside else (left + 0.4, "left")
        axes.text(at, y, text, va="center", ha=side, fontsize=9)
    axes.axvline(budget / GIB, color="black", linestyle="--", label=f"{budget / GIB:g} GiB")
    axes.set_yticks([y for y, _ in labels], [name for _, name in labels])
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    known = rows[0].live.activations is not None
    axes.set_xlabel("GiB" if known else "GiB, without activations")
    axes.set_title(title, loc="left")
    axes.margins(x=0.08)
    axes.legend(ncols=6, loc="upper center", bbox_to_anchor=(0.45, -0.7 / height), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def as_json(rows: Sequence[Row], model: str, rank: int, budget: float) -> dict[str, Any]:
    """Every figure in bytes."""
    figures = {
        row.name: {
            **asdict(row.live),
            "in_backward": None,
            "state": row.live.state,
            "peaks": {k: None if e is None else e.peak for k, e in row.peaks.items()},
            "fits": {k: e is not None and e.fits(budget) for k, e in row.peaks.items()},
        }
        for row in rows
    }
    return {"model": model, "rank": rank, "budget": budget, "rows": figures}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, and write it where asked."""
    parser = argparse.ArgumentParser(description="What a LLaMA needs with each optimizer.")
    parser.add_argument("--model", choices=LLAMA_SHAPES, default="llama-7b")
    parser.add_argument("--rank", type=int, default=1024)
    parser.add_argument("--budget-gib", type=float, default=24.0)
    parser.add_argument("--tokens", type=int, help="of one sequence: count activations too")
    parser.add_argument("--checkpointing", action="store_true", help="of every layer")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures, in bytes")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw them")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="rows, as the table names them")
    args = parser.parse_args(arguments)
    known = methods(args.rank)
    if unknown := [name for name in args.only or () if name not in known]:
        parser.error(f"--only: no row is called {unknown[0]!r}; the rows are {', '.join(known)}")
    rows = measure(args.model, args.rank, args.tokens, args.checkpointing, args.only)
    budget = round(args.budget_gib * GIB)
    name = args.model.replace("llama", "LLaMA").replace("m", "M").replace("b", "B")
    about = f"{name}, rank {args.rank}, bfloat16 weights"
    if args.tokens:
        about += f", {args.tokens} tokens" + ", checkpointed" * args.checkpointing
    live = rows[0].live
    title = (
        f"{about}, beside {args.budget_gib:g} GiB (figures in GiB)\n"
        f"weights {gib(live.weights)}, gradients {gib(live.gradients)} (largest "
        f"{gib(live.largest_gradient)}); peaks by mode of attach_in_backward"
    )
    console = Console()
    print_table(console, title, HEADER, [cells(row, budget) for row in rows])
    console.print(bars(rows, budget, width=max(20, min(console.width, 100) - LABEL - 8)))
    console.print("\n" + reading(rows, budget) + "\n", highlight=False)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(as_json(rows, args.model, args.rank, budget), indent=1))
    if args.plot:
        plot(rows, about, budget, args.plot)


if __name__ == "__main__":
    main()
