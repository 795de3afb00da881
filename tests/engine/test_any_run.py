"""Any class, options and model: an accelerator's run is a host's, and does not depend on a save.

The CPU plays the accelerator (:func:`tests.cases.branching`). Beside a host weights are in float64,
gradients have no singular values that are alike, and eps is not small. So the two differ by
rounding, and by no more than it. rsvd is left out, whose iterations differ, and beside a host so is
state in fewer bits, where rounding may become the next code. A last step with a NaN is left out
too: with a gap of 1 nobody has asked yet whether its refresh came about.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lowrank_optim import PROJECTORS, LowRankOptimizer, methods
from lowrank_optim.groups.keys import projector_keys
from tests import cases
from tests.compare import assert_close

pytestmark = pytest.mark.filterwarnings("ignore")  # of what does little with a matrix so small

STEPS = 4
SHAPES: Sequence[tuple[int, ...]] = [
    (), (1,), (7,), (1, 1), (1, 9), (9, 1), (6, 11), (13, 7), (8, 8), (3, 6, 10), (2, 9, 4),
    (6, 4, 3, 3),
]  # fmt: skip
AXES: dict[str, Sequence[Any]] = {
    "projector": [*sorted({*PROJECTORS} - {"rsvd", "golore"})],
    "update_proj_gap": [1, 2, 3],
    "scale": [0.25, 1.0],
    "proj_type": ["std", "reverse_std", "left", "right"],
    "on_refresh": ["keep", "reset", "project"],
    "state_dtype": ["float32", "bfloat16", "8bit", "4bit"],
    "stagger": [False, True],
    "maximize": [True],
    "flatten": [True],
    "weight_decay": [0.0, 0.5],
    "betas": [(0.8, 0.95), (0.0, 0.9), (0.5, 0.0)],
    "momentum": [0.9],
    "beta1": [None, 0.9],
    "scale_parameter": [False, True],
    "basis": ["dct2", "dct3"],
    "transform": ["fft", "matmul"],
    "error_feedback": ["float32"],
    "slot_bias_correction": [False, True],
    "alpha_mode": ["release", "paper"],
    "scaling": ["column", "matrix"],
    "limiter": [None, 1.01],
    "scale_type": ["channel", "tensor"],
    "free_rule": ["sign", "sgd", "none"],
    "free_lr_scale": [0.5],
    "proj_params_lr_scale": [0.5],
    "block_order": ["random", "ascending", "mirror"],
    "steps_per_iteration": [2, 3],
    "warmup_steps": [0, 3],
    "factors": ["exact", "active"],
    "negative": ["clamp", "flip"],
    "enhanced": [False, True],
    "order": ["fifo", "random"],
    "decay_on": ["factors", "weight"],
    "restart_every": [None, 2],
}
"""Values of options; of each that a class reads one is drawn, or its default stays."""


class Run(NamedTuple):
    """All that decides a run."""

    name: str
    options: dict[str, Any]
    rate: str
    capturable: bool
    """Of the accelerator: a host counts its steps."""
    rank: int | float
    shapes: list[tuple[int, ...]]
    dtype: torch.dtype
    dense: int
    """How many of them are in a group of dense parameters."""
    bad: list[tuple[int, int]]
    """Steps, and places of parameters, whose gradient has a NaN."""
    saved: int
    """The step before which a run is saved, and resumed by another optimizer."""


NARROW = ("8bit", "4bit", "bfloat16")
RATES = {
    "number": lambda lr: lr,
    "tensor": lambda lr: torch.tensor(lr, dtype=torch.float64),
    "with a dimension": lambda lr: torch.tensor([lr], dtype=torch.float64),
}


@st.composite
def runs(draw: st.DrawFn) -> Run:
    name = draw(st.sampled_from(cases.method_names()))
    cls = getattr(methods, name)
    options: dict[str, Any] = {"interval": 2, "freeze_steps": 1} if "Switch" in name else {}
    if not any(x in name for x in ("Lion", "SGD", "Adafactor")):
        options["eps"] = 1e-3
    projector = draw(st.sampled_from(AXES["projector"]))
    if "projector" not in cls.unused:
        options["projector"] = projector
    read = {*cls.group_keys()} - {*cls.unused} | projector_keys(options.get("projector"))
    for key in sorted(AXES.keys() & read - options.keys()):
        options |= draw(st.just({}) | st.sampled_from([{key: value} for value in AXES[key]]))
    block = "projector" in options and projector == "block"
    ranks = st.sampled_from([0.25, 0.6] if block else [1, 2, 5, 0.5])
    shapes = draw(st.lists(st.sampled_from(SHAPES), min_size=2, max_size=6))
    places = st.tuples(st.integers(0, STEPS - 2), st.integers(0, len(shapes) - 1))
    dtypes = st.sampled_from([torch.float64, torch.float32])
    return Run(
        name, options, draw(st.sampled_from([*RATES])), draw(st.booleans()), draw(ranks), shapes,
        draw(dtypes), draw(st.integers(0, 1)), draw(st.lists(places, max_size=2)),
        draw(st.integers(1, STEPS - 1)),
    )  # fmt: skip


def made(run: Run, params: Sequence[Tensor], accelerated: bool) -> LowRankOptimizer:
    cls = getattr(methods, run.name)
    parts = params[: len(params) - run.dense], params[len(params) - run.dense :]
    groups: list[dict[str, Any]] = [{"params": [*own]} for own in parts if own]
    if "rank" not in cls.unused:
        for group, rank in zip(groups, (run.rank, None), strict=False):
            group["rank"] = rank
    for group in groups:  # a rate of its own: what is written into one is not another's
        group["lr"] = RATES[run.rate](0.05)
    own = {"capturable": True} if run.capturable and accelerated else {}
    optimizer: LowRankOptimizer = cls(groups, **run.options, **own)
    return optimizer


def trained(run: Run, accelerated: bool, saved: bool = False) -> list[dict[str, Tensor]]:
    """Weights and state of each parameter at the end; what a NaN meets stays on the way."""
    params = [cases.parameter(shape, run.dtype, n) for n, shape in enumerate(run.shapes)]
    grads = [cases.gradients(shape, STEPS, run.dtype, n) for n, shape in enumerate(run.shapes)]
    optimizer = made(run, params, accelerated)
    for step in range(STEPS):
        if saved and step == run.saved:
            state = copy.deepcopy(optimizer.state_dict())
            params = [nn.Parameter(p.detach().clone()) for p in params]
            optimizer = made(run, params, accelerated)
            optimizer.load_state_dict(state)
        before = [p.detach().clone() for p in params]
        for n, (param, own) in enumerate(zip(params, grads, strict=True)):
            param.grad = own[step].clone()
            if (step, n) in run.bad:
                param.grad.view(-1)[-1] = torch.nan
        optimizer.step()
        for at, n in run.bad:
            assert at != step or torch.equal(params[n], before[n])
    states = optimizer.state_dict()["state"]
    return [{"weights": p.detach(), **states[n]} for n, p in enumerate(params)]


def check(run: Run) -> None:
    with pytest.MonkeyPatch.context() as patch:
        cases.branching(patch, lambda _: True)
        try:
            made(run, [nn.Parameter(torch.ones(4, 6))] * 1, True)
        except ValueError:  # options that do not go together are refused in words
            return
        whole, resumed = trained(run, True), trained(run, True, saved=True)
    for a, b in zip(whole, resumed, strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - {k for k in a if "pool_" in k}:  # nobody reads rows in use there
            assert torch.equal(a[key], b[key]), key
    narrow = run.name.endswith("8bit") or run.options.get("state_dtype") in NARROW
    if narrow or run.dtype != torch.float64:
        return
    for a, b in zip(trained(run, False), whole, strict=True):
        assert_close(b["weights"], a["weights"])


@given(runs())
@settings(max_examples=12, suppress_health_check=list(HealthCheck))
def test_any_run(run: Run) -> None:
    check(run)


@pytest.mark.slow
@given(runs())
@settings(max_examples=2000, suppress_health_check=list(HealthCheck), derandomize=False)
def test_many_runs(run: Run) -> None:
    check(run)
