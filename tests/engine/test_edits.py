"""Group keys edited in mid-run: obeyed as if made so, or refused. Nothing in between."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from lowrank_optim import GaLoreAdamW, GaLoreSGD, LowRankOptimizer, attach_in_backward, methods
from tests import cases
from tests.engine.snapshots import everything, same

OTHERS: dict[str, list[Any]] = {
    "lr": [0.5],
    "betas": [(0.5, 0.6)],
    "eps": [1e-3],
    "weight_decay": [0.3],
    "momentum": [0.5],
    "dampening": [0.5],
    "nesterov": [True],
    "rank": [2, 0.5, None],
    "update_proj_gap": [1],
    "scale": [3.0],
    "proj_type": ["left", "right", "reverse_std", "full"],
    "projector": [
        "rsvd",
        "random",
        "golore",
        "dct",
        "hadamard",
        "columns",
        "rows",
        "randk",
        "block",
    ],
    "on_refresh": ["keep", "reset", "project"],
    "state_dtype": ["float32", "bfloat16", "8bit", "4bit"],
    "state_device": ["cpu"],
    "stochastic_rounding": [True],
    "stagger": [True],
    "flatten": [True],
    "maximize": [True],
    "capturable": [True],
    "seed": [5],
    "alpha_mode": ["paper"],
    "scaling": ["matrix"],
    "scale_type": ["tensor"],
    "rho": [0.5],
    "limiter": [None, 2.0],
    "free_rule": ["sgd", "none"],
    "free_lr_scale": [0.1],
    "proj_params_lr_scale": [0.1],
    "block_order": ["ascending"],
    "basis": ["dct3"],
    "ranking": ["l1"],
    "transform": ["matmul", "fft"],
    "error_feedback": ["float32", "8bit"],
    "slot_bias_correction": [False],
    "steps_per_iteration": [1],
    "iterations_per_round": [1],
    "warmup_steps": [5],
    "sampling": ["topr"],
    "enhanced": [False],
    "factors": ["active"],
    "factor_dtype": ["bfloat16"],
    "offload_inactive": [True],
    "negative": ["flip"],
    "vector_lr_scale": [0.5],
    "s_lr_scale": [0.5],
    "interval": [12],
    "active_layers": [1],
    "layers": [r"h\.\d+"],
    "layer_weights": [[1.0], [1.0, 2.0]],
    "outside": ["always"],
    "total_steps": [50],
    "descent_ratio": [0.5],
    "descent": ["Z"],
    "freeze_steps": [1],
    "freeze_step_counter": [False],
    "order": ["random"],
    "pool_device": ["param"],
    "decay_on": ["factors"],
    "fan_in_fan_out": [True],
    "restart_every": [2],
    "clip_threshold": [0.1],
    "decay_rate": [-0.5],
    "beta1": [0.9],
    "scale_parameter": [True],
    "relative_step": [True],
    "warmup_init": [True],
}
"""Other values of every key that a group may have."""
BOOKKEEPING = {"params", "param_names", "method", "targets", "factor_starts", "differentiable"}
SHAPES = [(6, 11), (8, 8)]


def pairs() -> list[tuple[str, str]]:
    """Every method that keeps its state in a format of its own is another's subclass."""
    found = []
    for name in cases.method_names():
        if not name.endswith("8bit"):
            found += [(name, key) for key in sorted(_group(name)) if key not in BOOKKEEPING]
    return found


def made(name: str, **options: Any) -> LowRankOptimizer:
    weights = [nn.Parameter(torch.ones(shape)) for shape in SHAPES]
    return cases.build(name, weights, **options)


def _group(name: str) -> dict[str, Any]:
    return made(name).param_groups[0]


def stepped(optimizer: LowRankOptimizer, start: int, stop: int) -> None:
    for n in range(len(SHAPES)):
        optimizer.param_groups[0]["params"][n].grad = None
    grads = [cases.gradients(shape, stop, dtype=torch.float32) for shape in SHAPES]
    for i in range(start, stop):
        for n, own in enumerate(grads):
            optimizer.param_groups[0]["params"][n].grad = own[i].clone()
        optimizer.step()


def params() -> list[Any]:
    """A key that several classes have is slow with five of six of them."""
    seen: Counter[str] = Counter()
    found = []
    for name, key in pairs():
        found.append(pytest.param(name, key, marks=pytest.mark.slow if seen[key] % 6 else ()))
        seen[key] += 1
    return found


@pytest.mark.parametrize(("name", "key"), params())
def test_an_edit_is_obeyed_or_refused(name: str, key: str) -> None:
    """Obeyed: as a checkpoint of the old value loaded by an optimizer made with the new one.

    Refused: nothing changes, and with the old value back the run goes on as if nothing had been.
    """
    assert key in OTHERS, f"no other value of {key}"
    was = _group(name)[key]
    others = [(1e-20, 1e-2)] if (name, key) == ("GaLoreAdafactor", "eps") else OTHERS[key]
    for value in [v for v in others if v != was]:
        edited, control = made(name), made(name)
        for optimizer in (edited, control):
            stepped(optimizer, 0, 4)
        edited.param_groups[0][key] = value
        before = everything(edited)
        try:
            stepped(edited, 4, 5)
        except (ValueError, AssertionError) as error:  # torch's, of capturable on a CPU
            assert f"{key} was {was!r} and is {value!r}" in str(error) or key in str(error)
            left = {k: v for k, v in everything(edited).items() if not k.endswith(".grad")}
            assert not same(left, {k: v for k, v in before.items() if not k.endswith(".grad")})
            edited.param_groups[0][key] = was
            stepped(edited, 4, 7)
            stepped(control, 4, 7)
            assert not same(everything(edited), everything(control)), value
            continue
        stepped(edited, 5, 7)
        fresh = made(name, **({} if key in ("rank", "projector") else {key: value}))
        for mine, theirs in zip(
            fresh.param_groups[0]["params"], control.param_groups[0]["params"], strict=True
        ):
            mine.data.copy_(theirs.data)
        saved = copy.deepcopy(control.state_dict())
        saved["param_groups"][0][key] = value
        fresh.param_groups[0][key] = value
        fresh.load_state_dict(saved)
        stepped(fresh, 4, 7)
        assert not same(everything(edited), everything(fresh)), value


STRUCTURAL = [
    ("GaLoreAdamW", {"projector": "svd"}, "rank", 2),
    ("GaLoreAdamW", {"projector": "dct"}, "projector", "hadamard"),
    ("GaLoreAdamW", {"projector": "columns"}, "projector", "rows"),
    ("GaLoreAdamW", {"projector": "svd"}, "state_dtype", "bfloat16"),
    ("GaLoreAdamW", {"state_dtype": "bfloat16"}, "state_dtype", "float32"),
    ("DCTAdamW", {"projector": "dct"}, "rank", 2),
    ("SwitchLoRAAdamW", {}, "rank", 2),
    ("SwitchLoRAAdamW", {}, "scale", 2.0),
    ("SSTAdamW", {}, "rank", 2),
    ("FrugalAdamW", {"projector": "columns", "rank": 0.5}, "projector", "block"),
    ("FrugalAdamW", {"projector": "block", "rank": 0.5}, "projector", "columns"),
    ("GaLoreSGD", {"momentum": 0.0}, "momentum", 0.9),
    ("GaLoreSGD", {"momentum": 0.9}, "momentum", 0.0),
    ("GaLoreAdamW", {"on_refresh": "keep"}, "on_refresh", "reset"),
    ("GaLoreAdafactor", {}, "beta1", 0.9),
    ("GaLoreAdamW", {}, "rank", None),
]


@pytest.mark.parametrize(("name", "options", "key", "value"), STRUCTURAL, ids=str)
def test_what_the_state_cannot_follow_is_refused(
    name: str, options: dict[str, Any], key: str, value: Any
) -> None:
    """8-bit codes went on as float32 moments, and weights ended 2.3 times as far, in silence."""
    optimizer = made(name, **options)
    stepped(optimizer, 0, 2)
    optimizer.param_groups[0][key] = value
    with pytest.raises(ValueError, match=rf"{key} was .*set it back, or make a new optimizer"):
        optimizer.step()


@pytest.mark.parametrize(
    "formats", [("8bit", "float32"), ("float32", "8bit"), ("8bit", "4bit"), ("4bit", "8bit")]
)
def test_codes_are_not_read_as_moments(formats: tuple[str, str]) -> None:
    """Of moments that are large enough for 8 bits."""
    weight = nn.Parameter(torch.zeros(64, 512))
    optimizer = GaLoreAdamW([weight], rank=16, state_dtype=formats[0])
    weight.grad = torch.randn(64, 512)
    optimizer.step()
    optimizer.param_groups[0]["state_dtype"] = formats[1]
    with pytest.raises(ValueError, match=r"state_dtype was '.*set it back, or make a new"):
        optimizer.step()


def test_edits_before_there_is_a_state_are_free() -> None:
    optimizer = made("GaLoreAdamW")
    optimizer.param_groups[0].update(rank=2, state_dtype="bfloat16", proj_type="full")
    stepped(optimizer, 0, 1)
    assert optimizer.state_dict()["state"][0]["low.exp_avg"].shape == (2, 2)


def test_a_key_that_nothing_reads_is_refused_when_it_is_added() -> None:
    optimizer = made("GaLoreAdamW")
    stepped(optimizer, 0, 1)
    optimizer.param_groups[0]["name"] = "decay"  # trainers tag groups
    optimizer.param_groups[0]["_mine"] = 3
    stepped(optimizer, 1, 2)
    optimizer.param_groups[0]["updat_proj_gap"] = 5
    with pytest.raises(ValueError, match="did you mean 'update_proj_gap'"):
        stepped(optimizer, 2, 3)


def test_an_edit_after_loading_is_noticed() -> None:
    """The state that is loaded is what an edit must fit."""
    optimizer, other = made("GaLoreAdamW"), made("GaLoreAdamW")
    stepped(optimizer, 0, 2)
    other.load_state_dict(optimizer.state_dict())
    other.param_groups[0]["proj_type"] = "left"
    with pytest.raises(ValueError, match="proj_type was 'std' and is 'left'"):
        stepped(other, 2, 3)


def test_a_group_added_in_mid_run_leaves_the_others_watched() -> None:
    optimizer = made("GaLoreAdamW")
    stepped(optimizer, 0, 2)
    optimizer.param_groups[0]["proj_type"] = "left"
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3, 3))], "rank": 2})
    with pytest.raises(ValueError, match="proj_type was 'std' and is 'left'"):
        stepped(optimizer, 2, 3)


def test_dense_momentum_cannot_appear_without_a_slot() -> None:
    weight = nn.Parameter(torch.ones(4))
    optimizer = GaLoreSGD([weight], lr=0.1)
    weight.grad = torch.ones(4)
    optimizer.step()
    optimizer.param_groups[0]["momentum"] = 0.9
    with pytest.raises(ValueError, match="momentum was 0 and is not 0"):
        optimizer.step()


def test_a_model_converted_in_mid_run_converts_its_state_by_the_remedy_that_the_error_names() -> (
    None
):
    """A matmul of two dtypes was what one saw. One weight of a group is enough."""
    other, weight = (nn.Parameter(torch.randn(16, 8)) for _ in range(2))
    optimizer = GaLoreAdamW([other, weight], lr=0.1, rank=4)
    for _ in range(2):
        other.grad, weight.grad = torch.randn(16, 8), torch.randn(16, 8)
        optimizer.step()
    weight.grad = None
    weight.data = weight.data.bfloat16()
    weight.grad = torch.randn(16, 8).bfloat16()
    with pytest.raises(RuntimeError, match="load_state_dict") as caught:
        optimizer.step()
    assert "parameter 1" in str(caught.value)
    optimizer.load_state_dict(optimizer.state_dict())
    before = weight.detach().clone()
    optimizer.step()
    assert not weight.equal(before)
    assert optimizer.state[weight]["basis"].dtype == torch.bfloat16
    assert optimizer.state[other]["basis"].dtype == torch.float32


NO_RATES: list[tuple[str, str, Any]] = [
    ("GaLoreAdamW", "lr", -1.0),
    ("FiraAdamW", "lr", float("nan")),
    ("SSTAdamW", "lr", "1e-3"),
    ("GaLoreLion", "lr", torch.tensor(float("nan"))),
    ("GaLoreAdamW", "lr", torch.ones(2)),
    ("FrugalAdamW", "weight_decay", float("inf")),
    ("GaLoreAdamW", "betas", (1.5, 0.9)),
    ("GaLoreSGD", "momentum", -0.5),
    ("GaLoreAdafactor", "lr", -1e-3),
]


@pytest.mark.parametrize(("name", "key", "value"), NO_RATES, ids=str)
@pytest.mark.parametrize("where", ["step", "backward"])
def test_a_rate_that_no_step_could_use_is_refused(
    name: str, key: str, value: Any, where: str
) -> None:
    """Of a scheduler, say: what may be edited at every step is looked at in every step."""
    own = {"momentum": 0.9} if key == "momentum" else {}
    optimizer = cases.build(name, [_group(name)], **own)
    stepped(optimizer, 0, 3)
    before, group = everything(optimizer), optimizer.param_groups[0]
    (param, *_), old = group["params"], group[key]
    group[key] = value
    if where == "backward":
        attach_in_backward(optimizer, "step")
    with pytest.raises(ValueError, match=r"Invalid|1-element|relative_step"):
        if where == "step":
            optimizer.step()
        else:
            param.grad = None
            param.sum().backward()
    assert not [key for key in same(everything(optimizer), before) if "grad" not in key]
    group[key] = old
    optimizer.step()


def test_a_rate_that_is_changed_in_place_is_seen() -> None:
    """A tensor is the same object with another number."""
    optimizer = made("GaLoreAdamW", lr=torch.tensor(0.1))
    stepped(optimizer, 0, 2)
    optimizer.param_groups[0]["lr"].fill_(-0.1)
    with pytest.raises(ValueError, match=r"Invalid learning rate: -0\.1"):
        optimizer.step()


def test_every_method_is_here() -> None:
    keys = {key for _, key in pairs()}
    assert keys == set(OTHERS)
    assert {name for name, _ in pairs()} == {n for n in methods.__all__ if not n.endswith("8bit")}
