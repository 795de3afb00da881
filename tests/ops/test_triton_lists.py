"""Lists of alike matrices: as many launches as of one, and what each would be alone.

Interpreted, or on a GPU, as ``test_triton.py``.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from lowrank_optim.ops import cosine as reference
from lowrank_optim.ops import triton as ops
from lowrank_optim.ops.triton import (
    coordinate,
    cosine,
    direction,
    factors,
    launch,
    norms,
    rows,
    turns,
)
from tests.ops import ops_cases, ops_cosines, ops_factors
from tests.ops.checks import check, run
from tests.ops.interpreted import INTERPRETED
from tests.ops.test_triton import DEVICE, MARKS

pytestmark = [] if INTERPRETED else MARKS
COUNT = 3
KERNELS = {
    "column_norms": 1,
    "coordinate_add_": 1,
    "decay_": 1,
    "direction_add_": 1,
    "count_": 1,
    "top_rows_": 1,
    "move_rows_": 1,
    "row_steps_": 1,
    "residual_factors_": 1,
    "row_dots_": 1,
    "turn_rows_": 1,
    "step_rows_": 1,
    "cosine_scores": 2,
    "cosine_project_": 2,
    "cosine_top_project_": 2 + 1 + 1,
    "cosine_lift_add_": 3,
    "cosine_adamw_": 2 + 1 + 3,
}
"""Beside FFTs and sums."""


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """By kernel; of lists, and not of the entries of one."""
    seen: Counter[str] = Counter()

    def counted(kernel: Any, *args: Any, **meta: Any) -> None:
        seen[kernel.__name__] += 1
        launch.launch(kernel, *args, **meta)

    for module in (coordinate, cosine, direction, factors, norms, rows, turns):
        monkeypatch.setattr(module, "launch", counted)
    monkeypatch.setenv("LOWRANK_OPTIM_BACKEND", "triton")
    return seen


def alike(op: str) -> ops_cases.Arguments:
    """Arguments of a call, all matrices of one shape; one of them is not finite."""
    if op in ops_cosines.COSINES:
        unsound = 1 if op == "cosine_lift_add_" else None
        found = ops_cosines.arguments(op, torch.float32, widths=(33,) * COUNT, unsound=unsound)
    elif op == "top_rows_":
        found = ops_cosines.told(torch.float32)
        found = {k: x[:COUNT] for k, x in found.items()}
    elif op == "move_rows_":  # of float32, and codes whose rows are whole words
        found = ops_cosines.moves()
        at = [n for n, x in enumerate(found["xs"]) if x.shape in ((12, 1), (12, 33), (12, 256))]
        found = {k: [x[n] for n in at] for k, x in found.items()}
    elif op in ops_factors.OPS:
        found = ops_factors.arguments(op, torch.float32)
        found = {k: [x[2]] * COUNT if isinstance(x, list) and x else x for k, x in found.items()}
    else:
        unsound = None if op == "column_norms" else 1
        shapes = [(17, 33)] * COUNT
        given = {"unsound": unsound, "factors": ops_cases.FACTORS}
        found = ops_cases.matrices(op, torch.float32, shapes=shapes, **given)
    return ops_cases.on(DEVICE, found)


@pytest.mark.parametrize("op", KERNELS)
def test_alike_matrices_share_their_launches(op: str, launches: Counter[str]) -> None:
    run(op, alike(op))
    assert sum(launches.values()) == KERNELS[op], launches


def test_others_have_launches_of_their_own(launches: Counter[str]) -> None:
    """Code is compiled for strides and shapes; results come in the order of the list."""
    x = torch.randn(12, 33, device=DEVICE)
    xs = [x, torch.randn(7, 5, device=DEVICE), x + 1, x.mT, x[:, ::2], x + 2, x[:0]]
    for got, y in zip(ops.column_norms(xs), xs, strict=True):
        check(got, (y.double().square().sum(0, keepdim=True).sqrt(), None), str(y.stride()))
    assert launches == {"column_norm_kernel": 5}


@pytest.mark.parametrize(("share", "together"), [(1, 1), (1, 2), (2, 1), (2, 2), (3, 5)])
def test_what_is_too_large_for_a_tile_is_cut(
    share: int, together: int, launches: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between columns, and between matrices: as many slices of several are one transform."""
    a = alike("cosine_project_")
    m, n = a["grads"][0].shape
    width = -(-n // share)
    for name, size in (("TILE_ELEMENTS", m * width), ("TOGETHER_ELEMENTS", m * width * together)):
        monkeypatch.setattr(reference, name, dict.fromkeys((False, True), size))
    run("cosine_project_", a)
    assert launches["cosine_fold_kernel"] == -(-n // width) * -(-COUNT // together)


def test_a_graph_that_is_captured_launches_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a table in the memory of the host would be gone at replay: the same bits."""
    results: list[list[Tensor]] = []
    for capturing in (False, True):
        monkeypatch.setattr(launch, "capturing", lambda x, now=capturing: now)
        torch.manual_seed(0)
        for op in ("column_norms", "cosine_scores", "coordinate_add_", "decay_"):
            a = alike(op)
            out = getattr(ops, op)(*(a[name] for name in ops_cases.names(op)))
            results.append(out or a["params"])
    half = len(results) // 2
    for one, many in zip(results[:half], results[half:], strict=True):
        assert all(torch.equal(x, y) for x, y in zip(one, many, strict=True))
