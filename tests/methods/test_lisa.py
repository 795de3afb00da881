"""Whole layers that take turns: whose turn it is, who asks for gradients, and what is kept."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from lowrank_optim import (
    BAdamW,
    FrugalAdamW,
    LisaAdamW,
    LowRankOptimizer,
    attach_in_backward,
    memory,
)
from lowrank_optim.engine.state import active_blocks
from tests import runs
from tests.compare import assert_close
from tests.oracles.lisa import Turns

GAP, COUNT = 3, 4
HYPER: dict[str, Any] = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-8, "weight_decay": 0.1}


class Net(nn.Module):
    """A small transformer's names: embedding, layers with norms and biases, a norm, a head."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(7, 6)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"norm": nn.LayerNorm(6), "mlp": nn.Linear(6, 6)}) for _ in range(COUNT)
        )
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 7, bias=False)
        self.to(dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + torch.tanh(layer["mlp"](layer["norm"](x)))
        return self.head(self.norm(x))


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Vectors without decay in a group of their own, as trainers make them."""
    named = [(n, p) for n, p in model.named_parameters()]
    parts = [[x for x in named if x[1].dim() >= 2], [x for x in named if x[1].dim() < 2]]
    return [
        {"params": [p for _, p in part], "param_names": [n for n, _ in part], **own}
        for part, own in zip(parts, ({}, {"weight_decay": 0.0}), strict=True)
    ]


def batch(step: int) -> Tensor:
    return torch.randint(0, 7, (5, 4), generator=torch.Generator().manual_seed(step))


def loss(model: nn.Module, step: int) -> Tensor:
    tokens = batch(step)
    out = model(tokens)
    return nn.functional.cross_entropy(out.flatten(0, 1), tokens.roll(1, 0).flatten())


def train(model: nn.Module, optimizer: LowRankOptimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss(model, step).backward()
        optimizer.step()


def asking(model: nn.Module) -> set[str]:
    return {n for n, p in model.named_parameters() if p.requires_grad}


def layers_in(names: set[str]) -> set[str]:
    return {n.split(".")[1] for n in names if n.startswith("layers.")}


def make(name: str, model: nn.Module, **options: Any) -> LowRankOptimizer:
    cls = {"lisa": LisaAdamW, "badam": BAdamW}[name]
    optimizer: LowRankOptimizer = cls(groups(model), update_proj_gap=GAP, **{**HYPER, **options})
    return optimizer


CASES: list[tuple[str, dict[str, Any]]] = [
    ("lisa", {}),
    ("lisa", {"block_order": "descending", "active_layers": 3}),
    ("lisa", {"layer_weights": [0.0, 1.0, 2.0, 3.0]}),
    ("badam", {}),
    ("badam", {"block_order": "ascending"}),
    ("badam", {"block_order": "random", "active_layers": 2}),
]


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_training_is_the_straight_line_code(name: str, options: dict[str, Any]) -> None:
    """Four turns and more of a network, with the gradients of all parameters in the oracle.

    Decay is left out of vectors by a group of their own, which takes the same turns.
    """
    model = Net()
    optimizer = make(name, model, **options)
    modules = {"embed": "embed", "head": "head", "norm": "layers.3"}
    layer_of: dict[str, str | None] = {}
    for n, _ in model.named_parameters():
        own = ".".join(n.split(".")[:2]) if n.startswith("layers") else None
        layer_of[n] = own or (modules[n.split(".")[0]] if name == "badam" else None)
    chosen: list[set[str]] = []
    starts = {n: p.detach().clone() for n, p in model.named_parameters()}
    flat = {n: 0.0 if x.dim() < 2 else HYPER["weight_decay"] for n, x in starts.items()}
    oracles = {
        decay: Turns(
            {n: x for n, x in starts.items() if flat[n] == decay}, layer_of, chosen, GAP,
            **{**HYPER, "weight_decay": decay},
        )
        for decay in set(flat.values())
    }  # fmt: skip
    for step in range(5 * GAP + 1):
        if step % GAP == 0:
            chosen.append({layer_of[n] for n in asking(model)} - {None})  # type: ignore[arg-type]
        weights = {n: x for own in oracles.values() for n, x in own.weights.items()}
        leaves = {n: x.clone().requires_grad_() for n, x in weights.items()}
        tokens = batch(step)
        out = functional_call(model, leaves, (tokens,))
        value = nn.functional.cross_entropy(out.flatten(0, 1), tokens.roll(1, 0).flatten())
        grads = dict(zip(leaves, torch.autograd.grad(value, [*leaves.values()]), strict=True))
        for own in oracles.values():
            own.update(grads)
        train(model, optimizer, range(step, step + 1))
        for own in oracles.values():
            for n, want in own.weights.items():
                assert_close(model.get_parameter(n).detach(), want)
    size = options.get("active_layers", {"lisa": 2, "badam": 1}[name])
    assert all(len(turn) == size for turn in chosen)


def test_a_layer_is_active_as_a_whole_and_nothing_else_asks_for_gradients() -> None:
    """At every step, in both groups; moments are those of the layers that were active in it."""
    model = Net()
    optimizer = make("lisa", model)
    seen = set()
    for step in range(6 * GAP):
        before = asking(model)
        active = layers_in(before)
        seen.add(frozenset(active))
        assert len(active) == 2
        whole = {n for n, _ in model.named_parameters() if n.split(".")[1] in active}
        assert before == whole | {"embed.weight", "norm.weight", "norm.bias", "head.weight"}
        weights = {n: p.detach().clone() for n, p in model.named_parameters()}
        train(model, optimizer, range(step, step + 1))
        moved = {n for n, p in model.named_parameters() if not torch.equal(p, weights[n])}
        assert moved == before
        assert {n for n, p in model.named_parameters() if p.grad is not None} == before
        held = {n for n, p in model.named_parameters() if "exp_avg" in optimizer.state[p]}
        over = whole if (step + 1) % GAP == 0 else set()  # gone at once, also where it comes again
        assert held == (before & asking(model)) - over
    assert len(seen) > 2


def test_nothing_is_kept_of_idle_layers() -> None:
    """Bytes of moments after a step are those of embedding, head and two layers of four."""
    model = Net(torch.float32)
    optimizer = make("lisa", model)
    train(model, optimizer, range(2))
    active = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert memory.report(optimizer).moments == 8 * active
    assert active < sum(p.numel() for p in model.parameters())


def test_badam_has_a_cycle_of_all_layers_and_backward_ends_at_the_active_one() -> None:
    """Embedding, layers and head once each in six turns; the last norm goes with the last layer."""
    model = Net()
    optimizer = make("badam", model)
    turns = []
    for step in range(12 * GAP):
        if step % GAP == 0:
            turns.append(frozenset(asking(model)))
        train(model, optimizer, range(step, step + 1))
    assert len({*turns[:6]}) == len({*turns[6:]}) == 6 and turns[:6] != turns[6:]
    assert frozenset({"embed.weight"}) in turns and frozenset({"head.weight"}) in turns
    last = {n for n, _ in model.named_parameters() if n.startswith(("layers.3.", "norm."))}
    assert frozenset(last) in turns


@pytest.mark.parametrize("name", ["lisa", "badam"])
@pytest.mark.parametrize("saved", [1, GAP, 2 * GAP + 1])
def test_resumed_is_uninterrupted(name: str, saved: int) -> None:
    """A new process: bit for bit, with the mask of the turn, from ``weights_only=True``."""
    model, other = Net(torch.float32), Net(torch.float32)
    optimizer = make(name, model)
    train(model, optimizer, range(saved))
    data = runs.saved(optimizer)
    other.load_state_dict(model.state_dict())
    resumed = make(name, other)
    resumed.load_state_dict(torch.load(io.BytesIO(data), weights_only=True))
    assert asking(other) == asking(model)
    train(model, optimizer, range(saved, saved + 2 * GAP))
    train(other, resumed, range(saved, saved + 2 * GAP))
    runs.assert_same([*other.parameters()], [*model.parameters()])
    runs.assert_same_state(runs.entries(resumed), runs.entries(optimizer))
    assert asking(other) == asking(model)


def test_layers_without_names_are_resumed() -> None:
    """Each matrix is one of three layers, of which two are drawn by their weights."""
    grads = torch.randn(6, 3, 4, 5)
    options: dict[str, Any] = {"active_layers": 2, "layer_weights": [1.0, 2.0, 3.0]}
    options |= {"update_proj_gap": 2}

    def step(optimizer: LisaAdamW, at: range) -> None:
        for n in at:
            for p, g in zip(optimizer.param_groups[0]["params"], grads[n], strict=True):
                p.grad = g.clone() if p.requires_grad else None
            optimizer.step()

    whole = LisaAdamW([nn.Parameter(torch.ones(4, 5)) for _ in range(3)], **options)
    step(whole, range(3))
    params = [nn.Parameter(p.detach().clone()) for p in whole.param_groups[0]["params"]]
    resumed = LisaAdamW(params, **options)
    resumed.load_state_dict(runs.loaded(runs.saved(whole)))
    for optimizer in (whole, resumed):
        step(optimizer, range(3, 6))
    runs.assert_same(params, whole.param_groups[0]["params"])
    runs.assert_same_state(runs.entries(resumed), runs.entries(whole))


def test_what_the_user_has_frozen_stays_frozen() -> None:
    """Before the optimizer is made, and in mid-run after release(); turns are as before."""
    model, twin = Net(), Net()
    model.layers[1]["mlp"].weight.requires_grad_(False)  # type: ignore[union-attr,operator]
    optimizer, other = make("lisa", model), make("lisa", twin)
    for step in range(4 * GAP):
        assert asking(model) == asking(twin) - {"layers.1.mlp.weight"}
        train(model, optimizer, range(step, step + 1))
        train(twin, other, range(step, step + 1))
    optimizer.release()  # type: ignore[attr-defined]
    everything = {n for n, _ in model.named_parameters()}
    assert asking(model) == everything - {"layers.1.mlp.weight"}
    model.embed.weight.requires_grad_(False)
    train(model, optimizer, range(GAP))
    assert not asking(model) & {"embed.weight", "layers.1.mlp.weight"}
    assert len(layers_in(asking(model))) == 2


def test_another_optimizer_takes_over() -> None:
    """Idle layers of the one are no frozen parameters to the next, nor after a copy or a pickle."""
    model = Net()
    first = make("badam", model)
    train(model, first, range(2))
    make("lisa", model)
    assert len(layers_in(asking(model))) == 2 and "embed.weight" in asking(model)
    for clone in (copy.deepcopy((model, first)), pickle.loads(pickle.dumps((model, first)))):
        own, optimizer = clone
        train(own, optimizer, range(12 * GAP))
        optimizer.release()
        assert asking(own) == {n for n, _ in model.named_parameters()}


def test_gradients_that_come_anyway_move_nothing() -> None:
    """Where all parameters ask: an idle layer stays, to the bit, and counts nothing."""
    model, twin = Net(), Net()
    optimizer, other = make("badam", model), make("badam", twin)
    for step in range(4 * GAP):
        optimizer.release()  # type: ignore[attr-defined]
        train(model, optimizer, range(step, step + 1))
        train(twin, other, range(step, step + 1))
        runs.assert_same([*model.parameters()], [*twin.parameters()])
        runs.assert_same_state(runs.entries(optimizer), runs.entries(other))


@pytest.mark.parametrize("name", ["lisa", "badam"])
def test_inside_backward_is_the_same(name: str) -> None:
    model, twin = Net(), Net()
    optimizer, other = make(name, model), make(name, twin)
    with attach_in_backward(optimizer, mode="step"):
        for step in range(5 * GAP):
            train(model, optimizer, range(step, step + 1))
            train(twin, other, range(step, step + 1))
            runs.assert_same([*model.parameters()], [*twin.parameters()])
            assert asking(model) == asking(twin)


def test_with_all_layers_active_it_is_adamw() -> None:
    """To the bit, in one turn."""
    model, twin = Net(torch.float32), Net(torch.float32)
    optimizer = LisaAdamW(model.named_parameters(), active_layers=COUNT, update_proj_gap=99)
    adamw = torch.optim.AdamW(twin.parameters(), foreach=False)
    for step in range(6):
        train(model, optimizer, range(step, step + 1))
        adamw.zero_grad()
        loss(twin, step).backward()
        adamw.step()
    runs.assert_same([*model.parameters()], [*twin.parameters()])


def test_draws_are_even_and_by_weight() -> None:
    """Chi-squared of 400 turns; a layer of weight zero has none."""
    model = Net(torch.float32)
    counts = {"even": torch.zeros(COUNT), "weighed": torch.zeros(COUNT)}
    options: dict[str, Any] = {"update_proj_gap": 1, "active_layers": 1, "lr": 0.0}
    for kind, weights in (("even", None), ("weighed", [0.0, 1.0, 1.0, 2.0])):
        optimizer = LisaAdamW(model.named_parameters(), layer_weights=weights, **options)
        plan = [i for g in optimizer.param_groups for i in optimizer._items(g) if i.subspace]
        chosen = optimizer._strategies(optimizer.param_groups[0])
        for turn in range(400):
            for place in active_blocks(plan[0], chosen, turn):
                counts[kind][place] += 1
    even = (counts["even"] - 100).square().sum() / 100
    assert float(even) < 16.3  # 0.1 % of the distribution of three degrees
    assert counts["weighed"][0] == 0
    assert float((counts["weighed"][1:] - torch.tensor([100, 100, 200])).abs().max()) < 50


def test_frugal_takes_layers_and_moves_the_others_by_signs() -> None:
    """All matrices of a layer hold moments together, and idle ones move."""
    model = Net()
    params = [(n, p) for n, p in model.named_parameters() if "mlp.weight" in n]
    group = {
        "params": [p for _, p in params], "param_names": [n for n, _ in params],
        "layers": r"layers\.\d+\.", "density": 0.5,
    }  # fmt: skip
    optimizer = FrugalAdamW([group], update_proj_gap=2, lr=0.01, weight_decay=0.0)
    for _ in range(4):
        before = [p.detach().clone() for _, p in params]
        for _, p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert sum("exp_avg" in optimizer.state[p] for _, p in params) == 2
        assert all(not torch.equal(a, p) for a, (_, p) in zip(before, params, strict=True))


ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"layers": None}, "layers must be a regular expression in LisaAdamW"),
    ({"layers": "("}, r"layers must be None or a regular expression"),
    ({"layers": "nowhere"}, r"finds a layer in none of the .* names, such as 'embed.weight'"),
    ({"active_layers": 0}, "active_layers must be a positive int"),
    ({"outside": "never"}, "outside must be one of 'always', 'turns'"),
    ({"layer_weights": [1.0, 2.0]}, "layer_weights must have a number for each of the 4 blocks"),
    ({"layer_weights": [1.0, 0.0, 0.0, 0.0]}, "layer_weights has 1 numbers above 0, and 2 blocks"),
    ({"layer_weights": [-1.0] * 4}, "layer_weights must be None or a list of numbers"),
    (
        {"layer_weights": [1.0] * 4, "block_order": "ascending"},
        "layer_weights has no effect with block_order='ascending'",
    ),
]


@pytest.mark.parametrize(("options", "message"), ERRORS, ids=str)
def test_what_cannot_be_is_refused_and_nothing_is_frozen(
    options: dict[str, Any], message: str
) -> None:
    model = Net()
    with pytest.raises(ValueError, match=message):
        LisaAdamW(model.named_parameters(), **options)
    assert asking(model) == {n for n, _ in model.named_parameters()}


def test_a_group_in_mid_run_is_refused() -> None:
    model = Net()
    optimizer = make("lisa", model)
    train(model, optimizer, range(1))
    with pytest.raises(RuntimeError, match="add all groups before the first step"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3, 3))]})


def test_without_names_matrices_take_turns_alike_in_every_process() -> None:
    """Draws are of places, and of nothing that differs from one process to the next."""
    found = []
    for _ in range(2):
        params = [nn.Parameter(torch.ones(3, 3)) for _ in range(9)]
        kept = [params] if not found else [params, torch.empty(10**5)]
        optimizer = LisaAdamW(kept[0], update_proj_gap=1)
        turns = []
        for _ in range(6):
            turns.append([i for i, p in enumerate(params) if p.requires_grad])
            for p in params:
                p.grad = torch.ones_like(p)
            optimizer.step()
        found.append(turns)
    assert found[0] == found[1] and len({*map(tuple, found[0])}) > 3
    assert all(len(turn) == 2 for turn in found[0])


def test_several_processes_freeze_nothing_and_take_the_same_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Wrappers look at ``requires_grad`` once: a layer they took for frozen is never averaged."""
    model, twin = Net(), Net()
    other = make("lisa", twin)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_: 2)
    optimizer = make("lisa", model)
    assert asking(model) == {n for n, _ in model.named_parameters()}
    for step in range(3 * GAP):
        optimizer.zero_grad()
        loss(model, step).backward()
        with monkeypatch.context() as alone:
            alone.setattr(torch.distributed, "is_initialized", lambda: False)
            other.zero_grad()
            loss(twin, step).backward()
            other.step()
        optimizer._replicas.groups = lambda *_: {}  # type: ignore[method-assign]
        optimizer.step()
        assert asking(model) == {n for n, _ in model.named_parameters()}
        runs.assert_same([*model.parameters()], [*twin.parameters()])
