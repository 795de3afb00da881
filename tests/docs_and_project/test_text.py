"""The text of benchmarks: how it is split, what its tokens stand for, and the schedule of a run."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.common import (
    SEPARATOR,
    held_out,
    load_corpus,
    markdown_table,
    stdlib_files,
    train_tokenizer,
)
from benchmarks.pretrain import evaluate, schedule
from benchmarks.runs import Settings


@pytest.fixture(scope="module")
def library():
    """Content of every file, and whether it is held out."""
    read = {file: file.read_bytes() for file in stdlib_files()}
    return {file: (content, held_out(content)) for file, content in read.items()}


@pytest.fixture(scope="module")
def corpus(library):
    """Some files of each side, whichever Python's they are."""
    sides = {True: [], False: []}
    for file, (_, held) in library.items():
        sides[held].append(file)
    return load_corpus([*sides[False][:60], *sides[True][:4]], vocab_size=300)


def test_held_out_files_are_no_training_files(corpus, library):
    """Split by content: no file is on both sides, and copies of one file stay together."""
    sides: dict[bytes, set[bool]] = {}
    for content, held in library.values():
        sides.setdefault(content, set()).add(held)
    assert all(len(side) == 1 for side in sides.values())
    held = sum(len(content) for content, side in sides.items() if True in side)
    share = held / sum(map(len, sides))
    assert 0.01 < share < 0.15
    assert not set(corpus.train_files) & set(corpus.held_files)
    assert len(corpus.train_files) == 60 and len(corpus.held_files) == 4
    assert {held_out(Path(f).read_bytes()) for f in corpus.held_files} == {True}
    assert {held_out(Path(f).read_bytes()) for f in corpus.train_files} == {False}
    assert not any("site-packages" in str(f) or "/test/" in str(f) for f in library)


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
    settings = replace(Settings(), steps=100, warmup=0.1, floor=0.1)
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


def test_markdown_table_keeps_figures_as_written():
    """Without care the tabulating library turns 1.50 into 1.5."""
    text = markdown_table(["a", "b"], [["x", "1.50"]])
    assert text.splitlines() == ["| a   |    b |", "|:----|-----:|", "| x   | 1.50 |"]
