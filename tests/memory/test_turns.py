"""Layers that take turns: the estimate is of the worst turn, against all turns of real runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lowrank_optim import BAdamW, FrugalAdamW, LisaAdamW, memory
from lowrank_optim.memory import estimate
from lowrank_optim.memory.turns import names_of, turns_of
from lowrank_optim.subspaces.block import BLOCK_ORDERS
from tests.memory.test_peaks import config, counted_over


class Net(nn.Module):
    """An embedding, five layers of which some are alike, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8 * n) for n in (1, 3, 1, 2, 3))
        self.head = nn.Linear(8, 20)


PLACES = ["embed", *(f"layers.{i}." for i in range(5)), "head"]


def size(net: nn.Module, turn: frozenset[str]) -> int:
    """Parameters of the layers that train."""
    return sum(p.numel() for n, p in net.named_parameters() if n.startswith(tuple(turn)))


def turns_that_come(optimizer: Any, net: nn.Module, count: int) -> set[frozenset[str]]:
    """Layers that ask for gradients, turn by turn."""
    found = set()
    for _ in range(count):
        asking = {n for n, p in net.named_parameters() if p.requires_grad}
        found.add(frozenset(x for x in PLACES if any(n.startswith(x) for n in asking)))
        for p in net.parameters():
            p.grad = torch.ones_like(p) if p.requires_grad else None
        optimizer.step()
    return found


@pytest.mark.parametrize(
    ("order", "active"),
    [(x, n) for x in BLOCK_ORDERS for n in (1, 2) if (x, n) != ("mirror", 1)],  # by pairs
)
def test_the_worst_turn_is_among_them(order: str, active: int) -> None:
    """Of all that come in turn the one of most parameters; and no other than what can come."""
    net = Net()
    own = {"active_layers": active, "block_order": order, "update_proj_gap": 1}
    optimizer = BAdamW(net.named_parameters(), **own)
    found = [
        frozenset(names_of(optimizer, turn, [*net.parameters()]))
        for turn in turns_of(optimizer, [*net.parameters()])
    ]
    come = turns_that_come(optimizer, net, 14 if order in ("ascending", "descending") else 40)
    assert max(size(net, x) for x in found) == max(size(net, x) for x in come)
    if order not in ("random", "shuffled"):
        assert set(found) <= come
    if active == 1:  # backward goes farthest to the first of those alike
        first = ["embed", "head", "layers.0.", "layers.1.", "layers.3."]
        assert sorted(x for (x,) in found) == first


def test_layers_that_cannot_come_do_not_count() -> None:
    """Of weight 0, or frozen by their user."""
    net = Net()
    weights = (0.0, 1.0, 0.0, 1.0, 1.0)
    net.layers[4].requires_grad_(False)
    own = {"active_layers": 1, "layer_weights": weights}
    optimizer = LisaAdamW(net.named_parameters(), **own)
    params = [*net.parameters()]
    turns = {names_of(optimizer, turn, params) for turn in turns_of(optimizer, params)}
    assert turns == {("layers.1.",), ("layers.3.",)}


@pytest.mark.parametrize("cls", [BAdamW, LisaAdamW])
def test_moments_are_the_most_of_all_turns(cls: Any) -> None:
    """To the byte, beside a run in which every layer has its turn; and it says whose turn it is."""
    net = Net()
    own = {"active_layers": 1, "update_proj_gap": 2}
    found = memory.estimate(net, cls, transients=False, **own)
    assert all(p.requires_grad for p in net.parameters())
    optimizer = cls(net.named_parameters(), **own)
    most = 0
    for _ in range(40):
        for p in net.parameters():
            p.grad = torch.ones_like(p) if p.requires_grad else None
        optimizer.step()
        most = max(most, memory.report(optimizer).moments)
    assert found.moments == most
    assert found.turn == (("embed",) if cls is BAdamW else ("layers.4.",))
    assert f"in the turn of {found.turn[0]}" in str(found)


@pytest.mark.slow
@pytest.mark.parametrize("order", ["ascending", "descending", "random"])
@pytest.mark.parametrize(("name", "active"), [("BAdamW", 2), ("LisaAdamW8bit", 1)])
@pytest.mark.filterwarnings("ignore")
def test_peaks_of_all_turns(
    monkeypatch: pytest.MonkeyPatch, order: str, name: str, active: int
) -> None:
    """As torch counts them, of a model whose first and last layers are as large as no other."""
    own = {"active_layers": active, "block_order": order, "update_proj_gap": 3}
    found, counted = counted_over(monkeypatch, config("gpt2", 2), name, own, steps=36)
    held = found.held - found.weights
    for moment, size in counted.items():
        assert held + found.beside[moment] == pytest.approx(size, rel=0.02), moment


def test_of_sets_of_tensors_the_largest_is_counted() -> None:
    """State is that of the first set, and the peak that of the worst of a run."""
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(32, 64, bias=False))
    own = {"projector": "block", "density": 0.5, "device": "cpu", "transients": False}
    first, other = (2 * x.weight.nbytes for x in model)
    counters = 2 * 3 * 4
    for order, state in ("ascending", first), ("descending", other):
        found = estimate(model, FrugalAdamW, block_order=order, **own)
        assert found.state == counters + state
        assert found.peak == found.weights + found.gradients + counters + other
