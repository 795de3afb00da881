"""Each op over its bytes floor, and beside fused AdamW, bitsandbytes, torchao and addmm.

Run as ``python -m benchmarks.kernels``. The floor of an op is a plain copy that moves as many bytes
as the op must, timed in the same rounds. Everything compared runs in one process, in turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.common import LLAMA_SHAPES, environment, environment_line, print_table
from benchmarks.matrices import galore, gemm_floor, linear_weights
from benchmarks.op_costs import floor
from benchmarks.timing import interleaved, peer, ratio
from lowrank_optim.ops import native, reference
from lowrank_optim.ops.passing import named
from lowrank_optim.ops.quant import Quantized, dynamic_map, layout

Work = Callable[[], object]
FLOOR, FUSED, ADDMM, BNB, AO = "copy", "fused AdamW", "addmm", "bitsandbytes", "torchao"
BACKENDS = {"native": native, "reference": reference}
WIDTH = 2048
"""Columns of the tensors that elementwise ops get."""
TARGETS = {
    ("adamw_direction_8bit_", FUSED): 1.5,
    ("adamw_direction_8bit_", BNB): 0.1,
    ("lift_add_scaled_", ADDMM): 1.15,
    ("lift_add_sign_", ADDMM): 1.6,
    ("coordinate_add_", FUSED): 1.0,
    ("coordinate_adamw_", FUSED): 1.0,
}
HOST_MS = 2.0


def copy_floor(count: int) -> Work:
    """A copy that reads and writes ``count`` bytes in all."""
    source = torch.ones(max(1, count // 8))
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def elementwise(elements: int) -> dict[str, tuple[Any, ...]]:
    """Arguments of every op on flat tensors."""
    shape = (max(1, elements // WIDTH), WIDTH)
    g, m, v, out = torch.randn(shape), torch.randn(shape), torch.rand(shape), torch.empty(shape)
    signed, unsigned = (dynamic_map(s, g.device) for s in (True, False))
    rcb = [[x] for x in layout(shape)]
    blocks = layout(shape).scales
    kept = [
        Quantized(torch.zeros(shape, dtype=torch.uint8), torch.empty(blocks), s)
        for s in (True, False)
    ]
    (c1, s1, _), (c2, s2, _) = kept
    for x, q in ((m, kept[0]), (v, kept[1])):
        reference.quantize_blockwise_([x], [q.codes], [q.scales], q.map, *rcb)
    betas, own = (0.9, 0.999), ([1e-8], [], [], [])
    narrow = torch.empty(shape, dtype=torch.bfloat16)
    one, two = ([c1], [s1]), ([c1], [s1], [c2], [s2])
    return {
        "adamw_direction_": ([g], [m], [v], [out], *betas, *own),
        "lion_direction_": ([g], [m], [out], *betas, []),
        "moment_": ([g], [m], [out], 0.9, 0.1, []),
        "adamw_direction_8bit_": ([g], *two, [out], signed, unsigned, *rcb, *betas, *own),
        "lion_direction_8bit_": ([g], *one, [out], signed, *rcb, *betas, []),
        "moment_8bit_": ([g], *one, [out], signed, *rcb, 0.9, 0.1, []),
        "quantize_blockwise_": ([g], *one, signed, *rcb),
        "dequantize_blockwise_": (*one, [out], signed, *rcb),
        "stochastic_round_": ([g], [narrow], [7], [0], [WIDTH], [WIDTH], [1]),
        "column_norms": ([g],),
        "decay_": ([out], 0.999, [torch.ones(())], []),
        **of_buckets(elements),
    }


def of_buckets(elements: int) -> dict[str, tuple[Any, ...]]:
    """Arguments of the ops on a bucket's small numbers: an age a row, three norms a column."""
    ages = torch.randint(0, 100, (elements,)).float()
    lows, directions = (torch.rand(1, elements) for _ in range(2))
    norms = [lows], [directions], [lows + 1], [torch.zeros(())], [torch.empty(1, elements)]
    steps = [ages], [torch.empty(elements)], [torch.empty(elements)], 0.9, 0.999, 1e-8
    return {
        "count_": ([ages.clone()], []),
        "row_steps_": steps,
        "residual_factors_": (*norms, 1e-8, 0.25, 1e-6, 1.01, []),
    }


def moved(op: str, arguments: Sequence[Any]) -> int:
    """Bytes that must cross memory."""
    return floor(op, named(getattr(torch.ops.lowrank_optim, op).default, arguments, {})).bytes


def dense_peers(elements: int) -> dict[str, Work]:
    """Whole AdamW steps on as many elements."""
    shape = (max(1, elements // WIDTH), WIDTH)

    def parameter() -> torch.nn.Parameter:
        param = torch.nn.Parameter(torch.randn(shape))
        param.grad = torch.randn(shape)
        return param

    found: dict[str, Work] = {FUSED: torch.optim.AdamW([parameter()], lr=1e-9, fused=True).step}
    eight = peer("bitsandbytes.optim", "AdamW8bit")
    if eight is not None:
        found[BNB] = eight([parameter()], lr=1e-9).step
    compiled = peer("torchao.optim", "AdamW8bit")
    if compiled is not None:  # its first step compiles for about a minute: the warm-up holds it
        found[AO] = compiled([parameter()], lr=1e-9).step
    return found


def dense(args: argparse.Namespace) -> list[dict[str, Any]]:
    """P7: elementwise ops."""
    works: dict[str, Work] = dense_peers(args.elements)
    cases = elementwise(args.elements)
    counts = {op: moved(op, arguments) for op, arguments in cases.items()}
    for op, arguments in cases.items():
        works[f"{FLOOR} {op}"] = copy_floor(counts[op])
        for name, module in available().items():
            works[f"{name} {op}"] = _bound(getattr(module, op), arguments)
    times = interleaved(works, args.rounds)
    bases = [name for name in (FUSED, BNB, AO) if name in works]
    return [_row(times, op, name, bases, count=counts[op]) for op in cases for name in available()]


def available() -> dict[str, Any]:
    """The backends that this machine's CPU has."""
    return {k: m for k, m in BACKENDS.items() if k == "reference" or native.available("cpu")[0]}


def _bound(op: Callable[..., object], arguments: Sequence[Any]) -> Work:
    return lambda: op(*arguments)


def _row(
    times: Mapping[str, list[float]], op: str, name: str, bases: Sequence[str], count: int
) -> dict[str, Any]:
    own = f"{name} {op}"
    return {
        "op": op,
        "backend": name,
        "ms": statistics.median(times[own]),
        "bytes": count,
        "over_floor": ratio(times, own, f"{FLOOR} {op}"),
        **{f"over_{base}": ratio(times, own, base) for base in bases},
        "targets": {b: TARGETS[op, b] for b in bases if (op, b) in TARGETS and name == "native"},
    }


def applies(args: argparse.Namespace, dtype: str) -> list[dict[str, Any]]:
    """P2 and P3: fused applies on the matrices of a LLaMA, beside ``W <- c W - P N``."""
    params = linear_weights(args.model, args.layers, getattr(torch, dtype))
    weights = [p.data if p.shape[0] <= p.shape[1] else p.data.mT for p in params]
    grads = [p.grad if p.shape[0] <= p.shape[1] else p.grad.mT for p in params]
    r = args.rank
    bases = [torch.randn(w.shape[0], r).to(w.dtype) for w in weights]
    lows = [torch.randn(r, w.shape[1]) for w in weights]
    columns = [torch.rand(1, w.shape[1]) for w in weights]
    index = [torch.randperm(w.shape[0])[:r].sort().values.int() for w in weights]
    narrow = [x.to(weights[0].dtype) for x in lows]
    small = 0.999, 1e-9, 0.25
    arguments: dict[str, tuple[Any, ...]] = {
        "lift_add_scaled_": (weights, grads, bases, lows, lows, columns, *small),
        "lift_add_sign_": (weights, grads, bases, lows, lows, *small, 1.0),
        "coordinate_add_": (weights, grads, index, lows, *small, 1.0, "sign"),
    }
    moments = [[torch.zeros_like(x, dtype=torch.float32) for x in lows] for _ in range(2)]
    each = [[x] * len(lows) for x in (1e-8, 1e-9, 1e-9)]
    arguments["coordinate_adamw_"] = (
        weights, grads, index, *moments, 0.9, 0.999, *each, 0.999, "sign",
    )  # fmt: skip

    def addmm() -> None:
        for w, p, n in zip(weights, bases, narrow, strict=True):
            w.addmm_(p, n, beta=0.999, alpha=-1e-9)

    fused = torch.optim.AdamW(params, lr=1e-9, fused=True)
    works: dict[str, Work] = {ADDMM: addmm, FUSED: fused.step}
    counts = {op: moved(op, values) for op, values in arguments.items()}
    for op, values in arguments.items():
        works[f"{FLOOR} {op}"] = copy_floor(counts[op])
        for name, module in available().items():
            works[f"{name} {op}"] = _bound(getattr(module, op), values)
    times = interleaved(works, args.rounds)
    return [
        {**_row(times, op, name, (ADDMM, FUSED), counts[op]), "dtype": dtype}
        for op in arguments
        for name in available()
    ]


def host_time(args: argparse.Namespace) -> dict[str, Any]:
    """P8: a step on as many matrices as LLaMA-1B has, too small for any arithmetic to count.

    What is left after the calls of the GEMM floor on the same matrices is Python and dispatch, ours
    and that of the elementwise ops.
    """
    layers = LLAMA_SHAPES["llama-1b"][2]
    params = []
    for _ in range(7 * layers):
        param = torch.nn.Parameter(torch.randn(16, 24))
        param.grad = torch.randn(16, 24)
        params.append(param)
    works = {"step": galore(params, 4).step, "gemms": gemm_floor(params, 4)}
    times = interleaved(works, max(args.rounds, 21), warmup=3)
    step, gemms = (statistics.median(times[k]) for k in ("step", "gemms"))
    rest = statistics.median(a - b for a, b in zip(times["step"], times["gemms"], strict=True))
    return {
        "matrices": len(params),
        "step_ms": step,
        "gemm_calls_ms": gemms,
        "host_ms": rest,
        "target": HOST_MS,
    }


def show(console: Console, results: dict[str, Any], args: argparse.Namespace) -> None:
    """The tables."""
    titles = [(f"Elementwise ops, {args.elements / 1e6:.1f} M elements, float32", results["dense"])]
    for rows in results["applies"]:
        what = f"{args.layers} layers of {args.model}, rank {args.rank}, {rows[0]['dtype']}"
        titles.append((f"Fused applies, {what}", rows))
    for title, rows in titles:
        bases = [k.removeprefix("over_") for k in rows[0] if k.startswith("over_")]
        header = ("op", "backend", "ms", *(f"/ {b}" for b in ("floor", *bases[1:])), "target")
        print_table(console, title, header, [_cells(row, bases) for row in rows])
    found = results["host"]
    row = [f"{found[k]:.2f}" for k in ("step_ms", "gemm_calls_ms", "host_ms")]
    title = f"P8: host time of a step, {found['matrices']} matrices of 16 x 24"
    header = ("", "step ms", "GEMM calls ms", "the rest ms", "target")
    print_table(console, title, header, [("GaLoreAdamW", *row, f"<= {found['target']}")])


def _cells(row: dict[str, Any], bases: Sequence[str]) -> tuple[str, ...]:
    targets = ", ".join(f"<= {t} of {base}" for base, t in row["targets"].items())
    ratios = (f"{row[f'over_{base}']:.2f}" for base in bases)
    return row["op"], row["backend"], f"{row['ms']:.2f}", *ratios, targets


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Ops over their floors, side by side.")
    parser.add_argument("--elements", type=int, default=1 << 23, help="of elementwise ops")
    parser.add_argument("--model", choices=LLAMA_SHAPES, default="llama-130m")
    parser.add_argument("--layers", type=int, default=2, help="of the model (default: 2)")
    parser.add_argument("--rank", type=int, default=256)
    parser.add_argument("--dtype", default="float32,bfloat16", help="of the fused applies")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="default: torch's choice")
    parser.add_argument("--out", type=Path, default=Path("runs/kernels.json"))
    return parser.parse_args(arguments)


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
        "dense": dense(args),
        "applies": [applies(args, dtype) for dtype in args.dtype.split(",")],
        "host": host_time(args),
    }
    show(console, results, args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    console.print(f"written: {args.out}", highlight=False)


if __name__ == "__main__":
    main()
