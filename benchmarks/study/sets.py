"""What is compared: named sets of cases, and relations that papers report."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from benchmarks.bytes_task import make_model
from benchmarks.study.recipes import METHODS, Case
from benchmarks.study.sizes import Size
from benchmarks.study.training import state_bytes

ADAMW = Case("AdamW", "adamw")
MATRIX = r"layers\.\d+\.\w+_proj\."
"""Every matrix is a layer by itself, and norms are in none."""


def methods(size: Size) -> list[Case]:
    """Every method at one rank; of FRUGAL's blocks the density is the share of it."""
    share = size.rank / size.shape.hidden
    rank, blocks = {"rank": size.rank}, size.shape.layers
    active, matrices = max(1, blocks // 4), 7 * blocks
    each = {"layers": MATRIX, "active_layers": matrices // 4}
    return [
        ADAMW,
        Case("AdamW 8-bit (bitsandbytes)", "adamw8bit"),
        Case("GaLore", "galore", {"rank": size.rank}),
        Case("GaLore 8-bit", "galore8bit", {"rank": size.rank}),
        Case("GoLore, random from 80 %", "golore", rank),
        Case("Fira", "fira", {"rank": size.rank}),
        Case("FRUGAL, block", "frugal", {"rank": share, "projector": "block"}),
        Case("FRUGAL, columns", "frugal", {"rank": size.rank, "projector": "columns"}),
        Case("FRUGAL, svd", "frugal", {"rank": size.rank, "projector": "svd"}),
        Case("DCT-AdamW", "dct", {"rank": size.rank}),
        Case("LDAdam, errors in 8 bits", "ldadam", {**rank, "error_feedback": "8bit"}),
        Case("LDAdam, no error feedback", "ldadam", {**rank, "error_feedback": None}),
        Case("APOLLO", "apollo", rank),
        Case("APOLLO-Mini", "apollo", {"rank": 1, "scale_type": "tensor"}),
        Case(f"LISA, {active} of {blocks} layers", "lisa", {"active_layers": active}),
        Case(f"LISA, {matrices // 4} of {matrices} matrices", "lisa", each),
        Case(f"BAdam, {active} of {blocks + 1} layers", "badam", {"active_layers": active}),
        Case("SST", "sst", {"rank": size.rank}),
        Case("SwitchLoRA", "switchlora", {"rank": size.rank}),
        Case("LoRA", "lora", {"rank": size.rank}),
        Case("LoRA with restarts, as ReLoRA", "lora", {"rank": size.rank, "restarts": 2}),
        Case("SLTrain", "sltrain", rank),
        Case("LOST", "lost", rank),
        Case("LOST, no activation", "lost", {**rank, "activation": None}),
    ]


def held_bytes(case: Case, size: Size) -> int:
    """The most state of a run, on gradients of noise: blocks that take turns differ in size."""
    model, turns = make_model(size.shape, 0), 1
    if case.options.get("projector") == "block":
        size, turns = replace(size, gap=1), math.ceil(size.steps / size.gap)
    optimizer = METHODS[case.method].make(model, 1e-3, size, **case.options).optimizer
    most = 0
    for _ in range(turns):
        for param in model.parameters():
            if param.requires_grad:
                param.grad = torch.randn_like(param)
        optimizer.step()
        most = max(most, state_bytes(model, optimizer))
    return most


def with_rank(case: Case, rank: int | float) -> Case:
    """The case with another rank, or density."""
    return replace(case, options={**case.options, "rank": rank})


def at_most(case: Case, size: Size, budget: int) -> Case | None:
    """The case with the largest rank whose state is within ``budget``; None if there is none."""
    hidden = size.shape.hidden
    step = 1 / hidden if isinstance(case.options["rank"], float) else 1
    fits, passes = 0, hidden
    while passes - fits > 1:
        middle = (fits + passes) // 2
        inside = held_bytes(with_rank(case, middle * step), size) <= budget
        fits, passes = (middle, passes) if inside else (fits, middle)
    return with_rank(case, fits * step) if fits else None


@cache
def equal_bytes(size: Size) -> list[Case]:
    """Every method with a rank to choose, at the bytes of GaLore at the rank; AdamW is first."""
    every = methods(size)
    budget = held_bytes(next(case for case in every if case.name == "GaLore"), size)
    ranked = [c for c in every if "rank" in c.options and c.options.get("scale_type") != "tensor"]
    found = [at_most(case, size, budget) for case in ranked]
    return [ADAMW, *(case for case in found if case is not None)]


def ablations(size: Size) -> list[Case]:
    """What people argue about, one change at a time."""
    base: dict[str, Any] = {"rank": size.rank}

    def galore(name: str, **options: Any) -> Case:
        return Case(f"GaLore, {name}", "galore", {**base, **options})

    names = ("svd", "rsvd", "dct", "hadamard", "random", "columns")
    return [
        ADAMW,
        Case("GaLore", "galore", base),
        *(galore(name, projector=name) for name in names),
        Case("GaLore, golore", "golore", {**base, "on_refresh": "keep"}),
        *(galore(f"gap {gap}", update_proj_gap=gap) for gap in (size.gap // 5, size.steps)),
        *(galore(f"rank {r}", rank=r) for r in (size.rank // 4, size.rank * 2)),
        *(galore(f"scale {scale:g}", scale=scale) for scale in (0.25, 4.0)),
        *(galore(f"moments {how}", on_refresh=how) for how in ("keep", "reset", "project")),
        galore("refreshed at once", stagger=False),
        Case("GaLore 8-bit", "galore8bit", base),
        Case("DCT-AdamW", "dct", base),
        Case("DCT-AdamW, error feedback", "dct", {**base, "error_feedback": "float32"}),
        Case("Fira", "fira", base),
        Case("Fira without limiter", "fira", {**base, "limiter": None}),
        *(
            Case(f"FRUGAL, columns, free {rule}", "frugal", {**base, "projector": "columns", **own})
            for rule, own in (("sign", {}), ("none", {"free_rule": "none"}))
        ),
    ]


SETS: dict[str, Callable[[Size], list[Case]]] = {
    "rank": methods,
    "bytes": equal_bytes,
    "ablations": ablations,
}


@dataclass(frozen=True)
class Relation:
    """That one case of ``set_name`` ends below another, or beside it."""

    claim: str
    source: str
    set_name: str
    better: str
    worse: str
    near: bool = False
    """The two are to be apart by at most a tenth of what LoRA is behind AdamW."""


RELATIONS = (
    Relation(
        "a higher rank ends lower",
        "GaLore (arXiv:2403.03507)",
        "ablations",
        "GaLore, rank {double}",
        "GaLore, rank {quarter}",
    ),
    Relation("Fira ends below GaLore", "Fira (arXiv:2410.01623)", "rank", "Fira", "GaLore"),
    Relation(
        "blocks end below svd at equal memory",
        "FRUGAL (arXiv:2411.07837)",
        "bytes",
        "FRUGAL, block",
        "FRUGAL, svd",
    ),
    Relation(
        "DCT is near SVD",
        "DCT-AdamW (arXiv:2505.17967)",
        "ablations",
        "GaLore, dct",
        "GaLore, svd",
        near=True,
    ),
    Relation("APOLLO ends below GaLore", "APOLLO (arXiv:2412.05270)", "rank", "APOLLO", "GaLore"),
    Relation(
        "errors kept end below GaLore",
        "LDAdam (arXiv:2410.16103)",
        "rank",
        "LDAdam, errors in 8 bits",
        "GaLore",
    ),
    Relation(
        "the sparse part ends below ReLoRA",
        "SLTrain (arXiv:2406.02214)",
        "rank",
        "SLTrain",
        "LoRA with restarts, as ReLoRA",
    ),
    Relation(
        "random bases late end below GaLore",
        "GoLore (arXiv:2410.11289)",
        "rank",
        "GoLore, random from 80 %",
        "GaLore",
    ),
    Relation("LOST ends below SLTrain", "LOST (arXiv:2508.02668)", "rank", "LOST", "SLTrain"),
    Relation("LOST ends below LoRA", "LOST (arXiv:2508.02668)", "rank", "LOST", "LoRA"),
    Relation("LOST ends below full rank", "LOST (arXiv:2508.02668)", "rank", "LOST", "AdamW"),
    Relation("SST ends below LoRA", "SST (arXiv:2405.15481)", "rank", "SST", "LoRA"),
    Relation(
        "SST ends below ReLoRA",
        "SST (arXiv:2405.15481)",
        "rank",
        "SST",
        "LoRA with restarts, as ReLoRA",
    ),
    Relation(
        "SwitchLoRA is near full rank",
        "SwitchLoRA (arXiv:2406.06564)",
        "rank",
        "SwitchLoRA",
        "AdamW",
        near=True,
    ),
)
