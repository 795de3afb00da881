"""Groups of any keys and values: an optimizer that trains, or an error that names a key."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lowrank_optim import LowRankOptimizer, methods

KEYS = (
    "rank", "density", "projector", "proj_type", "update_proj_gap", "scale", "state_dtype",
    "state_device", "on_refresh", "lr", "betas", "eps", "weight_decay", "momentum", "free_rule",
    "error_feedback", "seed", "stagger", "stochastic_rounding", "maximize", "capturable",
    "interval", "active_layers", "block_order", "rnak", "",
)  # fmt: skip
WORDS = (
    "svd", "rsvd", "dct", "columns", "block", "std", "left", "full", "8bit", "4bit", "bfloat16",
    "cpu", "keep", "reset", "project", "sign", "random", "", "nan",
)  # fmt: skip
IN_TORCHS_WORDS = {"lr": "learning rate", "betas": "beta", "eps": "epsilon"}
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 9),
    st.floats(-2, 2),
    st.sampled_from([float("nan"), float("inf"), 1e30, 0.5, 2**70]),
    st.sampled_from(WORDS),
)
VALUES = SCALARS | st.tuples(SCALARS, SCALARS) | st.lists(SCALARS, max_size=2)
GROUPS = st.lists(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=3), max_size=2)


def check(name: str, own: dict[str, Any], groups: list[dict[str, Any]]) -> None:
    """Made and stepped with a rate of nothing, or refused before anything changes."""
    torch.manual_seed(0)
    params = [
        [nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(5))] for _ in (own, *groups)
    ]
    before = [x.detach().clone() for xs in params for x in xs]
    given_ = [{"params": xs, **group} for xs, group in zip(params, ({}, *groups), strict=True)]
    try:
        optimizer: LowRankOptimizer = getattr(methods, name)(given_, **own)
        for param in (x for xs in params for x in xs):
            param.grad = torch.randn_like(param)
        optimizer.step()
    except (ValueError, TypeError) as error:
        keys = {*own, *(key for group in groups for key in group)}
        called = {*keys, *(IN_TORCHS_WORDS[key] for key in keys if key in IN_TORCHS_WORDS)}
        assert any(key in str(error) for key in called), f"{error!r} names none of {keys}"
        after = [x.detach() for xs in params for x in xs]
        assert all(map(torch.equal, before, after)), f"{error!r} came after something had changed"
        return
    for param, state in optimizer.state.items():
        assert bool(param.isfinite().all()), (param, own, groups)
        for key, x in state.items():
            assert not x.is_floating_point() or bool(x.isfinite().all()), key


@pytest.mark.parametrize(
    "examples", [20, pytest.param(5000, marks=pytest.mark.slow)], ids=["some", "every"]
)
def test_any_groups(examples: int) -> None:
    """Hypothesis, over every class."""
    of = st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=3)

    @settings(max_examples=examples)
    @given(st.sampled_from(methods.__all__), of, GROUPS)
    def each(name: str, own: dict[str, Any], groups: list[dict[str, Any]]) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check(name, own, groups)

    each()
