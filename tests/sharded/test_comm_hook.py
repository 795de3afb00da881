"""``ddp_comm_hook``: coordinates on the wire under DistributedDataParallel, and its own steps."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import lowrank_optim
from lowrank_optim import GaLoreAdamW, attach_in_backward
from lowrank_optim.backward.comm_hook import ddp_comm_hook, lift_
from tests import cases
from tests.sharded.meter import Meter
from tests.sharded.ranks import Ranks, World
from tests.sharded.replicas import SHORT, Run, beside
from tests.sharded.test_average_in_backward import DIAGONAL, SVD, WHOLE
from tests.sharded.training import Case, assembled, assert_equal_runs

Worlds = Callable[[int], Ranks]

EQUAL: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "accumulated": ("GaLoreAdamW", {"on_refresh": "project"}, {"pieces": 2}),
    "scaled": ("GaLoreAdamW", {"projector": "dct"}, {"scaled": True}),
    "static graph": ("GaLoreLion", {"projector": "random"}, {"options": {"static_graph": True}}),
    "views of buckets": (
        "GaLoreAdamW",
        {"projector": "svd", "proj_type": "full", **DIAGONAL},
        {"options": {"gradient_as_bucket_view": True}},
    ),
    "unused": (
        "GaLoreSGD",
        {"momentum": 0.9},
        {"unused": True, "options": {"find_unused_parameters": True}},
    ),
    "columns": ("GaLoreAdamW", {"projector": "columns", "rank": 0.5}, {}),
}
MORE: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "all shapes": ("GaLoreAdamW", {"projector": "svd"}, {"case": WHOLE}),
    "entries": ("GaLoreAdamW", {"projector": "randk", "rank": 0.3}, {}),
    "hadamard": ("GaLoreAdamW", {"projector": "hadamard", "scale": 0.7}, {}),
    "adafactor": ("GaLoreAdafactor", {"relative_step": False, "scale_parameter": False}, {}),
    "cosines": ("DCTAdamW", {"update_proj_gap": 3}, {}),
    "small buckets": ("GaLoreAdamW", {}, {"options": {"bucket_cap_mb": 0.0005}}),
}


def leaving(world: World, early: bool) -> tuple[str, int]:
    """What was raised within ``join()`` where rank 1 has a batch more, and steps taken."""
    model = DistributedDataParallel(nn.Linear(8, 8))
    own = {"rank": 0.5, "projector": "columns", "update_proj_gap": 2}
    optimizer = GaLoreAdamW(model.module.named_parameters(), **own)
    model.register_comm_hook(None, ddp_comm_hook(optimizer))
    taken = 0
    try:
        with model.join(throw_on_early_termination=early):
            for _ in range(3 + world.rank):
                model(torch.randn(2, 8)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                taken += 1
    except RuntimeError as error:
        return str(error), taken
    return "", taken


def test_a_rank_that_leaves_would_not_know_what_is_sent(ranks: Worlds) -> None:
    """Messages of a rank that takes no steps had other lengths than those of the others."""
    for said, taken in ranks(2).run("leaving", leaving, early=False).checked():
        assert "throw_on_early_termination" in said and "as many batches" in said and taken == 0
    for said, taken in ranks(2).run("leaving", leaving, early=True).checked():
        assert "exhausted" in said and taken == 3


@pytest.mark.parametrize(
    "name", [*EQUAL, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)]
)
def test_it_is_plain_ddp(name: str, ranks: Worlds) -> None:
    """Weights, state, choices and counters, over refreshes; ranks alike to the bit."""
    cls, options, own = (EQUAL | MORE)[name]
    run = Run(**{"case": Case(cls, options, only=SHORT), "how": "hook", **own})
    values = ranks(2).run(name, beside, runs=[run, run.plain]).checked()
    ours, ddp = (assembled([x[i] for x in values]) for i in range(2))
    assert_equal_runs(ours, ddp)


@pytest.mark.parametrize("projector", [n for n in cases.projector_names() if n != "block"])
@pytest.mark.parametrize("proj_type", ["std", "full"])
def test_what_is_lifted_has_the_coordinates_that_it_came_from(
    projector: str, proj_type: str
) -> None:
    """``P^T (P R) = R``, and P R is the nearest that G has in the subspace."""
    for shape in ((6, 11), (13, 7), (3, 6, 10), (6, 4, 3, 3)):
        weight = nn.Parameter(cases.parameter(shape, torch.float64).detach())
        grad = cases.parameter(shape, torch.float64, seed=5).detach()
        own = {"projector": projector, "proj_type": proj_type, "rank": 2, "scale": 0.3}
        optimizer = GaLoreAdamW([weight], update_proj_gap=9, **own)
        weight.grad = grad.clone()
        optimizer.step()
        (plan,) = optimizer._items(optimizer.param_groups[0])
        state = optimizer.state[weight]
        low = plan.subspace.coords(state, plan.view.of(grad))
        before = {k: x.clone() for k, x in state.items()}
        lifted = torch.full(shape, float("nan"), dtype=torch.float64)
        lift_(plan, state, {k: x.clone() for k, x in low.items()}, lifted)
        again = plan.subspace.coords(state, plan.view.of(lifted))
        assert torch.allclose(again["low"], low["low"], rtol=0, atol=1e-12)
        assert float((grad * lifted).sum()) == pytest.approx(float(lifted.square().sum()), abs=1e-9)
        assert all(torch.equal(state[k], before[k]) for k in before)


# ------------------------------------------------------------------ what is sent

M, N, R = 32, 48, 4


def counted(world: World, hook: bool) -> Any:
    model = nn.Sequential(*(nn.Linear(N, M), nn.Tanh(), nn.Linear(M, N))).double()
    ddp = DistributedDataParallel(model)
    own = {"rank": R, "update_proj_gap": 3, "stagger": False}
    optimizer = GaLoreAdamW(model.named_parameters(), lr=1e-2, **own)
    if hook:
        ddp.register_comm_hook(None, ddp_comm_hook(optimizer))
    out = []
    for _ in range(5):
        with Meter() as meter:
            ddp(torch.randn(4, N, dtype=torch.float64)).square().mean().backward()
        out.append(meter.bytes["all_reduce"])
        optimizer.step()
        optimizer.zero_grad()
    return out


def test_coordinates_are_all_that_is_sent(ranks: Worlds) -> None:
    """Where no basis is due: steps 0 and 3 refresh, and what is known is the coming step's."""
    low, whole = 8 * (2 * R * N + M + N), 8 * (2 * M * N + M + N)
    for sent in ranks(2).run("counted", counted, hook=True).checked():
        assert sent == [whole, low, low, whole, low]
    for sent in ranks(2).run("counted, ddp", counted, hook=False).checked():
        assert sent == [whole] * 5


# ------------------------------------------------------------------ refused

REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "fira": ("FiraAdamW", {}, "does not see .* ddp_comm_hook does not send"),
    "frugal": ("FrugalAdamW", {"projector": "columns"}, "does not see .* does not send"),
    "blocks": ("FrugalAdamW", {"projector": "block"}, "whole or not at all"),
    "memory": ("DCTAdamW", {"error_feedback": "8bit", "update_proj_gap": 3}, "does not see"),
    "every step": ("DCTAdamW", {"update_proj_gap": 1}, "at every step"),
    "switched": ("SwitchLoRAAdamW", {}, "at every step"),
    "factors": ("SSTAdamW", {}, r"attach_in_backward\(optimizer, 'project', process_group=...\)"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_needs_more_than_coordinates_is_refused(what: str) -> None:
    name, options, why = REFUSED[what]
    weight = nn.Parameter(torch.randn(8, 12))
    optimizer = cases.build(name, [("a.weight", weight)], **options)
    with pytest.raises(ValueError, match=f"a.weight.*{why}|{why}") as error:
        ddp_comm_hook(optimizer)
    assert "DistributedDataParallel" in str(error.value)


def test_what_is_no_optimizer_of_this_package_is_refused() -> None:
    with pytest.raises(TypeError, match="ddp_comm_hook takes an optimizer of lowrank_optim"):
        ddp_comm_hook(torch.optim.AdamW([torch.zeros(1)]))  # type: ignore[arg-type]


def in_pairs(world: World) -> Any:
    """Models of pairs of ranks: nobody averages with the other pair; another state is an error."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    group = pairs[world.rank // 2]
    torch.manual_seed(0)
    grads = []
    for state in (None, group, dist.group.WORLD, "world"):
        model = nn.Linear(6, 4).double()
        ddp = DistributedDataParallel(model, process_group=group)
        optimizer = lowrank_optim.GaLoreSGD(model.named_parameters(), lr=1e-2, rank=2)
        ddp.register_comm_hook(state, ddp_comm_hook(optimizer))
        x = torch.full((4, 6), 1.0 + world.rank, dtype=torch.float64)
        if state in (None, group):
            ddp(x).sum().backward()
            assert model.weight.grad is not None
            grads.append(float(model.weight.grad[0, 0]))
        else:
            with pytest.raises(ValueError, match="must be None, or the process group"):
                ddp(x).sum().backward()
    return grads


def test_the_group_is_that_of_the_model(ranks: Worlds) -> None:
    values = ranks(4).run("in pairs", in_pairs).checked()
    assert values == [[6.0, 6.0]] * 2 + [[14.0, 14.0]] * 2


def test_clipping_sees_the_subspace(ranks: Worlds) -> None:
    """The norm is that of coordinates, as with ``attach_in_backward``."""
    hook = Run(replace(SVD, steps=8), "hook", clip=0.05)
    runs = [hook, replace(hook, how="project")]
    values = ranks(2).run("clipped", beside, runs=runs).checked()
    by_hook, inside = (assembled([x[i] for x in values]) for i in range(2))
    assert_equal_runs(by_hook, inside)


class Inner(nn.Module):
    """Inner products with two weights: no gradient is of a product that autocast knows."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (
            nn.Parameter(x) for x in cases.gradients((2, 12, 8), 1, torch.float32, seed=4)[0]
        )

    def forward(self, x: Tensor, both: bool) -> Tensor:
        return (self.a * x).sum() + ((self.b * x).sum() if both else 0)


def under_autocast(world: World, hook: bool) -> list[Tensor]:
    """Weights of a run without, and of one that is all under autocast."""
    found = []
    for under in (nullcontext(), torch.autocast("cpu", torch.bfloat16)):
        model = Inner()
        optimizer = cases.build("GaLoreAdamW", model.named_parameters(), update_proj_gap=4)
        if hook:
            ddp = DistributedDataParallel(model, find_unused_parameters=True)
            ddp.register_comm_hook(None, ddp_comm_hook(optimizer))
        else:
            ddp = model
            handle = attach_in_backward(optimizer, process_group=dist.group.WORLD)
        with under:
            for n, x in enumerate(cases.gradients((12, 8), 6, torch.float32, seed=world.rank)):
                if n == 4:  # ranks agree anew on what they send
                    optimizer.load_state_dict(optimizer.state_dict())
                with nullcontext() if hook or n % 2 else handle.no_sync():
                    ddp(x, n % 2 == 0).backward()
                if hook or n % 2:  # what the last backward did not reach was left by the first
                    optimizer.step()
                    optimizer.zero_grad()
        found.append(torch.cat([model.a.detach(), model.b.detach()]))
    return found


@pytest.mark.parametrize("hook", [True, False], ids=["hook", "inside backward"])
def test_autocast_changes_no_bit(hook: bool, ranks: Worlds) -> None:
    """Coordinates on the wire, and what is lifted of their mean, were rounded to bfloat16."""
    for plain, cast in ranks(2).run(f"cast, {hook}", under_autocast, hook=hook).checked():
        assert torch.equal(cast, plain)
