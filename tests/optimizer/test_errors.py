"""Errors: at construction, in torch's words where torch has them, and nothing half done."""

from __future__ import annotations

import copy
import logging
import math
from typing import Any

import pytest
import torch
from torch import nn

from lowrank_optim import GaLoreAdafactor, GaLoreAdamW, GaLoreLion, GaLoreSGD
from tests import runs
from tests.logged import Logged


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.ones(shape or (6, 10)))


def raised(call: Any) -> tuple[type, str]:
    with pytest.raises(Exception) as caught:
        call()
    return caught.type, str(caught.value)


# ------------------------------------------------------------------ where torch has words for it

HYPER_PARAMETERS: list[dict[str, Any]] = [
    {"lr": -1},
    {"lr": -1e-2},
    {"lr": math.nan},
    {"lr": torch.tensor(-1.0)},
    {"lr": torch.tensor([1e-3, 1e-3])},
    {"eps": -1e-8},
    {"betas": (1.0, 0.0)},
    {"betas": (-0.1, 0.9)},
    {"betas": (0.9, 1.0)},
    {"betas": (0.9, math.nan)},
    {"weight_decay": -1},
]


@pytest.mark.parametrize("options", HYPER_PARAMETERS, ids=str)
def test_hyper_parameters_raise_what_torch_raises(options: dict[str, Any]) -> None:
    """Same type and words, also when a group holds the value, where torch does not look.

    What is allowed comes after them.
    """
    kind, words = raised(lambda: torch.optim.AdamW([weight()], **options))
    for params, own in (([weight()], options), ([{"params": [weight()], **options}], {})):
        found, message = raised(lambda p=params, o=own: GaLoreAdamW(p, **o))
        assert found is kind and message.startswith(f"{words};"), message


def non_leaf() -> list[Any]:
    return [weight() * 2]


def twice() -> list[Any]:
    w = weight()
    return [{"params": [w]}, {"params": [w]}]


PARAMS: dict[str, Any] = {
    "tensor": lambda: weight(),
    "empty": list,
    "not iterable": lambda: 5,
    "group without params": lambda: [{"lr": 1.0}],
    "set": lambda: [{"params": {weight()}}],
    "strings": lambda: ["weight"],
    "non-leaf": non_leaf,
    "in two groups": twice,
    "names missing": lambda: [("a", weight()), weight()],
}


@pytest.mark.parametrize("what", PARAMS)
def test_parameters_raise_what_torch_raises(what: str) -> None:
    expected = raised(lambda: torch.optim.AdamW(PARAMS[what]()))
    assert raised(lambda: GaLoreAdamW(PARAMS[what]())) == expected


def test_duplicates_in_a_group_warn_as_in_torch() -> None:
    w = weight()
    for cls in (torch.optim.AdamW, GaLoreAdamW):
        with pytest.warns(UserWarning, match="parameter group with duplicate parameters"):
            cls([w, w])


# ------------------------------------------------------------------ ours, in the same voice

OURS: list[tuple[dict[str, Any], str]] = [
    ({"rank": 0}, r"^rank must be a positive int or a fraction in \(0, 1\), got 0$"),
    ({"rank": -4}, r"^rank must be .*, got -4$"),
    # one direction, or all of them?
    ({"rank": 1.0}, r"^rank must be .*, got 1\.0; FRUGAL alone takes a density of 0 or 1$"),
    ({"rank": 2.5}, r"^rank must be .*, got 2\.5$"),
    ({"rank": True}, r"^rank must be .*, got True$"),
    ({"rank": math.nan}, r"^rank must be .*, got nan$"),
    ({"update_proj_gap": 0}, r"^update_proj_gap must be a positive int, got 0$"),
    ({"update_proj_gap": 2.0}, r"^update_proj_gap must be a positive int, got 2\.0$"),
    ({"scale": -0.5}, r"^scale must be a finite number of at least 0, got -0\.5$"),
    ({"scale": math.nan}, r"^scale must be a finite number of at least 0, got nan$"),
    ({"proj_type": "both"}, r"'std', 'reverse_std', 'left', 'right', 'full', got 'both'$"),
    ({"projector": "qr"}, r"^projector must be one of .*'rsvd'.*, got 'qr'$"),
    ({"on_refresh": "zero"}, r"^on_refresh must be one of 'keep', 'project', 'reset', got 'zero'$"),
    ({"state_dtype": "int3"}, r"^state_dtype must be one of 'float32', .*, got 'int3'$"),
    ({"seed": 0.5}, r"^seed must be an int from 0 to .*, got 0\.5$"),
]


@pytest.mark.parametrize(("options", "message"), OURS, ids=str)
@pytest.mark.parametrize("cls", [GaLoreAdamW, GaLoreLion, GaLoreSGD, GaLoreAdafactor])
def test_values_out_of_range(cls: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cls([weight()], **options)
    with pytest.raises(ValueError, match=message):
        cls([{"params": [weight()], **options}])


def test_rank_none_is_for_groups_only() -> None:
    with pytest.raises(ValueError, match=r"rank must be .*, got None"):
        GaLoreAdamW([weight()], rank=None)
    assert GaLoreAdamW([{"params": [weight()], "rank": None}]).param_groups[0]["rank"] is None


@pytest.mark.parametrize("cls", [GaLoreAdamW, GaLoreLion, GaLoreSGD, GaLoreAdafactor])
def test_an_argument_that_does_not_exist(cls: Any) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'update_gapp'"):
        cls([weight()], update_gapp=3)


def test_momentum() -> None:
    with pytest.raises(ValueError, match=r"^Invalid momentum value: -0\.5; it must be"):
        GaLoreSGD([weight()], momentum=-0.5)
    expected = raised(lambda: torch.optim.SGD([weight()], nesterov=True))
    assert raised(lambda: GaLoreSGD([weight()], lr=1e-3, nesterov=True)) == expected


def test_adafactor_eps_is_a_pair() -> None:
    with pytest.raises(
        ValueError, match=r"^Invalid epsilon value: \(1e-30, -0\.001\); it must be a pair"
    ):
        GaLoreAdafactor([weight()], eps=(1e-30, -1e-3))


# ------------------------------------------------------------------ parameters and gradients


@pytest.mark.parametrize("shape", [(6, 10), (7,), ()])
def test_complex_parameters_are_refused_by_name_and_not_added(shape: tuple[int, ...]) -> None:
    bad = nn.Parameter(torch.ones(shape, dtype=torch.complex64))
    message = "GaLoreAdamW does not support complex parameters: phase"
    with pytest.raises(ValueError, match=f"^{message}$"):
        GaLoreAdamW([("good", weight()), ("phase", bad)])
    optimizer = GaLoreAdamW([("good", weight())])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [("phase", bad)]})
    assert len(optimizer.param_groups) == 1


def test_a_group_that_is_refused_is_not_added() -> None:
    optimizer = GaLoreAdamW([weight()])
    with pytest.raises(ValueError, match="rank must be"):
        optimizer.add_param_group({"params": [weight()], "rank": 0})
    with pytest.raises(TypeError, match="param_group must be a dict"):
        optimizer.add_param_group([weight()])
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("rank", [None, 4])
def test_sparse_gradients_are_refused_before_anything_moves(rank: int | None) -> None:
    table, other = nn.Embedding(12, 8, sparse=True), weight()
    params = [other, nn.Parameter(torch.ones(3)), table.weight]
    optimizer = GaLoreAdamW([{"params": params, "rank": rank}])
    table(torch.tensor([1, 2])).sum().backward()
    for p in params[:2]:
        p.grad = torch.ones_like(p)
    before = runs.copies(params)
    with pytest.raises(RuntimeError, match=r"sparse gradients.*sparse=False.*SparseAdam"):
        optimizer.step()
    runs.assert_same(params, before)


def test_step_param_of_a_stranger() -> None:
    with pytest.raises(ValueError, match="in none of the optimizer's groups"):
        GaLoreAdamW([weight()]).step_param(weight())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at_refresh", [False, True])
def test_a_bad_gradient_corrupts_nothing(bad: float, at_refresh: bool, logged: Logged) -> None:
    """One entry is enough: moments, basis and weights stay as they were, and the run goes on.

    The release calls the SVD on it and ends the run (GaLore#26, #58), or averages NaN for good.
    """
    params = list(runs.parameters().values())
    gap = 2 if at_refresh else 100
    optimizer = GaLoreAdamW(params, rank=3, update_proj_gap=gap, projector="svd", stagger=False)
    runs.train(params, optimizer, range(2))
    before, weights = runs.entries(optimizer), runs.copies(params)
    runs.set_grads(params, 2)
    for p in params:
        assert p.grad is not None
        p.grad.view(-1)[0] = bad
    with logged.at_level(logging.WARNING, "lowrank_optim"):
        optimizer.step()
    assert any("not finite" in message for message in logged.messages)
    runs.assert_same(params, weights)
    for old, new in zip(before, runs.entries(optimizer), strict=True):
        for key in old.keys() - {"step", "postponed"}:
            assert torch.equal(old[key], new[key]), key
    matrices = [f"parameter {i}" for i in range(4)]
    assert optimizer.postponed_refreshes() == (dict.fromkeys(matrices, 1) if at_refresh else {})
    runs.train(params, optimizer, [3])
    for p, old in zip(params, weights, strict=True):
        assert p.isfinite().all() and not torch.equal(p, old)
    refreshed = [float(optimizer.state[p]["refresh_step"]) for p in params[:4]]
    assert refreshed == [3.0 if at_refresh else 0.0] * 4  # the one that was postponed


def test_a_bad_checkpoint_value_leaves_the_optimizer_as_it_was() -> None:
    params = list(runs.parameters().values())
    optimizer = GaLoreAdamW(params, rank=3)
    runs.train(params, optimizer, range(2))
    bad = copy.deepcopy(optimizer.state_dict())
    bad["param_groups"][0]["betas"] = (0.9, 1.5)
    before, lr = runs.entries(optimizer), optimizer.param_groups[0]["lr"]
    bad["param_groups"][0]["lr"] = 7.0
    with pytest.raises(ValueError, match=r"Invalid beta parameter at index 1: 1\.5"):
        optimizer.load_state_dict(bad)
    runs.assert_same_state(runs.entries(optimizer), before)
    assert optimizer.param_groups[0]["lr"] == lr
