"""Loss against tokens and against time, and what the state takes."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.study.training import Record


def draw(lines: Mapping[str, Sequence[Record]], path: Path) -> None:
    """A curve for each name, the mean over its records.

    Names, final losses and colours are at the bars. Time is that of CPUs: of one thread on an idle
    machine it is what a clock shows.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (tokens, seconds, bars) = plt.subplots(
        1,
        3,
        figsize=(12, max(4.2, 0.24 * len(lines))),
        width_ratios=(3, 3, 2),
        layout="constrained",
    )
    colours = plt.colormaps["tab20" if len(lines) > 10 else "tab10"].colors  # type: ignore[attr-defined]
    for place, (name, records) in enumerate(lines.items()):
        shape = records[0]["trial"]["size"]["shape"]
        steps = [step for step, _ in records[0]["validation"]]
        losses = [
            statistics.fmean(r["validation"][i][1] for r in records) for i in range(len(steps))
        ]
        time = [statistics.median(r["cpu_seconds"][i] for r in records) for i in range(len(steps))]
        seen = [step * shape["batch"] * shape["context"] / 1e3 for step in steps]
        label, colour = f"{name} ({losses[-1]:.3f})", colours[place % len(colours)]
        style = "o-" if place < len(colours) else "s--"
        tokens.plot(seen[1:], losses[1:], style, color=colour, ms=3)
        seconds.plot(time[1:], losses[1:], style, color=colour, ms=3)
        size = records[0]["state_bytes"] / 1024
        bars.barh(label, size, 0.6, color=colour)
        bars.text(size, place, f" {size:.0f}", va="center")
    tokens.set_xlabel("thousand tokens")
    tokens.set_ylabel("validation loss (nats per byte)")
    seconds.set_xlabel("seconds of CPU")
    bars.set_xlabel("optimizer state (KiB)")
    bars.invert_yaxis()
    bars.margins(x=0.2)
    for axes in (tokens, seconds, bars):
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
