"""SST and SwitchLoRA on an accelerator: what it selects is what a host decides."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_optim import LowRankOptimizer
from lowrank_optim.nn import convert
from lowrank_optim.subspaces.factors import triplets, triplets_of
from lowrank_optim.subspaces.searches import alone, together
from tests import cases
from tests.compare import assert_close
from tests.methods.test_sst import MATRICES
from tests.pairwise import in_turns


@pytest.mark.parametrize("name", MATRICES)
def test_triplets_of_a_device_are_those_of_a_host(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With equal singular values and null vectors, alone and among others, with old ones too."""
    w = MATRICES[name]()
    others = [w, cases.parameter(tuple(w.shape)).detach(), w.flip(0).contiguous()]
    want = [triplets(x) for x in others]
    olds = [(u.flip(0).contiguous(), v.flip(0).contiguous()) for u, _, v in want]
    again = [triplets(x, old) for x, old in zip(others, olds, strict=True)]
    cases.branching(monkeypatch, lambda tensor: True)
    for found, expected in (
        (together([triplets_of(x) for x in others]), want),
        (together([triplets_of(x, old) for x, old in zip(others, olds, strict=True)]), again),
    ):
        for (*factors, fine), own in zip(found, expected, strict=True):
            assert bool(fine)
            for x, y in zip(factors, own, strict=True):
                assert float((x - y).abs().max()) <= 1e-10
    batch = torch.stack(others)
    *factors, fine = alone(triplets_of(batch))
    for x, own in zip(factors, zip(*want, strict=True), strict=True):
        assert float((x - torch.stack(own)).abs().max()) <= 1e-10
    *_, fine = alone(triplets_of(torch.where(w == w[0, 0], torch.nan, w)))
    assert not bool(fine)


def run(
    forced: bool, name: str, options: dict[str, Any], bad: int | None = None, steps: int = 7
) -> tuple[list[Tensor], LowRankOptimizer]:
    """Weights after each step of a matrix and of experts; one weight is NaN in some step."""
    with pytest.MonkeyPatch.context() as patch:
        cases.branching(patch, lambda tensor: forced)
        shapes = [(10, 14), (10, 14), (2, 8, 12)]
        params = [cases.parameter(shape) for shape in shapes]
        optimizer = cases.build(name, params, **options)
        found = []
        for step, row in enumerate(
            zip(*(cases.gradients(x, steps, seed=n) for n, x in enumerate(shapes)), strict=True)
        ):
            kept = params[1].detach().clone()
            if step == bad:
                params[1].data[0, 0] = torch.nan
            cases.run(optimizer, params, [list(row)])
            if step == bad:
                params[1].data.copy_(kept)
            found.append(torch.cat([p.detach().reshape(-1) for p in params]))
        return found, optimizer


OPTIONS: list[dict[str, Any]] = [
    {},
    {"factors": "active"},
    {"on_refresh": "project"},
    {"offload_inactive": True, "negative": "flip"},
    {"state_dtype": "8bit", "factor_dtype": "bfloat16"},
]


@pytest.mark.filterwarnings("ignore:.*does not use")
@pytest.mark.parametrize(("options", "bad"), in_turns(OPTIONS, [4, 0, None]))
def test_sst(options: dict[str, Any], bad: int | None) -> None:
    """A weight that is not finite when a round begins puts it off, by a step, and is counted."""
    schedule = {"steps_per_iteration": 2, "iterations_per_round": 2, **options}
    want, optimizer = run(False, "SSTAdamW", schedule, bad)
    got, accelerated = run(True, "SSTAdamW", schedule, bad)
    for x, y in zip(got, want, strict=True):
        assert_close(x, y)
    counts = accelerated.postponed_refreshes()
    assert counts == optimizer.postponed_refreshes()
    assert counts == ({} if bad is None else {"parameter 1": 1})
    for state, other in zip(accelerated.state.values(), optimizer.state.values(), strict=True):
        for key in ("host.iteration", "refresh_step", "step"):
            assert state[key] == other[key], key


@pytest.mark.filterwarnings("ignore:.*does not use")
def test_switchlora_restarts() -> None:
    """Factors of several matrices, in one call."""
    options = {"restart_every": 3, "interval": 4, "freeze_steps": 1}
    want, _ = run(False, "SwitchLoRAAdamW", options)
    got, _ = run(True, "SwitchLoRAAdamW", options)
    for x, y in zip(got, want, strict=True):
        assert_close(x, y)


@pytest.mark.parametrize(("kind", "own"), [("sst", {"steps_per_iteration": 2}), ("switchlora", {})])
def test_layers(kind: str, own: dict[str, Any]) -> None:
    """Their rounds and restarts: as of a host, and one wait for equal layers."""
    name = {"sst": "SSTAdamW", "switchlora": "SwitchLoRAAdamW"}[kind]
    options = own or {"restart_every": 2, "interval": 4, "freeze_steps": 1}
    ends = []
    for forced in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(3))).double()
        groups = convert(net, kind, rank=4)  # type: ignore[arg-type]
        with pytest.MonkeyPatch.context() as patch:
            cases.branching(patch, lambda tensor, forced=forced: forced)
            optimizer = getattr(__import__("lowrank_optim"), name)(groups, lr=1e-2, **options)
            for _ in range(9 if kind == "sst" else 5):
                net(torch.randn(5, 16, dtype=torch.float64)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        ends.append([p.detach().clone() for p in net.parameters()])
    for x, y in zip(*ends, strict=True):
        assert_close(x, y)
