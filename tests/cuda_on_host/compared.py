"""One op by the CUDA kernels and by those of the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowrank_optim.ops import native
from tests.compare import assert_close
from tests.cuda_on_host.host import Host
from tests.ops import ops_cases as cases

SUMS = ["column_norms"]
"""Added up in another order: within the table of tolerances. All else has the same bits."""


def same_bits(actual: Tensor, expected: Tensor, what: str) -> None:
    """Every bit, but that one NaN is as good as another."""
    actual = actual.as_subclass(Tensor)
    assert actual.dtype == expected.dtype and actual.shape == expected.shape, what
    wrong = (actual != expected) & ~((actual != actual) & (expected != expected))
    if actual.is_floating_point():  # the sign of a zero
        wrong |= (actual == expected) & (actual.signbit() != expected.signbit())
    places = wrong.nonzero()[:3].tolist()
    assert not wrong.any(), f"{what} at {places}: {actual[wrong][:3]} for {expected[wrong][:3]}"


def compare(host: Host, op: str, arguments: dict[Any, Any], device: int = 0) -> None:
    """Everything that the op writes or returns, as the CPU library has it."""
    here, there = cases.on("cpu", arguments), host.place(arguments, device)
    wanted = getattr(native, op)(*here.values())
    found = host.call(op, there)
    compare_tensors(op, {**there, "": found}, {**here, "": wanted})


def compare_tensors(op: str, found: dict[Any, Any], wanted: dict[Any, Any]) -> None:
    for name, expected in wanted.items():
        if isinstance(expected, list) and expected and isinstance(expected[0], Tensor):
            for i, (x, y) in enumerate(zip(found[name], expected, strict=True)):
                if op in SUMS and name == "":
                    assert_close(x.as_subclass(Tensor), y, torch.float32)
                else:
                    same_bits(x, y, f"{op} {name} {i}")
