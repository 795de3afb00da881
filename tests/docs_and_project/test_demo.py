"""The demo: the same start for both, what it holds, and files that say what was printed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import demo
from benchmarks.bytes_task import make_model
from benchmarks.study.sizes import SIZES
from lowrank_optim import GaLoreAdamW8bit, lowrank_groups
from lowrank_optim.memory import estimate


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two runs of a few steps, and the folder of their files."""
    out = tmp_path_factory.mktemp("demo")
    demo.main(["--steps", "3", "--threads", "1", "--out", str(out)])
    return out, json.loads((out / "results.json").read_text())


def test_both_runs_begin_alike(made):
    """The same weights and the same first batch: before a step the runs are one run."""
    first = {(r["validation"][0][1], r["train_loss"][0]) for r in made[1].values()}
    assert list(made[1]) == ["torch.optim.AdamW", "GaLoreAdamW8bit"] and len(first) == 1


def test_the_swapped_line_is_the_only_difference(made):
    one, two = (r["trial"] for r in made[1].values())
    assert {key for key in one if one[key] != two[key]} <= {"case", "lr"}


def test_state_is_what_the_estimate_says(made):
    size, rank = SIZES["small"], demo.LINES[1][0].options["rank"]
    expected = estimate(
        make_model(size.shape, 0),
        GaLoreAdamW8bit,
        groups=lambda model: lowrank_groups(model, rank=rank),
        **{k: v for k, v in demo.LINES[1][0].options.items() if k != "rank"},
    )
    assert made[1]["GaLoreAdamW8bit"]["state_bytes"] == expected.state


def test_table_and_figure_are_of_the_results(made):
    out, records = made
    text = (out / "table.md").read_text()
    for name, record in records.items():
        cells = next(line for line in text.splitlines() if line.startswith(f"| {name}"))
        assert f"{record['final_loss']:.3f}" in cells
        assert f"{record['state_bytes'] / 1024:.0f}" in cells
    assert Path(out / "curves.png").stat().st_size > 10_000
