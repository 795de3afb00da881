"""Numbers at the edge of their formats: weights, bases and moments stay finite, bases orthonormal.

What a gradient without finite norm leaves in place is in ``tests/engine/test_facts_numerics.py``;
here it is that nothing follows from it, at every phase and in every format.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_optim.ops import devices
from tests import cases, runs
from tests.compare import assert_close
from tests.logged import Logged

SHAPE, RANK, GAP = (12, 20), 4, 3
ORTHONORMAL = 1e-5
EVERY: list[tuple[str, str | None]] = [
    *cases.pairs(),
    *((name, None) for name in cases.method_names() if name not in cases.projecting_names()),
]
PHASES = {"first": 0, "refresh": GAP, "between": GAP + 1}
SIZES: dict[str, Mapping[torch.dtype, float]] = {
    "nan": dict.fromkeys((torch.float32, torch.bfloat16, torch.float16), math.nan),
    "inf": dict.fromkeys((torch.float32, torch.bfloat16, torch.float16), -math.inf),
    "huge": {torch.float32: 1e30, torch.bfloat16: 3e38, torch.float16: 6e4},
    "large": {torch.float32: 1e15, torch.bfloat16: 1e15, torch.float16: 6e3},
    "denormal": {torch.float32: 1e-42, torch.bfloat16: 1e-40, torch.float16: 6e-8},
    "zero": dict.fromkeys((torch.float32, torch.bfloat16, torch.float16), 0.0),
}
"""What every entry of a gradient is, or is multiplied by."""


def make(name: str, projector: str | None, param: Tensor, **options: Any) -> Any:
    own = {} if projector is None else {"projector": projector}
    group = {"params": [param], "rank": RANK}
    return cases.build(name, [group], **{**own, "update_proj_gap": GAP, **options})


def check_sound(optimizer: torch.optim.Optimizer) -> None:
    """Everything finite, and every basis that is kept orthonormal, whatever dtype it is in."""
    for param, state in optimizer.state.items():
        assert param.isfinite().all(), "weights"
        for key, x in state.items():
            assert x.isfinite().all(), key
            if key in ("basis", "basis_right") and int(state["refresh_step"]) >= 0:
                p = x.double()
                gap = (p.mT @ p - torch.eye(p.shape[-1], dtype=p.dtype)).abs().max()
                assert gap <= ORTHONORMAL + torch.finfo(x.dtype).eps, (key, float(gap))


def moves(optimizer: Any, param: Tensor, size: float = 1.0) -> None:
    """A good gradient still trains, and nothing is left that would spoil it."""
    before = param.detach().clone()
    optimizer.param_groups[0]["weight_decay"] = 0.0  # which would move any weights
    for grad in cases.gradients(SHAPE, GAP + 1, param.dtype, seed=9):
        param.grad = size * grad
        optimizer.step()
    check_sound(optimizer)
    assert not torch.equal(param, before)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("name", "projector"), EVERY)
def test_a_gradient_at_the_edge(
    name: str, projector: str | None, size: str, dtype: torch.dtype
) -> None:
    """At the first step, at a refresh and between, of weights in three formats."""
    for at in PHASES.values():
        edge(name, projector, size, dtype, at)


def edge(name: str, projector: str | None, size: str, dtype: torch.dtype, at: int) -> None:
    param = nn.Parameter(cases.parameter(SHAPE, dtype).detach())
    optimizer = make(name, projector, param, weight_decay=0.01)
    for step, grad in enumerate(cases.gradients(SHAPE, at + 4, dtype)):
        factor = SIZES[size][dtype]
        bad = grad.sign() * factor if step == at else grad
        param.grad = bad.to(dtype)
        optimizer.step()
        check_sound(optimizer)
    moves(optimizer, param, size_after(SIZES[size][dtype]))


def size_after(factor: float) -> float:
    """The size of gradients that are to move weights after one of +-``factor`` everywhere.

    1 after one that was passed over: nothing may be left of it. One whose norm is finite in float32
    is taken, and then smaller ones need not be seen. Adafactor divides by the root of a mean v that
    has ``factor^2`` in it, of which ``1 - t^-0.8`` is left at step t, a third to three quarters in
    the first ten; and SGD's weights are as large as ``lr factor``. Either way a step of size s is
    ``s / factor`` of what moved the weights before, and for ``s = 1`` less than half a unit of
    theirs. An eighth of ``factor`` is seen, and eight standard deviations of it are in the format.
    """
    taken = math.isfinite(factor) and math.prod(SHAPE) * factor**2 < torch.finfo(torch.float32).max
    return max(1.0, factor / 8) if taken else 1.0


SOME = [
    (name, projector)
    for name, projector in EVERY
    if not name.endswith("8bit") and (name, projector) != ("FrugalAdamW", "svd")
    if projector in (None, "svd") or (name, projector) in cases.OWN.items()
]


@pytest.mark.parametrize(("name", "projector"), SOME)
def test_a_gradient_at_the_edge_of_float32(name: str, projector: str | None) -> None:
    """Each size at one phase."""
    for size, at in zip(SIZES, [0, 3, 4, 3, 0, 3], strict=True):
        edge(name, projector, size, torch.float32, at)


# ---------------------------------------------------------------- spectra


def spectrum(kind: str) -> tuple[Tensor, int]:
    """A gradient, and its rank."""
    m, n = SHAPE
    generator = torch.Generator().manual_seed(3)
    u, _ = torch.linalg.qr(torch.randn(m, m, generator=generator, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(n, m, generator=generator, dtype=torch.float64))
    values = {
        "all equal": torch.ones(m),
        "two by two": torch.arange(m).div(2, rounding_mode="floor").neg().exp2(),
        "equal at the cut": torch.cat([torch.tensor([4.0, 3.0]), torch.ones(m - 2)]),
        "rank 1": torch.eye(m)[0],
        "rank 2": torch.eye(m)[0] + 0.5 * torch.eye(m)[1],
        "condition 1e12": torch.logspace(0, -12, m),
    }
    if kind in values:
        s = values[kind].double()
        return u @ torch.diag(s) @ v.mT, int((s > 0).sum())
    g = torch.zeros(SHAPE, dtype=torch.float64)
    if kind == "one entry":
        g[3, 5] = 1.0
    elif kind == "constant":
        g += 1.0
    else:
        g[:3, :3] = torch.eye(3)  # "unit vectors": of as many rows as there are, less than rank
    return g, int(torch.linalg.matrix_rank(g))


SPECTRA = [
    "all equal", "two by two", "equal at the cut", "rank 1", "rank 2", "condition 1e12",
    "one entry", "constant", "unit vectors",
]  # fmt: skip
HOW = [
    pytest.param("project", torch.float32),
    pytest.param("keep", torch.bfloat16),
    pytest.param("reset", torch.float16, marks=pytest.mark.slow),
    pytest.param("project", torch.float64, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("on_refresh", "dtype"), HOW)
@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("projector", cases.basis_names())
def test_spectra_without_gaps(
    projector: str, kind: str, on_refresh: str, dtype: torch.dtype
) -> None:
    """A basis is orthonormal where singular vectors are not unique, or are of nothing at all.

    Where the gradient has no more directions than the basis, a basis that is found from it misses
    nothing of it, to the rounding of the format that the gradient comes in.
    """
    exact, rank = spectrum(kind)
    param = nn.Parameter(cases.parameter(SHAPE, dtype).detach())
    optimizer = make("GaLoreAdamW", projector, param, on_refresh=on_refresh)
    for factor in (1.0, 1e-3, -1.0, 1.0, 1.0, 2.0, 1.0):
        param.grad = (factor * exact).to(dtype)
        optimizer.step()
        check_sound(optimizer)
    if rank <= RANK and projector in ("svd", "rsvd"):
        p, g = optimizer.state[param]["basis"].double(), exact.to(dtype).double()
        unit = max(torch.finfo(dtype).eps, torch.finfo(optimizer.state[param]["basis"].dtype).eps)
        assert (g - p @ (p.mT @ g)).norm() <= 30 * unit * g.norm()


@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("name", ["SSTAdamW", "SwitchLoRAAdamW", "FiraAdamW", "FrugalAdamW"])
def test_spectra_without_gaps_in_other_methods(name: str, kind: str) -> None:
    """Of the weights too: SST decomposes them, and SwitchLoRA's factors begin with them."""
    exact, _ = spectrum(kind)
    param = nn.Parameter(exact.float())
    optimizer = make(name, None if name in ("SSTAdamW", "SwitchLoRAAdamW") else "svd", param)
    for _ in range(7):
        param.grad = exact.float()
        optimizer.step()
        check_sound(optimizer)


# ---------------------------------------------------------------- long runs


def noisy_quadratic(param: Tensor, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    noise = torch.randn(param.shape, generator=generator)
    param.grad = (param.detach().float() + 0.1 * noise).to(param.dtype)


@pytest.mark.slow
@pytest.mark.parametrize("rounding", [False, True])
@pytest.mark.parametrize(("name", "projector"), EVERY)
def test_five_thousand_steps_of_bfloat16(name: str, projector: str | None, rounding: bool) -> None:
    """A noisy quadratic: the weights shrink to the noise, nothing leaves the format.

    Rounded to nearest, a step has to be as long as half a unit of the weights to change them.
    """
    param = nn.Parameter(2 * cases.parameter(SHAPE, torch.bfloat16).detach())
    first = float(param.detach().float().norm())
    options: dict[str, Any] = {"lr": 2e-3 if rounding else 2e-2, "scale": 1.0}
    options["stochastic_rounding"] = rounding
    if name in cases.projecting_names():
        options["update_proj_gap"] = 20
    if (name, projector) == ("GaLoreLion", "columns"):
        # A sign moves a weight by lr, in a fifth of the columns at a time: by 2e-3 * 5000 / 5 = 2
        # in all, which leaves 0.42 of the first norm. Momentum that is kept remembers 100 steps: it
        # is mostly of the five sets of columns before, which say nothing of these (0.51 is left, in
        # float32 too). So it follows its columns (0.36).
        options["on_refresh"] = "project"
    optimizer = make(name, projector, param, **options)
    for step in range(5000):
        noisy_quadratic(param, step)
        optimizer.step()
        if step % 500 == 499:
            check_sound(optimizer)
    assert float(param.detach().float().norm()) < 0.5 * first


def late(optimizer: Any, by: int) -> None:
    """Let an optimizer think that ``by`` steps, a multiple of its gap, have been."""
    saved = optimizer.state_dict()
    for state in saved["state"].values():
        state["step"] += by
        if state["refresh_step"] >= 0:
            state["refresh_step"] += by
    optimizer.load_state_dict(saved)


LATE = [
    pytest.param(*pair, marks=pytest.mark.slow if pair[0] == "FrugalAdamW" else ())
    for pair in cases.pairs()
    if pair[1] == "svd" and not pair[0].endswith("8bit")
]


@pytest.mark.parametrize("at", [999_999, 16_777_200])
@pytest.mark.parametrize(("name", "projector"), LATE)
def test_counters_of_a_million_steps(name: str, projector: str, at: int) -> None:
    """A run that is a million steps old, or as old as a float32 can count, goes on.

    Its steps are those of a run that is a million steps old, to the bit: bias corrections are 1,
    and refreshes fall on the same steps. Adafactor averages over all steps, so that its are close.
    """
    params = [nn.Parameter(cases.parameter(SHAPE, torch.float32).detach()) for _ in range(2)]
    optimizers = [make(name, projector, p, seed=7) for p in params]
    grads = cases.gradients(SHAPE, 13, torch.float32)
    for param, optimizer, by in zip(params, optimizers, (999_999, at), strict=True):
        cases.run(optimizer, [param], [[g] for g in grads[:4]])
        late(optimizer, by // GAP * GAP)
        cases.run(optimizer, [param], [[g] for g in grads[4:]])
        check_sound(optimizer)
        state = optimizer.state[param]
        assert int(state["step"]) == by // GAP * GAP + 13
        assert int(state["refresh_step"]) == by // GAP * GAP + 12
    if name == "GaLoreAdafactor":
        assert_close(params[1], params[0], torch.bfloat16)
    else:
        runs.assert_same([params[1]], [params[0]])


COUNTED: list[tuple[str, str | None, dict[str, Any]]] = [
    ("GaLoreAdamW", "svd", {}),
    ("GaLoreAdafactor", "svd", {"on_refresh": "reset"}),
    ("FrugalAdamW", "block", {}),
    ("FrugalAdamW", "rows", {"on_refresh": "project"}),
    ("DCTAdamW", "dct", {"slot_bias_correction": True}),
    ("SSTAdamW", None, {"factors": "active", "steps_per_iteration": GAP}),
    ("SwitchLoRAAdamW", None, {"interval": 4, "freeze_steps": 1}),
]
COUNTERS = ("step", "refresh_step", "clock", "host.iteration", "low.age")


@pytest.mark.parametrize(("name", "projector", "options"), COUNTED)
def test_counters_go_on_beyond_float32(
    name: str, projector: str | None, options: dict[str, Any], logged: Logged
) -> None:
    """A float32 counts to 2^24, and there refreshes ended without a word.

    Every step counts as one, bases are refreshed as often as before, and a run that is resumed
    beyond takes the same steps.
    """
    shapes = SHAPE, SHAPE, (5,)
    lists = [cases.gradients(x, 18, torch.float32, seed=n) for n, x in enumerate(shapes)]
    rows = [list(row) for row in zip(*lists, strict=True)]

    def made(like: Sequence[Tensor]) -> tuple[Any, list[Tensor]]:
        params: list[Tensor] = [nn.Parameter(p.detach().clone()) for p in like]
        own = {} if projector is None else {"projector": projector, "update_proj_gap": GAP}
        groups = [{"params": params[:2], "rank": RANK}, {"params": params[2:], "rank": None}]
        return cases.build(name, groups, **own, **options), params

    optimizer, params = made([cases.parameter(shape, torch.float32) for shape in shapes])
    cases.run(optimizer, params, rows[:4])
    by = 2**24 - 10  # a multiple of two gaps, so that either block is where it was
    saved = optimizer.state_dict()
    for state in saved["state"].values():
        for key in COUNTERS:
            if key in state:
                state[key] += by * (state[key] >= 0)
    optimizer.load_state_dict(saved)
    cases.run(optimizer, params, rows[4:14])
    resumed, twins = made(params)
    resumed.load_state_dict(optimizer.state_dict())
    for run, own in ((optimizer, params), (resumed, twins)):
        cases.run(run, own, rows[14:])
    runs.assert_same(twins, params)
    assert not logged.records
    for param, twin in zip(params, twins, strict=True):
        state = optimizer.state[param]
        assert int(state.get("clock", state["step"])) == by + 18
        if "refresh_step" in state and projector in ("svd", "rows", "dct"):
            assert int(state["refresh_step"]) == by + 15
        again = resumed.state[twin]
        assert state.keys() == again.keys()
        assert all(torch.equal(x, again[key]) for key, x in state.items())


def test_counters_of_a_device_say_where_they_end(
    monkeypatch: pytest.MonkeyPatch, logged: Logged
) -> None:
    """A graph may know where they are, so that they stay what they are."""
    monkeypatch.setattr(devices, "HOSTS", frozenset())  # the CPU stands for a device
    param = nn.Parameter(cases.parameter(SHAPE, torch.float32).detach())
    optimizer = make("GaLoreAdamW", "svd", param, capturable=True)
    grads = cases.gradients(SHAPE, 5, torch.float32)
    cases.run(optimizer, [param], [[grads[0]]])
    late(optimizer, 2**24 - 4)  # a multiple of the gap, so that 2^24 - 3 steps are taken
    cases.run(optimizer, [param], [[g] for g in grads[1:3]])
    assert not logged.records
    cases.run(optimizer, [param], [[g] for g in grads[3:]])
    (record,) = logged.records
    assert "parameter 0 has taken 16777215 steps" in record.getMessage()
    state = optimizer.state[param]
    assert {state[key].dtype for key in ("step", "refresh_step")} == {torch.float32}
