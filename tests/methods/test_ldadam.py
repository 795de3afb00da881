"""LDAdam against the straight-line oracle in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.meter import Meter
from lowrank_optim import LDAdamW, LDAdamW8bit, attach_in_backward
from tests import cases
from tests.cases import matrices
from tests.compare import assert_close, relative
from tests.oracles.ldadam import ldadam
from tests.pairwise import paired
from tests.runs import resumed

HYPER: dict[str, Any] = {"lr": 3e-2, "weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-6}
STEPS = 8


def expected(start: Tensor, grads: list[Tensor], rank: int, **own: Any) -> tuple[Tensor, Tensor]:
    """The oracle's weights and errors after each gradient, expert by expert."""
    shape = start.shape
    if start.dim() == 4:
        start, grads = start.flatten(1), [g.flatten(1) for g in grads]
    runs = [
        ldadam(w, [matrices(g)[i] for g in grads], rank=min(rank, *w.shape), **own)
        for i, w in enumerate(matrices(start.detach()))
    ]
    found = []
    for part in (0, 1):
        steps = zip(*(run[part] for run in runs), strict=True)
        whole = [torch.stack(x) if start.dim() == 3 else x[0] for x in steps]
        found.append(torch.stack([x.reshape(shape) for x in whole]))
    return found[0], found[1]


def build(param: Tensor, **options: Any) -> Any:
    chosen = {"projector": "rsvd", "update_proj_gap": 1, **HYPER, **options}
    rank = chosen.pop("rank", cases.RANK)
    return cases.build("LDAdamW", [{"params": [param], "rank": rank}], **chosen)


def error_of(optimizer: Any, param: Tensor) -> Tensor:
    """E in the stored orientation: it is kept transposed in the canonical view."""
    ((item,),) = [optimizer._items(group) for group in optimizer.param_groups]
    error = optimizer.state[param]["error"].mT
    return (error.mT if item.view.flip else error).reshape(param.shape)


@pytest.mark.filterwarnings("ignore:rank")
@pytest.mark.parametrize(
    ("shape", "proj_type", "gap", "memory"),
    paired([*cases.SHAPES], cases.PROJ_TYPES, [1, 3], ["float32", None]),
)
def test_method_is_the_oracle(shape: str, proj_type: str, gap: int, memory: str | None) -> None:
    """Same weights and errors after every step, with a resume on the way."""
    size = cases.SHAPES[shape]
    start, grads = cases.parameter(size), cases.gradients(size, STEPS)
    own = {"gap": gap, "proj_type": proj_type, "rho": 0.6, **HYPER}
    if proj_type == "full":
        own["eps"] = 1e-3  # both sides of an SVD leave a diagonal, and rounding beside it
    want, errors = expected(start, grads, cases.RANK, error_feedback=memory is not None, **own)
    own["update_proj_gap"] = own.pop("gap")
    param = nn.Parameter(start.detach().clone())
    optimizer = build(param, error_feedback=memory, **own)
    for s, grad in enumerate(grads):
        if s == 4:
            fresh = build(param, error_feedback=memory, **own)
            resumed(optimizer, fresh)
            optimizer = fresh
        cases.run(optimizer, [param], [[grad]])
        assert_close(param, want[s])
        if memory:
            assert_close(error_of(optimizer, param), errors[s])


@pytest.mark.parametrize("shape", ["wide", "tall", "experts"])
def test_maximize_is_descent_on_the_negative(shape: str) -> None:
    """The basis follows the momentum of what is minimised, and so does the error."""
    size = cases.SHAPES[shape]
    start, grads = cases.parameter(size), cases.gradients(size, STEPS)
    want, errors = expected(start, [-g for g in grads], cases.RANK, rho=0.908, **HYPER)
    param = nn.Parameter(start.detach().clone())
    optimizer = build(param, maximize=True)
    cases.run(optimizer, [param], [[g] for g in grads])
    assert_close(param, want[-1])
    assert_close(-error_of(optimizer, param), errors[-1])


def test_the_error_has_no_share_in_the_subspace() -> None:
    """The error is orthogonal to the basis that made it, with what the momentum lost in it."""
    size = (12, 20)
    param = nn.Parameter(cases.parameter(size).detach())
    optimizer = build(param)
    for grad in cases.gradients(size, STEPS):
        cases.run(optimizer, [param], [[grad]])
        state = optimizer.state[param]
        inside = state["basis"].mT @ state["error"].mT
        assert float(inside.norm()) < 1e-12 * float(state["error"].norm())


@pytest.mark.parametrize(("memory", "bound"), [
    ("float32", 1e-3), ("bfloat16", 3e-2), ("8bit", 5e-2), ("4bit", 0.5),
])  # fmt: skip
def test_narrow_memories_follow_the_float64_oracle(memory: str, bound: float) -> None:
    """What the weights have moved is within the error of the memory's format."""
    size = (24, 80)
    start = cases.parameter(size).detach()
    grads = [cases.parameter(size, seed=s).detach() + start for s in range(2, 8)]
    own = {**HYPER, "weight_decay": 0.0, "eps": 1e-3}
    want = expected(start, grads, 8, rho=0.908, **own)[0][-1] - start
    param = nn.Parameter(start.float())
    optimizer = build(param, rank=8, error_feedback=memory, **own)
    cases.run(optimizer, [param], [[g.float()] for g in grads])
    assert relative(param.detach() - start, want) < bound


def test_moments_in_8_bits_follow_the_float64_oracle() -> None:
    size = (24, 640)
    start = cases.parameter(size).detach()
    grads = [cases.parameter(size, seed=s).detach() + start for s in range(2, 8)]
    own = {**HYPER, "weight_decay": 0.0, "eps": 1e-3}
    want = expected(start, grads, 8, rho=0.908, **own)[0][-1] - start
    param = nn.Parameter(start.float())
    optimizer = LDAdamW8bit([param], rank=8, **own)
    cases.run(optimizer, [param], [[g.float()] for g in grads])
    assert optimizer.state[param]["low.exp_avg"].dtype == torch.uint8
    assert relative(param.detach() - start, want) < 0.1


def test_the_gradient_is_left_alone() -> None:
    """The release keeps its error in ``p.grad``: what zeroes, clips or scales that corrupts it."""
    param = nn.Parameter(cases.parameter((6, 11)).detach())
    optimizer = build(param)
    for grad in cases.gradients((6, 11), 3):
        param.grad = grad.clone()
        optimizer.step()
        assert torch.equal(param.grad, grad)


@pytest.mark.parametrize("mode", ["step", "project"])
def test_inside_backward_it_is_the_plain_run(mode: Any) -> None:
    """Where bases rest, coordinates are all that is kept; "step" at any gap."""
    own: dict[str, Any] = {"rank": 4, "lr": 1e-2}
    own |= {"update_proj_gap": 2, "error_feedback": None} if mode == "project" else {}
    runs = []
    for attached in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(32, 16).double()
        optimizer = LDAdamW(model.named_parameters(), **own)
        handle = attach_in_backward(optimizer, mode) if attached else None
        for _ in range(6):
            model(torch.randn(4, 32).double()).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        if handle is not None:
            handle.remove()
        runs.append(model.weight.detach())
    assert_close(runs[0], runs[1])


def test_what_moves_at_every_step_keeps_no_coordinates() -> None:
    model = nn.Linear(32, 16)
    for own, why in (({}, "does not see"), ({"error_feedback": None}, "at every step")):
        optimizer = LDAdamW(model.named_parameters(), rank=4, **own)
        with pytest.raises(ValueError, match=f"{why}.*use mode='step'"):
            attach_in_backward(optimizer, "project")


@pytest.mark.parametrize("memory", ["float32", "8bit"])
def test_a_refresh_copies_no_memory_of_errors(memory: str) -> None:
    """It writes none, so that what puts a failed step back need not hold another."""
    param = cases.parameter((32, 48), torch.float32)
    optimizer = build(param, error_feedback=memory, rank=4)
    for _ in range(2):
        param.grad = torch.randn(32, 48)
        with Meter() as meter:
            optimizer.step()
    error = optimizer.state[param]["error"]
    copied = [
        new for new in meter.news
        if new.op in ("aten::empty_like", "aten::clone") and new.shape == tuple(error.shape)
    ]  # fmt: skip
    assert not copied


def test_a_bad_gradient_changes_nothing() -> None:
    """Neither weights, nor bases, moments and the error; and the run goes on."""
    param = nn.Parameter(cases.parameter((6, 11)).detach())
    optimizer = build(param, weight_decay=0.0)
    grads = cases.gradients((6, 11), 4)
    cases.run(optimizer, [param], [[g] for g in grads[:3]])
    before, kept = param.detach().clone(), {k: x.clone() for k, x in optimizer.state[param].items()}
    bad = grads[3].clone()
    bad[0, 0] = float("nan")
    param.grad = bad.clone()
    optimizer.step()
    assert torch.equal(param, before)
    for key in ("basis", "low.exp_avg", "low.exp_avg_sq", "error"):
        assert torch.equal(optimizer.state[param][key], kept[key]), key
    cases.run(optimizer, [param], [[grads[3]]])
    assert bool(param.isfinite().all()) and not torch.equal(param, before)


def test_the_error_makes_the_difference_where_a_subspace_is_too_small() -> None:
    """A quadratic in all directions at rank 1: with the memory the loss falls, without it less."""
    target = torch.randn(12, 12, generator=torch.Generator().manual_seed(0))
    losses = {}
    for memory in (None, "float32"):
        param = nn.Parameter(torch.zeros(12, 12))
        optimizer = LDAdamW([param], lr=0.1, rank=1, weight_decay=0.0, error_feedback=memory)
        for _ in range(80):
            optimizer.zero_grad()
            loss = (param - target).square().sum()
            loss.backward()
            optimizer.step()
        losses[memory] = float(loss.detach())
    assert losses["float32"] < 0.75 * losses[None], losses


@pytest.mark.parametrize(("options", "message"), [
    ({"rho": 1.0}, r"rho must be a number in \[0, 1\), got 1.0"),
    ({"rho": "half"}, r"rho must be a number in \[0, 1\), got 'half'"),
    ({"error_feedback": "16bit"}, "error_feedback must be one of None, 'float32'"),
    ({"on_refresh": "keep"}, "on_refresh of LDAdamW must be 'project', got 'keep': the basis"),
])  # fmt: skip
def test_what_no_step_could_use_is_refused(options: dict[str, Any], message: str) -> None:
    weight = nn.Parameter(torch.zeros(8, 8))
    with pytest.raises(ValueError, match=message):
        LDAdamW([weight], **options)
    with pytest.raises(ValueError, match=message):
        LDAdamW([{"params": [weight], "rank": 4, **options}])
    optimizer = LDAdamW([{"params": [weight], "rank": 4}])
    optimizer.param_groups[0].update(options)
    weight.grad = torch.ones(8, 8)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert not weight.detach().any()
