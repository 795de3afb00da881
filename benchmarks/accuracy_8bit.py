"""How far runs with 8-bit moments end from float32 AdamW's, ours and bitsandbytes' on the CPU.

Run as ``python -m benchmarks.accuracy_8bit``. Gradients are normal, of sizes that range over a
number of decades within each block of 256; weights of 64 x 512 move for 50 steps at lr 0.01.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from rich.console import Console
from torch import Tensor
from torch.optim import Optimizer

from benchmarks.common import environment_line, print_table
from lowrank_optim import GaLoreAdamW8bit

DECADES = (0, 1, 2, 3, 4)
SEEDS = 5
SHAPE, STEPS = (64, 512), 50
OWN = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
Make = Callable[[Tensor], Optimizer]


def ours(param: Tensor) -> Optimizer:
    """Dense, by whatever backend is chosen."""
    return GaLoreAdamW8bit([{"params": [param], "rank": None}], **OWN)


def theirs(param: Tensor) -> Optimizer:
    """The peer, on the CPU."""
    import bitsandbytes

    optimizer: Optimizer = bitsandbytes.optim.AdamW8bit([param], **OWN)
    return optimizer


def moved(make: Make, seed: int, decades: float) -> Tensor:
    """Where the weights are after the run, from where they were."""
    torch.manual_seed(seed)
    start, size = torch.randn(SHAPE), 10 ** (-decades * torch.rand(SHAPE))
    param = torch.nn.Parameter(start.clone())
    optimizer = make(param)
    for _ in range(STEPS):
        param.grad = torch.randn(SHAPE) * size
        optimizer.step()
    return (param.detach() - start).double()


def main() -> None:
    """Print the least and largest distance of the seeds, relative to the movement of float32."""
    console = Console()
    rows = []
    for decades in DECADES:
        found: dict[str, list[float]] = {}
        for seed in range(SEEDS):
            full = moved(lambda p: torch.optim.AdamW([p], **OWN), seed, decades)
            for name, make in {"ours": ours, "bitsandbytes": theirs}.items():
                gap = (moved(make, seed, decades) - full).norm() / full.norm()
                found.setdefault(name, []).append(float(gap))
        spans = [f"{min(gaps):.3f} - {max(gaps):.3f}" for gaps in found.values()]
        rows.append([str(decades), *spans])
    console.print(environment_line())
    print_table(console, "", ["decades", "ours", "bitsandbytes"], rows)


if __name__ == "__main__":
    main()
