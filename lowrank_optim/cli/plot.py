"""The bars as a figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lowrank_optim.cli.display import COLOURS, drawn, segments
from lowrank_optim.cli.errors import Refused
from lowrank_optim.cli.rows import Row
from lowrank_optim.memory import GIB


def plot(rows: Sequence[Row], title: str, budget: float, path: Path) -> None:
    """Draw peaks of every row, and the budget as a line through them.

    Raises:
        Refused: the file cannot be written.
    """
    import matplotlib  # optional, and slow to import

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
    known = any(e.activations is not None for _, _, e in named)
    axes.set_xlabel("GiB" if known else "GiB, without activations")
    axes.set_title(title, loc="left")
    axes.margins(x=0.08)
    axes.legend(ncols=6, loc="upper center", bbox_to_anchor=(0.45, -0.7 / height), frameon=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise Refused(f"--plot {path}: {error}") from error
    finally:
        plt.close(figure)
