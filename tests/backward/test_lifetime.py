"""What takes gradients inside backward keeps nothing alive that nobody else does."""

from __future__ import annotations

import gc
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from lowrank_optim import GaLoreAdamW, LowRankOptimizer, attach_in_backward
from lowrank_optim.backward.handle import GONE


def trained(mode: Any, net: nn.Module, **options: Any) -> LowRankOptimizer:
    """An optimizer that has taken some steps inside backward."""
    optimizer = GaLoreAdamW(net.named_parameters(), lr=1e-2, rank=2, update_proj_gap=2)
    attach_in_backward(optimizer, mode, **options)
    for _ in range(3):
        net(torch.randn(5, 6)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))


@pytest.mark.parametrize("options", [{}, {"max_norm": 1.0}], ids=str)
@pytest.mark.parametrize("mode", ["project", "step"])
def test_what_nobody_holds_is_freed(mode: Any, options: dict[str, Any]) -> None:
    """Weights, moments and the optimizer: a notebook makes one model after another."""
    net = network()
    optimizer = trained(mode, net, **options)
    alive = [*map(weakref.ref, (net, optimizer, *net.parameters()))]
    alive += [weakref.ref(x) for own in optimizer.state.values() for x in own.values()]
    del net, optimizer
    gc.collect()
    assert [ref() for ref in alive if ref() is not None] == []


@pytest.mark.parametrize("mode", ["project", "step"])
def test_an_optimizer_that_is_gone_is_told_once(mode: Any) -> None:
    """The weights are still there: their gradients are whole, and another optimizer may come."""
    net = network()
    trained(mode, net)
    gc.collect()
    with pytest.warns(UserWarning) as told:
        net(torch.randn(5, 6)).square().mean().backward()
    assert {str(w.message) for w in told} == {GONE}
    assert all(type(p.grad) is torch.Tensor and p.grad.shape == p.shape for p in net.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net(torch.randn(5, 6)).square().mean().backward()


@pytest.mark.parametrize("mode", ["project", "step"])
def test_another_takes_the_place_of_one_that_is_gone(mode: Any) -> None:
    """As if the first had never been."""
    found = []
    for first in (True, False):
        torch.manual_seed(0)
        net = network()
        start = [p.detach().clone() for p in net.parameters()]
        if first:
            trained(mode, net)
            gc.collect()
        for p, x in zip(net.parameters(), start, strict=True):
            p.data.copy_(x)
            p.grad = None
        torch.manual_seed(1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer = trained(mode, net)
        found.append([p.detach().clone() for p in net.parameters()])
        del optimizer
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("mode", ["project", "step"])
@pytest.mark.parametrize("zeroed", [True, False], ids=["set to none", "in place"])
def test_a_parameter_that_is_taken_out_is_let_go_of(mode: Any, zeroed: bool) -> None:
    """The others go on as without a handle. Backward ended in an assertion without a word."""
    found = []
    for attached in (True, False):
        torch.manual_seed(0)
        net = network()
        optimizer = GaLoreAdamW(net.named_parameters(), lr=1e-2, rank=2, update_proj_gap=2)
        if attached:
            attach_in_backward(optimizer, mode)
        (group,) = optimizer.param_groups
        for step in range(5):
            if step == 3:
                out = group["params"].pop(0)
                group["param_names"].pop(0)
            net(torch.randn(5, 6)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=zeroed)
        found.append([p.detach().clone() for p in net.parameters()])
        assert type(out.grad) is torch.Tensor and out.grad.shape == out.shape
        assert not out._post_accumulate_grad_hooks or not attached
        second = GaLoreAdamW([out], rank=2)
        attach_in_backward(second, mode).remove()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("mode", ["project", "step"])
def test_a_parameter_that_is_taken_out_after_backward_takes_no_step(mode: Any) -> None:
    """Another optimizer, inside backward too, has it at once."""
    net = network()
    optimizer = trained(mode, net)
    attach_in_backward(optimizer_of := GaLoreAdamW([nn.Parameter(torch.ones(4, 4))], rank=2), mode)
    net(torch.randn(5, 6)).square().mean().backward()
    (group,) = optimizer.param_groups
    out, before = group["params"].pop(0), net[0].weight.detach().clone()
    group["param_names"].pop(0)
    optimizer.step()
    assert torch.equal(out, before)
    out.grad = None
    optimizer_of.add_param_group({"params": [out], "rank": 2})
    optimizer_of.step()
    net(torch.randn(5, 6)).square().mean().backward()
    optimizer_of.step()
    assert not torch.equal(out, before)
