"""Tables and figures from the files of runs; what was not run is said, not left out."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.common import markdown_table
from benchmarks.study.recipes import METHODS, Case
from benchmarks.study.search import GROWN, SEARCH_SEED, beside
from benchmarks.study.sets import RELATIONS, Relation
from benchmarks.study.sizes import Size
from benchmarks.study.training import Record, Trial, kept, timing

HEADER = (
    "optimizer",
    "rank",
    "rate",
    "validation loss (nats)",
    "less than the first",
    "seeds",
    "state (KiB)",
    "CPU a step (ms)",
)
NOT_RUN = "not run"


@dataclass(frozen=True)
class Line:
    """What there is of one case."""

    case: Case
    searched: dict[float, float] = field(default_factory=dict)
    inside: bool = False
    records: dict[int, Record] = field(default_factory=dict)
    """By seed, at the best rate."""

    machines: tuple[Record, ...] = ()
    """Of every run, those of the search too."""

    @property
    def best(self) -> float | None:
        """Of the rates that were tried."""
        return min(self.searched, key=lambda lr: self.searched[lr]) if self.searched else None

    @property
    def losses(self) -> dict[int, float]:
        """Final, by seed."""
        return {seed: record["final_loss"] for seed, record in self.records.items()}


def on_cpu(record: Record, size: Size, out: Path) -> Record:
    """A run of an accelerator with the seconds of a CPU: those of the few steps that are kept."""
    if "device" not in record["environment"]:
        return record
    timed = kept(timing(size, Case(**record["trial"]["case"])), out)
    steps = [step for step, _ in record["validation"]]
    each = math.nan if timed is None else timed["cpu_seconds"][-1] / timed["validation"][-1][0]
    return {**record, "cpu_seconds": [step * each for step in steps]}


def read(case: Case, size: Size, seeds: Sequence[int], out: Path) -> Line:
    """The kept runs of a case."""
    rates = sorted(METHODS[case.method].grid)
    for _ in range(GROWN):
        rates = [beside(rates[0], up=False), *rates, beside(rates[-1], up=True)]
    tried = {lr: kept(Trial(size, case, lr, SEARCH_SEED), out) for lr in rates}
    searched = {lr: float(r["final_loss"]) for lr, r in tried.items() if r is not None}
    if not searched:
        return Line(case)
    best = min(searched, key=lambda lr: searched[lr])
    found = {seed: kept(Trial(size, case, best, seed), out) for seed in seeds}
    records = {seed: on_cpu(r, size, out) for seed, r in found.items() if r is not None}
    made = [*(r for r in tried.values() if r is not None), *records.values()]
    inside = min(searched) < best < max(searched)
    return Line(case, searched, inside, records, tuple(r["environment"] for r in made))


def difference(first: Line, other: Line) -> tuple[float, float] | None:
    """How much lower ``other`` ends, in pairs of seeds: mean and standard error."""
    seeds = sorted(set(first.losses) & set(other.losses))
    gains = [first.losses[seed] - other.losses[seed] for seed in seeds]
    if len(gains) < 2:
        return None
    return statistics.fmean(gains), statistics.stdev(gains) / math.sqrt(len(gains))


def row(line: Line, first: Line) -> list[str]:
    """One line of a table."""
    rank, losses = line.case.options.get("rank"), list(line.losses.values())
    shown = "–" if rank is None else f"{rank:g}"
    if line.best is None:
        return [line.case.name, shown, NOT_RUN, *[""] * (len(HEADER) - 3)]
    rate = f"{line.best:g}" + ("" if line.inside else " (at the edge)")
    if not losses:
        ended = f"{line.searched[line.best]:.3f} (the search's seed)"
        return [line.case.name, shown, rate, ended, "", "0", "", ""]
    spread = f" ± {statistics.stdev(losses):.3f}" if len(losses) > 1 else ""
    gain = None if line is first else difference(first, line)
    records = list(line.records.values())
    steps = [r["cpu_seconds"][-1] / r["validation"][-1][0] for r in records]
    return [
        line.case.name,
        shown,
        rate,
        f"{statistics.fmean(losses):.3f}{spread}",
        "" if gain is None else f"{gain[0]:+.3f} ± {gain[1]:.3f}",
        str(len(losses)),
        f"{records[0]['state_bytes'] / 1024:.0f}",
        f"{1e3 * statistics.median(steps):.0f}" if math.isfinite(steps[0]) else "",
    ]


def table(lines: Sequence[Line]) -> list[list[str]]:
    """Every case, in pairs with the first."""
    return [row(line, lines[0]) for line in lines]


def searches(lines: Sequence[Line]) -> list[list[str]]:
    """Losses at every rate that was tried; the best is bold."""
    return [
        [
            line.case.name,
            ", ".join(
                f"{lr:g} **{loss:.3f}**" if lr == line.best else f"{lr:g} {loss:.3f}"
                for lr, loss in sorted(line.searched.items())
            )
            or NOT_RUN,
        ]
        for line in lines
    ]


def provenance(lines: Sequence[Line]) -> str:
    """Commits, machines and versions of the runs."""
    said = {
        f"{e.get('device', e['cpu'])}, {e['threads']} thread{'s' * (e['threads'] > 1)}, "
        f"torch {e['torch']}{', compiled' if 'compiled' in e else ''}, commit {e['commit']}"
        for line in lines
        for e in line.machines
    }
    return "; ".join(sorted(said)) or "No run was made."


def verdict(
    relation: Relation, lines: Sequence[Line], size: Size, scale: tuple[float, float] | None
) -> list[str]:
    """Reproduced, not reproduced, not told apart, or not run.

    Args:
        relation: of a paper.
        lines: of its set.
        size: of the models.
        scale: what LoRA is behind AdamW, and its error: what "near" is a tenth of.
    """
    names = {"quarter": size.rank // 4, "double": size.rank * 2}
    by_name = {line.case.name: line for line in lines}
    better = by_name.get(relation.better.format(**names))
    worse = by_name.get(relation.worse.format(**names))
    gain = None if better is None or worse is None else difference(worse, better)
    start = [relation.claim, relation.source]
    if gain is None:
        return [*start, "", "not tested yet"]
    mean, error = gain
    figure = f"{mean:+.3f} ± {error:.3f}"
    if relation.near:
        if scale is None:
            return [*start, figure, "not tested yet"]
        most = scale[0] / 10
        if abs(mean) + 2 * error <= most:
            return [*start, figure, "reproduced"]
        return [
            *start,
            figure,
            "not told apart" if abs(mean) - 2 * error <= most else "not reproduced",
        ]
    if abs(mean) <= 2 * error:
        return [*start, figure, "not told apart"]
    return [*start, figure, "reproduced" if mean > 0 else "not reproduced"]


def published(lines: dict[str, list[Line]], size: Size) -> list[list[str]]:
    """Every relation."""
    by_name = {line.case.name: line for line in lines["rank"]}
    scale = difference(by_name["LoRA"], by_name["AdamW"])
    return [verdict(relation, lines[relation.set_name], size, scale) for relation in RELATIONS]


def place(page: Path, name: str, text: str) -> None:
    """Put ``text`` between the page's markers of ``name``.

    Raises:
        ValueError: the page has no such markers.
    """
    content = page.read_text(encoding="utf-8")
    pattern = re.compile(rf"(<!-- study: {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
    if not pattern.search(content):
        raise ValueError(f"{page} has no '<!-- study: {name} -->' followed by '<!-- end -->'")
    changed = pattern.sub(lambda m: f"{m[1]}\n{text.strip()}\n\n{m[2]}", content)
    page.write_text(changed, encoding="utf-8")


def section(lines: Sequence[Line]) -> str:
    """Table, searches, what was not run, and where the figures are from."""
    made = [line for line in lines if line.searched]
    missing = [line.case.name for line in lines if not line.searched]
    parts = [
        markdown_table(HEADER, table(made)),
        markdown_table(("optimizer", f"loss at each rate, seed {SEARCH_SEED}"), searches(made)),
    ]
    if missing:
        parts.append(f"Not run yet: {'; '.join(missing)}.")
    if len(made) < 2:
        parts = parts[-1:] if missing else []
    return "\n\n".join([*parts, provenance(made)])
