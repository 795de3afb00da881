"""The C ABI at random shapes, strides, tails and threads, against float64 and between guards.

Every tensor that an op may write or read with strides lies in a larger buffer, whose other entries
say whether anything else was written. ``tests/ops/test_sanitizers.py`` runs this with more examples
on a build that stops at the first bad access.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowrank_optim.ops import native
from tests import runs
from tests.ops import checks, ops_cases, ops_cosines

AVAILABLE, REASON = native.available("cpu")
pytestmark = pytest.mark.skipif(not AVAILABLE, reason=REASON)
EXAMPLES = int(os.environ.get("LOWRANK_OPTIM_FUZZ", "5"))
"""Calls of each kind; the sanitizers ask for more."""

fuzz = settings(max_examples=EXAMPLES)
GUARD = 77.0

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
LENGTHS = st.one_of(st.integers(1, 70), st.sampled_from([127, 128, 129, 255, 256, 257, 511, 770]))
"""Below, at and above vectors of 16, blocks of 256, and what is shared out to threads."""
MATRICES = st.lists(st.tuples(LENGTHS, LENGTHS), min_size=1, max_size=3)
ANY = st.lists(
    st.one_of(
        st.tuples(st.integers(0, 1500)),
        st.tuples(st.integers(0, 9), LENGTHS),
        st.tuples(st.integers(1, 3), st.integers(1, 9), LENGTHS),
    ),
    min_size=1,
    max_size=4,
)


@pytest.fixture(autouse=True, scope="module")
def on_native() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOWRANK_OPTIM_BACKEND", "native")
        yield


class Laid:
    """Tensors moved into the midst of larger buffers, with strides of their own."""

    def __init__(self, draw: st.DataObject) -> None:
        self.draw = draw
        self.buffers: list[tuple[Tensor, Tensor]] = []

    def __call__(self, x: Tensor) -> Tensor:
        """The same values; the order of the last two dimensions, their gaps and the start vary."""
        if not x.dim():
            return x
        across = x.dim() > 1 and self.draw.draw(st.booleans(), label="by columns")
        step = self.draw.draw(st.integers(1, 3), label="step")
        pad = self.draw.draw(st.integers(0, 5), label="pad")
        start = self.draw.draw(st.integers(0, 17), label="start")
        order = [*range(x.dim())]
        if across:
            order[-2:] = order[:-3:-1]
        strides, reach = [0] * x.dim(), step
        for d in reversed(order):
            strides[d] = reach
            reach = reach * max(1, x.shape[d]) + pad
        buffer = torch.full((start + reach + 19,), GUARD).to(x.dtype)
        view = buffer.as_strided(x.shape, strides, start)
        view.copy_(x)
        self.buffers.append((buffer, view))
        return view

    def all(self, a: dict[str, Any], names: tuple[str, ...]) -> None:
        for name in names:
            if name in a:
                a[name] = [self(x) for x in a[name]]

    def check(self) -> None:
        """Nothing but the tensors themselves was written."""
        for buffer, view in self.buffers:
            inside = torch.zeros_like(buffer, dtype=torch.bool)
            inside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(True)
            assert bool((buffer[~inside] == GUARD).all())


def checked(op: str, a: dict[str, Any], data: st.DataObject, laid: tuple[str, ...] = ()) -> None:
    moved = Laid(data)
    moved.all(a, laid)
    with runs.threads(data.draw(st.integers(1, 4), label="threads")):
        checks.run(op, a)
    moved.check()


@pytest.mark.parametrize("op", ops_cases.ELEMENTWISE + ops_cases.BITS8)
@fuzz
@given(ANY, DTYPES, st.booleans(), st.sampled_from([1e-6, 1.0, 1e4]), st.data())
def test_directions(
    op: str,
    shapes: list[tuple[int, ...]],
    dtype: torch.dtype,
    by_row: bool,
    magnitude: float,
    data: st.DataObject,
) -> None:
    unsound = data.draw(st.none() | st.integers(0, len(shapes) - 1), label="unsound")
    magnitude = 1.0 if dtype == torch.float16 else magnitude
    a = ops_cases.elementwise(
        op,
        dtype,
        shapes=shapes,
        by_row=by_row and "adamw" in op,
        unsound=unsound,
        magnitude=magnitude,
    )
    checked(op, a, data)


@pytest.mark.parametrize("op", [*ops_cases.APPLIES, "column_norms"])
@fuzz
@given(MATRICES, DTYPES, st.sampled_from(["sign", "sgd", "none"]), st.data())
def test_matrices(
    op: str, shapes: list[tuple[int, int]], dtype: torch.dtype, free: str, data: st.DataObject
) -> None:
    unsound = data.draw(st.none() | st.integers(0, len(shapes) - 1), label="unsound")
    unsound = None if op == "column_norms" else unsound
    a = ops_cases.matrices(op, dtype, shapes=shapes, free=free, unsound=unsound)
    checked(op, a, data, ("params", "grads", "xs"))


@fuzz
@given(MATRICES, DTYPES, st.sampled_from(["sign", "sgd", "none"]), st.data())
def test_coordinate_steps(
    shapes: list[tuple[int, int]], dtype: torch.dtype, free: str, data: st.DataObject
) -> None:
    a = ops_cases.coordinate_steps(dtype, shapes=shapes, free=free)
    checked("coordinate_adamw_", a, data, ("params", "grads"))


@pytest.mark.parametrize("op", ops_cosines.COSINES)
@fuzz
@given(
    st.integers(2, 300).filter(native.takes_length),
    st.lists(LENGTHS, min_size=1, max_size=3),
    DTYPES,
    st.sampled_from(["dct2", "dct3"]),
    st.data(),
)
def test_cosines(
    op: str, n: int, widths: list[int], dtype: torch.dtype, basis: str, data: st.DataObject
) -> None:
    a = ops_cosines.arguments(
        op,
        dtype,
        n=n,
        widths=widths,
        basis=basis,
        by_row=data.draw(st.booleans(), label="by row"),
        moved=data.draw(st.booleans(), label="moved"),
    )
    checked(op, a, data, ("params", "grads"))
