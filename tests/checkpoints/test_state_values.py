"""A checkpoint whose values no step could use is refused by name, and changes nothing.

Once an index outside its matrix was loaded, and the kernels of the next step wrote into foreign
memory: some crashed the process, some went on.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_optim import SSTAdamW, SwitchLoRAAdamW, lowrank_groups
from lowrank_optim import nn as layers
from lowrank_optim.ops import quant
from lowrank_optim.optimizer import LowRankOptimizer
from tests import cases, runs
from tests.checkpoints.trained import SHAPES, VARIANTS, trained

OTHERS = [name for name in cases.method_names() if name not in cases.projecting_names()]
CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {"projector": projector}) for name, projector in cases.pairs()),
    *((name, {}) for name in OTHERS),
    *VARIANTS,
]
IN_CODES = ("GaLoreAdamW8bit", "SSTAdamW8bit", "BAdamW8bit")
"""Of each place that moments may have, in a subspace, of factors and of layers: one in codes."""
HUGE = 10**6


def free(key: str, how: str, optimizer: LowRankOptimizer) -> bool:
    """Whether this is not wrong with an entry: nothing relies on it."""
    if key == "host.held":
        return how == "turned" and optimizer.param_groups[0]["order"] == "random"
    if key.endswith(".exp_avg_scale") and how == "negative":
        return optimizer.param_groups[0]["state_dtype"] == "4bit"  # the sign of the largest
    # any permutation is an order, and any slots may be frozen
    return (key, how) in (
        ("basis_order", "turned"),
        ("host.frozen", "turned"),
        ("host.frozen", "repeated"),
    )


def wrong(key: str, x: Tensor) -> Iterator[tuple[str, Any]]:
    """Every way in which an entry is damaged, and what it becomes."""
    if x.dtype == torch.uint8:  # any byte is a code
        yield "floats", x.float()
        return

    def with_first(value: float) -> Tensor:
        new = x.clone()
        new.view(-1)[0] = value
        return new

    yield "complex", x.to(torch.complex64)
    yield "bool", x.bool()
    yield "text", "3"
    if not x.is_floating_point():
        yield "floats", x.double() + 0.25
        yield "negative", with_first(-1)
        yield "outside", with_first(2**62 if key == "key" else HUGE)
        if x.dim() and x.shape[-1] > 1:
            yield "turned", x.flip(-1)
            repeated = x.clone()
            repeated[..., 1] = repeated[..., 0]
            yield "repeated", repeated
        return
    yield "nan", with_first(math.nan)
    yield "inf", with_first(math.inf)
    counter = (x.dim() == 0 and key != "residual_norm") or key.endswith(".age")
    squares = "_sq" in key or key.endswith("_scale")
    if counter or squares or key in ("basis_s", "residual_norm", "error_step"):
        yield "negative", with_first(-2.0)
    if counter:
        yield "half", with_first(0.5)
        if key != "step":  # a dense parameter's may be large
            yield "too many", with_first(2.0**54)


def assert_refuses(optimizer: LowRankOptimizer, names: list[str], turn: int | None) -> int:
    """Each entry of each parameter in turn, in every way; then the checkpoint itself loads.

    Args:
        optimizer: with its state.
        names: of its parameters.
        turn: every third way alone, from this one on; None for all.
    """
    good = copy.deepcopy(optimizer.state_dict())
    before, count, ways = runs.entries(optimizer), 0, itertools.count()
    for i, entry in good["state"].items():
        for key, x in entry.items():
            if not x.numel():
                continue
            for how, value in wrong(key, x):
                if turn is not None and next(ways) % 3 != turn:
                    continue
                if free(key, how, optimizer):
                    continue
                bad = {**good, "state": {**good["state"], i: {**entry, key: value}}}
                with pytest.raises(ValueError) as caught:
                    optimizer.load_state_dict(bad)
                said = str(caught.value)
                assert names[i] in said, (key, how, said)
                assert "allowed" in said or "there and" in said, (key, how, said)
                assert key in said or key.split(".")[-1] in said, (key, how, said)
                runs.assert_same_state(runs.entries(optimizer), before)
                count += 1
    assert optimizer.state_dict()["param_groups"] == good["param_groups"]
    optimizer.load_state_dict(good)
    runs.assert_same_state(runs.entries(optimizer), before)
    return count


def is_slow(name: str, options: dict[str, Any]) -> bool:
    beyond = cases.is_beyond(name, options.get("projector"))
    return beyond or (name.endswith("8bit") and name not in IN_CODES)


IN_TURNS = [(*x, n % 3) for n, x in enumerate(x for x in CASES if not is_slow(*x))]
"""Each class and projector with a third of the ways, another third for the next one."""
ALL = [pytest.param(*x, None, marks=pytest.mark.slow) for x in CASES]


@pytest.mark.parametrize(("name", "options", "turn"), [*IN_TURNS, *ALL], ids=str)
def test_every_entry_of_every_state(
    name: str, options: dict[str, Any], turn: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quant, "MIN_SIZE", 40)  # some moments in codes, some too small for them
    params, optimizer = trained(name, options)
    assert assert_refuses(optimizer, list(SHAPES), turn) > (20 if turn is None else 6)
    runs.train(params, optimizer, [2])


MODULES = {"sst": SSTAdamW, "switchlora": SwitchLoRAAdamW}


def modules(method: str) -> tuple[nn.Module, LowRankOptimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 8))
    optimizer = MODULES[method](layers.convert(model, method, rank=4), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(5, 12)).square().mean().backward()
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("turn", [0, pytest.param(None, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", MODULES)
def test_every_entry_of_the_state_beside_modules(method: str, turn: int | None) -> None:
    _, optimizer = modules(method)
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    assert assert_refuses(optimizer, names, turn) > (20 if turn is None else 6)


ORDERS = {
    "outside": lambda order: order.clone().index_fill_(0, torch.tensor([0]), order.numel()),
    "negative": lambda order: order - 1,
    "repeated": lambda order: order.clone().index_fill_(0, torch.tensor([0]), int(order[1])),
}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("how", ORDERS)
def test_an_order_of_modules_that_is_no_permutation(how: str, assign: bool) -> None:
    """What a layer of singular vectors indexes with: torch's error, and the layer as it was."""
    model, _ = modules("sst")
    before = {k: v.clone() for k, v in model[1].state_dict().items()}
    bad = copy.deepcopy(model.state_dict())
    bad["1.order"] = ORDERS[how](bad["1.order"])
    bad["1.s"] += 1
    with pytest.raises(RuntimeError, match=r"SpectralLinear|Sequential") as caught:
        model.load_state_dict(bad, assign=assign)
    assert "1.order holds" in str(caught.value)
    for key, x in model[1].state_dict().items():
        assert torch.equal(x, before[key]), key


# ------------------------------------------------------------------ whose state it is


def named(order: list[str], prefix: str = "") -> tuple[list[nn.Parameter], LowRankOptimizer]:
    params = [nn.Parameter(torch.randn(8, 8)) for _ in order]
    pairs = [(prefix + name, p) for name, p in zip(order, params, strict=True)]
    optimizer = cases.build("GaLoreAdamW", pairs, rank=2)
    runs.train(params, optimizer, range(2))
    return params, optimizer


def test_the_same_parameters_in_another_order_are_refused() -> None:
    """Of one shape each, they were loaded into each other: the run went on from mixed moments."""
    _, theirs = named(["q.weight", "k.weight", "v.weight"])
    _, mine = named(["q.weight", "v.weight", "k.weight"])
    before, groups = runs.entries(mine), copy.deepcopy(mine.state_dict()["param_groups"])
    message = r"has k\.weight where the optimizer has v\.weight: .* in another order"
    with pytest.raises(ValueError, match=message):
        mine.load_state_dict(theirs.state_dict())
    runs.assert_same_state(runs.entries(mine), before)
    assert mine.state_dict()["param_groups"] == groups


def test_other_parameters_are_refused_and_load_by_position_without_names() -> None:
    _, theirs = named(["q.weight", "k.weight"])
    _, mine = named(["q.weight", "proj.weight"])
    state = theirs.state_dict()
    with pytest.raises(ValueError, match=r"has k\.weight where .* has proj\.weight: .*renamed"):
        mine.load_state_dict(state)
    del state["param_groups"][0]["param_names"]
    mine.load_state_dict(state)
    runs.assert_same_state(runs.entries(mine), runs.entries(theirs))
    assert mine.param_groups[0]["param_names"] == ["q.weight", "proj.weight"]


PREFIXES = ["module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod.", "module.module."]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_names_agree_but_for_what_wrappers_add(prefix: str) -> None:
    _, theirs = named(["q.weight", "k._checkpoint_wrapped_module.weight"], prefix)
    _, mine = named(["q.weight", "k.weight"])
    mine.load_state_dict(theirs.state_dict())
    runs.assert_same_state(runs.entries(mine), runs.entries(theirs))
    theirs.load_state_dict(mine.state_dict())


@pytest.mark.parametrize("names", [["q.weight"], "ab", [1, 2], {"q.weight": 0, "k.weight": 1}])
def test_names_that_are_no_names(names: Any) -> None:
    _, mine = named(["q.weight", "k.weight"])
    state = copy.deepcopy(mine.state_dict())
    state["param_groups"][0]["param_names"] = names
    with pytest.raises(ValueError, match="param_names of group 0 must be 2 strings"):
        mine.load_state_dict(state)


def test_factors_of_another_form_are_refused() -> None:
    """Where a layer's factors begin is not for a checkpoint to say."""
    _, optimizer = modules("switchlora")
    for n, group in enumerate(optimizer.param_groups):
        if group["factor_starts"]:
            bad = copy.deepcopy(optimizer.state_dict())
            bad["param_groups"][n]["factor_starts"] = (1,)
            with pytest.raises(ValueError, match=r"factor_starts=\(1,\)"):
                optimizer.load_state_dict(bad)
    plain = SwitchLoRAAdamW(lowrank_groups(nn.Linear(8, 8), rank=2))
    bad = copy.deepcopy(plain.state_dict())
    bad["param_groups"][0]["interval"] = 0
    with pytest.raises(ValueError, match="interval must be a positive int"):
        plain.load_state_dict(bad)


FORMS: dict[str, tuple[Any, type[Exception], str]] = {
    "a list": ([], TypeError, "a state dict must be a dict, got list"),
    "nothing": ({}, ValueError, "'state' must be a dict, got only nothing"),
    "a model's": ({"w": torch.ones(1)}, ValueError, "'state' must be a dict, got only 'w'"),
    "state": ({"state": [], "param_groups": []}, ValueError, "'state' must be a dict, got list"),
    "groups": ({"state": {}, "param_groups": "x"}, ValueError, "must be a list, got str"),
    "group": ({"state": {}, "param_groups": [3]}, ValueError, "group 0 .* is not a dict"),
    "params": ({"state": {}, "param_groups": [{}]}, ValueError, "group 0 .* no list of params"),
    "ids": ({"state": {}, "param_groups": [{"params": [[0]]}]}, ValueError, "numbers or names"),
    "stranger": (
        {"state": {7: {}}, "param_groups": [{"params": [0, 1]}]},
        ValueError,
        "state of parameter 7, which is in none",
    ),
    "entry": (
        {"state": {0: 5}, "param_groups": [{"params": [0, 1]}]},
        ValueError,
        "state of parameter 0 must be a dict",
    ),
    "key": (
        {"state": {0: {"step": 1.0, 3: 2.0}}, "param_groups": [{"params": [0, 1]}]},
        ValueError,
        "state of parameter 0 must be a dict of names",
    ),
    "shared": (
        {"state": {}, "param_groups": [{"params": [0, 0]}]},
        ValueError,
        "lists parameter 0 twice",
    ),
}


@pytest.mark.parametrize("what", FORMS)
def test_what_is_no_state_dict(what: str) -> None:
    value, error, message = FORMS[what]
    _, mine = named(["q.weight", "k.weight"])
    before = runs.entries(mine)
    with pytest.raises(error, match=message):
        mine.load_state_dict(value)
    runs.assert_same_state(runs.entries(mine), before)
    assert not mine._optimizer_load_state_dict_pre_hooks
