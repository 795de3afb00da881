"""What coordinates in bfloat16 cost: error of accumulated gradients, and loss of training runs.

Run as ``python -m benchmarks.coords_dtype``. The LLaMA of
:mod:`benchmarks.pretrain`, narrower, in bfloat16, GaLore,
``attach_in_backward(mode="project")``; a step is so many micro-batches of one window.

Errors are of coordinates summed over the micro-batches of one step, in the bases of a run of some
steps, against the same gradients projected and summed in float64. ``nearest`` is bfloat16 without
stochastic rounding; ``whole`` are gradients that autograd adds up in bfloat16, projected once, as
without ``attach_in_backward``. ``share`` is the part of the true sum that is there: 1 where
rounding has no bias.

Losses are paired: the same weights, batches and bases, and the difference to float32 at the end of
each run. ``other seed`` is float32 with other random bases: what any small change does to a run.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from benchmarks.common import Corpus, environment_line, load_corpus, print_table
from benchmarks.pretrain import evaluate, losses, make_groups, make_model, schedule
from benchmarks.runs import Settings
from lowrank_optim import GaLoreAdamW, attach_in_backward
from lowrank_optim.backward.projecting import items_of, projected
from lowrank_optim.engine.plan import ParamPlan, State, Strategies
from lowrank_optim.tensors.projected_grad import ProjectedGrad

LR = 6e-4


def start(settings: Settings, corpus: Corpus, seed: int = 0) -> tuple[nn.Module, GaLoreAdamW]:
    """A model in bfloat16 and its optimizer; ``seed`` is that of its bases."""
    model = make_model(settings, corpus.vocab_size).bfloat16()
    groups = make_groups(model, settings)
    return model, GaLoreAdamW(groups, lr=LR, stochastic_rounding=True, seed=seed)


def backwards(model: nn.Module, window: Tensor) -> Iterator[None]:
    """One micro-batch for each line of ``window``, of which the loss is the mean."""
    for line in window:
        (losses(model, line[None]).float().mean() / len(window)).backward()
        yield


def train(
    settings: Settings, corpus: Corpus, coords_dtype: Any, pieces: int, seed: int = 0
) -> float:
    """Held-out loss at the end of a run; gradients stay whole where ``coords_dtype`` is None."""
    model, optimizer = start(settings, corpus, seed)
    scheduler = schedule(optimizer, settings)
    if coords_dtype is not None:
        attach_in_backward(optimizer, coords_dtype=coords_dtype)
    for window in corpus.batches(settings.steps, pieces, settings.context, settings.seed):
        for _ in backwards(model, window):
            pass
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    windows = corpus.validation(settings.validation_windows, settings.context)
    return evaluate(model.float(), windows, corpus.token_bytes, 8)[0]


class Sums:
    """Gradients of one matrix, added up in every format."""

    def __init__(self, item: ParamPlan, state: State, chosen: Strategies) -> None:
        self.item, self.state, self.chosen = item, state, chosen
        self.kept: dict[str, ProjectedGrad] = {}
        self.exact = self.nearest = self.whole = torch.zeros(())

    def add(self, grad: Tensor) -> None:
        """One more, in bfloat16."""
        assert self.item.view is not None
        whole = self.item.view.of(grad)
        low = self.state["basis"].mT @ whole
        exact = self.state["basis"].double().mT @ whole.double()
        if not self.kept:
            for name in ("float32", "bfloat16"):
                self.kept[name] = projected(self.item, self.state, grad, self.chosen, name)
            self.exact, self.nearest, self.whole = exact, low.clone(), whole.clone()
            return
        for held in self.kept.values():
            held.accumulate_(grad)
        self.exact += exact
        self.nearest += low
        self.whole += whole

    def of(self, name: str) -> Tensor:
        """Coordinates of the sum."""
        if name == "nearest":
            return self.nearest.double()
        if name == "whole":
            return (self.state["basis"].mT @ self.whole).double()
        return self.kept[name].coords["low"].double()


FORMATS = ("float32", "bfloat16", "nearest", "whole")


def errors(settings: Settings, corpus: Corpus, counts: Sequence[int], warm: int) -> list[list[str]]:
    """Rows of the first table."""
    model, optimizer = start(settings, corpus)
    windows = list(corpus.batches(warm + 1, max(counts), settings.context, settings.seed))
    for window in windows[:warm]:
        for _ in backwards(model, window[:4]):
            pass
        optimizer.step()
        optimizer.zero_grad()
    sums = [
        Sums(item, optimizer.state[item.param], optimizer._strategies(group))
        for group, item in items_of(optimizer)
        if item.subspace is not None
    ]
    rows = []
    for n, _ in enumerate(backwards(model, windows[-1]), start=1):
        for own in sums:
            assert own.item.param.grad is not None
            own.add(own.item.param.grad)
        optimizer.zero_grad()
        if n in counts:
            true = torch.stack([own.exact.norm() for own in sums]).norm()
            found = {name: [own.of(name) for own in sums] for name in FORMATS}
            off = {
                name: float(torch.stack([(x - s.exact).norm() for x, s in pairs(xs, sums)]).norm())
                for name, xs in found.items()
            }
            share = {
                name: float(sum((x * s.exact).sum() for x, s in pairs(xs, sums)) / true**2)
                for name, xs in found.items()
            }
            rows += [
                [str(n), name, f"{off[name] / float(true):.2e}",
                 f"{off[name] / off['float32']:.2f}", f"{share[name]:.5f}"]
                for name in FORMATS
            ]  # fmt: skip
    return rows


def pairs(xs: Sequence[Tensor], sums: Sequence[Sums]) -> Iterator[tuple[Tensor, Sums]]:
    """The coordinates of each matrix, and what they should be."""
    return zip(xs, sums, strict=True)


VARIANTS: dict[str, tuple[Any, int]] = {
    "float32": ("float32", 0),
    "bfloat16": ("bfloat16", 0),
    "whole": (None, 0),
    "other seed": ("float32", 1),
}


def runs(
    console: Console, settings: Settings, corpus: Corpus, args: argparse.Namespace
) -> list[list[str]]:
    """Rows of the second table."""
    rows = []
    for count in args.train:
        ends: dict[str, list[float]] = {name: [] for name in ("float32", *args.beside)}
        for seed in range(args.seeds):
            for name in ends:
                coords_dtype, own = VARIANTS[name]
                loss = train(replace(settings, seed=seed), corpus, coords_dtype, count, own)
                ends[name].append(loss)
                console.print(f"{count} micro-batches, seed {seed}, {name}: {loss:.4f}")
        for name, own_ends in ends.items():
            gaps = [a - b for a, b in zip(own_ends, ends["float32"], strict=True)]
            listed = ", ".join(f"{gap:+.4f}" for gap in gaps)
            rows.append([str(count), name, f"{statistics.fmean(own_ends):.4f}", listed])
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description="Coordinates in bfloat16 against float32.")
    parser.add_argument("--pieces", type=int, nargs="+", default=[1, 8, 64], help="micro-batches")
    parser.add_argument("--train", type=int, nargs="*", default=[1, 8], help="of training runs")
    beside = [name for name in VARIANTS if name != "float32"]
    parser.add_argument("--beside", nargs="+", choices=beside, default=beside, metavar="FORMAT")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--threads", type=int, help="default: torch's choice")
    args = parser.parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    console = Console()
    console.print(environment_line(), highlight=False)
    corpus = load_corpus()
    settings = Settings(hidden=128, mlp=344, layers=3, rank=32, steps=args.steps)
    header = ["micro-batches", "format", "relative error", "over float32", "share"]
    title = "Coordinates of one step, against float64"
    print_table(console, title, header, errors(settings, corpus, args.pieces, warm=10))
    if args.train:
        header = ["micro-batches", "format", "loss", "less that of float32, by seed"]
        rows = runs(console, settings, corpus, args)
        print_table(console, f"Held-out loss after {args.steps} steps", header, rows)


if __name__ == "__main__":
    main()
