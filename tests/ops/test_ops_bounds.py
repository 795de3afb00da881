"""Indices that ops follow, and the buffers that csrc trusts: an error before anything is written.

Once `coordinate_adamw_` of index 10**6 wrote four megabytes past its weights.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from lowrank_optim.ops import native, reference
from tests.ops import ops_cases, ops_cosines

AVAILABLE, REASON = native.available("cpu")
BACKENDS = {
    "native": pytest.param(native, marks=pytest.mark.skipif(not AVAILABLE, reason=REASON)),
    "reference": pytest.param(reference),
}
INDEXED = [
    "coordinate_add_",
    "coordinate_adamw_",
    "cosine_project_",
    "cosine_lift_add_",
    "cosine_adamw_",
]


def changed(x: Tensor, at: int, value: int) -> Tensor:
    new = x.clone()
    new.view(-1)[at] = value
    return new


def damaged(index: Tensor, rows: int, least: int) -> dict[str, tuple[Tensor, str]]:
    """Indices that are wrong, and what is said of them."""
    first = int(index.view(-1)[0])
    return {
        "far": (
            changed(index, 0, 2**31 - 1),
            rf"index 2147483647 is not in \[{least}, {rows - 1}\]",
        ),
        "one past": (changed(index, -1, rows), rf"index {rows} is not in \[{least}, {rows - 1}\]"),
        "negative": (changed(index, 0, least - 1), rf"index {least - 1} is not in"),
        "lowest": (changed(index, 0, -(2**31)), "index -2147483648 is not in"),
        "twice": (changed(index, 1, first), f"index {first} comes after {first}; .* ascend"),
        "descending": (index.flip(-1).contiguous(), "must ascend"),
    }


def arguments(op: str) -> dict[str, Any]:
    """Two matrices; the second is damaged, so that the first may not have been written."""
    if op in ops_cosines.COSINES:
        return ops_cosines.arguments(op, torch.float32)
    shapes = [(12, 9), (17, 33)]
    if op == "coordinate_add_":
        return ops_cases.matrices(op, torch.float32, shapes=shapes)
    return ops_cases.coordinate_steps(torch.float32, shapes=shapes)


@pytest.mark.parametrize("how", ["far", "one past", "negative", "lowest", "twice", "descending"])
@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
@pytest.mark.parametrize("op", INDEXED)
def test_indices_are_looked_at_before_anything_is_written(op: str, backend: Any, how: str) -> None:
    given = arguments(op)
    lists = {"indices": 0, "sources": -1} if given.get("sources") else {"indices": 0}
    for name, least in lists.items():
        if name == "sources" and how in ("twice", "descending"):
            continue  # where rows stood is not as long as the index: see below
        matrices = given.get("params", given.get("grads"))
        last = given[name][-1]
        rows = matrices[-1].shape[-2] if name == "indices" else last.numel()
        bad, message = damaged(last, rows, least)[how]
        call = ops_cases.on("cpu", {**given, name: [*given[name][:-1], bad]})
        before = copy.deepcopy(call)
        with pytest.raises(IndexError, match=message) as caught:
            getattr(backend, op)(*call.values())
        assert op.rstrip("_") in str(caught.value)
        for key, value in call.items():
            for x, old in zip(value, before[key], strict=True) if isinstance(value, list) else ():
                same = isinstance(x, Tensor) and torch.equal(x.nan_to_num(7), old.nan_to_num(7))
                assert same or x == old, key


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
@pytest.mark.parametrize("bad", [[2, 1], [1, 1], [-2, 0]])
def test_rows_come_from_ascending_places(backend: Any, bad: list[int]) -> None:
    """Moved in place, in an order that relies on it: a row would be read after it was written."""
    call = ops_cosines.arguments("cosine_adamw_", torch.float32)
    k = call["indices"][-1].numel()
    call["sources"] = [torch.arange(x.numel(), dtype=torch.int32) for x in call["indices"]]
    call["sources"][-1][:2] = torch.tensor(bad)
    call["sources"][-1][2:] = -1
    assert k > 2
    with pytest.raises(IndexError, match="cosine_adamw"):
        backend.cosine_adamw_(*call.values())


# ------------------------------------------------------------------ what the library trusts

TRUSTED = [*ops_cases.ELEMENTWISE, *ops_cases.BITS8, *INDEXED, "cosine_scores", "top_rows_"]
TRUSTED += ["quantize_blockwise_", "dequantize_blockwise_", "stochastic_round_", "column_norms"]
TRUSTED += ["lift_add_scaled_", "lift_add_sign_"]
ANY_SHAPE = ("column_norms", "top_rows_", "cosine_scores")
OWN_STRIDES = ("params", "grads", "xs", "bases", "updates", "lows", "columns")
"""Lists that some op takes as they come, or makes contiguous itself."""


@pytest.mark.skipif(not AVAILABLE, reason=REASON)
@pytest.mark.parametrize("op", TRUSTED)
def test_no_argument_is_taken_on_trust(op: str) -> None:
    """Each tensor of each list: too short, of another dtype, on another device, or missing."""
    given = ops_cases.example(op)
    for name, value in given.items():
        tensors = isinstance(value, list) and value and isinstance(value[0], Tensor)
        if not tensors or name == "plan":
            continue
        i = max(range(len(value)), key=lambda n: value[n].numel())
        x = value[i]
        bad: dict[str, Any] = {"device": x.to("meta"), "dtype": x.to(torch.complex64)}
        if x.dim() and x.shape[-1] > 1:
            bad["short"] = x[..., :-1].contiguous()
        if x.dim() > 1 and name not in OWN_STRIDES:
            bad["strides"] = x.mT.contiguous().mT
        for how, wrong in bad.items():
            if how == "short" and op in ANY_SHAPE and name == next(iter(given)):
                continue
            call = {**ops_cases.on("cpu", given), name: [*value[:i], wrong, *value[i + 1 :]]}
            with pytest.raises((ValueError, TypeError, RuntimeError, NotImplementedError)):
                getattr(native, op)(*call.values())
                raise AssertionError((op, name, how))
        if len(value) > 1 and name != next(iter(given)):
            call = {**ops_cases.on("cpu", given), name: value[:-1]}
            with pytest.raises((ValueError, TypeError, RuntimeError)):
                getattr(native, op)(*call.values())
                raise AssertionError((op, name, "missing"))


@pytest.mark.skipif(not AVAILABLE, reason=REASON)
@pytest.mark.parametrize("layout", [(-1, -20, 16), (1, 20, 0), (1, 20, -4), (2, 20, 16)])
def test_a_layout_that_is_none(layout: tuple[int, int, int]) -> None:
    """The product of two negative numbers is as many elements as there are."""
    x, (rows, cols, block) = torch.randn(20), layout
    codes, scales = torch.zeros(20, dtype=torch.uint8), torch.zeros(2)
    table = ops_cases.dynamic_map(True, torch.device("cpu"))
    with pytest.raises(ValueError, match="a layout of"):
        native.quantize_blockwise_([x], [codes], [scales], table, [rows], [cols], [block])


def test_a_length_of_zero_is_none_of_a_transform() -> None:
    """Once this never returned."""
    assert not native.takes_length(0)
