"""What a LLaMA needs with each optimizer, beside the memory of one card.

Run as ``python -m benchmarks.memory --model llama-7b --rank 1024 --budget-gib 24``. With
``--tokens 4096`` activations are in the peaks, of checkpointed layers with ``--checkpointing``.
Nothing is allocated: :func:`lowrank_optim.memory.estimate` makes the state on the meta device.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
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
    "weights",
    "grads",
    "basis",
    "moments",
    "largest\ngrad",
    "peak, all\ngrads live",
    "peak, freed\nin backward",
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
    """One optimizer, with every gradient live and with each freed inside backward."""

    name: str
    live: Estimate
    freed: Estimate


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
    model: str, rank: int, tokens: int | None = None, checkpointing: bool = False
) -> list[Row]:
    """The rows of ``model``, a key of :data:`~benchmarks.common.LLAMA_SHAPES`."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):  # once for all rows
        module = AutoModelForCausalLM.from_config(llama_config(model), dtype=torch.bfloat16)
    counted: dict[str | None, int] = {}

    def one(
        optimizer: type[Optimizer] | str, options: dict[str, Any], how: Literal["step"] | None
    ) -> Estimate:
        asked = {"tokens": tokens, "checkpointing": checkpointing} if how not in counted else {}
        found = estimate(module, optimizer, in_backward=how, **asked, **options)
        if tokens is None:
            return found
        # forward and backward know nothing of the optimizer: once is enough
        activations = counted.setdefault(how, found.activations or 0)
        return replace(found, activations=activations)

    return [
        Row(name, one(optimizer, options, None), one(optimizer, options, "step"))
        for name, (optimizer, options) in methods(rank).items()
    ]


def gib(size: float) -> str:
    """Bytes as GiB, to two places."""
    return f"{size / GIB:.2f}"


def cells(row: Row, budget: float) -> list[str]:
    """One line of the table, in GiB."""
    e = row.live
    sizes = [e.weights, e.gradients, e.basis, e.moments, e.largest_gradient]
    peaks = [f"{gib(x.peak)} {'fits' if x.fits(budget) else 'no  '}" for x in (e, row.freed)]
    return [row.name, *map(gib, sizes), *peaks]


def listed(rows: Sequence[Row], kind: str, budget: float) -> str:
    """Who fits, as the subject of a sentence."""
    names = [row.name for row in rows if getattr(row, kind).fits(budget)]
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
        ". With each gradient stepped and freed inside backward, at most "
        f"{gib(first.largest_gradient)} GiB of them lives at once, and "
        f"{listed(rows, 'freed', budget)}"
    )
    spare = budget - min(row.freed.peak for row in rows)
    left = f", {gib(spare)} GiB here," if spare >= 0 else ""
    activations = rows[0].freed.activations
    others = "Activations are not counted, nor what"
    if activations is not None:
        text += f". Activations take {gib(activations)} GiB of the latter peaks"
        others = "Not counted is what"
    if not left:
        return f"{text}."
    return (
        f"{text}. {others} a step, a refresh of the bases and the "
        f"allocator need in passing: what the least of these leaves{left} is for them."
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


def bars(rows: Sequence[Row], budget: float, width: int) -> Text:
    """Both peaks of every row as bars, with the budget as a line through them."""
    longest = max(row.live.peak for row in rows)
    scale = width / max(longest, budget)
    mark = round(budget * scale)
    text = Text()
    for row in rows:
        for label, e in ((row.name, row.live), ("  freed", row.freed)):
            text.append(f"{label:<{LABEL}}")
            ends, total, drawn = [], 0, 0
            for part, size in segments(e).items():
                total += size
                ends.append((part, round(total * scale)))
            for part, end in ends:
                for at in range(drawn, end):
                    style = "bold" if at == mark else COLOURS[part]
                    text.append("│" if at == mark else PARTS[part], style)
                drawn = max(drawn, end)
            if drawn <= mark:
                text.append(" " * (mark - drawn) + "│", "bold")
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

    figure, axes = plt.subplots(figsize=(9, 4.2), layout="constrained")
    labels = []
    for i, row in enumerate(rows):
        for j, e in enumerate((row.live, row.freed)):
            y, left = 2.4 * i + j, 0.0
            labels.append((y, row.name if j == 0 else "freed in backward"))
            for part, size in segments(e).items():
                label = part if i == j == 0 else None
                axes.barh(y, size / GIB, left=left, color=COLOURS[part], label=label)
                left += size / GIB
            axes.text(left + 0.4, y, f"{left:.1f}", va="center", fontsize=9)
    axes.axvline(budget / GIB, color="black", linestyle="--", label=f"{budget / GIB:g} GiB")
    axes.set_yticks([y for y, _ in labels], [name for _, name in labels])
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    known = rows[0].live.activations is not None
    axes.set_xlabel("GiB" if known else "GiB, without activations")
    axes.set_title(title, loc="left")
    axes.margins(x=0.08)
    axes.legend(ncols=6, loc="upper center", bbox_to_anchor=(0.45, -0.16), frameon=False)
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
            "peak": row.live.peak,
            "peak_in_backward": row.freed.peak,
            "fits": row.live.fits(budget),
            "fits_in_backward": row.freed.fits(budget),
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
    args = parser.parse_args(arguments)
    rows = measure(args.model, args.rank, args.tokens, args.checkpointing)
    budget = round(args.budget_gib * GIB)
    name = args.model.replace("llama", "LLaMA").replace("m", "M").replace("b", "B")
    about = f"{name}, rank {args.rank}, bfloat16 weights"
    if args.tokens:
        about += f", {args.tokens} tokens" + ", checkpointed" * args.checkpointing
    title = f"{about}, beside {args.budget_gib:g} GiB (figures in GiB)"
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
