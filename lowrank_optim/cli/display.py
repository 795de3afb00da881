"""Rows as a table, as bars and in words."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

from lowrank_optim.cli.rows import ACCUMULATED, LIVE, PROJECT, STEP, USUAL, Column, Row
from lowrank_optim.memory import GIB, Estimate
from lowrank_optim.memory.figures import EXPANDABLE, WASTE

HEADER = ("moments in", "basis", "moments")
PARTS = {"weights": "█", "gradient": "▓", "basis": "▒", "moments": "░"}
PARTS |= {"activations": "▪", "gathered": "▧", "in passing": "▫"}
COLOURS = {
    "weights": "#4c72b0",
    "gradient": "#c44e52",
    "basis": "#55a868",
    "moments": "#dd8452",
    "activations": "#8172b3",
    "gathered": "#64b5cd",
    "in passing": "#937860",
}


def gib(size: float) -> str:
    """Bytes as GiB, to two places."""
    return f"{size / GIB:.2f}"


def verdict(e: Estimate | None, budget: float) -> Text:
    """A peak, that it fits, or what it passes the budget by, and at which moment it is."""
    if e is None:
        return Text("–")
    fits = e.fits(budget)
    told = f"{gib(e.peak)} fits" if fits else f"{gib(e.peak)} +{gib(e.peak - budget)}"
    return Text.assemble((told, "green" if fits else "red"), (f"\nat {e.peak_at}", "dim"))


def cells(row: Row, budget: float) -> list[str | Text]:
    """One line of the table, in GiB."""
    sizes = [gib(row.state.basis), gib(row.state.moments)]
    return [row.name, *sizes, *(verdict(e, budget) for e in row.peaks.values())]


def listed(rows: Sequence[Row], column: Column, budget: float) -> str:
    """Who fits, as the subject of a sentence."""
    found = {row.name: row.peaks[column] for row in rows}
    names = [name for name, e in found.items() if e is not None and e.fits(budget)]
    if not names and not any(found.values()):
        return f"{', '.join(found)} cannot train so (–: the method needs whole gradients)"
    if not names:
        return "nothing fits"
    if len(names) == 1:
        return f"only {names[0]} fits" if len(found) > 1 else f"{names[0]} fits"
    return f"{', '.join(names[:-1])} and {names[-1]} fit"


def reading(rows: Sequence[Row], budget: float) -> str:
    """The table in words, from its figures."""
    line, state, columns = f"{budget / GIB:g} GiB", rows[0].state, [*rows[0].peaks]
    if tuple(columns) != USUAL:
        said = [f"{c.header.replace(chr(10), ' ')}: {listed(rows, c, budget)}" for c in columns]
        return f"In {line}, {'; '.join(said)}. {_not_counted(rows)}."
    text = f"With all gradients live, {listed(rows, LIVE, budget)} in {line}"
    if state.weights + state.gradients > budget:
        both = f"weights ({gib(state.weights)}) and gradients ({gib(state.gradients)})"
        text += f", and no optimizer could: {both} alone pass it"
    text += (
        '. With attach_in_backward(mode="step") and one micro-batch, at most '
        f"{gib(state.largest_gradient)} GiB of gradients lives at once, and "
        f"{listed(rows, STEP, budget)}; accumulated, all live until the last micro-batch, and "
        f"{listed(rows, ACCUMULATED, budget)}. "
        'With mode="project" and any number of micro-batches, coordinates live, dense gradients '
        f"and those that a refresh waits for, and {listed(rows, PROJECT, budget)} (–: the method "
        "needs whole gradients)"
    )
    fits = [e for row in rows if (e := row.peaks[PROJECT]) is not None and e.fits(budget)]
    if fits and fits[-1].activations is not None:
        text += f". Activations take {gib(fits[-1].activations)} GiB of its peak"
    if not fits:
        return f"{text}. {_not_counted(rows)}."
    spare = budget - min(e.peak for e in fits)
    return (
        f"{text}. {_not_counted(rows)}: what the least of "
        f'mode="project" leaves, {gib(spare)} GiB here, is for that.'
    )


def tight(rows: Sequence[Row], budget: float) -> str:
    """A warning of what fits and leaves little; empty where nothing does."""
    found = [
        (f"{row.name} ({' '.join(column.header.split())})", budget - e.peak)
        for row in rows
        for column, e in row.peaks.items()
        if e is not None and e.is_tight(budget)
    ]
    if not found:
        return ""
    told = ", ".join(f"{name} leaves {gib(spare)} GiB" for name, spare in found)
    return f"Tight: {told}. {remedy()}"


def remedy() -> str:
    """What to do where little is left."""
    return (
        f"torch's allocator may waste up to {WASTE:.0%} of a peak, and about 1% with "
        f"{EXPANDABLE}: set it."
    )


def _not_counted(rows: Sequence[Row]) -> str:
    found = [e for row in rows for e in row.peaks.values() if e is not None]
    if not found:
        return "Nothing was counted"
    known = any(e.activations is not None for e in found)
    others = "Not counted is" if known else "Activations are not counted, nor is"
    return f"{others} what the allocator wastes"


def segments(e: Estimate) -> dict[str, int]:
    """What a bar is made of, at the moment of the peak.

    Counters, a few KiB, count as moments, and what the allocator takes beyond bytes likewise.
    """
    at = e.peak_at
    passing = {"step": e.step_transients, "refresh": e.refresh_transients}.get(at) or 0
    rest = e.beside[at] - passing
    gradient = min(rest, e.live_gradients)
    gathered = min(e.gathered or 0, rest - gradient) if at == "backward" else 0
    rest -= gathered
    return {
        "weights": e.weights,
        "gradient": gradient,
        "basis": e.basis,
        "moments": e.moments + e.other - e.host + e.staging + e.rounding,
        **({} if e.activations is None else {"activations": rest - gradient}),
        **({} if e.gathered is None else {"gathered": gathered}),
        "in passing": passing if e.activations is not None else passing + rest - gradient,
    }


def drawn(row: Row) -> list[tuple[str, Estimate]]:
    """What has a bar, and its label: not ``ACCUMULATED``, which is ``LIVE`` and one gradient."""
    found = []
    for column, e in row.peaks.items():
        if e is not None and column != ACCUMULATED:
            told = "" if column in USUAL else f", {column.count}"
            told += "" if column.coords_dtype == "auto" else f", {column.coords_dtype}"
            mode = column.in_backward
            found.append((row.name + told if mode is None else f"  {mode}{told}", e))
    named = any(not label.startswith(" ") for label, _ in found)
    return found if named else [(f"{row.name},{label[1:]}", e) for label, e in found]


def bars(rows: Sequence[Row], budget: float, width: int) -> Text:
    """Peaks of every row as bars, with the budget as a line through them."""
    named = [pair for row in rows for pair in drawn(row)]
    label_width = max((len(label) for label, _ in named), default=0) + 2
    width = max(20, width - label_width - 8)
    scale = width / max([e.peak for _, e in named] + [budget])
    mark = round(budget * scale)
    text = Text()
    for label, e in named:
        text.append(f"{label:<{label_width}}")
        total, done = 0, 0
        for part, size in segments(e).items():
            total += size
            end = round(total * scale)
            for at in range(done, end):
                style = "bold" if at == mark else COLOURS[part]
                text.append("│" if at == mark else PARTS[part], style)
            done = max(done, end)
        if done <= mark:
            text.append(" " * (mark - done) + "│", "bold")
        text.append(f" {gib(e.peak)}\n")
    text.append(" " * (label_width + mark) + f"│ {budget / GIB:g} GiB\n", "bold")
    for part in segments(named[0][1]) if named else ():
        text.append(f"{PARTS[part]} {part}   ", COLOURS[part])
    return text
