"""Estimates of one of several GPUs, against ranks that train under FSDP2."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lowrank_optim.memory import estimate
from tests import cases
from tests.memory.ranks import SHARDS, TOKENS, class_of, config, held, peaks
from tests.sharded.ranks import Ranks

Worlds = Callable[[int], Ranks]

UNEVEN = {"hidden_size": 44, "intermediate_size": 275, "vocab_size": 255}
"""Rows that two ranks do not divide, and columns of 8-bit moments that are no whole blocks."""


def options_of(name: str, projector: str | None = None) -> dict[str, Any]:
    own: dict[str, Any] = {"rank": 16, "update_proj_gap": 3, "stagger": False}
    if name.startswith("SST"):
        own = {"rank": 16, "steps_per_iteration": 3, "factors": "active", "stagger": False}
    if name.startswith("Switch"):
        own = {"rank": 16}
    if projector is not None:
        own["projector"] = projector
    if projector == "block" or (projector is None and name.startswith("Frugal")):
        own["rank"] = 0.25
    return own


def refused(name: str, projector: str | None) -> bool:
    """What no DTensor may be."""
    return name.startswith("LDAdam") or projector == "randk" or (
        projector == "block" and ("Adafactor" in name or name.startswith(("Fira", "Apollo")))
    )  # fmt: skip


EVERY = [
    *((name, None) for name in cases.method_names() if not refused(name, None)),
    *((name, projector) for name, projector in cases.pairs() if not refused(name, projector)),
]
FEW = [
    ("GaLoreAdamW", "rsvd"),
    ("GaLoreAdamW8bit", None),
    ("FrugalAdamW", None),
    ("DCTAdamW", None),
    ("SSTAdamW8bit", None),
    ("GaLoreAdafactor", None),
    ("LisaAdamW", None),
    ("AdamW", None),
]


def runs(pairs: list[tuple[str, str | None]], **own: Any) -> list[dict[str, Any]]:
    return [
        {"name": n, "options": options_of(n, p) if n != "AdamW" else {}, **own} for n, p in pairs
    ]


def told(run: dict[str, Any], size: int = 2, **own: Any) -> Any:
    """The estimate of a run."""
    return estimate(
        config(**run.get("sizes", {})),
        class_of(run["name"]),
        world_size=size,
        shard=SHARDS[run.get("shard")],
        dtype=run.get("dtype", torch.bfloat16),
        checkpointing=run.get("checkpointing", False),
        accumulation_steps=run.get("accumulation_steps", 1),
        **own,
        **run["options"],
    )


@pytest.mark.parametrize(
    "pairs", [pytest.param(FEW, id="few"), pytest.param(EVERY, id="all", marks=pytest.mark.slow)]
)
@pytest.mark.filterwarnings("ignore")
def test_a_rank_holds_what_is_told(ranks: Worlds, pairs: list[tuple[str, str | None]]) -> None:
    """Of two real ranks, to the byte: weights, gradients, bases, moments, the rest."""
    wrong = []
    for run in runs(pairs, sizes=UNEVEN):
        real, other = ranks(2).run("held", held, run=run).checked()
        e = told(run, device="cpu", transients=False)
        found = (e.weights, e.gradients, e.basis, e.moments, e.other)
        least = other[0] + sum(other[2:])
        if found != real or e.least != least:
            wrong.append((run, found, real, e.least, least))
    assert not wrong, wrong


GALORE = [("GaLoreAdamW", None)]
PEAKS = [
    *runs(GALORE),
    *runs(GALORE, checkpointing=True, accumulation_steps=2, shard="placed"),
    *runs([("FrugalAdamW", "columns")], shard="mixed", dtype=torch.float32),
]
MORE = [
    *runs([(n, "rsvd" if n in cases.projecting_names() else None) for n in cases.distinct_names()
           if not refused(n, None)]),
    *runs([("GaLoreAdamW8bit", "svd"), ("FiraAdamW", "svd")], checkpointing=True),
    *runs([("GaLoreAdamW8bit", None)], shard="mixed", dtype=torch.float32),
    *runs([("GaLoreAdamW", "random")], shard="placed", checkpointing=True),
]  # fmt: skip


@pytest.mark.parametrize(
    "asked", [pytest.param(PEAKS, id="few"), pytest.param(MORE, id="all", marks=pytest.mark.slow)]
)
@pytest.mark.filterwarnings("ignore")
def test_peaks_of_a_rank_are_what_torch_counts(ranks: Worlds, asked: list[dict[str, Any]]) -> None:
    """Of backward, of a step, and of one that finds bases, on two ranks that train.

    Both have the same shards. What the threads of gloo still hold of a message of before counts on
    one of them or the other, so that the smaller figure is the one that repeats.
    """
    wrong = []
    for run in asked:
        own, other = ranks(2).run("peaks", peaks, run=run).checked()
        e = told(run, tokens=TOKENS)
        counted = {moment: min(own[moment], other[moment]) for moment in own}
        for moment, size in counted.items():
            found = e.state + e.beside.get(moment, 0)
            if moment in e.beside and not 0.98 * size <= found <= 1.02 * size:
                wrong.append((run["name"], moment, found / size))
        if not 0.98 <= (e.peak - e.weights) / max(counted.values()) <= 1.02:
            wrong.append((run["name"], "peak", e.peak_at, counted, dict(e.beside), e.state))
    assert not wrong, wrong
