"""The cosine basis: what a step costs beside GaLore's, and what it captures of real gradients.

Run as ``python -m benchmarks.dct``. P4: two gradients take turns, so that the index set changes at
every step. Energies are those of the small LLaMA's gradients after some steps of training, by the
kind of layer, over the best possible ones (SVD) of the same rank; two fixed bases that are no
projectors stand beside them as controls. ``--plot`` draws them.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from benchmarks.common import environment, environment_line, load_corpus, print_table
from benchmarks.matrices import galore, linear_weights
from benchmarks.pretrain import LR, losses, make_groups, make_model, schedule
from benchmarks.runs import Settings
from benchmarks.timing import Work, interleaved, ratio
from lowrank_optim import PROJECTORS, DCTAdamW, GaLoreAdamW
from lowrank_optim.ops.cosine import cosine_rows
from lowrank_optim.subspaces import RefreshContext
from lowrank_optim.tensors.matrix import matrix_view

GALORE = "GaLoreAdamW, no refresh"
PROJECTED = ("svd", "rsvd", "dct", "hadamard", "random")
CHOSEN = ("axes", "any fixed")
"""Controls: the best r of the axes, and of one random orthonormal basis."""
RELEASED = {False: "operations of the release, matmul", True: "operations of the release, makhoul"}
OF_ALL = "svd of all"
"""What the best basis captures of the whole gradient."""
BASES = (*PROJECTED[:-1], *CHOSEN, PROJECTED[-1])


def released(params: Sequence[Tensor], rank: int, fast: bool) -> Work:
    """The operations of the released step at gap 1 in torch, right or left.

    Scores by a product with all of Q, or with ``fast`` by a complex FFT of every row in Makhoul's
    order; l1 norms, Adam, and in both a product with the chosen columns on the way back.
    """
    bases, states, orders, turns = {}, [], {}, {}
    for param in params:
        m = min(param.shape)
        kind = "dct2" if fast else "dct3"
        bases.setdefault(m, cosine_rows(m, kind, param.dtype, param.device).mT.contiguous())
        every = torch.arange(m)
        orders[m] = torch.cat([every[::2], every[1::2].flip(0)])
        size = torch.full((m,), (2 / m) ** 0.5).index_fill_(0, torch.tensor(0), (1 / m) ** 0.5)
        turns[m] = torch.polar(size, -torch.pi * every / (2 * m))
        low = (param.shape[0], rank) if param.shape[0] >= param.shape[1] else (rank, param.shape[1])
        states.append((torch.zeros(low, dtype=param.dtype), torch.zeros(low, dtype=param.dtype)))

    def transformed(x: Tensor) -> Tensor:
        m = x.shape[1]
        return (torch.fft.fft(x[:, orders[m]]) * turns[m]).real

    def run() -> None:
        for param, (m, v) in zip(params, states, strict=True):
            assert param.grad is not None
            q, right = bases[min(param.shape)], param.shape[0] >= param.shape[1]
            if fast:
                similar = transformed(param.grad) if right else transformed(param.grad.mT).mT
            else:
                similar = param.grad @ q if right else q.mT @ param.grad
            scores = similar.abs().sum(0 if right else 1)
            index = scores.topk(rank, sorted=False).indices
            low = similar[:, index] if right else similar[index]
            m.mul_(0.9).add_(low, alpha=0.1)
            v.mul_(0.999).addcmul_(low, low, value=0.001)
            update = m / (v.sqrt() + 1e-8)
            lifted = update @ q[:, index].mT if right else q[:, index] @ update
            param.data.mul_(1 - 1e-11).add_(lifted, alpha=-1e-9)

    return run


def measure(args: argparse.Namespace, console: Console, dtype: str = "float32") -> dict[str, Any]:
    """P4, and the same at other ranks; the release has no FFT of bfloat16."""
    params = linear_weights("llama-130m", args.layers, getattr(torch, dtype))
    other = [torch.randn_like(p) for p in params]

    def alternating(step: Work) -> Work:
        def run() -> None:
            for i, p in enumerate(params):
                p.grad, other[i] = other[i], p.grad
            step()

        return run

    works: dict[str, Work] = {GALORE: alternating(galore(params, 256).step)}
    for rank in (64, 128, 256, 512):
        for transform in ("fft", "matmul") if rank == 256 else ("fft",):
            group = {"params": params, "rank": rank, "transform": transform}
            works[f"DCTAdamW, {transform}, rank {rank}"] = alternating(
                DCTAdamW([group], lr=1e-9).step
            )
    for fast in (False, True)[: 2 if dtype == "float32" else 1]:
        works[RELEASED[fast]] = alternating(released(params, 256, fast))
    with torch.no_grad():
        times = interleaved(works, args.rounds)
    ran = [name for name in RELEASED.values() if name in works]
    faster = min(ran, key=lambda name: statistics.median(times[name]))
    found = {
        name: {
            "ms": statistics.median(t),
            "over_galore": ratio(times, name, GALORE),
            "over_release": ratio(times, name, faster),
        }
        for name, t in times.items()
    }
    rows = [
        (k, f"{v['ms']:.1f}", f"{v['over_galore']:.2f}", f"{v['over_release']:.3f}")
        for k, v in found.items()
    ]
    title = f"P4: one step, {7 * args.layers} matrices of LLaMA-130M, {dtype}, gap 1, rank 256"
    header = ("", "ms", "over GaLore\n(target 0.5)", "over the release's\nfaster mode (0.25)")
    print_table(console, title, header, rows)
    return found


def controls(m: int) -> tuple[Tensor, Tensor]:
    """Orthonormal rows ``(m, m)``: the axes, and random ones that no gradient was looked at for."""
    noise = torch.randn(m, m, generator=torch.Generator().manual_seed(1))
    return torch.eye(m), torch.linalg.qr(noise).Q


def energies(steps: int) -> dict[str, dict[str, float]]:
    """Captured energy of each basis over that of the SVD, mean over layers of a kind."""
    settings, corpus = replace(Settings(), gap=200), load_corpus()
    model = make_model(Settings(), corpus.vocab_size)
    optimizer = GaLoreAdamW(make_groups(model, settings), lr=LR)
    scheduler = schedule(optimizer, settings)
    batches = corpus.batches(steps + 1, settings.batch, settings.context, settings.seed)
    for window in batches:
        optimizer.zero_grad()
        losses(model, window).mean().backward()
        optimizer.step()
        scheduler.step()
    kinds: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for name, param in model.named_parameters():
        view = matrix_view(param.shape)
        if view is None or ".layers." not in name or param.grad is None:
            continue
        grad = view.of(param.grad)
        rank = max(1, view.m // 8)
        ctx = RefreshContext(view, torch.Generator().manual_seed(0))
        best = float(torch.linalg.svdvals(grad)[:rank].square().sum())
        total = float(grad.square().sum())
        kinds[name.split(".")[-2]][OF_ALL].append(best / total)
        for projector in PROJECTED:
            basis = PROJECTORS[projector](rank).find(grad, None, ctx)  # type: ignore[attr-defined]
            energy = float((basis.mT @ grad).square().sum()) / best
            kinds[name.split(".")[-2]][projector].append(energy)
        for control, rows in zip(CHOSEN, controls(view.m), strict=True):
            energy = float((rows @ grad).square().sum(1).topk(rank).values.sum()) / best
            kinds[name.split(".")[-2]][control].append(energy)
    return {k: {p: statistics.mean(x) for p, x in v.items()} for k, v in kinds.items()}


def plot(found: dict[str, dict[str, float]], path: Path) -> None:
    """Bars by kind of layer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    width = 0.8 / len(BASES)
    figure, axes = pyplot.subplots(figsize=(7.5, 2.8))
    for i, projector in enumerate(BASES):
        at = [k + width * (i - (len(BASES) - 1) / 2) for k in range(len(found))]
        axes.bar(at, [v[projector] for v in found.values()], width, label=projector)
    axes.set_xticks(range(len(found)), list(found), fontsize=8)
    axes.set_ylabel("energy over SVD's")
    axes.legend(
        fontsize=8, ncols=len(BASES), loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False
    )
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def show_energies(console: Console, found: dict[str, dict[str, float]], steps: int) -> None:
    """One table."""
    columns = (*BASES, OF_ALL)
    rows = [(k, *(f"{v[p]:.3f}" for p in columns)) for k, v in found.items()]
    title = f"Energy over the SVD's at rank m / 8, after {steps} steps"
    print_table(console, title, ("layer", *columns), rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the tables, write the file."""
    parser = argparse.ArgumentParser(description="Time and captured energy of the cosine basis.")
    parser.add_argument("--layers", type=int, default=2, help="of LLaMA-130M (default: 2)")
    parser.add_argument("--steps", type=int, default=50, help="of training before its gradients")
    parser.add_argument("--dtype", default="float32", help="of the steps: float32,bfloat16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, help="default: torch's choice")
    parser.add_argument("--only", choices=["times", "energies"])
    parser.add_argument("--plot", type=Path, help="where to draw the energies")
    parser.add_argument("--out", type=Path, default=Path("runs/dct.json"))
    args = parser.parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    console = Console()
    console.print(environment_line(), highlight=False)
    results: dict[str, Any] = {"environment": environment()}
    if args.only != "energies":
        results["times"] = {d: measure(args, console, d) for d in args.dtype.split(",")}
    if args.only != "times":
        results["energies"] = found = energies(args.steps)
        show_energies(console, found, args.steps)
        if args.plot:
            plot(found, args.plot)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    console.print(f"written: {args.out}", highlight=False)


if __name__ == "__main__":
    main()
