"""Under ``ZeroRedundancyOptimizer`` every method trains as in one process, or is refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer

from lowrank_optim import GaLoreAdamW, LowRankOptimizer, lowrank_groups, methods
from lowrank_optim.nn import convert
from tests import cases
from tests.compare import assert_close
from tests.sharded.ranks import Ranks, World

Worlds = Callable[[int], Ranks]

STEPS, GAP = 6, 2
SST = {"steps_per_iteration": GAP, "iterations_per_round": 2, "warmup_steps": 1}
SWITCH = {"interval": 2, "freeze_steps": 1, "order": "random", "total_steps": 40}
ROUNDED = {"stochastic_rounding": True}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "galore svd": ("GaLoreAdamW", {"projector": "svd"}),
    "galore rsvd": ("GaLoreAdamW", {"projector": "rsvd", "on_refresh": "project"}),
    "galore random": ("GaLoreAdamW", {"projector": "random"}),
    "galore lion": ("GaLoreLion", {}),
    "galore adafactor": ("GaLoreAdafactor", {}),
    "galore full": ("GaLoreAdamW", {"projector": "svd", "proj_type": "full"}),
    "galore 8bit": ("GaLoreAdamW8bit", {}),
    "fira": ("FiraAdamW", {"projector": "rsvd"}),
    "fira random": ("FiraAdamW", {"projector": "random"}),
    "frugal columns": ("FrugalAdamW", {"projector": "columns", "density": 0.4}),
    "frugal rows": ("FrugalSGD", {"projector": "rows", "density": 0.4, "momentum": 0.9}),
    "frugal randk": ("FrugalAdamW", {"projector": "randk", "density": 0.4}),
    "dct": ("DCTAdamW", {"error_feedback": "8bit"}),
    "hadamard": ("GaLoreAdamW", {"projector": "hadamard"}),
    "sst": ("SSTAdamW", {**SST}),
    "sst active": ("SSTAdamW", {**SST, "factors": "active", "sampling": "multinomial"}),
    "switchlora": ("SwitchLoRAAdamW", {**SWITCH}),
    "switchlora 8bit": ("SwitchLoRAAdamW8bit", {**SWITCH}),
    "bfloat16": ("GaLoreAdamW", {"projector": "random", **ROUNDED}),
    "sst bfloat16": ("SSTAdamW", {**SST, **ROUNDED}),
}


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Sizes that ZeRO does not leave in their order, and a matrix that a rank of 3 covers."""
    torch.manual_seed(0)
    layers = [nn.Embedding(90, 12), nn.Linear(12, 30), nn.Linear(30, 9), nn.Linear(9, 9)]
    return nn.Sequential(*layers, nn.Linear(3, 24, bias=False)).to(dtype)


def options(case: str) -> tuple[str, dict[str, Any]]:
    name, own = CASES[case]
    ranked = {} if "density" in own else {"rank": 3}
    gap = {} if own.keys() & {*SST, *SWITCH} or case == "dct" else {"update_proj_gap": GAP}
    return name, {"lr": 0.01, **ranked, **gap, **own}


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, steps: Iterable[int]) -> None:
    """On gradients that every rank has, as after DistributedDataParallel."""
    for step in steps:
        for n, p in enumerate(model.parameters()):
            p.grad = cases.gradients(p.shape, 1, p.dtype, 100 * step + n)[0]
        optimizer.step()


def assert_as_one(
    case: str, sharded: nn.Module, whole: nn.Module, dtype: torch.dtype | None = None
) -> None:
    for (name, p), q in zip(sharded.named_parameters(), whole.parameters(), strict=True):
        try:
            assert_close(p, q, dtype)
        except AssertionError as error:
            raise AssertionError(f"{case}, {name}: {error}") from None


def as_one(world: World, case: str) -> None:
    """A method of one process, and the same under ZeRO, which gives this rank some parameters."""
    warnings.simplefilter("ignore", UserWarning)
    name, own = options(case)
    dtype = torch.bfloat16 if "bfloat16" in case else torch.float64
    whole, sharded = network(dtype), network(dtype)
    one = getattr(methods, name)(whole.parameters(), **own)
    many = ZeroRedundancyOptimizer(sharded.parameters(), getattr(methods, name), **own)
    assert 0 < sum(len(g["params"]) for g in many.optim.param_groups) < 8
    trained(whole, one, range(STEPS))
    trained(sharded, many, range(STEPS))
    assert_as_one(case, sharded, whole)


DEFAULT = (
    "galore rsvd", "galore adafactor", "galore 8bit", "fira", "frugal randk", "dct", "sst active",
    "switchlora",
)  # fmt: skip
"""Everything that is drawn, or has a mean, and one of each residual."""


@pytest.mark.parametrize(
    "case", [pytest.param(x, marks=() if x in DEFAULT else pytest.mark.slow) for x in CASES]
)
def test_a_method_trains_as_one_process(case: str, ranks: Worlds) -> None:
    """It gives each rank its parameters alone, the largest first, without or with wrong names."""
    ranks(2).run(case, as_one, case=case).checked()


def unnamed(groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in group.items() if k != "param_names"} for group in groups]


def groups_as_one(world: World) -> None:
    """Groups with a rank each; groups with the constructor's; one that is late."""
    own: dict[str, Any] = {"lr": 0.01, "update_proj_gap": GAP, "projector": "random"}
    overrides = {r"^4\.": {"rank": 2}}
    pair = network(), network()
    one, many = (unnamed(lowrank_groups(m, rank=3, overrides=overrides)) for m in pair)
    trained(pair[0], GaLoreAdamW(one, **own), range(STEPS))
    trained(pair[1], ZeroRedundancyOptimizer(many, GaLoreAdamW, **own), range(STEPS))
    assert_as_one("groups", pair[1], pair[0])

    pair = network(), network()
    made: list[Any] = []
    for model in pair:
        *early, late = model.parameters()
        groups = [{"params": early[3:], "weight_decay": 0.0}, {"params": early[:3]}]
        if model is pair[0]:
            made.append(GaLoreAdamW(groups, rank=3, **own))
        else:
            made.append(ZeroRedundancyOptimizer(groups, GaLoreAdamW, rank=3, **own))
        trained(model, made[-1], range(3))
        made[-1].add_param_group({"params": [late]})
        trained(model, made[-1], range(3, STEPS))
    assert_as_one("constructor's rank", pair[1], pair[0])


def resumed_as_one(world: World) -> None:
    """Consolidated on rank 0, and loaded on both."""
    own: dict[str, Any] = {"lr": 0.01, "update_proj_gap": GAP, "projector": "random", "rank": 3}
    whole, sharded = network(), network()
    trained(whole, GaLoreAdamW(whole.parameters(), **own), range(STEPS))
    first = ZeroRedundancyOptimizer(sharded.parameters(), GaLoreAdamW, **own)
    trained(sharded, first, range(5))
    first.consolidate_state_dict(to=0)
    saved: list[Any] = [first.state_dict() if world.rank == 0 else None]
    torch.distributed.broadcast_object_list(saved, src=0)
    again = ZeroRedundancyOptimizer(sharded.parameters(), GaLoreAdamW, **own)
    again.load_state_dict(saved[0])
    trained(sharded, again, range(5, STEPS))
    assert_as_one("resumed", sharded, whole)


def refused(world: World) -> None:
    """What depends on all parameters of a group, or on names, and before anything changed."""

    def told(groups: Any, cls: type[LowRankOptimizer], text: str, **own: Any) -> None:
        with pytest.raises(ValueError, match=text):
            ZeroRedundancyOptimizer(groups, cls, **own)

    model = network()
    before = [p.detach().clone() for p in model.parameters()]
    told(
        model.parameters(), methods.FrugalAdamW, "takes turns among all tensors.*columns",
        projector="block", density=0.5,
    )  # fmt: skip
    told(lowrank_groups(model, rank=3), GaLoreAdamW, "delete 'param_names' from the groups")
    told(
        [{"params": [model[1].weight], "rank": 2}, {"params": [model[2].weight]}], GaLoreAdamW,
        "rank=2 in a group, and another in the constructor.*set rank", rank=3,
    )  # fmt: skip
    assert all(torch.equal(p, x) for p, x in zip(model.parameters(), before, strict=True))
    # of SST, whose modules keep an order in integers, torch says it
    text = "may give the factors of one layer to different ranks|same dense type"
    for kind, cls in (("sst", methods.SSTAdamW), ("switchlora", methods.SwitchLoRAAdamW)):
        factors = convert(network(torch.float32), kind, rank=3)
        told(factors, cls, text)
        told(unnamed(factors), cls, text)


@pytest.mark.parametrize("job", [groups_as_one, resumed_as_one, refused])
def test_groups_and_checkpoints_too_or_it_is_refused(job: Any, ranks: Worlds) -> None:
    ranks(2).run(job.__name__, job).checked()


def test_names_must_be_as_many_as_parameters() -> None:
    """As whoever splits a group and forgets its names gives them."""
    params = [nn.Parameter(torch.zeros(4, 4)) for _ in range(2)]
    for names in (["a"], ["a", "b", "c"], "ab", ["a", 1]):
        with pytest.raises(ValueError, match=r"of 2 parameters must be 2 strings, got"):
            GaLoreAdamW([{"params": params, "param_names": names}], rank=2)
