"""Moments in 8 bits on several ranks: the codes of one process, in blocks that no rank shares."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import lowrank_optim
from tests.sharded import training
from tests.sharded.ranks import Ranks, World
from tests.sharded.training import GAP, Case

Worlds = Callable[[int], Ranks]
SIZES = (2, 3, 4)
HOWS = ("fsdp", "fsdp columns", "tensors")
SHAPES = ("some blocks", "a few more", "no block", "small")
"""Blocks that edges of shards cross, blocks of rows, one block of whole rows, and none."""

CASES: dict[str, Case] = {
    "galore": Case("GaLoreAdamW8bit", {"on_refresh": "project"}),
    "galore svd": Case("GaLoreAdamW8bit", {"projector": "svd", "on_refresh": "reset"}),
    "galore columns": Case(
        "GaLoreAdamW8bit", {"projector": "columns", "rank": 0.5, "on_refresh": "project"}
    ),
    "galore larger side": Case("GaLoreAdamW8bit", {"proj_type": "reverse_std", "rank": 30}),
    "galore dct": Case("GaLoreAdamW8bit", {"projector": "dct", "maximize": True}),
    "galore lion": Case("GaLoreLion", {"state_dtype": "8bit", "projector": "random"}),
    "galore sgd": Case("GaLoreSGD", {"state_dtype": "8bit", "momentum": 0.9}),
    "fira": Case("FiraAdamW8bit", {"projector": "random"}),
    "frugal rows": Case("FrugalAdamW8bit", {"projector": "rows", "density": 0.5}),
    "frugal columns": Case(
        "FrugalLion", {"state_dtype": "8bit", "projector": "columns", "density": 0.5}
    ),
    "dct": Case("DCTAdamW8bit"),
    "dct memory": Case("DCTAdamW8bit", {"error_feedback": "float32", "update_proj_gap": GAP}),
    "dct memory 8bit": Case("DCTAdamW8bit", {"error_feedback": "8bit"}),
    "dct memory 4bit": Case("DCTAdamW8bit", {"error_feedback": "4bit"}),
}
CASES = {name: replace(case, only=SHAPES, steps=7) for name, case in CASES.items()}
TURNS = [(name, SIZES[i % 3], HOWS[i // 2 % 3]) for i, name in enumerate(CASES)]


def check(ranks: Worlds, size: int, name: str, case: Case) -> None:
    """Codes to the bit, whatever the basis: float32 has no room for a difference of 1e-16."""
    expected = training.reference(case.reference)
    training.assert_worth_comparing(case.reference, expected)
    values = ranks(size).run(name, training.train, case=case).checked()
    run = training.assembled(values)
    training.assert_equal_runs(run, expected)
    training.assert_all_moved(case.reference, run)


@pytest.mark.parametrize(("name", "size", "how"), TURNS)
def test_it_is_one_process(name: str, size: int, how: str, ranks: Worlds) -> None:
    check(ranks, size, name, replace(CASES[name], how=how))


@pytest.mark.slow
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", CASES)
def test_it_is_one_process_everywhere(name: str, size: int, how: str, ranks: Worlds) -> None:
    only = (*SHAPES, "four blocks")
    check(ranks, size, name, replace(CASES[name], how=how, only=only, steps=12))


BLOCKS = Case("FrugalAdamW8bit", {"density": 0.5}, only=("some blocks", "table", "four blocks"))
"""By rows that blocks lie within: whole tensors, of which one has moments at a time."""


@pytest.mark.parametrize("size", [3])
def test_blocks_of_rows_are_one_process(size: int, ranks: Worlds) -> None:
    check(ranks, size, "frugal block", replace(BLOCKS, steps=9))


DENSE: dict[str, tuple[tuple[int, ...], int, bool]] = {
    "rows": ((37, 260), 0, True),
    "experts": ((3, 24, 520), 0, True),
    "rows of experts": ((3, 24, 520), 1, True),
    "vector": ((5000,), 0, False),
    "narrow": ((60, 240), 0, False),
    "columns": ((16, 1024), 1, False),
    "few": ((4, 260), 0, False),
}
"""Shape, the dimension that is split, and whether moments are in 8 bits as in one process."""


def dense(world: World | None, dtypes: dict[str, str]) -> dict[str, Any]:
    """Dense weights after some steps, and what the optimizer says of them."""
    params = []
    for name, (shape, dim, _) in DENSE.items():
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        if world is not None:
            x = distribute_tensor(x, init_device_mesh("cpu", (world.size,)), [Shard(dim)])
        params.append((f"{name.replace(' ', '_')}.weight", nn.Parameter(x)))
    groups: Any = [
        {"params": [param], "rank": None, "state_dtype": dtypes[name]}
        for param, name in zip(params, DENSE, strict=True)
    ]
    optimizer = lowrank_optim.GaLoreAdamW(groups, lr=1e-2)
    before = str(optimizer.summary())
    for step in range(4):
        for _, param in params:
            draw = torch.Generator().manual_seed(50 + step)
            grad = torch.randn(param.shape, generator=draw, dtype=torch.float64)
            mesh = None if world is None else param.device_mesh
            param.grad = grad if mesh is None else distribute_tensor(grad, mesh, param.placements)
        optimizer.step()
    assert optimizer.summary().state_bytes == sum(
        (x.to_local() if hasattr(x, "to_local") else x).nbytes
        for state in optimizer.state.values()
        for x in state.values()
    )
    assert before == str(optimizer.summary()), "what is said before a step is what comes"
    found = {name: whole(param) for name, (_, param) in zip(DENSE, params, strict=True)}
    states = [optimizer.state[param] for _, param in params]
    kinds = {n: str(s["exp_avg"].dtype) for n, s in zip(DENSE, states, strict=True)}
    return {"weights": found, "kinds": kinds, "said": before}


def whole(x: Any) -> torch.Tensor:
    found: torch.Tensor = (x.full_tensor() if hasattr(x, "full_tensor") else x).detach()
    return found


@pytest.mark.parametrize("size", [2, 3])
def test_dense_weights(size: int, ranks: Worlds) -> None:
    """To the bit: of one process in 8 bits, or in float32 where ranks would share a block."""
    eight = dense(None, dict.fromkeys(DENSE, "8bit"))
    same = {name: "8bit" if in_8bit else "float32" for name, (_, _, in_8bit) in DENSE.items()}
    expected = dense(None, same)
    for own in ranks(size).run("dense", dense, dtypes=dict.fromkeys(DENSE, "8bit")).checked():
        for name, (shape, _, in_8bit) in DENSE.items():
            assert torch.equal(own["weights"][name], expected["weights"][name]), name
            assert own["kinds"][name] == ("torch.uint8" if in_8bit else "torch.float64"), name
            wide = not in_8bit and math.prod(shape) >= 4096
            assert (name in own["said"]) == wide, own["said"]
            assert torch.equal(eight["weights"][name], expected["weights"][name]) != wide, name
