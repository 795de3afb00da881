"""docs/published_memory.md: published figures beside what `memory.estimate` says of the same."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank_optim import FrugalAdamW, GaLoreAdamW, GaLoreAdamW8bit
from lowrank_optim.memory import GIB, Estimate, estimate
from lowrank_optim.memory.models import MODELS
from lowrank_optim.memory.shapes import on_meta, parameter_shapes

PAGE = (Path(__file__).parents[2] / "docs" / "published_memory.md").read_text(encoding="utf-8")
RANKS = {"60M": 128, "130M": 256, "350M": 256, "1B": 512, "7B": 1024}
NOMINAL = {"60M": 60e6, "130M": 130e6, "350M": 350e6, "1B": 1.3e9}


@cache
def model(size: str, dtype: torch.dtype) -> torch.nn.Module:
    return on_meta(MODELS[f"llama-{size.lower()}"].config, dtype)


held = partial(estimate, transients=False)


@cache
def adam(size: str, dtype: torch.dtype = torch.bfloat16) -> Estimate:
    return held(model(size, dtype), torch.optim.AdamW)


@cache
def galore(size: str) -> Estimate:
    own = {"rank": RANKS[size], "state_dtype": "bfloat16"}
    return held(model(size, torch.bfloat16), GaLoreAdamW, **own)


@cache
def galore8(**more: Any) -> Estimate:
    return held(model("7B", torch.bfloat16), GaLoreAdamW8bit, rank=1024, **more)


@cache
def frugal(size: str, density: float) -> Estimate:
    own = {"density": density, "projector": "columns"}
    return held(model(size, torch.float32), FrugalAdamW, **own)


def both(found: Estimate) -> int:
    return found.weights + found.state


@cache
def activations(sequences: int, length: int, checkpointing: bool) -> int:
    """What forward and backward of LLaMA-7B need beside weights, state and one gradient."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(**MODELS["llama-7b"].config)
    found = estimate(
        config, GaLoreAdamW8bit, rank=1024, in_backward="step", tokens=(sequences, length),
        checkpointing=checkpointing,
    )  # fmt: skip
    return found.peak


def q_galore() -> float:
    """Q-GaLore by the counts of this package: bytes for the linear layers, and for the bases."""
    sizes = parameter_shapes(MODELS["llama-7b"].config)
    linear = sum(a * b for name, (a, *rest) in sizes.items() if "_proj" in name for b in rest)
    of_bfloat16 = galore8()
    scales = linear / 256 * 8  # a scale and a zero of float32 for each group of 256
    saved = linear - scales + of_bfloat16.basis / 2
    return activations(16, 256, True) - saved


def sizes_of(*published: float) -> list[tuple[str, float]]:
    return list(zip(RANKS, published, strict=False))


Figure = tuple[float, Callable[[], float]]
FIGURES: dict[str, Figure] = {}
"""By the first cell of its row: as published, and bytes by the count of this package."""
for size, said in sizes_of(0.12, 0.25, 0.68, 2.60):
    FIGURES[f"{size}: weights"] = said, lambda s=size: adam(s).weights
for size, said in sizes_of(0.23, 0.51, 1.37, 5.20):
    FIGURES[f"{size}: states of Adam"] = said, lambda s=size: adam(s).state
for size, said in sizes_of(0.13, 0.28, 0.54, 1.78):
    FIGURES[f"{size}: states of GaLore"] = said, lambda s=size: galore(s).state
for size, said in sizes_of(0.36, 0.76, 2.06, 7.80):
    FIGURES[f"{size}: Adam"] = said, lambda s=size: both(adam(s))
for size, said in sizes_of(0.24, 0.52, 1.22, 4.38):
    FIGURES[f"{size}: GaLore"] = said, lambda s=size: both(galore(s))
FIGURES["7B: 8-bit Adam"] = 26, lambda: both(held(model("7B", torch.bfloat16), "adamw-8bit"))
FIGURES["7B: 8-bit GaLore"] = 18, lambda: both(galore8())
for size, said in sizes_of(0.43, 1.00, 2.74, 9.98):
    FIGURES[f"{size}: AdamW"] = said, lambda s=size: adam(s, torch.float32).state
for size, said in sizes_of(0.29, 0.52, 1.05, 3.23):
    FIGURES[f"{size}: FRUGAL, ρ = 0.25"] = said, lambda s=size: frugal(s, 0.25).state
for size, said in sizes_of(0.24, 0.37, 0.49, 0.98):
    FIGURES[f"{size}: FRUGAL, ρ = 0"] = said, lambda s=size: frugal(s, 0.0).state

RUNS: dict[str, Figure] = {
    "500 tokens": (22.0, lambda: activations(1, 500, False)),
    "256 tokens": (22.72, lambda: activations(1, 256, False)),
    "16 x 256 tokens, checkpointed": (22.8, lambda: activations(16, 256, True)),
    "Q-GaLore, 16 x 256 tokens, checkpointed": (15.26, q_galore),
}
"""Of runs on a card, activations included: seconds each."""


def rows() -> dict[str, list[str]]:
    """Of all tables with a reason."""
    lines = [x.strip("|").split("|") for x in PAGE.splitlines() if x.startswith("|")]
    cells = [[cell.strip() for cell in line] for line in lines]
    found = [
        line for line in cells if len(line) == 5 and line[1] != "published" and "--" not in line[1]
    ]
    assert len({line[0] for line in found}) == len(found)
    return {name: rest for name, *rest in found}


def line(published: float, size: float) -> list[str]:
    """What a row says: the figures in GiB, and the difference."""
    ours = size / GIB
    return [f"{published:.4g}" if published > 10 else f"{published:.2f}", f"{ours:.2f}",
            f"{100 * (ours / published - 1):+.1f} %"]  # fmt: skip


def test_every_figure_has_its_row() -> None:
    assert rows().keys() == FIGURES.keys() | RUNS.keys()
    assert all(reason for *_, reason in rows().values())


@pytest.mark.parametrize("name", FIGURES)
def test_a_row_says_what_is_estimated(name: str) -> None:
    published, size = FIGURES[name]
    assert rows()[name][:3] == line(published, size())


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_run_says_what_is_estimated(name: str) -> None:
    published, size = RUNS[name]
    assert rows()[name][:3] == line(published, size())


def test_reasons_hold() -> None:
    """What a row calls equal is; and the count that another names gives what was published."""
    for name, (_, _, _, reason) in rows().items():
        if name in RUNS:
            continue
        published, size = FIGURES[name]
        found, places = size(), 2 if published < 10 else 0
        nominal = NOMINAL.get(name.split(":")[0], 0)
        each = {"weights": 2, "Adam": 6, "states of Adam": 4}.get(name.split(": ")[1], 0)
        count = {
            "equal": found / GIB,
            "equal, in GB": found / 1e9,
            "cut, not rounded": int(100 * found / GIB) / 100,
            "of the nominal size, in GB": nominal * each / 1e9,
        }.get(reason)
        if reason.startswith(("equal", "cut", "of the nominal")):
            assert count is not None and round(count, places) == published, (name, count)


def test_the_elements_of_a_matrix() -> None:
    """Table 1 of GaLore: mn weights, mr + 2nr of state beside 2mn of Adam, for m ≤ n."""
    m, n, r = 4096, 11008, 1024
    layer = torch.nn.Linear(n, m, bias=False, device="meta", dtype=torch.bfloat16)
    low = held(layer, GaLoreAdamW, rank=r, state_dtype="bfloat16")
    full = held(layer, torch.optim.AdamW)
    assert low.weights == 2 * m * n and full.moments == 2 * 2 * m * n
    assert low.basis == 2 * m * r and low.moments == 2 * 2 * n * r
    said = {name: int(count.replace(",", "")) for name, count in re.findall(
        r"^\| ([\w ]+) \| \$[^|]*\$ \| ([\d,]+) \|", PAGE, re.M)}  # fmt: skip
    assert said == {
        "weights": low.weights // 2, "states of Adam": full.moments // 2,
        "states of GaLore": (low.basis + low.moments) // 2,
    }  # fmt: skip


def test_no_plain_count_gives_galores_states() -> None:
    """What the page says of them: in either unit, with or without bases, embeddings or heads."""
    published = [FIGURES[f"{s}: states of GaLore"][0] for s in NOMINAL]
    nearest = 1.0
    for unit in (1e9, GIB):
        for heads in (0, 1, 2):
            for bases in (0, 1):
                found = []
                for size in NOMINAL:
                    e = galore(size)
                    dense = 2 * 2 * (adam(size).weights // 2 - linear(size))
                    found.append((e.moments - dense * (2 - heads) / 2 + bases * e.basis) / unit)
                off = max(abs(x / p - 1) for x, p in zip(found, published, strict=True))
                nearest = min(nearest, off)
    assert f"{100 * nearest:.0f} %" in PAGE.split("no count")[1].split("\n\n")[0]


def linear(size: str) -> int:
    shapes = parameter_shapes(MODELS[f"llama-{size.lower()}"].config)
    return sum(s[0] * s[1] for name, s in shapes.items() if "_proj" in name)
