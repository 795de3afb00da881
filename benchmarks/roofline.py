"""A model of an optimizer step on a GPU: bytes, flops and launches, and the time they take.

Run as ``python -m benchmarks.roofline``. Nothing here is measured. A step is taken by tensors
without data and counted (:mod:`benchmarks.counting`); a kernel takes the longest of its bytes over
the bandwidth, its flops over the peak and its launches over their rate; and kernels follow each
other. The bound is what no code can pass: every weight and every moment read and written once,
gradients and bases read once, beside the products at their peak.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from rich.console import Console
from torch import nn
from torch.optim import Optimizer

import lowrank_optim
from benchmarks.common import LLAMA_SHAPES, markdown_table, print_table
from benchmarks.counting import MATRIX, Kernel, Launches, pretended_accelerator
from benchmarks.matrices import NEVER, linear_shapes
from lowrank_optim import memory, ops
from lowrank_optim.memory import GIB


class Device(NamedTuple):
    """A card by the data sheet of its vendor."""

    name: str
    bandwidth: float
    """Bytes a second."""
    matrix: float
    """Dense bfloat16 products with float32 sums, flops a second."""
    scalar: float
    """float32 outside the matrix units."""
    source: str
    factors: bool = True
    """Whether products read their factors there, as those of cuBLAS do: else decay is a pass."""


DEVICES = (
    Device("RTX 4090", 1.008e12, 165.2e12, 82.6e12, "NVIDIA Ada GPU architecture, appendix A"),
    Device("A100 80GB", 2.039e12, 312e12, 19.5e12, "NVIDIA A100 80GB SXM data sheet"),
    Device("H100", 3.35e12, 989.4e12, 66.9e12, "NVIDIA H100 SXM data sheet, half of its sparse"),
    Device("MI300X", 5.3e12, 1307.4e12, 163.4e12, "AMD Instinct MI300X data sheet", False),
)
LAUNCH = 4e-6
"""Seconds between the starts of two kernels that have nothing to do. No data sheet has it: an
assumption, of the order that profilers show; Python between two launches is not in it."""

VOCAB = 32000
RANKS = {"llama-1b": 512, "llama-7b": 1024}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "AdamW fused": ("AdamW", {"fused": True}),
    "GaLore": ("GaLoreAdamW", {"projector": "svd", "update_proj_gap": NEVER}),
    "GaLore 8-bit": ("GaLoreAdamW8bit", {"projector": "svd", "update_proj_gap": NEVER}),
    "Fira": ("FiraAdamW", {"projector": "svd", "update_proj_gap": NEVER}),
    "FRUGAL basis": ("FrugalAdamW", {"projector": "svd", "update_proj_gap": NEVER}),
    "FRUGAL columns": ("FrugalAdamW", {"projector": "columns", "update_proj_gap": NEVER}),
    "DCT, gap 1": ("DCTAdamW", {"update_proj_gap": 1, "transform": "fft"}),
    "SST active": ("SSTAdamW", {"factors": "active", "steps_per_iteration": NEVER}),
    "SwitchLoRA": ("SwitchLoRAAdamW", {"interval": NEVER}),
}
"""Without a refresh, but for cosines. A step costs the same whatever a basis is."""


@dataclass(frozen=True)
class Counted:
    """One step of one optimizer."""

    name: str
    least: float
    """Bytes that must move."""
    kernels: tuple[tuple[float, Kernel], ...]
    """Of the present code, each with how often it is launched."""
    elsewhere: tuple[tuple[float, Kernel], ...]
    """The same of a device whose products take factors of the host alone."""

    @property
    def bytes(self) -> float:
        """That the present code moves."""
        return math.fsum(n * k.bytes for n, k in self.kernels)

    @property
    def flops(self) -> float:
        """Of products, on the matrix units or not."""
        return math.fsum(n * k.flops for n, k in self.kernels if k.op in PRODUCTS)

    @property
    def launches(self) -> float:
        """Of all kernels."""
        return math.fsum(n * k.launches for n, k in self.kernels)

    def times(self, n: float) -> Counted:
        """As often."""
        lists = (tuple((n * x, k) for x, k in own) for own in (self.kernels, self.elsewhere))
        return Counted(self.name, n * self.least, *lists)

    def __add__(self, other: Counted) -> Counted:
        """One after the other."""
        lists = self.kernels + other.kernels, self.elsewhere + other.elsewhere
        return Counted(self.name, self.least + other.least, *lists)

    def bound(self, device: Device) -> float:
        """Seconds that no fusing can pass."""
        return max(self.least / device.bandwidth, self.flops / device.matrix)

    def present(self, device: Device) -> float:
        """Seconds of the counted kernels, one after the other."""
        kernels = self.kernels if device.factors else self.elsewhere
        return math.fsum(n * seconds(k, device) for n, k in kernels)


def seconds(kernel: Kernel, device: Device) -> float:
    """The longest of what a kernel waits for."""
    peak = device.matrix if kernel.unit == MATRIX else device.scalar
    moved, worked = kernel.bytes / device.bandwidth, kernel.flops / peak
    return max(moved, worked, kernel.launches * LAUNCH)


def count(
    name: str,
    low: Sequence[tuple[int, ...]],
    dense: Sequence[tuple[int, ...]],
    rank: int,
    dtype: torch.dtype = torch.bfloat16,
) -> Counted:
    """The second step of an optimizer: the first made its state."""
    with pretended_accelerator():
        optimizer = _made(name, _fake(low, dtype), _fake(dense, dtype), rank)
        params = [p for g in optimizer.param_groups for p in g["params"]]
        optimizer.step()
        with Launches() as seen:
            optimizer.step()
        with mock.patch.object(ops, "reads_factors", lambda param: False), Launches() as passes:
            optimizer.step()
        held = memory.report(optimizer)
        weights = sum(p.numel() * p.element_size() for p in params)
    least = 3 * weights + held.basis + 2 * held.moments
    return Counted(name, least, *(tuple((1, k) for k in x.kernels) for x in (seen, passes)))


PRODUCTS = ("mm", "bmm", "addmm", "addmm_", "baddbmm_", "lift_add_scaled_", "lift_add_sign_")


def _fake(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> list[nn.Parameter]:
    params = [nn.Parameter(torch.empty(shape, dtype=dtype)) for shape in shapes]
    for p in params:
        p.grad = torch.empty_like(p)
    return params


def _made(name: str, low: list[nn.Parameter], dense: list[nn.Parameter], rank: int) -> Optimizer:
    cls, options = METHODS[name]
    if cls == "AdamW":
        return torch.optim.AdamW([*low, *dense], **options)
    groups: list[dict[str, Any]] = [{"params": low, "rank": rank}] if low else []
    groups += [{"params": dense, "rank": None}] if dense else []
    if not cls.startswith(("SST", "Switch")):
        options = {"stagger": False, **options}
    made: Optimizer = getattr(lowrank_optim, cls)(groups, **options)
    return made


def measure(model: str) -> list[Counted]:
    """All methods on all of a model."""
    return [whole(name, *LLAMA_SHAPES[model][:3], RANKS[model]) for name in METHODS]


FEW, MORE = 2, 4
"""Layers that are counted: every further one adds what the last ones did."""


def whole(name: str, hidden: int, mlp: int, layers: int, rank: int) -> Counted:
    """A LLaMA with its embedding, head and norms, which are dense."""

    def first(n: int) -> Counted:
        norms = [(hidden,)] * (2 * n)
        return count(name, linear_shapes(hidden, mlp) * n, norms, rank)

    few, more = first(FEW), first(MORE)
    beyond = (layers - FEW) / (MORE - FEW)
    table = count(name, [], [(VOCAB, hidden)], rank)
    last = count(name, [], [(hidden,)], rank)
    return few.times(1 - beyond) + more.times(beyond) + table.times(2) + last


def counts(rows: Sequence[Counted]) -> list[tuple[str, ...]]:
    """Cells of the first table."""
    return [
        (
            r.name, f"{r.least / GIB:.1f}", f"{r.bytes / GIB:.1f}", f"{r.bytes / r.least:.2f}",
            f"{r.flops / 1e12:.1f}", f"{r.launches:,.0f}",
        )
        for r in rows
    ]  # fmt: skip


def times(rows: Sequence[Counted]) -> list[tuple[str, ...]]:
    """Cells of the second: bound and present code on each device, in milliseconds."""
    return [
        (r.name, *(f"{1e3 * r.bound(d):.1f} / {1e3 * r.present(d):.1f}" for d in DEVICES))
        for r in rows
    ]


HEADER = ("", "least GiB", "counted GiB", "ratio", "Tflop of products", "launches")


def heaviest(row: Counted, device: Device, most: int = 6) -> list[tuple[str, float, float]]:
    """Where the time of the model goes: ops by seconds, with their launches."""
    found: dict[str, tuple[float, float]] = {}
    for n, k in row.kernels:
        took, launches = found.get(k.op, (0.0, 0.0))
        found[k.op] = took + n * seconds(k, device), launches + n * k.launches
    ranked = sorted(found.items(), key=lambda item: -item[1][0])
    return [(op, *own) for op, own in ranked[:most]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print both tables of each model, and write the figures where asked."""
    parser = argparse.ArgumentParser(description="A model of a step on a GPU; nothing is measured.")
    parser.add_argument("--models", nargs="+", choices=RANKS, default=list(RANKS))
    parser.add_argument("--markdown", action="store_true", help="as the documentation has them")
    parser.add_argument("--parts", action="store_true", help="the ops that take most, on an A100")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    args = parser.parse_args(arguments)
    console = Console()
    figures = {}
    for model in args.models:
        rows = measure(model)
        names = ("", *(d.name for d in DEVICES))
        about = f"{model}, rank {RANKS[model]}, bfloat16"
        tables = (
            (f"{about}: one step", HEADER, counts(rows)),
            (f"{about}: bound / present code in ms, by the model", names, times(rows)),
        )
        for title, header, cells in tables:
            if args.markdown:
                print(f"{title}\n\n{markdown_table(header, cells)}\n")
            else:
                print_table(console, title, header, cells)
        if args.parts:
            for row in rows:
                parts = [
                    (op, f"{1e3 * took:.1f}", f"{n:,.0f}")
                    for op, took, n in heaviest(row, DEVICES[1])
                ]
                print_table(console, f"{row.name} on {DEVICES[1].name}", ("", "ms", "#"), parts)
        keys = ("name", "least", "bytes", "flops", "launches")
        figures[model] = [{key: getattr(row, key) for key in keys} for row in rows]
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
