"""What comes out of the demo: a table, a figure and every number."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.common import Corpus, environment, environment_line, markdown_table
from benchmarks.runs import Run, Settings

HEADER = (
    "optimizer",
    "val loss\n(nats)",
    "perplexity\n",
    "bits/\nbyte",
    "state\n(MiB)",
    "step\n(ms)",
    "model\n(ms)",
    "total\n(s)",
)


def table(runs: Sequence[Run]) -> list[list[str]]:
    """One line per optimizer: medians over its seeds, and the spread of the loss over them."""
    rows = []
    for name in dict.fromkeys(run.method for run in runs):
        own = [run for run in runs if run.method == name]
        loss = statistics.median(run.final_loss for run in own)
        spread = max(run.final_loss for run in own) - min(run.final_loss for run in own)

        def middle(values: Callable[[Run], float], own: Sequence[Run] = own) -> float:
            return statistics.median(map(values, own))

        rows.append(
            [
                name,
                f"{loss:.3f}" + (f" ± {spread / 2:.3f}" if len(own) > 1 else ""),
                f"{math.exp(loss):.2f}",
                f"{middle(lambda r: r.bits_per_byte):.3f}",
                f"{own[0].state['total'] / 2**20:.2f}",
                f"{middle(lambda r: r.optimizer_ms):.1f}",
                f"{middle(lambda r: r.model_ms):.0f}",
                f"{middle(lambda r: r.seconds):.0f}",
            ]
        )
    return rows


def caption(settings: Settings, corpus: Corpus, runs: Sequence[Run]) -> str:
    """What the table's figures are of."""
    seeds = len({run.seed for run in runs})
    lrs = ", ".join(f"{n} {lr:g}" for n, lr in dict.fromkeys((r.method, r.lr) for r in runs))
    tokens = settings.steps * settings.batch * settings.context
    return (
        f"LLaMA of {runs[0].parameters / 1e6:.2f} M parameters, {settings.steps} steps of "
        f"{settings.batch} x {settings.context} tokens ({tokens:,}), rank {settings.rank}, gap "
        f"{settings.gap}, {seeds} seed{'s' * (seeds > 1)}, peak learning rates of the matrices: "
        f"{lrs}; of embedding, head and norms {settings.dense_lr:g} in all. "
        f"Validation on {len(corpus.held_files)} held-out files; a model without context has "
        f"{corpus.unigram_loss():.3f} nats. Loss and perplexity are per token, "
        "state is by storage, step is the median optimizer step, model the median forward and "
        f"backward pass.\n\n{environment_line()}"
    )


def write(out: Path, settings: Settings, corpus: Corpus, runs: Sequence[Run]) -> None:
    """``results.json``, ``table.md`` and ``curves.png``."""
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {
        "environment": environment(),
        "settings": asdict(settings),
        "text": {
            "train_files": len(corpus.train_files),
            "held_files": len(corpus.held_files),
            "train_tokens": len(corpus.train),
            "held_tokens": len(corpus.held),
            "unigram_loss": corpus.unigram_loss(),
        },
        "runs": [{**asdict(run), "final_loss": run.final_loss} for run in runs],
    }
    (out / "results.json").write_text(json.dumps(results, indent=1))
    header = [name.replace("\n", " ").strip() for name in HEADER]
    text = markdown_table(header, table(runs)) + "\n\n" + caption(settings, corpus, runs) + "\n"
    (out / "table.md").write_text(text)
    plot(runs, corpus.unigram_loss(), out / "curves.png")


def plot(runs: Sequence[Run], unigram: float, path: Path) -> None:
    """Loss over steps, and the bytes of state as bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (curves, bars) = plt.subplots(
        1, 2, figsize=(10, 4.2), width_ratios=(3, 1), layout="constrained"
    )
    names = list(dict.fromkeys(run.method for run in runs))
    colours = dict(zip(names, plt.colormaps["tab10"].colors, strict=False))
    for run in runs:
        first = run.seed == runs[0].seed
        colour = colours[run.method]
        steps = range(1, len(run.train_loss) + 1)
        curves.plot(steps, run.train_loss, color=colour, alpha=0.25, linewidth=0.8)
        label = f"{run.method}, validation ({run.final_loss:.3f} at the end)" if first else None
        curves.plot(*zip(*run.validation, strict=True), "o-", color=colour, ms=3.5, label=label)
    curves.axhline(unigram, color="grey", linestyle=":", linewidth=1, label="no context (unigram)")
    curves.plot([], [], color="grey", alpha=0.5, linewidth=0.8, label="training batches")
    curves.set_xlabel("step")
    curves.set_ylabel("loss (nats per token)")
    curves.legend(frameon=False)
    kinds = {"basis": 0.45, "moments": 1.0}
    for i, name in enumerate(names):
        state, bottom = next(run.state for run in runs if run.method == name), 0.0
        for kind, alpha in kinds.items():
            size = state[kind] / 2**20
            bars.bar(i, size, 0.6, bottom=bottom, color=colours[name], alpha=alpha)
            if size:
                bars.text(i, bottom + size / 2, kind, ha="center", va="center", fontsize=8)
            bottom += size
        bars.text(i, bottom, f"{state['total'] / 2**20:.1f}", ha="center", va="bottom")
    bars.set_xticks(range(len(names)), names, fontsize=9)
    bars.set_ylabel("optimizer state (MiB)")
    bars.margins(x=0.1, y=0.08)
    for axes in (curves, bars):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
