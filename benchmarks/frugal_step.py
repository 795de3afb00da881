"""Time of a FRUGAL step beside ours of GaLore, fused AdamW and the release's cost structure.

Run as ``python -m benchmarks.frugal_step``. The released step is written out as the sequence of
torch calls that it makes; its package does not import under current torch.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from benchmarks.common import environment_line, print_table
from benchmarks.matrices import NEVER, OURS, galore, linear_weights
from benchmarks.timing import Work, interleaved, ratio
from lowrank_optim import FrugalAdamW

FUSED = "torch AdamW fused"
PAIRS = {
    "FRUGAL svd + sign": (OURS, "<= 1.6"),
    "FRUGAL columns + sign": (FUSED, "<= 1.0"),
    "FRUGAL rows + sign": (FUSED, ""),
    "FRUGAL randk + sign": (FUSED, ""),
    "FRUGAL block + sign": (FUSED, ""),
    "released: svd + sign": (OURS, ""),
    "released: columns + sign": (FUSED, ""),
}
"""What each is compared with, and its target."""


def released_step(
    params: Sequence[Tensor], down: Callable[[Tensor, Any], Tensor], up: Any, keep: Sequence[Any]
) -> Work:
    """The release's step of every matrix: moments, update, lifts of both, sign, two adds."""
    lows = [down(p.detach(), own) for p, own in zip(params, keep, strict=True)]
    moments = [(torch.zeros_like(x), torch.zeros_like(x)) for x in lows]

    def run() -> None:
        for param, own, (m, v) in zip(params, keep, moments, strict=True):
            grad = param.grad
            assert grad is not None
            param.data.mul_(1 - 1e-9 * 0.01)
            low = down(grad, own)
            m.mul_(0.9).add_(low, alpha=0.1)
            v.mul_(0.999).addcmul_(low, low, value=0.001)
            denominator = v.sqrt().div_(0.5).add_(1e-8)
            update = up(m / denominator * -1e-9, own, grad)
            rest = grad - up(low, own, grad)
            update.add_(-1e-9 * rest.sign())
            param.data.add_(update)

    return run


def _full(low: Tensor, own: Tensor, grad: Tensor) -> Tensor:
    full = torch.zeros_like(grad)
    full[:, own] = low
    return full


def variants(params: Sequence[Any], rank: int, density: float) -> dict[str, Work]:
    """Everything compared, each with a state of its own."""
    options: dict[str, Any] = {"update_proj_gap": NEVER, "lr": 1e-9}

    def ours(**own: Any) -> Work:
        return FrugalAdamW([{"params": params, **own}], **options).step

    def base(p: Tensor) -> Tensor:
        return torch.linalg.qr(torch.randn(min(p.shape), rank)).Q.to(p.dtype)

    def project(g: Tensor, q: Tensor) -> Tensor:
        return g @ q if g.shape[0] >= g.shape[1] else q.T @ g

    def lift(x: Tensor, q: Tensor, g: Tensor) -> Tensor:
        return x @ q.T if g.shape[0] >= g.shape[1] else q @ x

    columns = [torch.randperm(p.shape[1])[: int(density * p.shape[1])] for p in params]
    return {
        OURS: galore(params, rank).step,
        FUSED: torch.optim.AdamW(params, lr=1e-9, fused=True).step,
        # a step costs the same whatever the basis is
        "FRUGAL svd + sign": ours(rank=rank, projector="random"),
        "FRUGAL columns + sign": ours(density=density, projector="columns"),
        "FRUGAL rows + sign": ours(density=density, projector="rows"),
        "FRUGAL randk + sign": ours(density=density, projector="randk"),
        "FRUGAL block + sign": ours(density=density, projector="block"),
        "released: svd + sign": released_step(params, project, lift, [base(p) for p in params]),
        "released: columns + sign": released_step(params, lambda g, own: g[:, own], _full, columns),
    }


def measure(args: argparse.Namespace, dtype: str, console: Console) -> dict[str, dict[str, float]]:
    """P3: one table, of ``args.model, layers, rank, rounds`` and, if it has one, ``density``."""
    params = linear_weights(args.model, args.layers, getattr(torch, dtype))
    density = getattr(args, "density", 0.25)
    times = interleaved(variants(params, args.rank, density), args.rounds, warmup=2)
    found = {
        name: {"ms": statistics.median(times[name]), "ratio": ratio(times, name, base)}
        for name, (base, _) in PAIRS.items()
    }
    rows = [
        (name, f"{found[name]['ms']:.1f}", base, f"{found[name]['ratio']:.2f}", goal)
        for name, (base, goal) in PAIRS.items()
    ]
    rows += [(n, f"{statistics.median(times[n]):.1f}", "", "", "") for n in (OURS, FUSED)]
    title = f"P3: one step, {dtype}, {len(params)} matrices of {args.model}, no refresh"
    print_table(console, title, ("", "ms", "over", "ratio", "target"), rows)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description="Step time of FRUGAL, side by side.")
    parser.add_argument("--model", default="llama-130m")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rank", type=int, default=256)
    parser.add_argument("--density", type=float, default=0.25)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, help="default: torch's choice")
    args = parser.parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    console = Console()
    console.print(environment_line(), highlight=False)
    measure(args, args.dtype, console)


if __name__ == "__main__":
    main()
