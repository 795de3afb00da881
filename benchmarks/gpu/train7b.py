"""A LLaMA-7B trained for some steps under a cap of 24 GiB, as README says it fits."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.common import Corpus, load_corpus, stdlib_files
from benchmarks.gpu.memory import peak
from benchmarks.gpu.models import build, config
from benchmarks.gpu.report import Section
from benchmarks.gpu.settings import Settings
from lowrank_optim import GaLoreAdamW8bit, attach_in_backward
from lowrank_optim.cli.display import gib
from lowrank_optim.memory import estimate
from lowrank_optim.memory.measuring import capped

TITLE = "A 7B model under 24 GiB"
ENDS = 5
"""Losses at each end whose means are compared."""
MAX_NORM = 1.0


@dataclass
class Training:
    """What one run measured."""

    mode: str
    losses: list[float]
    seconds: list[float]
    """Of each step, forward and backward included."""
    peak: int
    estimated: int


def run(section: Section, settings: Settings) -> None:
    """``mode="project"`` of ``attach_in_backward``."""
    run_mode(section, settings, "project")


def run_mode(section: Section, settings: Settings, mode: str) -> None:
    """One mode, in a process of its own: what another one left behind is nobody's peak."""
    with capped(settings.device, settings.cap):
        found = train(settings, text(settings), mode)
    for what in judged(found, settings.cap):
        section.failed(what)
    section.data[mode] = asdict(found)
    took = statistics.median(found.seconds)
    row = (
        f"mode={mode!r}", f"{found.losses[0]:.3f}", f"{found.losses[-1]:.3f}",
        gib(found.peak), gib(found.estimated), f"{took:.2f}", f"{settings.tokens / took:.0f}",
    )  # fmt: skip
    size = settings.trained
    section.notes.append(
        f"GaLoreAdamW8bit, rank {size.rank}, {settings.steps} steps of {settings.tokens} tokens, "
        f"checkpointed layers, {str(settings.dtype).removeprefix('torch.')} weights, at most "
        f"{gib(settings.cap)} GiB from the allocator."
    )
    header = ("first loss", "last loss", "peak GiB", "estimated GiB", "s a step", "tokens a s")
    section.add(f"{size.name}, {settings.steps} steps", ("", *header), [row])


def text(settings: Settings) -> Corpus:
    """The standard library, or some files of it."""
    files = stdlib_files()[: settings.corpus_files]
    return load_corpus(files, vocab_size=min(1024, settings.vocab))


def train(settings: Settings, corpus: Corpus, mode: Any) -> Training:
    """The steps; what is alive at once is counted from before the model is made."""
    losses: list[float] = []
    seconds: list[float] = []

    def work() -> None:
        model = build(settings, settings.trained.shape, settings.device)
        optimizer = GaLoreAdamW8bit(
            model.named_parameters(), lr=settings.lr, rank=settings.trained.rank
        )
        attach_in_backward(optimizer, mode, max_norm=MAX_NORM)
        # the same few windows in turns: that losses fall does not hang on the luck of the draw
        windows = list(corpus.batches(2, 1, settings.tokens - 1, seed=0))
        for i in range(settings.steps):
            start = time.perf_counter()
            ids = windows[i % len(windows)].to(settings.device)
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss))
            seconds.append(time.perf_counter() - start)

    found = peak(settings.device, work)
    expected = estimate(
        config(settings, settings.trained.shape), GaLoreAdamW8bit, rank=settings.trained.rank,
        in_backward=mode, tokens=(1, settings.tokens), checkpointing=True, dtype=settings.dtype,
    )  # fmt: skip
    return Training(mode, losses, seconds, found, expected.peak)


def judged(found: Training, cap: int) -> list[str]:
    """What is not as it must be: losses finite and falling, the peak under the cap."""
    bad, own = [], f"mode={found.mode!r}"
    if not all(math.isfinite(x) for x in found.losses):
        bad.append(f"{own}: a loss is not finite: {found.losses}.")
    ends = min(ENDS, len(found.losses) // 2)
    first, last = (statistics.fmean(x) for x in (found.losses[:ends], found.losses[-ends:]))
    if not last < first:
        bad.append(f"{own}: losses do not fall: {first:.3f} at first, {last:.3f} at last.")
    if found.peak > cap:
        bad.append(f"{own}: the peak of {gib(found.peak)} GiB is above the cap of {gib(cap)}.")
    return bad
