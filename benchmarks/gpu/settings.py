"""What the sections run on: the real sizes, or tiny ones on which a CPU can run every line."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

import torch

from benchmarks.common import LLAMA_SHAPES, ROOT
from lowrank_optim.memory import GIB


@dataclass(frozen=True)
class Size:
    """Layers of a LLaMA that are timed, and the rank."""

    name: str
    shape: tuple[int, int, int, int]
    """Hidden size, MLP size, layers, heads."""
    layers: int
    """How many of its layers are timed and measured: what a card of 24 GiB holds of them."""
    rank: int
    exact: bool = True
    """Whether refreshes that factorise whole matrices are timed: many minutes of a card at 7B."""


@dataclass(frozen=True)
class Settings:
    """What a run depends on."""

    device: torch.device
    sizes: tuple[Size, ...] = (
        Size("llama-1b", LLAMA_SHAPES["llama-1b"], 8, 512),
        Size("llama-7b", LLAMA_SHAPES["llama-7b"], 4, 1024),
    )
    dtype: torch.dtype = torch.bfloat16
    vocab: int = 32000
    tokens: int = 1024
    """Of the one sequence of a micro-batch."""
    rounds: int = 11
    refresh_rounds: int = 5
    steps: int = 20
    """Of the training run."""
    lr: float = 1e-3
    cap: int = 24 * GIB
    """Bytes that the training run may have."""
    compiled: bool = True
    """Whether peers are timed whose first step compiles for a minute, at each size."""
    corpus_files: int | None = None
    """How many files of the standard library are read (default: all)."""
    build: tuple[str, ...] = (sys.executable, "-m", "pip", "install", "--no-deps", "-e", str(ROOT))
    tests: tuple[str, ...] = ("-m", "gpu", "-n", "8", "--dist", "worksteal", "tests")

    @property
    def trained(self) -> Size:
        """The largest: what is trained whole."""
        return self.sizes[-1]


def full(device: torch.device) -> Settings:
    """The figures that are published."""
    return Settings(device)


def quick(device: torch.device) -> Settings:
    """The same model under the cap, and beside it one layer of each and few rounds: minutes."""
    sizes = (replace(size, layers=1, exact=False) for size in Settings(device).sizes)
    return Settings(device, sizes=tuple(sizes), rounds=5, compiled=False)


def tiny(device: torch.device) -> Settings:
    """The same code in seconds; its figures mean nothing."""
    return Settings(
        device,
        sizes=(Size("tiny", (32, 48, 2, 2), 1, 4),),
        vocab=300,
        tokens=32,
        rounds=5,
        steps=20,
        lr=1e-2,
        corpus_files=24,
        build=(sys.executable, "-c", "print('built')"),
        tests=("-k", "no_two_modules", "tests/docs_and_project/test_imports.py"),
    )
