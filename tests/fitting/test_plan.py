"""A plan as text and back, against models, and through a checkpoint."""

from __future__ import annotations

import functools
import json

import pytest
import torch
from torch import nn

from lowrank_optim import GaLoreAdamW, fit
from lowrank_optim.fitting import Plan
from lowrank_optim.memory import report
from tests import runs

RANKS = {"0.weight": 8, "2.weight": 16, "3.weight": 24}


def net() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 48), nn.Linear(48, 32), nn.LayerNorm(32)
        )


@functools.cache
def planned() -> Plan:
    """Once for all tests: a plan is not changed, and to find one takes a second."""
    return fit(net(), 1.0, in_backward=["project"], update_proj_gap=3)


def edited(**own) -> Plan:
    return Plan.from_json(json.dumps({**json.loads(planned().to_json()), **own}))


def train(model, optimizer, steps) -> None:
    for n in steps:
        x = torch.randn(4, 32, generator=torch.Generator().manual_seed(n))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_round_trip():
    """Everything comes back, pairs and figures included."""
    plan = fit(
        net(), 1.0, in_backward=["project"], optimizers=[(GaLoreAdamW, {"betas": (0.9, 0.95)})]
    )
    again = Plan.from_json(plan.to_json(), net())
    assert again == plan
    assert json.loads(plan.to_json())["ranks"] == dict(plan.ranks)


def test_a_rank_for_each_parameter_through_a_checkpoint():
    """Interrupted and resumed is the uninterrupted run, to the bit."""
    plan = edited(ranks=RANKS)
    whole, first, second = net(), net(), net()
    optimizer = plan.optimizer(whole, lr=1e-2)
    plan.attach(optimizer, max_norm=1.0)
    train(whole, optimizer, range(8))
    before = plan.optimizer(first, lr=1e-2)
    with plan.attach(before, max_norm=1.0):
        train(first, before, range(4))
    saved = runs.through_a_file({"model": first.state_dict(), "optimizer": before.state_dict()})
    second.load_state_dict(saved["model"])
    after = Plan.from_json(plan.to_json(), second).optimizer(second, lr=1e-2)
    after.load_state_dict(saved["optimizer"])
    plan.attach(after, max_norm=1.0)
    train(second, after, range(4, 8))
    for a, b in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    for name, rank in RANKS.items():
        assert after.state[second.get_parameter(name)]["basis"].shape[-1] == rank


def test_groups_name_every_parameter_once():
    plan, model = edited(ranks=RANKS), net()
    groups = plan.groups(model, no_decay="bias")
    names = [name for group in groups for name in group["param_names"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert {n: g["rank"] for g in groups if "rank" in g for n in g["param_names"]} == RANKS
    assert all(g["weight_decay"] == 0 for g in groups if any("bias" in n for n in g["param_names"]))


def test_a_compiled_model_has_the_names_of_its_own():
    plan, model = edited(ranks=RANKS), nn.Module()
    model._orig_mod = net()  # as torch.compile has it
    groups = plan.groups(model)
    assert sorted(g["rank"] for g in groups if "rank" in g) == [8, 16, 24]


REFUSED = [
    ("which the model has not; did you mean 0.weight", {"ranks": {**RANKS, "0.wieght": 8}}),
    ("says nothing of 3.weight", {"ranks": {"0.weight": 8, "2.weight": 8}}),
    ("rank 40 for 0.weight .* at most 32", {"ranks": {**RANKS, "0.weight": 40}}),
    ("which is no matrix", {"ranks": {**RANKS, "0.bias": 8}}),
    ("must be a positive int, got 2.5", {"ranks": {**RANKS, "0.weight": 2.5}}),
    ("optimizer_class of a plan must be one of", {"optimizer_class": "AdamW"}),
    ("in_backward must be None", {"in_backward": "both"}),
    ("accumulation_steps must be a positive int", {"accumulation_steps": 0}),
    ("a plan has rnaks", {"rnaks": {}}),
    ("estimate of a plan", {"estimate": {"weights": 1}}),
    ("ranks of a plan must be an object", {"ranks": [8]}),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda c: c[0][:20])
def test_an_edited_plan_is_checked(case):
    text, own = case
    with pytest.raises(ValueError, match=text):
        edited(**own).groups(net())


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_what_is_no_plan(text):
    with pytest.raises(ValueError, match="a plan"):
        Plan.from_json(text)


def test_of_another_model():
    """Frozen since, deeper, or none at all."""
    plan, frozen = planned(), net()
    frozen[0].requires_grad_(False)
    with pytest.raises(ValueError, match=r"0.weight, which is frozen"):
        plan.optimizer(frozen, lr=1.0)
    with pytest.raises(ValueError, match=r"says nothing of 5.weight"):
        plan.optimizer(nn.Sequential(*net(), nn.Linear(32, 32)), lr=1.0)
    with pytest.raises(ValueError, match="which the model has not"):
        Plan.from_json(plan.to_json(), nn.Linear(4, 4))
    with pytest.raises(TypeError, match=r"torch.nn.Module"):
        plan.groups(3)


def test_arguments_that_change_what_is_counted_are_refused():
    """Those that no byte depends on are not, whatever they are called."""
    plan, model = planned(), net()
    for own in ({"state_dtype": "bfloat16"}, {"projector": "dct"}, {"stagger": False}):
        with pytest.raises(ValueError, match=f"{next(iter(own))} would change the memory"):
            plan.optimizer(model, lr=1e-3, **own)
    moving = fit(
        net(), 1.0, in_backward=["project"], optimizers=["GaLoreSGD"], state_dtypes=["float32"]
    )
    with pytest.raises(ValueError, match="momentum would change the memory"):
        moving.optimizer(model, lr=1e-3, momentum=0.9)
    optimizer = plan.optimizer(model, lr=1e-3, weight_decay=0.1, on_refresh="project")
    assert optimizer.defaults["on_refresh"] == "project" and optimizer.defaults["lr"] == 1e-3
    with pytest.raises(ValueError, match="take no rank"):
        plan.groups(model, rank=3)
    with pytest.raises(ValueError, match="mode is the plan's"):
        plan.attach(optimizer, mode="step")


def test_what_steps_need_in_passing_is_in_the_budget():
    """A budget of the peak has room for the plan's ranks; one byte less has not."""
    own = {"in_backward": ["step"], "state_dtypes": ["float32"], "optimizers": ["GaLoreAdamW"]}
    plan = fit(net(), 1.0, **own)
    found = plan.estimate
    assert found.peak == found.held + max(found.beside["step"], found.beside["refresh"])
    assert found.peak > found.held + found.live_gradients
    assert fit(net(), found.peak / 2**30, **own).ranks == plan.ranks
    less = fit(net(), (found.peak - 1) / 2**30, **own)
    assert sum(less.ranks.values()) < sum(plan.ranks.values())
    assert less.estimate.peak < found.peak


def test_what_steps_need_in_passing_may_be_left_out():
    """A budget of weights, gradients and state alone; the state is that of all ranks, as asked."""
    own = {"in_backward": [None], "state_dtypes": ["float32"], "optimizers": ["GaLoreAdamW"]}
    plan = fit(net(), 1.0, transients=False, **own)
    assert plan.estimate.step_transients is None
    assert plan.estimate.peak == plan.estimate.held + plan.estimate.gradients
    budget = plan.estimate.peak / 2**30
    assert fit(net(), budget, transients=False, **own).ranks == plan.ranks
    with pytest.raises(ValueError, match="nothing fits"):
        fit(net(), budget, **own)
    with pytest.raises(ValueError, match="transients must be True or False"):
        fit(net(), 1.0, transients="no")


def test_nothing_to_attach():
    plan, model = fit(net(), 1.0, in_backward=[None]), net()
    optimizer = plan.optimizer(model, lr=1e-3)
    assert plan.attach(optimizer) is None
    with pytest.raises(ValueError, match="attaches nothing, so max_norm"):
        plan.attach(optimizer, max_norm=1.0)


def test_an_edited_plan_is_estimated_anew():
    plan = edited(ranks=RANKS)
    model = net()
    optimizer = plan.optimizer(model, lr=1e-2)
    train(model, optimizer, range(1))
    assert plan.estimated(model).state == report(optimizer).total != plan.estimate.state
