"""A load that fails leaves the optimizer as it was, whatever the failure."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lowrank_optim import (
    GaLoreAdafactor,
    GaLoreAdamW,
    GaLoreAdamW8bit,
    LowRankOptimizer,
    import_bitsandbytes,
    import_galore_torch,
)
from lowrank_optim.checkpoints.importers import ProjectorRecord
from tests import cases, runs
from tests.engine.snapshots import everything, same
from tests.reliability.injection import OutOfMemory

SHAPES = [(6, 11), (8, 8), (5,)]
METHODS = ["GaLoreAdamW", "GaLoreAdafactor", "FrugalAdamW", "DCTAdamW8bit", "SSTAdamW"]


def trained(name: str, steps: int, seed: int = 0, **options: Any) -> LowRankOptimizer:
    params = [nn.Parameter(cases.parameter(s, torch.float32, seed=seed).detach()) for s in SHAPES]
    groups = [{"params": params[:2], "rank": 3}, {"params": params[2:], "rank": None}]
    optimizer = cases.build(name, groups, **options)
    for n in range(steps):
        for param in params:
            generator = torch.Generator().manual_seed(100 * seed + n)
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()
    return optimizer


def groups_of(optimizer: LowRankOptimizer) -> list[dict[str, Any]]:
    return [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]


def check_untouched(optimizer: LowRankOptimizer, load: Callable[[], None], error: Any) -> None:
    """State, groups and weights to the bit; and it steps as one that nobody tried to load into."""
    before, groups, plans = everything(optimizer), groups_of(optimizer), dict(vars(optimizer))
    with pytest.raises(error):
        load()
    assert not same(everything(optimizer), before)
    assert groups_of(optimizer) == groups
    assert vars(optimizer).keys() == plans.keys()
    assert all(vars(optimizer)[k] is v for k, v in plans.items())


@pytest.mark.parametrize("name", METHODS)
def test_out_of_memory_at_any_operation(name: str) -> None:
    """After torch had taken the groups, and the state was gone."""
    source = trained(name, 5, seed=1, lr=0.5)
    saved = source.state_dict()
    counting = OutOfMemory()
    twin = trained(name, 2)
    with counting:
        twin.load_state_dict(saved)
    optimizer = trained(name, 2)
    count = len(counting.names)
    assert count > 20
    for at in [*range(0, count, max(1, count // 24)), count - 1]:

        def load(at: int = at) -> None:
            with OutOfMemory(at):
                optimizer.load_state_dict(saved)

        check_untouched(optimizer, load, torch.OutOfMemoryError)
    for one in (twin, optimizer):
        if one is optimizer:
            one.load_state_dict(saved)
        for param in [p for g in one.param_groups for p in g["params"]]:
            param.data = torch.ones(param.shape)
            param.grad = torch.ones(param.shape)
        one.step()
    assert not same(everything(optimizer), everything(twin))


@pytest.mark.parametrize("when", ["pre", "post"])
def test_a_hook_that_raises(when: str) -> None:
    """A user's, before or after."""
    optimizer, saved = trained("GaLoreAdamW", 2), trained("GaLoreAdamW", 5, lr=0.5).state_dict()

    def hook(*_: Any) -> None:
        raise KeyError("mine")

    getattr(optimizer, f"register_load_state_dict_{when}_hook")(hook)
    check_untouched(optimizer, lambda: optimizer.load_state_dict(saved), KeyError)


@pytest.mark.parametrize("kind", ["sparse", "complex", "bool", "meta", "quantized", "object"])
def test_tensors_that_are_none_of_a_state(kind: str) -> None:
    """One of them left a new learning rate, and no state."""
    optimizer = trained("GaLoreAdamW", 2)
    saved = copy.deepcopy(trained("GaLoreAdamW", 5, lr=0.5).state_dict())
    x = saved["state"][1]["low.exp_avg"]
    made = {
        "sparse": x.to_sparse, "complex": lambda: x + 0j, "bool": x.bool,
        "meta": lambda: x.to("meta"),
        "quantized": lambda: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), "object": object,
    }  # fmt: skip
    saved["state"][1]["low.exp_avg"] = made[kind]()
    check_untouched(optimizer, lambda: optimizer.load_state_dict(saved), ValueError)


def test_a_learning_rate_of_none_is_adafactors() -> None:
    """It has a step size of its own, and its files say so; others need a number."""
    optimizer = trained("GaLoreAdafactor", 3, lr=None, relative_step=True, scale_parameter=True)
    saved = runs.through_a_file(optimizer.state_dict())
    assert saved["param_groups"][0]["lr"] is None
    other = trained("GaLoreAdafactor", 1, seed=2, lr=1.0)
    other.load_state_dict(saved)
    assert other.param_groups[0]["lr"] is None
    adamw = trained("GaLoreAdamW", 2)
    saved = {**adamw.state_dict()}
    saved["param_groups"] = [{**g, "lr": None} for g in saved["param_groups"]]
    check_untouched(adamw, lambda: adamw.load_state_dict(saved), ValueError)


@pytest.mark.parametrize("groups", [None, [None], "lr", [{"params": 3}], {"lr": 0.1}])
@pytest.mark.parametrize("name", ["GaLoreAdafactor", "GaLoreAdamW"])
def test_groups_that_are_none_are_refused_in_words(name: str, groups: Any) -> None:
    """Whatever a class reads of them before others do; a hook may still make groups of them."""
    optimizer = trained(name, 2)
    saved = {**optimizer.state_dict(), "param_groups": groups}
    check_untouched(optimizer, lambda: optimizer.load_state_dict(saved), ValueError)
    good = optimizer.state_dict()
    optimizer.register_load_state_dict_pre_hook(lambda *_: good)
    optimizer.load_state_dict(saved)


def projector(**own: Any) -> ProjectorRecord:
    record = ProjectorRecord()
    known = {"rank": 2, "update_proj_gap": 3, "scale": 0.25, "proj_type": "std"}
    vars(record).update({**known, "ortho_matrix": torch.randn(4, 2), **own})
    return record


GALORE = {"step": 3, "exp_avg": torch.ones(2, 6), "exp_avg_sq": torch.ones(2, 6)}
ABSENT = object()
WRONG = [
    ("step", ABSENT), ("step", None), ("step", "three"), ("step", float("nan")),
    ("step", torch.ones(2)), ("step", -4), ("step", 2.5), ("projector", "svd"),
    ("projector", {"rank": 2}), ("projector", ProjectorRecord()),
    ("projector", projector(ortho_matrix=None)), ("projector", projector(ortho_matrix=[])),
    ("projector", projector(ortho_matrix=torch.ones(4))),
    ("projector", projector(ortho_matrix=[torch.ones(4, 2)] * 2)),
    ("projector", projector(update_proj_gap=0)), ("projector", projector(update_proj_gap="a")),
    ("projector", projector(rank="a")), ("exp_avg", "x"), ("exp_avg", ABSENT),
    ("exp_avg", torch.eye(2, 6).to_sparse()),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), WRONG)
def test_importers_say_what_is_wrong_with_a_state_of_galore_torch(key: str, value: Any) -> None:
    """KeyError, TypeError, AttributeError and ZeroDivisionError in place of a sentence."""
    weight = nn.Parameter(torch.zeros(4, 6))
    optimizer = GaLoreAdamW([weight], rank=2, projector="svd", stagger=False)
    entry = {**GALORE, "projector": projector(), key: value}
    entry = {k: v for k, v in entry.items() if v is not ABSENT}
    saved = {"state": {0: entry}, "param_groups": [{"params": [0], "rank": 2, "lr": 0.01}]}
    with pytest.raises(ValueError, match=r"parameter 0|rank must be"):
        import_galore_torch(saved, optimizer)


@pytest.mark.parametrize("step", [ABSENT, None, "three", torch.ones(2), -1])
def test_importers_say_what_is_wrong_with_a_state_of_bitsandbytes(step: Any) -> None:
    optimizer = GaLoreAdamW8bit([{"params": [nn.Parameter(torch.zeros(4, 6))], "rank": None}])
    entry = {"step": step, "state1": torch.ones(4, 6), "state2": torch.ones(4, 6)}
    entry = {k: v for k, v in entry.items() if v is not ABSENT}
    saved = {"state": {0: entry}, "param_groups": [{"params": [0]}]}
    with pytest.raises(ValueError, match=r"parameter 0"):
        import_bitsandbytes(saved, optimizer)


@pytest.mark.parametrize("missing", ["RMS", "relative_step", "eps", "lr"])
def test_importers_say_what_adafactors_learning_rate_needs(missing: str) -> None:
    optimizer = GaLoreAdafactor([nn.Parameter(torch.zeros(4, 6))], rank=2, beta1=0.9)
    entry = {"step": 3, "RMS": 1.0, "exp_avg": torch.ones(2, 6), "projector": projector()}
    entry |= {"exp_avg_sq_row": torch.ones(2), "exp_avg_sq_col": torch.ones(6)}
    group = {"params": [0], "clip_threshold": 1.0, "eps": (1e-30, 1e-3), "relative_step": False}
    group |= {"scale_parameter": True, "warmup_init": False, "lr": 0.1}
    entry.pop(missing, None)
    group.pop(missing, None)
    with pytest.raises(ValueError, match=f"not known without {missing}"):
        import_galore_torch({"state": {0: entry}, "param_groups": [group]}, optimizer)


@pytest.mark.parametrize("read", [import_galore_torch, import_bitsandbytes])
@pytest.mark.parametrize(
    "saved",
    [
        {}, {"optimizer": 3}, {"state": None, "param_groups": None},
        {"state": [], "param_groups": []},
        {"state": {}, "param_groups": ["a"]}, {"state": {}, "param_groups": [{"params": "a"}]},
        {"state": {0: 3}, "param_groups": [{"params": [0]}]},
    ],
)  # fmt: skip
def test_importers_refuse_what_is_no_optimizers_state(saved: Any, read: Any) -> None:
    optimizer = GaLoreAdamW([{"params": [nn.Parameter(torch.zeros(4, 6))], "rank": None}])
    with pytest.raises(ValueError, match=r"not an optimizer checkpoint|must be|group 0|no list"):
        read(saved, optimizer)
