"""What a step costs its host, beside torch's AdamW, on matrices so small that arithmetic is little.

    python -m benchmarks.host_time
    python -m benchmarks.host_time --layers 8 --only GaLoreAdamW,FiraAdamW

An accelerator waits for its host where the host is slow to ask, so this is what bounds a step of
few or small matrices. No accelerator is needed: tensors lie in the memory of the host, the package
takes them for those of an accelerator, and Triton's launchers do all but launch. Ops of torch are
timed with their arithmetic, of a few hundred numbers each. Figures are medians of the CPU time of
the process, over rounds in which everything is run in turns.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import logging
import statistics
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from benchmarks.common import environment, environment_line, print_table
from benchmarks.counting import served_by_triton
from benchmarks.gpu import variants
from benchmarks.gpu.times import STEPS
from benchmarks.matrices import weights
from benchmarks.timing import Work, cpu_milliseconds, interleaved, ratio
from lowrank_optim.ops import cublas

SHAPES: list[tuple[int, ...]] = [(8, 8)] * 4 + [(12, 8)] * 2 + [(8, 12)] + [(8,)] * 2
"""Of the seven matrices of a layer, three kinds of them, and of its two norms, as of LLaMA."""
RANK = 4
BASE = "torch AdamW foreach"
TARGET = GPUTarget("cuda", 90, 32)


class _Launched:
    """Stands for compiled code: a launch of it is counted, and does nothing."""

    function = packed_metadata = None
    count = 0

    def launch_metadata(self, *args: object) -> None:
        """None, as where nobody has asked for it."""

    def run(self, *args: object) -> None:
        """What hands the arguments to a driver."""
        _Launched.count += 1


def _products() -> SimpleNamespace:
    """In the place of cuBLAS: calls of C that take as many arguments, and answer 0 to handle 0."""
    found = {}
    for name, kinds in cublas.CALLS.items():
        found[name] = ctypes.CDLL(None)["abs"]
        found[name].argtypes = kinds
    return SimpleNamespace(**found)


@contextmanager
def without_accelerator() -> Iterator[None]:
    """Tensors of the host taken for those of an accelerator; kernels of ours are not run."""
    made, products = _Launched(), _products()

    def compiled(
        self: Any, key: str, signature: Any, device: Any, *args: Any, **kwargs: Any
    ) -> Any:
        self.device_caches[device][0][key] = made
        return made

    pretended = SimpleNamespace(
        get_current_device=lambda: -1,  # code that is kept for it is for no other device
        get_current_stream=lambda device: 0,
        get_current_target=lambda: TARGET,
    )
    with (
        mock.patch.object(driver, "_active", pretended),
        served_by_triton(),
        mock.patch.object(JITFunction, "_do_compile", compiled),
        mock.patch.object(cublas, "_library", lambda device: products),
        mock.patch.object(cublas, "_handle", lambda: 0),
    ):
        yield


def works(layers: int, dtype: torch.dtype, only: Sequence[str]) -> dict[str, Work]:
    """A step of each, on weights of its own: those of kernels that do not run may be any numbers.

    From others' a basis could not be found, and would be sought at every step.
    """

    def params() -> list[torch.nn.Parameter]:
        return weights(SHAPES * layers, dtype)

    adamw = torch.optim.AdamW
    found: dict[str, Work] = {
        BASE: adamw(params(), lr=variants.LR, foreach=True).step,
        "torch AdamW fused": adamw(params(), lr=variants.LR, fused=True).step,
    }
    for label, (name, gap, options) in STEPS.items():
        if "state_device" not in options and (not only or label in only):
            found[label] = variants.ours(name, params(), RANK, gap, **options).step
    return found


def measure(layers: int, dtype: torch.dtype, only: Sequence[str], rounds: int) -> dict[str, Any]:
    """Medians in milliseconds, ratios to torch's AdamW, and launches of our kernels a step."""
    with without_accelerator(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        variant = works(layers, dtype, only)
        launches = {}
        for label, work in variant.items():
            for _ in range(2):
                work()
            before = _Launched.count
            work()
            launches[label] = _Launched.count - before
        times = interleaved(variant, rounds, clock=cpu_milliseconds)
    return {
        label: {
            "ms": statistics.median(own),
            "over_adamw": ratio(times, label, BASE),
            "launches": launches[label],
        }
        for label, own in times.items()
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", default="1,2,8", help="of seven matrices each (default: 1,2,8)")
    parser.add_argument("--dtype", default="bfloat16", help="of the weights (default: bfloat16)")
    parser.add_argument("--only", default="", help="labels, comma-separated (default: all)")
    parser.add_argument("--rounds", type=int, default=101)
    parser.add_argument("--out", type=Path, default=Path("runs/host_time.json"))
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the tables, write the file."""
    args = parse(arguments)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # what kernels that do not run leave behind may be any bits
    logging.getLogger("lowrank_optim").setLevel(logging.ERROR)
    console = Console()
    console.print(environment_line(), highlight=False)
    only = [label for label in args.only.split(",") if label]
    results: dict[str, Any] = {"environment": environment(), "rows": {}}
    for layers in map(int, args.layers.split(",")):
        rows = measure(layers, getattr(torch, args.dtype), only, args.rounds)
        results["rows"][layers] = rows
        what = f"{7 * layers} matrices of 3 shapes and {2 * layers} norms, {args.dtype}"
        title = f"One step of {what}: CPU time of the host"
        cells = [
            (label, f"{row['ms']:.2f}", f"{row['over_adamw']:.1f}", str(row["launches"]))
            for label, row in rows.items()
        ]
        print_table(console, title, ("", "ms", f"over {BASE}", "our kernels"), cells)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    console.print(f"written: {args.out}", highlight=False)


if __name__ == "__main__":
    main()
