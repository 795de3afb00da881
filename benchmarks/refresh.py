"""Refresh of a basis over the full SVD, with the energy that the basis captures.

Run as ``python -m benchmarks.refresh``. Gradients are real: the LLaMA of
:mod:`benchmarks.pretrain`, and two layers of the shapes of LLaMA-130M, trained. The basis in use
comes from one gradient, and the refresh sees the one ``gap`` steps later. Synthetic matrices with
a slowly decaying spectrum, where
no basis captures nearly all, show the other case. ``--by-layer`` shows instead what fixed bases
capture beside these, by the kind of layer, and ``--plot`` draws it.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from benchmarks.common import (
    LLAMA_SHAPES,
    Corpus,
    environment,
    environment_line,
    load_corpus,
    print_table,
)
from benchmarks.dct import energies, plot, show_energies
from benchmarks.pretrain import LR, losses, make_groups, make_model, schedule
from benchmarks.runs import Settings
from benchmarks.timing import interleaved, ratio
from lowrank_optim import GaLoreAdamW
from lowrank_optim.ops import devices
from lowrank_optim.subspaces import PROJECTORS, RefreshContext
from lowrank_optim.tensors.matrix import matrix_view

FLOOR, FULL, WARM = "two GEMM passes (floor)", "svd", "rsvd, warm"
TARGET_TIME, TARGET_ENERGY = 0.05, 0.99


class Case(NamedTuple):
    """Matrices ``(m, n)``, each with the gradient that the basis in use was found from."""

    title: str
    rank: int
    before: list[Tensor]
    now: list[Tensor]


def trained(
    title: str, settings: Settings, corpus: Corpus, steps: int, rank: int, gap: int
) -> Case:
    """Gradients of every projected matrix after ``steps`` and ``steps + gap`` steps of training."""
    model = make_model(settings, corpus.vocab_size)
    optimizer = GaLoreAdamW(make_groups(model, settings), lr=LR)
    scheduler = schedule(optimizer, settings)
    kept: list[list[Tensor]] = []
    batches = corpus.batches(steps + gap + 1, settings.batch, settings.context, settings.seed)
    for step, window in enumerate(batches):
        losses(model, window).mean().backward()
        if step in (steps, steps + gap):
            kept.append(list(projected_gradients(model)))
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return Case(f"{title}, steps {steps} and {steps + gap}", rank, *kept)


def projected_gradients(model: torch.nn.Module) -> Iterator[Tensor]:
    """Copies of the gradients of the linear layers inside the blocks, in canonical orientation."""
    for name, param in model.named_parameters():
        view = matrix_view(param.shape)
        if view is not None and ".layers." in name:
            assert param.grad is not None
            yield view.of(param.grad.clone())


def synthetic(rank: int, decay: float = 2.5) -> Case:
    """Matrices of LLaMA-130M, singular values from 1 down to ``10**-decay``, then perturbed."""
    hidden, mlp, *_ = LLAMA_SHAPES["llama-130m"]
    generator = torch.Generator().manual_seed(0)
    before, now = [], []
    for n in [hidden] * 4 + [mlp] * 3:
        values = torch.logspace(0, -decay, hidden)
        u = torch.linalg.qr(torch.randn(hidden, hidden, generator=generator)).Q
        v = torch.linalg.qr(torch.randn(n, hidden, generator=generator)).Q
        before.append((u * values) @ v.mT)
        # each singular vector turns by about 30 degrees between the two gradients
        tilt = 0.6 * hidden**-0.5 * torch.randn(hidden, hidden, generator=generator)
        turned = torch.linalg.qr(u + u @ tilt).Q
        now.append((turned * values) @ v.mT)
    title = f"synthetic, one layer of LLaMA-130M, values 1 to 1e-{decay}"
    return Case(title, rank, before, now)


def find(name: str, rank: int, grad: Tensor, previous: Tensor | None) -> Tensor:
    """The basis of a registered projector."""
    view = matrix_view(grad.shape, "left")
    assert view is not None
    ctx = RefreshContext(view, torch.Generator().manual_seed(0))
    return PROJECTORS[name](rank).find(grad, previous, ctx)


def unseen(rank: int, grad: Tensor, previous: Tensor | None) -> Tensor:
    """That of ``rsvd`` where no host looks at how much an iteration gains."""
    with devices.as_accelerators():
        return find("rsvd", rank, grad, previous)


def gram_eigh(grad: Tensor, rank: int) -> Tensor:
    """Exact too: the leading eigenvectors of ``G G^T``."""
    wide = grad.float()
    return torch.linalg.eigh(wide @ wide.mT).eigenvectors[:, -rank:]


def svd_lowrank(grad: Tensor, rank: int) -> Tensor:
    """The randomised SVD of torch, at GaLore 2's settings."""
    return torch.svd_lowrank(grad.float(), q=rank + 8, niter=2)[0][:, :rank]


def measure(case: Case, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """P5: time over the full SVD's, and energy over the best possible, of every variant."""
    r = case.rank
    warm = [find("svd", r, grad, None) for grad in case.before]
    grads = [grad.to(dtype) for grad in case.now]
    bases: dict[str, list[Tensor]] = {"the basis in use": warm}

    def variant(name: str, one: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], None]:
        def run() -> None:
            bases[name] = [one(grad, old) for grad, old in zip(grads, warm, strict=True)]

        return run

    def passes() -> None:
        for grad, old in zip(case.now, warm, strict=True):
            grad @ (old.mT @ grad).mT

    own: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        FULL: lambda g, old: find("svd", r, g, None),
        WARM: lambda g, old: find("rsvd", r, g, old.to(g.dtype)),
        "rsvd, cold": lambda g, old: find("rsvd", r, g, None),
        "rsvd as on an accelerator, warm": lambda g, old: unseen(r, g, old.to(g.dtype)),
        "rsvd as on an accelerator, cold": lambda g, old: unseen(r, g, None),
        "eigh of the Gram matrix": lambda g, old: gram_eigh(g, r),
        "torch.svd_lowrank, niter 2": lambda g, old: svd_lowrank(g, r),
        "random": lambda g, old: find("random", r, g, None),
    }
    works = {name: variant(name, one) for name, one in own.items()}
    times = interleaved({FLOOR: passes, **works}, rounds)
    best = [energy(basis, grad) for basis, grad in zip(bases[FULL], grads, strict=True)]
    rows: dict[str, dict[str, float]] = {}
    for name in ("the basis in use", *times):
        row = rows[name] = {}
        if name in times:
            row["ms"] = statistics.median(times[name])
            row["over_svd"] = ratio(times, name, FULL)
        if name in bases:
            pairs = zip(bases[name], grads, best, strict=True)
            relative = [energy(basis, grad) / most for basis, grad, most in pairs]
            row["energy"] = statistics.fmean(relative)
            row["least_energy"] = min(relative)
    total = sum(float(grad.double().square().sum()) for grad in grads)
    return {
        "title": case.title,
        "dtype": str(dtype).removeprefix("torch."),
        "rank": r,
        "shapes": sorted({tuple(grad.shape) for grad in grads}),
        "matrices": len(grads),
        "best_over_total": sum(best) / total,
        "rows": rows,
    }


def energy(basis: Tensor, grad: Tensor) -> float:
    """``|P^T G|^2`` in float64."""
    return float((basis.double().mT @ grad.double()).square().sum())


def show(console: Console, found: dict[str, Any]) -> None:
    """One table."""

    def text(row: dict[str, float], key: str, form: str) -> str:
        return form.format(row[key]) if key in row else ""

    rows = []
    for name, row in found["rows"].items():
        cells = [
            text(row, "ms", "{:.1f}"),
            text(row, "over_svd", "{:.3f}"),
            text(row, "energy", "{:.4%}"),
            text(row, "least_energy", "{:.4%}"),
        ]
        goal = f"<= {TARGET_TIME} at >= {TARGET_ENERGY:.0%}" if name == WARM else ""
        rows.append((name, *cells, goal))
    shapes = ", ".join(f"{m}x{n}" for m, n in found["shapes"])
    title = (
        f"P5: {found['title']}; {found['dtype']}, {found['matrices']} matrices {shapes}, rank "
        f"{found['rank']}; the best basis holds {found['best_over_total']:.1%} of the gradient"
    )
    header = ("", "ms", "over svd", "mean energy", "least", "target")
    print_table(console, title, header, rows)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Refresh of a basis over the full SVD.")
    parser.add_argument("--steps", type=int, default=100, help="of training before the old basis")
    parser.add_argument("--wide-steps", type=int, default=60, help="the same, LLaMA-130M shapes")
    parser.add_argument("--gap", type=int, default=50)
    parser.add_argument("--rank", type=int, default=256, help="on the shapes of LLaMA-130M")
    parser.add_argument("--dtype", default="float32,bfloat16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="default: torch's choice")
    parser.add_argument("--by-layer", action="store_true", help="energy alone, with fixed bases")
    parser.add_argument("--plot", type=Path, help="where to draw that")
    parser.add_argument("--out", type=Path, default=Path("runs/refresh.json"))
    return parser.parse_args(arguments)


def cases(args: argparse.Namespace, corpus: Corpus) -> Iterator[Case]:
    """The small LLaMA; two layers as wide as LLaMA-130M; and synthetic matrices as wide."""
    small = replace(Settings(), gap=args.gap)
    yield trained("small LLaMA", small, corpus, args.steps, small.rank, args.gap)
    hidden, mlp, _, heads = LLAMA_SHAPES["llama-130m"]
    wide = replace(small, hidden=hidden, mlp=mlp, layers=2, heads=heads, rank=args.rank)
    title = "two layers of LLaMA-130M"
    yield trained(title, wide, corpus, args.wide_steps, args.rank, args.gap)
    yield synthetic(args.rank)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the tables, write the file."""
    args = parse(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    console = Console()
    console.print(environment_line(), highlight=False)
    results: dict[str, Any] = {
        "environment": environment(),
        "arguments": {k: str(v) for k, v in vars(args).items()},
        "tables": [],
    }
    if args.by_layer:
        results["by_layer"] = found = energies(args.steps)
        show_energies(console, found, args.steps)
        if args.plot:
            plot(found, args.plot)
    for case in () if args.by_layer else cases(args, load_corpus()):
        for dtype in args.dtype.split(","):
            found = measure(case, getattr(torch, dtype), args.rounds)
            results["tables"].append(found)
            show(console, found)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    console.print(f"written: {args.out}", highlight=False)


if __name__ == "__main__":
    main()
