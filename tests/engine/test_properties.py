"""Properties over shapes, ranks, gaps, dtypes and layouts of groups."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from lowrank_optim import PROJECTORS, GaLoreAdamW
from lowrank_optim.subspaces.base import view_for
from lowrank_optim.tensors.matrix import matrix_view
from tests import cases
from tests.compare import assert_close, assert_mostly_close
from tests.oracles.galore import galore

pytestmark = pytest.mark.filterwarnings("ignore:rank")

SIDES = st.integers(2, 14)
SHAPES = st.tuples(SIDES, SIDES)
RANKS = st.one_of(st.integers(1, 16), st.floats(0.05, 0.95))
ANY_SHAPE = st.one_of(
    SHAPES,
    st.tuples(st.integers(1, 3), SIDES, SIDES),
    st.tuples(SIDES, st.integers(1, 3), st.just(2), st.just(3)),
    st.tuples(SIDES),
    st.just(()),
)


@given(
    SHAPES,
    RANKS,
    st.integers(1, 5),
    st.sampled_from(["std", "reverse_std", "left", "right"]),
    st.sampled_from(["adamw", "sgd", "adafactor"]),
    st.sampled_from(["keep", "reset"]),
    st.integers(0, 99),
)
def test_any_shape_rank_and_gap_is_the_oracle(
    shape: tuple[int, int],
    rank: int | float,
    gap: int,
    proj_type: str,
    rule: str,
    on_refresh: str,
    seed: int,
) -> None:
    """float64, seven steps. A fraction counts the projected dimension, and is at least 1.

    Adam has an eps of 1e-3: a matrix of n numbers at rank n leaves coordinates of rounding noise.
    """
    view = matrix_view(shape, proj_type)
    assert view is not None
    directions = rank if isinstance(rank, int) else max(1, round(rank * view.m))
    hyper: dict[str, Any] = {**cases.RULES[rule], "lr": 0.02, "scale": 0.5, "weight_decay": 0.1}
    hyper |= {"eps": 1e-3} if rule == "adamw" else {}
    hyper |= {"proj_type": proj_type, "on_refresh": on_refresh}
    start, grads = cases.parameter(shape, seed=seed), cases.gradients(shape, 7, seed=seed + 1)
    want = galore(
        start.detach(), grads, rank=min(directions, *shape), gap=gap, rule=rule, **hyper
    )[-1]  # fmt: skip
    name = {"adamw": "GaLoreAdamW", "sgd": "GaLoreSGD", "adafactor": "GaLoreAdafactor"}[rule]
    got, _ = cases.train(name, start, grads, rank=rank, update_proj_gap=gap, **hyper)
    assert_close(got, want)


@given(
    SHAPES,
    st.integers(1, 8),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 99),
)
def test_narrow_weights_follow_the_oracle(
    shape: tuple[int, int], rank: int, dtype: torch.dtype, seed: int
) -> None:
    """One period in float32 and bfloat16, from the same narrow weights and gradients.

    A linear rule, because a direction Adam normalises out of noise is not determined by its input.
    """
    start, grads = cases.parameter(shape, dtype, seed), cases.gradients(shape, 4, dtype, seed + 1)
    hyper: dict[str, Any] = {"lr": 1e-3, "scale": 1.0, "momentum": 0.9, "proj_type": "std"}
    wide = [g.double() for g in grads]
    rank = min(rank, *shape)
    spectrum = torch.linalg.svdvals(wide[0])
    if rank < len(spectrum) and spectrum[rank] > 0.95 * spectrum[rank - 1]:
        assume(False)  # the subspace is not determined to the precision of the gradient
    want = galore(start.detach().double(), wide, rank=rank, gap=9, rule="sgd", **hyper)[-1]
    got, _ = cases.train("GaLoreSGD", start, grads, rank=rank, update_proj_gap=9, **hyper)
    assert_mostly_close(got, want, dtype, max_error_rate=0.0)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[list[tuple[int, ...]], list[list[int]]]:
    """Some shapes, and a partition of them into groups in any order."""
    shapes = draw(st.lists(ANY_SHAPE, min_size=2, max_size=6))
    order = draw(st.permutations(range(len(shapes))))
    cuts = sorted(draw(st.sets(st.integers(1, len(shapes) - 1))))
    bounds = zip([0, *cuts], [*cuts, len(shapes)], strict=True)
    return shapes, [list(order[a:b]) for a, b in bounds]


def run_layout(
    name: str, shapes: list[tuple[int, ...]], parts: list[list[int]], options: dict[str, Any]
) -> list[Tensor]:
    params = [torch.nn.Parameter(cases.parameter(s, seed=i).detach()) for i, s in enumerate(shapes)]
    groups = [{"params": [params[i] for i in part], "rank": 3} for part in parts]
    optimizer = cases.build(name, groups, **options)
    columns = [cases.gradients(s, 5, seed=i) for i, s in enumerate(shapes)]
    cases.run(optimizer, params, [list(row) for row in zip(*columns, strict=True)])
    return [p.detach() for p in params]


@given(layouts(), st.sampled_from(cases.projecting_names()), st.sampled_from(cases.PROJ_TYPES))
def test_how_parameters_are_split_into_groups_does_not_matter(
    layout: tuple[list[tuple[int, ...]], list[list[int]]], name: str, proj_type: str
) -> None:
    """One group or many, in any order: the same bits, where seeds and staggering play no part."""
    shapes, parts = layout
    options = {"proj_type": proj_type, "weight_decay": 0.1}
    together = run_layout(name, shapes, [list(range(len(shapes)))], options)
    apart = run_layout(name, shapes, parts, options)
    assert all(torch.equal(a, b) for a, b in zip(together, apart, strict=True))


@given(ANY_SHAPE, RANKS, st.sampled_from(cases.projector_names()), st.booleans())
def test_an_update_has_the_rank_asked_for_and_no_parameter_is_left_behind(
    shape: tuple[int, ...], rank: int | float, projector: str, stagger: bool
) -> None:
    """Matrices move by a matrix of rank r; everything that is not one moves as in AdamW.

    Single entries are k in number, and a block moves whole or not at all.
    """
    start, grads = cases.parameter(shape), cases.gradients(shape, 2)
    options: dict[str, Any] = {"lr": 0.1, "scale": 1.0, "weight_decay": 0.0, "stagger": stagger}
    options |= {"projector": projector, "rank": rank, "update_proj_gap": 100}
    got, _ = cases.train("GaLoreAdamW", start, grads, **options)
    moved = got - start.detach()
    view = view_for({"projector": projector, "proj_type": "std"}, shape)
    if view is None:
        other = torch.nn.Parameter(start.detach().clone())
        adamw = torch.optim.AdamW([other], lr=0.1, weight_decay=0.0, foreach=False)
        cases.run(adamw, [other], [[g] for g in grads])
        assert torch.equal(got, other)
        return
    cls, rank = PROJECTORS[projector], cases.rank_for(projector, rank)
    count = min(cls.directions(rank, view), cls.limit(view))
    if projector == "block":
        assert isinstance(rank, float)
        count = round(rank) * view.m * view.n
    for one in view.of(moved).reshape(-1, view.m, view.n):
        if projector in cases.SINGLE:
            assert int((one != 0).sum()) == count
            continue
        found = torch.linalg.svdvals(one)
        assert int((found > 1e-9 * found[0]).sum()) <= count
        assert (float(found[0]) > 1e-3) == (count > 0)


@given(st.integers(1, 20), st.integers(1, 8), st.sampled_from(["float32", "bfloat16"]))
def test_state_does_not_depend_on_steps_taken(steps: int, gap: int, state_dtype: str) -> None:
    """Total after the first step, and of the same shapes and dtypes after any other."""
    param = torch.nn.Parameter(cases.parameter((5, 7), torch.float32).detach())
    optimizer = GaLoreAdamW([param], rank=2, update_proj_gap=gap, state_dtype=state_dtype)
    grads = cases.gradients((5, 7), 3, torch.float32)
    cases.run(optimizer, [param], [[grads[0]]])
    before = {k: (v.shape, v.dtype) for k, v in optimizer.state[param].items()}
    cases.run(optimizer, [param], [[grads[i % 3]] for i in range(steps)])
    assert {k: (v.shape, v.dtype) for k, v in optimizer.state[param].items()} == before
    assert int(optimizer.state[param]["step"]) == 1 + steps
