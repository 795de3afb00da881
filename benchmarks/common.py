"""What benchmarks share: LLaMA shapes, the machine in one line, real text, tables."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tabulate import tabulate
from torch import Tensor

from lowrank_optim.cli.tables import print_table as print_table
from lowrank_optim.memory.models import MODELS

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import LlamaConfig

ROOT = Path(__file__).resolve().parent.parent
FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
LLAMA_SHAPES: dict[str, tuple[int, int, int, int]] = {
    name: tuple(MODELS[name].config[key] for key in FIELDS)
    for name in ("llama-60m", "llama-130m", "llama-350m", "llama-1b", "llama-7b")
}
"""Hidden size, MLP size, layers, heads: the configurations shipped with GaLore's code."""


def llama_config(name: str, vocab_size: int = 32000) -> LlamaConfig:
    """The ``transformers`` configuration of one of :data:`LLAMA_SHAPES`."""
    return llama(*LLAMA_SHAPES[name], vocab_size=vocab_size)


def llama(
    hidden: int,
    mlp: int,
    layers: int,
    heads: int,
    kv_heads: int | None = None,
    *,
    vocab_size: int,
    context: int = 2048,
) -> LlamaConfig:
    """A LLaMA configuration; input and output embeddings are separate matrices, as in LLaMA."""
    from transformers import LlamaConfig  # takes seconds: only where a model is wanted

    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=context,
        tie_word_embeddings=False,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )


# ---------------------------------------------------------------- the machine


def environment() -> dict[str, Any]:
    """CPU, threads, versions and commit: what a figure means nothing without."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _commit(),
    }


def environment_line() -> str:
    """:func:`environment` as one line."""
    e = environment()
    return (
        f"{e['cpu']}, {e['threads']} of {e['cores']} cores; Python {e['python']}, "
        f"torch {e['torch']}, commit {e['commit']}"
    )


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    """What runs, and whether it was changed: files of runs, which a study writes, do not count."""
    named = ("describe", "--always", "--abbrev=10")
    changed = ("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)*.xz")
    try:
        commit, changes = (
            subprocess.run(
                ["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True
            ).stdout.strip()
            for words in (named, changed)
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit}-dirty" if changes else commit


# ---------------------------------------------------------------- tables


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same table for a README."""
    align = ["left", *["right"] * (len(header) - 1)]
    return tabulate(rows, header, tablefmt="pipe", colalign=align, disable_numparse=True)


# ---------------------------------------------------------------- text

SKIPPED = frozenset(
    # other people's code; test suites; and tables, whose near-copies would sit on both sides
    ["site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"]
)
HELD_OUT = 0.05
SEPARATOR = "<eof>"


def stdlib_files(root: Path | None = None) -> list[Path]:
    """The source files of Python's standard library, always in the same order."""
    root = root or Path(sysconfig.get_paths()["stdlib"])
    files = (f for f in root.rglob("*.py") if not SKIPPED & set(f.relative_to(root).parts[:-1]))
    return sorted(files, key=lambda f: f.relative_to(root).as_posix())


def held_out(content: bytes) -> bool:
    """Whether a file is for validation: by its content, so that copies stay on one side."""
    digest = hashlib.sha256(content).digest()
    return int.from_bytes(digest[:8], "big") < HELD_OUT * 2**64


@dataclass(frozen=True)
class Corpus:
    """Tokenised text, split by file."""

    train: Tensor
    """``(tokens,)`` int64."""
    held: Tensor
    """``(tokens,)`` of files that no batch is drawn from, nor the tokenizer trained on."""
    token_bytes: Tensor
    """``(vocab,)`` bytes of text that each token stands for."""
    train_files: tuple[str, ...]
    held_files: tuple[str, ...]

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return len(self.token_bytes)

    def batches(self, count: int, size: int, length: int, seed: int) -> Iterator[Tensor]:
        """``count`` batches ``(size, length + 1)`` of windows drawn from the training text."""
        generator = torch.Generator().manual_seed(seed)
        for _ in range(count):
            starts = torch.randint(len(self.train) - length, (size, 1), generator=generator)
            yield self.train[starts + torch.arange(length + 1)]

    def validation(self, windows: int, length: int) -> Tensor:
        """``(windows, length + 1)``: the same windows always, spread over the held-out text."""
        starts = torch.linspace(0, len(self.held) - length - 1, windows).long()
        return self.held[starts.unsqueeze(1) + torch.arange(length + 1)]


def load_corpus(files: Sequence[Path] | None = None, vocab_size: int = 1024) -> Corpus:
    """Read, split and tokenise the standard library (or ``files``)."""
    texts: dict[bool, list[str]] = {True: [], False: []}
    names: dict[bool, list[str]] = {True: [], False: []}
    for file in stdlib_files() if files is None else files:
        content = file.read_bytes()
        side = held_out(content)
        texts[side].append(content.decode("utf-8", errors="replace"))
        names[side].append(str(file))
    tokenizer = train_tokenizer(texts[False], vocab_size)
    return Corpus(
        train=_encode(tokenizer, texts[False]),
        held=_encode(tokenizer, texts[True]),
        token_bytes=_token_bytes(tokenizer),
        train_files=tuple(names[False]),
        held_files=tuple(names[True]),
    )


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE: 256 bytes, a separator, and the commonest pairs of a quarter of the text.

    The alphabet is given, so that no text is outside it.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[SEPARATOR],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts[::4], trainer)
    return tokenizer


def _encode(tokenizer: Tokenizer, texts: Sequence[str]) -> Tensor:
    end = tokenizer.token_to_id(SEPARATOR)
    pieces = [torch.tensor([*e.ids, end]) for e in tokenizer.encode_batch(list(texts))]
    return torch.cat(pieces)


def _token_bytes(tokenizer: Tokenizer) -> Tensor:
    """Every character of a byte-level token stands for one byte."""
    vocab = tokenizer.get_vocab()
    sizes = torch.zeros(len(vocab), dtype=torch.int64)
    for token, i in vocab.items():
        sizes[i] = 0 if token == SEPARATOR else len(token)
    return sizes
