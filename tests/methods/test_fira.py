"""Fira against the straight-line oracle in float64; and that against the release."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowrank_optim import FiraAdamW, FiraAdamW8bit, memory
from tests import cases
from tests.cases import matrices
from tests.compare import assert_close, relative
from tests.oracles.fira import fira
from tests.pairwise import paired
from tests.runs import resumed

HYPER: dict[str, Any] = {"lr": 3e-2, "scale": 0.6, "weight_decay": 0.1, **cases.RULES["adamw"]}
STEPS = 10  # with a gap of 3: refreshes at 0, 3, 6 and 9
MODES = ["release", "paper"]
SCALINGS = ["column", "matrix"]
COMBINATIONS = [
    (mode, scaling, limiter) for mode in MODES for scaling in SCALINGS for limiter in (1.01, None)
]
"""Every pair of choices, with the limiter on and off."""


def growing(size: tuple[int, ...], count: int, seed: int = 0) -> list[Tensor]:
    """Gradients whose norm jumps up and down, so that the limiter acts, and lets go."""
    sizes = [1.0, 5.0, 0.3, 40.0, 40.0, 1e-2, 1e-2, 3.0, 3.0, 0.5]
    grads = cases.gradients(size, count, seed=seed)
    return [g * sizes[i % len(sizes)] for i, g in enumerate(grads)]


def expected(start: Tensor, grads: list[Tensor], rank: int, **kwargs: Any) -> Tensor:
    """The oracle's weights after each gradient, expert by expert: ``(steps, *shape)``."""
    shape = start.shape
    if start.dim() == 4:
        start, grads = start.flatten(1), [g.flatten(1) for g in grads]
    runs = [
        fira(w, [matrices(g)[i] for g in grads], rank=min(rank, *w.shape), **kwargs)
        for i, w in enumerate(matrices(start.detach()))
    ]
    steps = zip(*runs, strict=True)
    found = [torch.stack(x) if start.dim() == 3 else x[0] for x in steps]
    return torch.stack([x.reshape(shape) for x in found])


@pytest.mark.filterwarnings("ignore:rank 4 is clamped")
@pytest.mark.parametrize(
    ("shape", "proj_type", "combination"), paired([*cases.SHAPES], cases.PROJ_TYPES, COMBINATIONS)
)
def test_method_is_the_oracle(
    shape: str, proj_type: str, combination: tuple[str, str, float | None]
) -> None:
    """Same weights after every one of ten steps, four refreshes and a resume on the way.

    Two-sided bases make ``P^T G Q`` diagonal at a refresh, and what is off the diagonal rounding
    noise, which Adam divides by eps: there eps is 1e-4.
    """
    size = cases.SHAPES[shape]
    start, grads = cases.parameter(size), growing(size, STEPS)
    hyper = {**HYPER, "proj_type": proj_type}
    hyper |= dict(zip(("alpha_mode", "scaling", "limiter"), combination, strict=True))
    if proj_type == "full":
        hyper["eps"] = 1e-4
    want = expected(start, grads, cases.RANK, gap=3, **hyper)
    param = torch.nn.Parameter(start.detach().clone())

    def make() -> torch.optim.Optimizer:
        return cases.build("FiraAdamW", [{"params": [param], "rank": cases.RANK}], **hyper)

    optimizer = make()
    for i, grad in enumerate(grads):
        if i == 5:  # between two refreshes
            fresh = make()
            resumed(optimizer, fresh)
            optimizer = fresh
        cases.run(optimizer, [param], [[grad]])
        assert_close(param, want[i])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("on_refresh", ["reset", "keep"])
def test_maximize_is_descent_on_the_negative(on_refresh: str, mode: str) -> None:
    """Every term turns: the direction, the residual and what is taken out of it."""
    size = cases.SHAPES["wide"]
    start, grads = cases.parameter(size), growing(size, STEPS)
    hyper = {**HYPER, "alpha_mode": mode, "on_refresh": on_refresh}
    want = expected(start, [-g for g in grads], 4, gap=3, **hyper)
    got, _ = cases.train("FiraAdamW", start, grads, maximize=True, **hyper)
    assert_close(got, want[-1])


@pytest.mark.filterwarnings("ignore:rank")
@settings(max_examples=20, deadline=None)
@given(
    st.tuples(st.integers(2, 12), st.integers(2, 12)),
    st.integers(1, 12),
    st.floats(0.05, 2.5),
    st.sampled_from(COMBINATIONS),
    st.sampled_from(["std", "reverse_std", "left", "right"]),
    st.integers(0, 99),
)
def test_any_shape_rank_and_alpha_is_the_oracle(
    size: tuple[int, int],
    rank: int,
    scale: float,
    chosen: tuple[str, str, float | None],
    proj_type: str,
    seed: int,
) -> None:
    """Shapes, ranks up to the full one, and alpha on both sides of 1."""
    mode, scaling, limiter = chosen
    hyper = {**HYPER, "scale": scale, "alpha_mode": mode, "scaling": scaling, "eps": 1e-4}
    hyper |= {"proj_type": proj_type, "limiter": limiter}
    start, grads = cases.parameter(size, seed=seed), growing(size, 5, seed)
    want = expected(start, grads, rank, gap=3, **hyper)
    got, _ = cases.train("FiraAdamW", start, grads, rank=rank, **hyper)
    assert_close(got, want[-1], torch.float32)


@pytest.mark.parametrize("mode, scaling, limiter", COMBINATIONS)
@pytest.mark.parametrize("shape", ["wide", "tall", "experts"])
def test_float32_follows_the_float64_oracle(
    shape: str, mode: str, scaling: str, limiter: float | None
) -> None:
    """The kernels that float64 does not run; the norm identity loses no more than they do."""
    size = cases.SHAPES[shape]
    start, grads = cases.parameter(size), growing(size, 6)
    hyper = {**HYPER, "alpha_mode": mode, "scaling": scaling, "limiter": limiter}
    want = expected(start, grads, 2, gap=3, **hyper)
    got, _ = cases.train(
        "FiraAdamW", start.detach().float(), [g.float() for g in grads], rank=2, **hyper
    )
    assert_close(got, want[-1], torch.float32)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(24, 80), (80, 24), (3, 24, 64)])
@pytest.mark.parametrize("cls, state_dtype, bound", [
    (FiraAdamW, "bfloat16", 2e-2),
    (FiraAdamW8bit, "8bit", 5e-2),
])  # fmt: skip
def test_narrow_states_follow_the_float64_oracle(
    cls: type[FiraAdamW], state_dtype: str, bound: float, shape: tuple[int, ...], mode: str
) -> None:
    """Ten steps: what the weights have moved is within the error of the moments' format."""
    start, grads = cases.parameter(shape), cases.gradients(shape, STEPS)
    hyper = {**HYPER, "weight_decay": 0.0, "alpha_mode": mode, "eps": 1e-4}
    want = expected(start, grads, 8, gap=4, **hyper)[-1] - start.detach()
    options = {**hyper, "rank": 8, "update_proj_gap": 4, "state_dtype": state_dtype}
    param = torch.nn.Parameter(start.detach().float().clone())
    optimizer = cases.build(cls.__name__, [param], **options)
    cases.run(optimizer, [param], [[g.float()] for g in grads])
    assert relative(param - start, want) < bound
    (state,) = optimizer.state.values()
    assert state["residual_norm"].dtype == torch.float32
    assert state["residual_norm"].shape == shape[:-2]
    if state_dtype == "8bit" and state["low.exp_avg"].numel() >= 4096:
        assert state["low.exp_avg"].dtype == torch.uint8


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(24, 80), (80, 24), (3, 24, 64)])
def test_bfloat16_weights_follow_the_float64_oracle(shape: tuple[int, ...], mode: str) -> None:
    """Weights, basis and gradients in bfloat16, from zero: one rounding a step each."""
    grads = cases.gradients(shape, 8, torch.bfloat16)
    hyper = {**HYPER, "weight_decay": 0.0, "alpha_mode": mode, "eps": 1e-4}
    start = torch.zeros(shape, dtype=torch.float64)
    want = expected(start, [g.double() for g in grads], 8, gap=4, **hyper)[-1]
    param = torch.nn.Parameter(start.bfloat16())
    optimizer = cases.build("FiraAdamW", [param], **{**hyper, "rank": 8, "update_proj_gap": 4})
    cases.run(optimizer, [param], [[g] for g in grads])
    assert relative(param, want) < 2e-2


@pytest.mark.parametrize(
    "shape",
    [(80, 24), *(pytest.param(x, marks=pytest.mark.slow) for x in ((24, 80), (3, 24, 64)))],
)
def test_stochastic_rounding_of_the_residual_is_unbiased(shape: tuple[int, ...]) -> None:
    """Steps a hundredth of a unit in the last place: to nearest, bfloat16 weights never move.

    Rounded without bias they follow float32 weights, within what chance explains.
    """
    grads = cases.gradients(shape, 1, torch.bfloat16) * 300
    ends = {}
    for dtype, rounding in [
        (torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)
    ]:  # fmt: skip
        param = torch.nn.Parameter(torch.ones(shape, dtype=dtype))
        options = {"lr": 3e-5, "rank": 4, "scale": 1.0, "weight_decay": 0.0, "seed": 3}
        optimizer = cases.build(
            "FiraAdamW", [param], stochastic_rounding=rounding, update_proj_gap=1000, **options
        )
        cases.run(optimizer, [param], [[g.to(dtype)] for g in grads])
        ends[dtype, rounding] = (param.detach().double() - 1).flatten()
    wide, nearest, random = ends.values()
    assert float((nearest - wide).norm() / wide.norm()) > 0.9
    assert float((random @ wide) / (wide @ wide)) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("kind", ["scaled", "sign"])
@pytest.mark.parametrize("shape", [(24, 80), (3, 24, 64)])
def test_a_tensor_learning_rate_is_the_float(
    shape: tuple[int, ...], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an accelerator the learning rate may live there: no op may read it on the host.

    The sign term is Fira's residual replaced by one: nothing else here gives it yet.
    """
    if kind == "sign":
        from lowrank_optim.subspaces.terms import Term

        def sign(self: Any, state: Any, seen: Any) -> Term:
            return Term("sign", gain=0.3 / seen.correction)

        monkeypatch.setattr("lowrank_optim.residuals.Scaled.after", sign)
    start, grads = cases.parameter(shape, torch.float32), cases.gradients(shape, 5, torch.float32)
    want, _ = cases.train("FiraAdamW", start, grads, lr=0.01, weight_decay=0.1)
    cases.branching(monkeypatch, lambda tensor: True)
    got, _ = cases.train("FiraAdamW", start, grads, lr=torch.tensor(0.01), weight_decay=0.1)
    assert_close(got, want)


def test_groups_of_the_release_are_read_as_they_are() -> None:
    """``rank, update_proj_gap, alpha, proj_type``: the four keys of every Fira group."""
    size = cases.SHAPES["wide"]
    start, grads = cases.parameter(size), growing(size, 7)
    want = expected(start, grads, 3, gap=2, **{**HYPER, "scale": 0.3, "proj_type": "reverse_std"})
    param = torch.nn.Parameter(start.detach().clone())
    group = {"rank": 3, "update_proj_gap": 2, "alpha": 0.3, "proj_type": "reverse_std"}
    hyper = {k: v for k, v in HYPER.items() if k != "scale"}
    optimizer = FiraAdamW([{"params": [param], **group}], projector="svd", stagger=False, **hyper)
    cases.run(optimizer, [param], [[g] for g in grads])
    assert_close(param, want[-1])


@pytest.mark.parametrize("key, value, message", [
    ("alpha_mode", "official", "alpha_mode must be one of 'release', 'paper', got 'official'"),
    ("scaling", "row", "scaling must be one of 'column', 'matrix', got 'row'"),
    ("limiter", 0.9, "limiter must be None or a finite number of at least 1, got 0.9"),
    ("limiter", "1.01", "limiter must be None or a finite number of at least 1, got '1.01'"),
])  # fmt: skip
def test_bad_values_raise_from_the_constructor_and_from_a_group(
    key: str, value: Any, message: str
) -> None:
    weight = torch.nn.Parameter(torch.zeros(4, 6))
    with pytest.raises(ValueError, match=message):
        FiraAdamW([weight], **{key: value})
    with pytest.raises(ValueError, match=message):
        FiraAdamW([{"params": [weight], key: value}])


def test_groups_may_choose_differently() -> None:
    """A mode, a scaling and a limiter of its own for every group: each as if it were alone."""
    size = cases.SHAPES["wide"]
    start, grads = cases.parameter(size), growing(size, 6)
    params = [torch.nn.Parameter(start.detach().clone()) for _ in COMBINATIONS]
    keys = ("alpha_mode", "scaling", "limiter")
    groups = [
        {"params": [p], "rank": 4, **dict(zip(keys, c, strict=True))}
        for p, c in zip(params, COMBINATIONS, strict=True)
    ]
    optimizer = cases.build("FiraAdamW", groups, **HYPER)
    cases.run(optimizer, params, [[g] * len(params) for g in grads])
    for param, chosen in zip(params, COMBINATIONS, strict=True):
        own = dict(zip(keys, chosen, strict=True))
        assert_close(param, expected(start, grads, 4, gap=3, **{**HYPER, **own})[-1])


@pytest.mark.parametrize("limiter", [1.01, None])
@pytest.mark.parametrize("shape, experts", [((256, 512), 1), ((3, 64, 128), 3)])
def test_memory_is_that_of_galore_and_a_scalar_per_matrix(
    shape: tuple[int, ...], experts: int, limiter: float | None
) -> None:
    """Fact 12: ``k r + 2 l r`` elements and one float32 more; estimated and held to the byte."""
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(torch.randn(shape))
    own = model.named_parameters
    reports = {}
    for name in ("GaLoreAdamW", "FiraAdamW"):
        extra = {"limiter": limiter} if name == "FiraAdamW" else {}
        optimizer = cases.build(name, copy.deepcopy(list(own())), rank=8, **extra)
        param = optimizer.param_groups[0]["params"][0]
        cases.run(optimizer, [param], [[torch.randn(shape)]])
        reports[name] = memory.report(optimizer)
        estimate = memory.estimate(model, type(optimizer), rank=8, **extra)
        assert estimate.state == reports[name].total
    galore, ours = reports.values()
    extra_bytes = 4 * experts
    assert (ours.basis, ours.moments) == (galore.basis, galore.moments)
    assert ours.other == galore.other + extra_bytes
    m, n = sorted(shape[-2:])
    assert galore.basis + galore.moments == 4 * experts * (m * 8 + 2 * 8 * n)


def test_a_limiter_may_be_set_and_lifted_in_mid_run() -> None:
    """Set after steps without one, it has nothing to grow from and starts with the next step."""
    size = cases.SHAPES["wide"]
    start, grads = cases.parameter(size), growing(size, 6)
    param = torch.nn.Parameter(start.detach().clone())
    optimizer = cases.build("FiraAdamW", [param], limiter=None, **HYPER)
    cases.run(optimizer, [param], [[g] for g in grads[:2]])
    free = expected(start, grads[:3], 4, gap=3, **HYPER, limiter=None)
    optimizer.param_groups[0]["limiter"] = 1.0
    cases.run(optimizer, [param], [[grads[2]]])
    assert_close(param, free[-1])
    norms = []
    for grad in (grads[3], 9 * grads[4]):
        norms.append(float(optimizer.state[param]["residual_norm"]))
        cases.run(optimizer, [param], [[grad]])
    assert norms[1] <= norms[0] * (1 + 1e-6)
