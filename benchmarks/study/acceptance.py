"""What must show on the task before methods are compared on it.

A test-bed that cannot tell training from not training cannot rank optimizers. The facts are known
without it; each is a line with its margin and what the margin has to be. Spread is the standard
deviation of AdamW's final loss between seeds, which give weights and batches.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.study.recipes import Case
from benchmarks.study.search import SEARCH_SEED, Each, Found, Loss, search
from benchmarks.study.sizes import Size
from benchmarks.study.training import Trial

SEEDS = (0, 1, 2, 3, 4)
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
DECADE = 2
"""Rates of :data:`RATES` from one to ten times it."""
CLEARLY = 3.0
"""Spreads between what is clearly apart."""


@dataclass(frozen=True)
class Measured:
    """What the facts are read from: final losses."""

    adamw: Mapping[float, float]
    """By rate, on the seed of searches; as are the next four."""
    sgd: float
    frozen: float
    galore: Mapping[int, float]
    """By rank."""
    full: Sequence[float]
    """AdamW at its best rate, by seed."""
    lora: Sequence[float]
    """LoRA of small rank at its best rate, by seed."""
    rates: Mapping[str, float]
    """The best found, of each method."""


@dataclass(frozen=True)
class Fact:
    """One line: what was found, and what is asked of it."""

    claim: str
    found: float
    least: float
    """``found`` must be this much at least."""
    detail: str

    @property
    def holds(self) -> bool:
        """Whether it is so; what is not a number is not."""
        return self.found >= self.least


def small_lora(size: Size) -> Case:
    """LoRA that cannot be as good as full rank."""
    return Case(f"LoRA, rank {size.small_rank}", "lora", {"rank": size.small_rank})


def ranks(size: Size) -> tuple[int, int, int]:
    """Ranks of GaLore, far apart."""
    return size.small_rank, size.rank // 2, size.shape.hidden // 2


def measure(size: Size, loss: Loss, each: Each = map) -> Measured:
    """Every run that the facts need."""
    adamw, lora = Case("AdamW", "adamw"), small_lora(size)
    tried = each(loss, [Trial(size, adamw, lr, SEARCH_SEED) for lr in RATES])
    adam = dict(zip(RATES, tried, strict=True))
    best = min(RATES, key=lambda lr: adam[lr])
    found: dict[str, Found] = {
        "SGD": search(size, Case("SGD", "sgd"), loss, each=each),
        "frozen": search(size, Case("frozen matrices", "frozen"), loss, each=each),
        "LoRA": search(size, lora, loss, each=each),
    }
    cases = [Case("GaLore", "galore", {"rank": rank}) for rank in ranks(size)]
    by_rank = each(loss, [Trial(size, case, best, SEARCH_SEED) for case in cases])
    return Measured(
        adamw=adam,
        sgd=min(found["SGD"].losses.values()),
        frozen=min(found["frozen"].losses.values()),
        galore=dict(zip(ranks(size), by_rank, strict=True)),
        full=[*each(loss, [Trial(size, adamw, best, seed) for seed in SEEDS])],
        lora=[*each(loss, [Trial(size, lora, found["LoRA"].best, seed) for seed in SEEDS])],
        rates={"AdamW": best, **{name: f.best for name, f in found.items()}},
    )


def facts(measured: Measured) -> list[Fact]:
    """Each fact with its margin."""
    m = measured
    spread = statistics.stdev(m.full)
    sane = m.adamw[m.rates["AdamW"]]
    place = sorted(m.adamw).index(m.rates["AdamW"])
    decade = [place - DECADE, place + DECADE]
    bad = [m.adamw[sorted(m.adamw)[i]] for i in decade if 0 <= i < len(m.adamw)]
    gaps = [a - b for a, b in zip(m.lora, m.full, strict=True)]
    gap = statistics.fmean(gaps)
    by_rank = [m.galore[rank] for rank in sorted(m.galore)]
    falls = min(a - b for a, b in itertools.pairwise(by_rank))
    shown = ", ".join(f"rank {rank} {m.galore[rank]:.3f}" for rank in sorted(m.galore))
    return [
        Fact(
            "frozen matrices end far above AdamW",
            m.frozen - sane,
            10 * spread,
            f"frozen {m.frozen:.3f} at {m.rates['frozen']:g}, AdamW {sane:.3f}, "
            f"spread {spread:.3f}",
        ),
        Fact(
            "AdamW is clearly ahead of its rates a tenth and ten times the best",
            min(bad) - sane if len(bad) == 2 else -math.inf,
            CLEARLY * spread,
            ", ".join(f"{lr:g} {loss:.3f}" for lr, loss in sorted(m.adamw.items())),
        ),
        Fact(
            "AdamW is clearly ahead of SGD",
            m.sgd - sane,
            CLEARLY * spread,
            f"SGD {m.sgd:.3f} at {m.rates['SGD']:g}",
        ),
        Fact(
            "AdamW is clearly ahead of LoRA of small rank, for every seed",
            min(gaps),
            max(spread, 1e-9),
            f"LoRA - AdamW {gap:.3f} on average, {min(gaps):.3f} to {max(gaps):.3f}",
        ),
        Fact(
            "the loss of GaLore falls with its rank",
            min(falls, (by_rank[0] - by_rank[-1]) / CLEARLY),
            spread,
            shown,
        ),
        Fact(
            "spread between seeds is at most a third of LoRA - AdamW",
            gap / 3,
            max(spread, 1e-9),
            f"spread {spread:.3f} over {len(m.full)} seeds, LoRA - AdamW {gap:.3f}",
        ),
    ]


def table(found: Sequence[Fact]) -> list[list[str]]:
    """A line for each fact."""
    return [
        [f.claim, "pass" if f.holds else "FAIL", f"{f.found:.3f}", f"{f.least:.3f}", f.detail]
        for f in found
    ]


HEADER = ("fact", "holds", "margin (nats)", "asked (nats)", "figures")


def spoken(found: Sequence[Fact]) -> str:
    """The same for a terminal, whatever its width."""
    return "\n".join(
        f"{holds}  {claim}: {margin} nats, {asked} asked ({detail})"
        for claim, holds, margin, asked, detail in table(found)
    )
