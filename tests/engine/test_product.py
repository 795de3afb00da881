"""Roles are composable: every subspace, residual, rule, store and transport against one oracle.

All of (subspace, residual, rule) are run, half of them by default, transports and stores in turn;
what else a group says is drawn for each of them, and every two choices meet, as do every three of
these four roles. A slow test runs all transports and stores with each of them.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from lowrank_optim.engine.fused import FusedCosines, FusedRows
from lowrank_optim.ops import dispatch, native, quant
from lowrank_optim.stores import STORES
from lowrank_optim.subspaces.base import make_projector, view_for
from lowrank_optim.subspaces.target import Target
from lowrank_optim.subspaces.terms import Term
from lowrank_optim.tensors.matrix import PROJ_TYPES
from lowrank_optim.transports import TRANSPORTS
from tests.cases import branching
from tests.engine.product_cases import AXES, RESIDUALS, RULES, STEPS, SUBSPACES, compare, drawn, one
from tests.pairwise import pairwise

READY, REASON = native.available("cpu")
needs_native = pytest.mark.skipif(not READY, reason=REASON)
NATIVE = "native" if READY else "reference"


@pytest.fixture(autouse=True)
def small_moments_in_8_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices here have few elements; their moments are kept in 8 bits all the same."""
    monkeypatch.setattr(quant, "MIN_SIZE", 0)


def check(
    subspace: str, residual: str, monkeypatch: pytest.MonkeyPatch, times: int = 0,
    chosen: slice = slice(None),
) -> None:  # fmt: skip
    flips = 0
    for case in [*drawn(subspace, residual, times)][chosen]:
        backend = NATIVE if case["backend"] == "native" else "reference"
        monkeypatch.setenv(dispatch.VARIABLE, backend)
        try:
            with pytest.MonkeyPatch.context() as patch:
                if not case["waits"]:
                    branching(patch, lambda tensor: True)
                flips += compare(subspace, residual, case)
        except BaseException as error:
            error.add_note(f"{subspace} x {residual}: {case}")
            raise
    assert flips <= max(1, times)


@pytest.mark.parametrize("half", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("subspace", SUBSPACES)
def test_every_composition(
    subspace: str, residual: str, half: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No test ran projector x free rule: dct took the sign of what "sgd" was to take as it is.

    Of the rules a subspace and a residual have every other, so that each meets all of them.
    """
    first = ([*SUBSPACES].index(subspace) + [*RESIDUALS].index(residual) + half) % 2
    check(subspace, residual, monkeypatch, chosen=slice(first, None, 2))


@pytest.mark.slow
@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("subspace", SUBSPACES)
def test_every_composition_in_every_store(
    subspace: str, residual: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(subspace, residual, monkeypatch, times=3)


def one_pass(subspace: str, residual: str, every: bool) -> Iterator[dict[str, Any]]:
    """Cases that kernels step in one pass over W and G: any two choices meet, or all."""
    fixed = {"rule": "adamw", "store": "float32", "maximize": False, "lr": float}
    fixed["backend"] = "native"
    ages = (False, True) if SUBSPACES[subspace]["projector"] == "dct" else (False,)
    axes = {"moments": [*TRANSPORTS], "shape": AXES["shape"], "side": PROJ_TYPES[:-1], "aged": ages}
    rows = itertools.product(*axes.values()) if every else pairwise(axes)
    for on_refresh, shape, proj_type, aged in rows:
        own = {"on_refresh": on_refresh, "shape": shape, "proj_type": proj_type, "aged": aged}
        case = one(subspace, random.Random(f"{subspace}/{residual}/{own}"), **fixed, **own)
        # a convolution's weights of other strides are no view of a matrix
        yield case | ({"stored": "rows"} if len(shape) == 4 else {})


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("subspace", "residual", "path"),
    [
        pytest.param("dct, fft", "dropped", FusedCosines, marks=needs_native),
        *itertools.product(
            ("rows", "columns"), ("dropped", "free, sign", "free, sgd"), (FusedRows,)
        ),
    ],
)
def test_one_pass_steps(
    subspace: str, residual: str, path: Any, every: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fast paths have conditions that few of the drawn cases fulfil."""
    monkeypatch.setenv(dispatch.VARIABLE, NATIVE)
    taken, step = [], path.step_

    def spied(*args: Any) -> None:
        taken.append(path)
        step(*args)

    monkeypatch.setattr(path, "step_", spied)
    for case in one_pass(subspace, residual, every):
        taken.clear()
        assert not compare(subspace, residual, case)
        assert len(taken) == (STEPS if path is FusedCosines else 2 * STEPS)


NARROW = ("dropped", *(name for name in RESIDUALS if name.startswith("feedback")))


@pytest.mark.parametrize("turn", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in (1, 2, 3))])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("residual", NARROW)
def test_narrow_weights(
    residual: str, dtype: torch.dtype, turn: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Error feedback raised in a GEMM where a basis is kept in the weights' bfloat16.

    Rounding and backend take turns, so that a format and a residual have all four.
    """
    for i, subspace in enumerate(SUBSPACES, turn + 2 * (dtype == torch.float16)):
        rounding, backend = i % 2 == 1, (NATIVE, "reference")[i // 2 % 2]
        monkeypatch.setenv(dispatch.VARIABLE, backend)
        generator = random.Random(f"{subspace}/{residual}/{rounding}/{dtype}")
        fixed = {"rule": "adamw", "store": "float32", "rounding": rounding, "scale": 1.0}
        case = one(subspace, generator, **fixed, on_refresh=generator.choice([*TRANSPORTS]))
        try:
            compare(subspace, residual, case, dtype)
        except BaseException as error:
            error.add_note(f"{subspace} x {residual}: {case}")
            raise


@pytest.mark.parametrize("subspace", [name for name in SUBSPACES if name != "block"])
def test_a_term_of_an_unknown_kind_is_an_error(subspace: str) -> None:
    """It was a sign to dct, and the gradient itself to sets of indices; block has no terms."""
    group = {
        "rank": 2, "scale": 1.0, "proj_type": "left", "update_proj_gap": 1, **SUBSPACES[subspace],
    }  # fmt: skip
    view = view_for(group, (5, 7))
    assert view is not None
    space, w = make_projector(group, view), torch.zeros(view.m, view.n)
    state = space.init(view, w)
    low = space.coords(state, w)
    for gain in (1.0, torch.tensor(1.0)):
        term = Term("cubic", gain=gain)  # type: ignore[arg-type]
        into = Target(w, torch.ones_like(w), low["low"], 1.0)
        with pytest.raises(ValueError, match=r"must be one of .*, got 'cubic'"):
            space.push_(into, state, low, term)
        assert not w.any()


def test_every_pair_of_choices_meets() -> None:
    """What is drawn leaves no two values of two axes that no case has together."""
    met, roles = set(), set()
    for subspace, residual in itertools.product(SUBSPACES, RESIDUALS):
        for case in drawn(subspace, residual):
            named = {"subspace": subspace, "residual": residual, **case, "lr": str(case["lr"])}
            met |= set(itertools.combinations(sorted((k, str(v)) for k, v in named.items()), 2))
            own = (subspace, residual, case["rule"], case["on_refresh"])
            roles |= {frozenset(x) for x in itertools.combinations(own, 3)}
    values: dict[str, Sequence[Any]] = {
        **AXES, "subspace": [*SUBSPACES], "residual": [*RESIDUALS], "rule": [*RULES],
        "store": [*STORES], "on_refresh": [*TRANSPORTS],
    }  # fmt: skip
    for (a, left), (b, right) in itertools.combinations(sorted(values.items()), 2):
        missing = {
            (x, y) for x, y in itertools.product(left, right)
            if ((a, str(x)), (b, str(y))) not in met
        }  # fmt: skip
        if {a, b} == {"aged", "subspace"}:
            missing.discard((True, "block"))
        assert not missing, (a, b, missing)
    for three in itertools.combinations((SUBSPACES, RESIDUALS, RULES, TRANSPORTS), 3):
        assert {frozenset(x) for x in itertools.product(*three)} <= roles
