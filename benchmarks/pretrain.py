"""The demo: one small LLaMA, trained on real text once per optimizer, with one line swapped.

Run as ``python -m benchmarks.pretrain``. The text is the source of Python's standard library, in a
byte-level BPE of 1,024 tokens; validation is on files that no batch is drawn from. Every run starts
from the same weights, sees the same batches and gets the same parameter groups.

Learning rates were tried in runs of 150 steps (seed 0, on the validation windows of the demo; nats
per token at the end):

=================================== =============================================================
matrices, embedding and head alike  AdamW 5e-4 5.918, 1e-3 5.805, 2e-3 5.644, 3e-3 5.736,
                                    6e-3 5.773; GaLoreAdamW 5e-3 4.914, 1e-2 4.932, 2e-2 5.013
embedding, head and norms at 1e-2   AdamW 1e-4 4.418, 2e-4 4.467, 4e-4 4.710, 1e-3 5.245,
                                    2e-3 5.444; GaLoreAdamW 6e-4 4.399, 1.25e-3 4.403, 2.5e-3 4.433,
                                    5e-3 4.544, 1e-2 4.817
=================================== =============================================================

The first line is no merit of GaLore. Its ``scale`` of 0.25 asks for a higher rate, which what is
dense then gets too, and embedding and head want one: in a smaller model (hidden 128, 3 layers)
GaLore at full rank, scale 1 and 1e-3 ends where AdamW does at 1e-3 (5.408, 5.402), and AdamW with
ten times the rate for embedding and head where GaLore does at 1e-2 (4.326, 4.313). So what is dense
has a rate of its own here, the same for both, and only then is the rate of the matrices searched.
In so short a run the best rates are low, at the edge of what was tried, and the two end close: what
differs is the state.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from benchmarks.common import Corpus, environment_line, llama, load_corpus, print_table
from benchmarks.demo_report import HEADER, caption, table, write
from benchmarks.lora import convert
from benchmarks.runs import Run, Settings
from lowrank_optim import (
    DCTAdamW,
    FiraAdamW,
    FrugalAdamW,
    GaLoreAdamW,
    GaLoreAdamW8bit,
    SSTAdamW,
    SwitchLoRAAdamW,
    lowrank_groups,
    memory,
)

Groups = list[dict[str, Any]]


@dataclass(frozen=True)
class Method:
    """One optimizer as data: the line that differs, and the learning rate found for it."""

    make: Callable[[Groups, float], Optimizer]
    lr: float
    """Peak learning rate of the matrices; what is dense has the same for every method."""
    grid: tuple[float, ...] = ()
    """Where :mod:`benchmarks.compare` begins to search it."""
    prepare: Callable[[nn.Module, Groups], Groups] | None = None
    """What is done to the model first, and the groups that it has then."""


def ranked(groups: Groups, rank: int | float, **keys: Any) -> Groups:
    """The groups with another rank, or density, for the matrices."""
    return [{**group, **({"rank": rank, **keys} if "rank" in group else {})} for group in groups]


def lora(model: nn.Module, groups: Groups) -> Groups:
    """LoRA of rank 35 in place of every matrix that the others train."""
    convert(model, 35, skip=("lm_head",))
    dense = [group for group in groups if "rank" not in group]
    factors = {name: p for name, p in model.named_parameters() if "lora_" in name}
    return [*dense, {"params": list(factors.values()), "param_names": list(factors)}]


METHODS: dict[str, Method] = {
    "AdamW": Method(
        lambda groups, lr: torch.optim.AdamW(groups, lr=lr), lr=1e-4, grid=(5e-5, 1e-4, 2e-4)
    ),
    "GaLoreAdamW": Method(
        lambda groups, lr: GaLoreAdamW(groups, lr=lr), lr=6e-4, grid=(3e-4, 6e-4, 1.2e-3)
    ),
    "GaLoreAdamW8bit": Method(lambda groups, lr: GaLoreAdamW8bit(groups, lr=lr), lr=6e-4),
    "FiraAdamW": Method(
        lambda groups, lr: FiraAdamW(groups, lr=lr), lr=3e-4, grid=(1.5e-4, 3e-4, 6e-4)
    ),
    "FrugalAdamW": Method(
        lambda groups, lr: FrugalAdamW(
            ranked(groups, 0.3), lr=lr, projector="block", block_order="descending"
        ),
        lr=1e-4,
        grid=(5e-5, 1e-4, 2e-4),
    ),
    "DCTAdamW": Method(
        lambda groups, lr: DCTAdamW(ranked(groups, 82, update_proj_gap=1), lr=lr),
        lr=1e-4,
        grid=(1e-4, 2e-4, 4e-4),
    ),
    "SSTAdamW": Method(
        lambda groups, lr: SSTAdamW(
            ranked(groups, 35), lr=lr, factors="active", steps_per_iteration=50, warmup_steps=5
        ),
        lr=1e-3,
        grid=(5e-4, 1e-3, 2e-3),
    ),
    "SwitchLoRAAdamW": Method(
        lambda groups, lr: SwitchLoRAAdamW(ranked(groups, 35), lr=lr, total_steps=200),
        lr=2e-3,
        grid=(2e-3, 4e-3, 8e-3),
    ),
    "LoRA": Method(
        lambda groups, lr: torch.optim.AdamW(groups, lr=lr),
        lr=1e-3,
        grid=(1e-3, 2e-3, 4e-3),
        prepare=lora,
    ),
}
"""Ranks and densities hold about the state of GaLore at rank 64: 15.7 MiB.

Of SST and SwitchLoRA that counts factors and moments (SwitchLoRA's pools, twice that, are in host
memory), of LoRA its adapters and their moments, of FRUGAL the first turn of its blocks.
"""

DEMO = ("AdamW", "GaLoreAdamW")
"""What ``make demo`` trains; :mod:`benchmarks.compare` has all."""


def make_groups(model: nn.Module, settings: Settings) -> Groups:
    """The same groups for every method; ``torch.optim`` passes over keys it does not know."""
    groups = lowrank_groups(model, rank=settings.rank, update_proj_gap=settings.gap)
    for group in groups:
        if "rank" not in group:
            group["lr"] = settings.dense_lr
    return groups


def make_model(settings: Settings, vocab_size: int) -> nn.Module:
    """The LLaMA of a run: the same weights for the same seed."""
    from transformers import LlamaForCausalLM

    config = llama(
        settings.hidden,
        settings.mlp,
        settings.layers,
        settings.heads,
        vocab_size=vocab_size,
        context=settings.context,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model: nn.Module = LlamaForCausalLM(config)
    return model


def losses(model: nn.Module, window: Tensor) -> Tensor:
    """Nats of each next token of ``window (batch, length + 1)``: ``(batch, length)``."""
    logits = model(input_ids=window[:, :-1]).logits
    return cross_entropy(logits.transpose(1, 2), window[:, 1:], reduction="none")


@torch.no_grad()
def evaluate(
    model: nn.Module, windows: Tensor, token_bytes: Tensor, batch: int
) -> tuple[float, float]:
    """Nats per token and bits per byte of the held-out ``windows``."""
    model.eval()
    nats = sum(float(losses(model, window).sum()) for window in windows.split(batch))
    model.train()
    targets = windows[:, 1:]
    size = int(token_bytes[targets].sum())
    return nats / targets.numel(), nats / math.log(2) / size


def schedule(optimizer: Optimizer, settings: Settings) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up, then a cosine down to ``floor``."""
    warmup = max(1, round(settings.warmup * settings.steps))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = (step - warmup) / max(1, settings.steps - warmup)
        return settings.floor + (1 - settings.floor) * 0.5 * (1 + math.cos(math.pi * done))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def train(
    name: str,
    settings: Settings,
    corpus: Corpus,
    *,
    lr: float | None = None,
    watch: Callable[[Run], None] = lambda run: None,
) -> Run:
    """Train once.

    Args:
        name: a key of :data:`METHODS`.
        settings: shapes, steps, seed.
        corpus: the text.
        lr: peak learning rate, instead of the one found for the method.
        watch: called after every step.
    """
    method = METHODS[name]
    lr = method.lr if lr is None else lr
    model = make_model(settings, corpus.vocab_size)
    windows = corpus.validation(settings.validation_windows, settings.context)
    groups = make_groups(model, settings)
    optimizer = method.make(groups if method.prepare is None else method.prepare(model, groups), lr)
    scheduler = schedule(optimizer, settings)
    run = Run(name, settings.seed, lr, sum(p.numel() for p in model.parameters()))
    model_times, optimizer_times = [], []
    batches = corpus.batches(settings.steps, settings.batch, settings.context, settings.seed)

    def validate(step: int) -> None:
        loss, run.bits_per_byte = evaluate(model, windows, corpus.token_bytes, settings.batch)
        run.validation.append((step, loss))

    begun = time.perf_counter()
    validate(0)
    for step, window in enumerate(batches, start=1):
        start = time.perf_counter()
        loss = losses(model, window).mean()
        loss.backward()
        middle = time.perf_counter()
        optimizer.step()
        end = time.perf_counter()
        optimizer.zero_grad()
        scheduler.step()
        model_times.append(1e3 * (middle - start))
        optimizer_times.append(1e3 * (end - middle))
        run.train_loss.append(loss.item())
        if step % settings.validate_every == 0 or step == settings.steps:
            validate(step)
        watch(run)
    held = memory.report(optimizer)
    adapters = sum(p.nbytes for n, p in model.named_parameters() if "lora_" in n)
    total = held.total - memory.host_bytes(optimizer) + adapters
    run.state = {**held._asdict(), "total": total}
    run.optimizer_ms = statistics.median(optimizer_times)
    run.model_ms = statistics.median(model_times)
    run.seconds = time.perf_counter() - begun
    return run


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    s = Settings()
    parser = argparse.ArgumentParser(description="Train one small LLaMA with each optimizer.")
    parser.add_argument("--optimizers", nargs="+", choices=METHODS, default=list(DEMO))
    parser.add_argument("--lr", type=float, help="of matrices, instead of each one's own")
    parser.add_argument("--dense-lr", type=float, default=s.dense_lr, help="of all else")
    parser.add_argument("--steps", type=int, default=s.steps)
    parser.add_argument("--rank", type=int, default=s.rank)
    parser.add_argument("--gap", type=int, default=s.gap, help="steps between refreshes")
    parser.add_argument("--seed", type=int, nargs="+", default=[s.seed], help="one run each")
    parser.add_argument("--threads", type=int, help="default: torch's choice")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, print the table, write the files."""
    args = parse(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    console = Console()
    console.print(environment_line(), highlight=False)
    corpus = load_corpus()
    console.print(
        f"{len(corpus.train):,} training tokens in {len(corpus.train_files)} files of the standard "
        f"library, {len(corpus.held):,} in {len(corpus.held_files)} held out",
        highlight=False,
    )
    settings = Settings(steps=args.steps, rank=args.rank, gap=args.gap, dense_lr=args.dense_lr)
    columns = (
        TextColumn("{task.description:<14}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeRemainingColumn(),
    )
    runs = []
    with Progress(*columns, console=console) as progress:
        for name in args.optimizers:
            for seed in args.seed:
                task = progress.add_task(name, total=settings.steps, loss="")

                def watch(run: Run, task: TaskID = task) -> None:
                    recent = statistics.fmean(run.train_loss[-10:])
                    loss = f"train {recent:.3f}, held out {run.final_loss:.3f}"
                    progress.update(task, advance=1, loss=loss)

                own = replace(settings, seed=seed)
                runs.append(train(name, own, corpus, lr=args.lr, watch=watch))
    print_table(console, "", HEADER, table(runs))
    console.print(caption(settings, corpus, runs), highlight=False)
    write(args.out, settings, corpus, runs)
    console.print(f"\nwritten: {args.out}/results.json, table.md, curves.png", highlight=False)


if __name__ == "__main__":
    main()
