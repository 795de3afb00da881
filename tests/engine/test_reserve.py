"""What a step asks for before it writes anything, beside what it takes then."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from lowrank_optim import ops
from lowrank_optim.engine import dense, reserve
from lowrank_optim.engine import step as engine_step
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
    monkeypatch.setenv("LOWRANK_OPTIM_BACKEND", backend)
    param = nn.Parameter(torch.randn(512, 256).to(dtype))
    param.grad = torch.randn(512, 256).to(dtype)
    compare(name, options, param, monkeypatch)


@pytest.mark.parametrize("name", ["GaLoreAdamW", "GaLoreAdafactor"])
@pytest.mark.parametrize("maximize", [False, True])
def test_gradients_by_columns_are_asked_for_by_rows(
    name: str, maximize: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was short by a tile of it, and the whole of it with Adafactor."""
    monkeypatch.setenv("LOWRANK_OPTIM_BACKEND", "reference")
    param = nn.Parameter(torch.randn(256, 512).mT)
    param.grad = torch.randn(256, 512).mT
    compare(name, {"maximize": maximize}, param, monkeypatch)


def compare(
    name: str, options: dict[str, Any], param: nn.Parameter, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases.branching(monkeypatch, lambda _: True)
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
    groups = [{"params": [param], "rank": None}]
    optimizer = cases.build(name, groups, weight_decay=0.1, **options)
    optimizer.step()
    assert param.grad is not None
    with Limited(1 << 40, [param, param.grad, *optimizer.state[param].values()]) as meter:
        optimizer.step()
    assert meter.most - SLACK <= asked[-1] <= meter.most + 2 * 4 * TILE


MATRICES: list[tuple[str, dict[str, Any]]] = [
    ("GaLoreAdamW", {}), ("GaLoreAdamW8bit", {}), ("FiraAdamW", {}), ("ApolloAdamW", {}),
    ("FrugalAdamW", {}), ("FrugalAdamW", {"projector": "columns"}), ("DCTAdamW", {}),
    ("SSTAdamW", {"factors": "active"}), ("GaLoreAdamW", {"capturable": True}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options"), MATRICES, ids=str)
def test_what_is_asked_for_is_what_matrices_take(
    name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a rehearsal, which sees what ops make in themselves, and no views of what was there."""
    cases.branching(monkeypatch, lambda _: True)
    monkeypatch.setenv("LOWRANK_OPTIM_BACKEND", "reference")
    params = [nn.Parameter(torch.randn(128, 256)) for _ in range(3)]
    for param in params:
        param.grad = torch.randn(128, 256)
    optimizer = cases.build(name, params, rank=16, weight_decay=0.1, **options)
    optimizer.step()
    asked: list[int] = []
    monkeypatch.setattr(reserve, "ask", lambda sizes, *_: asked.append(sum(sizes)))
    taken: list[int] = []
    written = reserve.written

    def metered(work: Any, chosen: Any, undo: Any, write: Any) -> None:
        def counted(own: Any, undo: Any) -> None:
            there = [*params, *(p.grad for p in params)]
            held = [*own, *(w.coords for w in own), *optimizer.state.values()]
            meter = Limited(1 << 40, [*there, *_tensors(held)])
            with meter, pytest.MonkeyPatch.context() as heard:
                heard.setattr(schema, "is_heard", lambda _: False)
                write(own, undo)
            taken.append(meter.most)

        written(work, chosen, undo, counted)

    monkeypatch.setattr(engine_step, "written", metered)
    optimizer.step()
    assert len(asked) == len(taken) >= 1
    for ask, most in zip(asked, taken, strict=True):
        assert most - SLACK <= ask <= most + SLACK


def _tensors(found: list[Any]) -> list[torch.Tensor]:
    """Of dicts, and of fields of what has some."""
    lists = [
        [*x.values()] if isinstance(x, dict) else [getattr(x, n, None) for n in x.__slots__]
        for x in found
    ]
    return [x for own in lists for x in own if isinstance(x, torch.Tensor)]
