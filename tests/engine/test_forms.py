"""What is remembered of operations without data is what torch makes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lowrank_optim.engine import forms
from lowrank_optim.tensors.alive import Alive

aten = torch.ops.aten


@pytest.fixture(autouse=True)
def nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[Any, Any]]:
    known: dict[Any, Any] = {}
    monkeypatch.setattr(forms, "_known", known)
    yield known


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def described(out: Any) -> list[Any]:
    return [
        (x.shape, x.stride(), x.dtype, x.untyped_storage().nbytes(), x.storage_offset())
        for x in tree_leaves(out)
    ]


X, Y = meta(6, 8), meta(8, 6, dtype=torch.bfloat16)
CALLS: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {
    "strides": (aten.mul.Tensor, (X.mT, Y), {}),
    "contiguous": (aten.mul.Tensor, (meta(8, 6), Y), {}),
    "another dtype": (aten.mul.Tensor, (Y, Y), {}),
    "broadcast": (aten.div.Tensor, (X, meta(6, 1)), {}),
    "int": (aten.mul.Tensor, (meta(4, dtype=torch.bool), 1), {}),
    "float": (aten.mul.Tensor, (meta(4, dtype=torch.bool), 1.0), {}),
    "bool": (aten.mul.Tensor, (meta(4, dtype=torch.bool), True), {}),
    "rows": (aten.sum.dim_IntList, (X, [0]), {}),
    "columns": (aten.sum.dim_IntList, (X, [1]), {}),
    "kept": (aten.sum.dim_IntList, (X, [1], True), {}),
    "in float64": (aten.sum.dim_IntList, (X, [1]), {"dtype": torch.float64}),
    "norm": (aten.linalg_vector_norm.default, (Y, 2, [-2], True), {}),
    "two results": (aten.linalg_eigh.default, (meta(3, 5, 5),), {}),
    "a list": (aten._foreach_mul.Scalar, ([X, Y], 2.0), {}),
    "lists of lists": (aten.cat.default, ([X, X.clone()], 1), {}),
    "no tensor": (aten.arange.default, (5,), {"device": torch.device("meta")}),
    "more": (aten.arange.default, (7,), {"device": torch.device("meta")}),
    "index": (aten.index.Tensor, (X, [None, meta(3, dtype=torch.int64)]), {}),
}


def test_forms_are_those_of_torch(nothing_is_known: dict[Any, Any]) -> None:
    """Of the first call and of the next; calls that differ in anything are told apart."""
    for _ in range(2):
        for name, (func, args, kwargs) in CALLS.items():
            found, wanted = forms.run(func, args, kwargs), func(*args, **kwargs)
            assert described(found) == described(wanted), name
            assert type(found) is type(wanted), name
        assert len(nothing_is_known) == len(CALLS)


def test_what_is_remembered_is_alive() -> None:
    """Results have memory of their own, until they go."""
    with Alive("meta") as alive:
        first = forms.run(aten.add.Tensor, (X, X), {})
    with Alive("meta") as again:
        second = forms.run(aten.add.Tensor, (X, X), {})
    assert again.now == alive.now == 6 * 8 * 4
    assert first.untyped_storage()._cdata != second.untyped_storage()._cdata


UNLIKE: dict[str, Callable[[], Any]] = {
    "a view": lambda: forms.run(aten.transpose.int, (X, 0, 1), {})._base is X,
    "in place": lambda: forms.run(aten.add_.Tensor, (X, 1), {}) is X,
    "out": lambda: forms.run(aten.mm.out, (X, meta(8, 6), ), {"out": OUT}) is OUT,
    "a view that does not say so": lambda: shared(forms.run(UNSAFE, (X, [48]), {}), X),
    "data": lambda: forms.run(aten.add.Tensor, (torch.ones(2), 1), {}).tolist() == [2, 2],
}  # fmt: skip
OUT = meta(6, 6)
UNSAFE = aten._unsafe_view.default


def shared(x: Tensor, y: Tensor) -> bool:
    return x.untyped_storage()._cdata == y.untyped_storage()._cdata


@pytest.mark.parametrize("case", UNLIKE)
def test_what_is_not_new_runs_as_it_is(case: str, nothing_is_known: dict[Any, Any]) -> None:
    for _ in range(2):
        assert UNLIKE[case]()
    assert not nothing_is_known


def test_few_are_kept(monkeypatch: pytest.MonkeyPatch, nothing_is_known: dict[Any, Any]) -> None:
    """A number that changes with each call fills no memory."""
    monkeypatch.setattr(forms, "LIMIT", 3)
    for n in range(10):
        forms.run(aten.add.Tensor, (X, float(n)), {})
        assert 0 < len(nothing_is_known) <= 3
