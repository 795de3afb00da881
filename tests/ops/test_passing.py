"""What ops hold in passing on a GPU, as estimates count it: what their launchers really make."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton")

from benchmarks.host_time import without_accelerator
from lowrank_optim.ops import cosine, cublas, passing, triton
from lowrank_optim.tensors.alive import Alive
from tests.ops import ops_cases as cases
from tests.ops import ops_cosines, ops_factors
from tests.ops.test_cublas import HANDLE, Library

COSINES = ("cosine_scores", "cosine_project_", "cosine_top_project_", "cosine_lift_add_")
LIFTS = ("lift_add_scaled_", "lift_add_sign_")


def held(op: str, given: dict[str, Any]) -> int:
    """Most bytes of what a call of Triton's launcher makes; no kernel is launched."""
    alive = Alive()
    alive.leave_out(x for x in tree_leaves(given) if isinstance(x, torch.Tensor))
    with without_accelerator(), alive, torch.no_grad():
        getattr(triton, op)(*given.values())
    return alive.most


def counted(op: str, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What an estimate adds."""
    monkeypatch.setattr(passing, "kind_of", lambda x: "cuda")
    return passing.passing(getattr(torch.ops.lowrank_optim, op).default, (), given)


@pytest.mark.parametrize("tiles", ["one", "columns", "several"])
@pytest.mark.parametrize("basis", ["dct2", "dct3"])
@pytest.mark.parametrize("op", COSINES)
def test_cosines(op: str, basis: str, tiles: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole matrices, slices of one, slices of two at once; those of the widest of two shapes."""
    m, widths = 64, (300, 300, 300, 20)
    size = m * (140 if tiles != "one" else 1000)
    monkeypatch.setitem(cosine.TILE_ELEMENTS, True, size)
    monkeypatch.setitem(cosine.TOGETHER_ELEMENTS, True, size * (2 if tiles == "several" else 1))
    given = ops_cosines.arguments(op, torch.bfloat16, n=m, widths=widths, basis=basis)
    found = counted(op, given, monkeypatch)
    places = 4 * m if op == "cosine_lift_add_" else 0  # of the narrow matrix, made after
    real = held(op, given)
    assert real > 4 * m * 100
    assert real - places <= sum(found) <= real + 8 * m


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("op", LIFTS)
def test_lifts(op: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right operands that are made ready in bfloat16, of the largest matrix; else none."""
    made = cases.matrices(op, dtype)
    given = {name: made[name] for name in cases.names(op)}
    given["bases"] = [x.to(dtype) for x in given["bases"]]
    real = held(op, given)
    assert (real > 0) == (dtype == torch.bfloat16)
    assert sum(counted(op, given, monkeypatch)) == real


@pytest.mark.parametrize("how", ["rows", "columns", "slice"])
@pytest.mark.parametrize("op", ["direction_add_", "decay_", "addmm_"])
def test_weights_with_gaps(op: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of one after the other; and of all directions that do not lie row after row."""
    made = ops_factors.arguments(op, torch.bfloat16, how=how)
    given = {name: made[name] for name in cases.names(op)}
    if op == "addmm_":  # operands as cuBLAS has them
        monkeypatch.setattr(cublas, "_library", lambda device: Library())
        monkeypatch.setattr(cublas, "_handle", lambda: HANDLE)
        full = [n for n, w in enumerate(given["params"]) if w.numel()]
        given = {name: [xs[n] for n in full] for name, xs in given.items()}
        given |= {k: [x.contiguous().bfloat16() for x in given[k]] for k in ("lefts", "rights")}
    real = held(op, given)
    assert (real > 0) == (how == "slice" or (how, op) == ("columns", "direction_add_"))
    assert sum(counted(op, given, monkeypatch)) == real


@pytest.mark.parametrize("how", ["rows", "columns", "slice"])
def test_a_step_asks_for_the_copy_of_weights_with_gaps(how: str) -> None:
    """In float32, as it asks for all: bfloat16 weights take half of it."""
    w = cases.strided(torch.randn(8, 6).bfloat16(), how)
    given = {"params": [w], "updates": [torch.randn(8, 6)], "decay": 0.9, "lr": 0.1}
    like = torch.empty_strided(w.shape, w.stride(), dtype=w.dtype, device="meta")
    real = held("direction_add_", given)
    assert (real > 0) == (how != "rows")
    assert passing.of_sum(like, True) * 4 * w.numel() == 2 * real


def test_others_and_hosts_hold_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    given = ops_cosines.arguments("cosine_scores", torch.float32, n=8)
    op = torch.ops.lowrank_optim.cosine_scores.default
    assert passing.passing(op, (), given) == []  # of a CPU
    assert passing.passing(op, (*given.values(),), {}) == []
    assert counted("cosine_scores", given, monkeypatch)
    x = torch.randn(4, 4)
    assert passing.passing(torch.ops.aten.mm.default, (x, x), {}) == []
    assert passing.passing(torch.ops.lowrank_optim.column_norms.default, ([x],), {}) == []
