"""What a dense step asks for before it writes anything, beside what it takes then."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from lowrank_optim import ops
from lowrank_optim.engine import dense
from lowrank_optim.ops import passing, schema
from lowrank_optim.ops.reference import storage
from tests import cases
from tests.reliability.injection import Limited

TILE = 1 << 15
SLACK = 8192
"""Bytes of steps, scales and tables, which lie in an allocator's segment of small blocks."""
FORMATS: list[dict[str, Any]] = [{}, *({"state_dtype": x} for x in ("8bit", "bfloat16", "4bit"))]
WAYS: list[dict[str, Any]] = [
    {}, {"maximize": True}, {"capturable": True}, {"stochastic_rounding": True},
    {"maximize": True, "capturable": True}, {"lr": torch.tensor(1e-3)},
]  # fmt: skip
CASES = [
    (name, {**kept, **way}, dtype, backend)
    for name, kept, way, dtype, backend in itertools.product(
        ("GaLoreAdamW", "GaLoreLion", "GaLoreSGD"), FORMATS, WAYS,
        (torch.float32, torch.bfloat16), ("native", "reference"),
    )
]  # fmt: skip
SOME = [
    ("GaLoreAdamW", {}, torch.bfloat16, "native"),
    ("GaLoreAdamW", {"state_dtype": "8bit", "capturable": True}, torch.float32, "native"),
    ("GaLoreLion", {"state_dtype": "4bit", "maximize": True}, torch.bfloat16, "native"),
    ("GaLoreAdamW", {"state_dtype": "8bit"}, torch.bfloat16, "reference"),
    ("GaLoreAdamW", {"state_dtype": "bfloat16"}, torch.bfloat16, "reference"),
    ("GaLoreSGD", {"maximize": True}, torch.float32, "reference"),
    ("GaLoreAdamW", {"stochastic_rounding": True}, torch.bfloat16, "reference"),
]
"""Both that are short without Triton: what kernels read and write of each is a copy for torch."""


@pytest.mark.parametrize(
    ("name", "options", "dtype", "backend"),
    [pytest.param(*x, marks=() if x in SOME else pytest.mark.slow) for x in CASES],
)
def test_what_is_asked_for_is_what_a_dense_step_takes(
    name: str,
    options: dict[str, Any],
    dtype: torch.dtype,
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On CUDA without Triton, within two tiles; what ops make in themselves is counted too."""
    cases.branching(monkeypatch, lambda _: True)
    monkeypatch.setenv("LOWRANK_OPTIM_BACKEND", backend)
    monkeypatch.setattr(passing, "kind_of", lambda _: "cuda")
    monkeypatch.setattr(ops.tiles, "ACCELERATOR_TILE_ELEMENTS", TILE)
    for owner in (ops.tiles, storage):
        monkeypatch.setattr(owner, "TILE_ELEMENTS", TILE // 64)
    monkeypatch.setattr(schema, "is_heard", lambda _: False)  # ops run where the count sees them
    monkeypatch.setattr(dense, "_flags", lambda grads: [torch.tensor(True) for _ in grads])
    asked: list[int] = []
    monkeypatch.setattr(
        dense, "ask", lambda sizes, dtype, _: asked.append(sum(sizes) * dtype.itemsize)
    )
    param = nn.Parameter(torch.randn(512, 256).to(dtype))
    param.grad = torch.randn(512, 256).to(dtype)
    groups = [{"params": [param], "rank": None}]
    optimizer = cases.build(name, groups, weight_decay=0.1, **options)
    optimizer.step()
    with Limited(1 << 40, [param, param.grad, *optimizer.state[param].values()]) as meter:
        optimizer.step()
    assert meter.most - SLACK <= asked[-1] <= meter.most + 2 * 4 * TILE
