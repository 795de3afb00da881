"""The demo on a tiny model: what it learns, what it holds, and that it can be repeated."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import demo_report, pretrain
from benchmarks.common import (
    SEPARATOR,
    held_out,
    load_corpus,
    markdown_table,
    stdlib_files,
    train_tokenizer,
)
from benchmarks.pretrain import (
    DEMO,
    METHODS,
    evaluate,
    make_groups,
    make_model,
    schedule,
    train,
)
from benchmarks.runs import Settings
from lowrank_optim.memory import estimate

TINY = Settings(
    hidden=32, mlp=48, layers=1, heads=2, steps=120, batch=16, context=32, rank=8, gap=30,
    validate_every=60, validation_windows=32,
)  # fmt: skip
LRS = {"AdamW": 1e-2, "GaLoreAdamW": 2e-2}


@pytest.fixture(scope="module")
def corpus():
    """Some files of each side, whichever Python's they are."""
    sides = {True: [], False: []}
    for file in stdlib_files():
        sides[held_out(file.read_bytes())].append(file)
    return load_corpus([*sides[False][:60], *sides[True][:4]], vocab_size=300)


@pytest.fixture(scope="module")
def runs(corpus):
    return {name: train(name, TINY, corpus, lr=LRS[name]) for name in DEMO}


@pytest.mark.parametrize("name", DEMO)
def test_learns_more_than_token_frequencies(name, corpus, runs):
    """The first loss is that of guessing evenly; the last beats the best model without context."""
    run = runs[name]
    steps, losses = zip(*run.validation, strict=True)
    assert steps == (0, 60, 120)
    assert losses[0] == pytest.approx(math.log(corpus.vocab_size), abs=0.2)
    assert losses[-1] < losses[1] < losses[0]
    assert run.final_loss < corpus.unigram_loss() < losses[0]


def test_same_start_and_same_batches_for_every_method(runs):
    """Before anything is stepped the runs are one run."""
    first = {(run.validation[0][1], run.train_loss[0]) for run in runs.values()}
    assert len(first) == 1


@pytest.mark.parametrize("name", DEMO)
def test_state_is_what_the_estimate_says(name, corpus, runs):
    """The demo's column of state bytes against the estimate made before training."""
    model = make_model(TINY, corpus.vocab_size)
    groups = partial(make_groups, settings=TINY)
    expected = estimate(model, type(METHODS[name].make(groups(model), 1e-3)), groups=groups)
    state = runs[name].state
    assert (state["basis"], state["moments"]) == (expected.basis, expected.moments)
    assert state["total"] == expected.state


def test_the_swapped_line_is_the_only_difference(corpus):
    """Both optimizers get the same parameters, rates and decay; one of them reads ``rank``."""
    model = make_model(TINY, corpus.vocab_size)
    one, two = (
        method.make(make_groups(model, TINY), 3e-3) for method in (METHODS[name] for name in DEMO)
    )
    for ours, theirs in zip(one.param_groups, two.param_groups, strict=True):
        assert all(p is q for p, q in zip(ours["params"], theirs["params"], strict=True))
        for key in ("lr", "betas", "eps", "weight_decay", "rank"):
            assert ours.get(key) == theirs.get(key), key
    rates = {g["lr"]: g["param_names"] for g in one.param_groups}
    assert set(rates) == {3e-3, TINY.dense_lr}
    assert all("proj" in name for name in rates[3e-3])
    assert not any("proj" in name for name in rates[TINY.dense_lr])


def test_galore_holds_less(runs):
    assert runs["GaLoreAdamW"].state["total"] < runs["AdamW"].state["total"]


@pytest.mark.parametrize("name", DEMO)
def test_same_seed_same_losses(name, corpus):
    short = replace(TINY, steps=6, validate_every=3)
    one, two = (train(name, short, corpus, lr=LRS[name]) for _ in range(2))
    other = train(name, replace(short, seed=1), corpus, lr=LRS[name])
    assert one.train_loss == two.train_loss and one.validation == two.validation
    assert one.train_loss[0] != other.train_loss[0]


def test_held_out_files_are_no_training_files(corpus):
    """Split by content: no file is on both sides, and copies of one file stay together."""
    files = stdlib_files()
    sides: dict[bytes, set[bool]] = {}
    for file in files:
        sides.setdefault(file.read_bytes(), set()).add(held_out(file.read_bytes()))
    assert all(len(side) == 1 for side in sides.values())
    held = sum(len(content) for content, side in sides.items() if True in side)
    share = held / sum(map(len, sides))
    assert 0.01 < share < 0.15
    assert not set(corpus.train_files) & set(corpus.held_files)
    assert len(corpus.train_files) == 60 and len(corpus.held_files) == 4
    assert {held_out(Path(f).read_bytes()) for f in corpus.held_files} == {True}
    assert {held_out(Path(f).read_bytes()) for f in corpus.train_files} == {False}
    assert not any("site-packages" in str(f) or "/test/" in str(f) for f in files)


def test_tokens_stand_for_every_byte(corpus):
    """Bits per byte rest on this: tokens of a text add up to its bytes, whatever is in it."""
    files = corpus.held_files
    assert int(corpus.token_bytes[corpus.held].sum()) == sum(Path(f).stat().st_size for f in files)
    text = "naïve → 漢字\n\tdef f(): pass"
    tokenizer = train_tokenizer(["def f(): pass\n" * 9], 270)
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_to_id(SEPARATOR) not in ids


def test_bits_per_byte_of_guessing_evenly(corpus):
    """A model that knows nothing pays log2(vocabulary) bits a token, whatever a token holds."""

    class Even(torch.nn.Module):
        def forward(self, input_ids):
            logits = torch.zeros(*input_ids.shape, corpus.vocab_size)
            return type("Output", (), {"logits": logits})

    windows = corpus.validation(7, 20)
    loss, bits = evaluate(Even(), windows, corpus.token_bytes, batch=3)
    size = int(corpus.token_bytes[windows[:, 1:]].sum())
    assert loss == pytest.approx(math.log(corpus.vocab_size))
    assert bits == pytest.approx(7 * 20 * math.log2(corpus.vocab_size) / size)


def test_schedule_warms_up_then_follows_a_cosine():
    settings = replace(TINY, steps=100, warmup=0.1, floor=0.1)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = schedule(optimizer, settings)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == 1.0 and rates[55] == pytest.approx(0.55)
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)
    assert all(a >= b for a, b in itertools.pairwise(rates[9:]))


def test_command_writes_matching_results_table_and_figure(corpus, tmp_path, monkeypatch, capsys):
    """Two seeds each: the table's medians are recomputed from results.json, and are printed."""
    monkeypatch.setattr(pretrain, "load_corpus", lambda: corpus)
    monkeypatch.setattr(pretrain, "Settings", lambda **own: replace(TINY, **own))
    command = ["--steps", "4", "--rank", "4", "--seed", "0", "1", "--out", str(tmp_path)]
    pretrain.main([*command, "--optimizers", "GaLoreAdamW", "AdamW"])
    results = json.loads((tmp_path / "results.json").read_text())
    assert [(r["method"], r["seed"]) for r in results["runs"]] == [
        (m, s) for m in ("GaLoreAdamW", "AdamW") for s in (0, 1)
    ]
    assert all(len(r["train_loss"]) == 4 for r in results["runs"])
    assert results["settings"]["rank"] == 4
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert "2 seeds" in lines[5]
    printed = capsys.readouterr().out
    for line, name in zip(lines[2:4], ("GaLoreAdamW", "AdamW"), strict=True):
        own = [r for r in results["runs"] if r["method"] == name]
        losses = [r["final_loss"] for r in own]
        assert losses == [r["validation"][-1][1] for r in own]
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        middle, spread = sum(losses) / 2, abs(losses[0] - losses[1]) / 2
        assert cells[:2] == [name, f"{middle:.3f} ± {spread:.3f}"]
        assert cells[2] == f"{math.exp(middle):.2f}"
        assert cells[3] == f"{sum(r['bits_per_byte'] for r in own) / 2:.3f}"
        assert cells[4] == f"{own[0]['state']['total'] / 2**20:.2f}"
        assert cells[5] == f"{sum(r['optimizer_ms'] for r in own) / 2:.1f}"
        assert cells[1].split()[0] in printed and cells[4] in printed
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_markdown_table_keeps_figures_as_written():
    """Without care the tabulating library turns 1.50 into 1.5."""
    text = markdown_table(["a", "b"], [["x", "1.50"]])
    assert text.splitlines() == ["| a   |    b |", "|:----|-----:|", "| x   | 1.50 |"]
    assert demo_report.HEADER[0] == "optimizer"
