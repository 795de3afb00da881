"""``ZeroRedundancyOptimizer``: what it consolidates goes on, on several ranks and on one."""

from __future__ import annotations

import copy
import logging
import re
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer

from lowrank_optim import methods
from tests import cases, runs
from tests.engine.test_zero import trained
from tests.sharded.ranks import Ranks, World

Worlds = Callable[[int], Ranks]
STEPS, SAVED, GAP = 6, 3, 2
"""Saved between two refreshes, and some matrices have had their first and some their second."""

SWITCH = {"interval": 2, "freeze_steps": 1, "order": "random", "total_steps": 40}
SST = {"steps_per_iteration": GAP, "iterations_per_round": 2, "warmup_steps": 1}

OWN: dict[str, tuple[str, dict[str, Any]]] = {
    "random, project": ("GaLoreAdamW", {"projector": "random", "on_refresh": "project"}),
    "two sides": ("GaLoreAdamW", {"projector": "rsvd", "proj_type": "full"}),
    "hadamard": ("GaLoreLion", {"projector": "hadamard"}),
    "randk": ("FrugalAdamW", {"projector": "randk", "density": 0.4}),
    "rows, momentum": ("FrugalSGD", {"projector": "rows", "density": 0.4, "momentum": 0.9}),
    "memory": ("DCTAdamW", {"error_feedback": "float32"}),
    "memory in 8 bits": ("DCTAdamW", {"error_feedback": "8bit", "update_proj_gap": GAP}),
    "sst active": ("SSTAdamW", {**SST, "factors": "active", "sampling": "multinomial"}),
    "sst 8bit active": ("SSTAdamW8bit", {**SST, "factors": "active"}),
    "switchlora in turn": ("SwitchLoRAAdamW", {**SWITCH, "order": "fifo"}),
    "adafactor, first moment": ("GaLoreAdafactor", {"beta1": 0.9, "projector": "random"}),
    "moments in bfloat16": ("FiraAdamW", {"state_dtype": "bfloat16"}),
    "weights in bfloat16": ("GaLoreAdamW", {"stochastic_rounding": True, "dtype": torch.bfloat16}),
}
"""Options that add or change what is kept, beside every class at its defaults."""

WHOLE = cases.WHOLE_LAYERS  # refused, as blocks are
CASES = {**{x: (x, {}) for x in cases.method_names() if x not in WHOLE}, **OWN}
SHORT = (
    "GaLoreAdamW8bit", "GaLoreAdafactor", "FiraAdamW", "FrugalAdamW", "SSTAdamW",
    "SwitchLoRAAdamW", "memory in 8 bits", "weights in bfloat16",
)  # fmt: skip


def options(case: str) -> tuple[Any, dict[str, Any], torch.dtype]:
    """Class, arguments and dtype of the weights."""
    name, own = CASES[case]
    own = dict(own)
    dtype = own.pop("dtype", torch.float32)
    chosen: dict[str, Any] = {"lr": 0.01}
    if name.startswith("Frugal"):
        chosen |= {"density": 0.4, "projector": "columns"}  # blocks are refused
    else:
        chosen["rank"] = 3
    if name.startswith("SST"):
        chosen |= SST
    elif name.startswith("SwitchLoRA"):
        chosen |= SWITCH
    elif not name.startswith("DCT"):
        chosen["update_proj_gap"] = GAP
    return getattr(methods, name), {**chosen, **own}, dtype


def network(dtype: torch.dtype) -> nn.Module:
    """Sizes that ZeRO does not leave in their order; one matrix has more than one 8-bit block."""
    torch.manual_seed(0)
    layers = [nn.Linear(12, 30), nn.Linear(30, 9), nn.Linear(9, 40), nn.Linear(40, 40)]
    return nn.Sequential(nn.Embedding(50, 12), *layers, nn.Linear(9, 9, bias=False)).to(dtype)


def assert_same(case: str, what: str, model: nn.Module, expected: nn.Module) -> None:
    for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        apart = float((p.detach().double() - q.detach().double()).abs().max())
        assert torch.equal(p, q), f"{case}, {what}: {name} is {apart:.1e} apart"


def consolidated(optimizer: ZeroRedundancyOptimizer, rank: int) -> Any:
    """On rank 0, and from there on all."""
    optimizer.consolidate_state_dict(to=0)
    sent: list[Any] = [runs.through_a_file(optimizer.state_dict()) if rank == 0 else None]
    torch.distributed.broadcast_object_list(sent, src=0)
    return sent[0]


def resumed(world: World, case: str, bucket_view: bool) -> None:
    """A run that is not interrupted, and two that go on from its checkpoint."""
    cls, own, dtype = options(case)

    def sharded(model: nn.Module) -> Any:
        return ZeroRedundancyOptimizer(
            model.parameters(), cls, parameters_as_bucket_view=bucket_view, **own
        )

    model = network(dtype)
    optimizer = sharded(model)
    assert 0 < sum(len(g["params"]) for g in optimizer.optim.param_groups) < 10
    trained(model, optimizer, range(SAVED))
    weights = {k: x.clone() for k, x in model.state_dict().items()}
    saved = consolidated(optimizer, world.rank)
    trained(model, optimizer, range(SAVED, STEPS))

    again, alone = network(dtype), network(dtype)
    again.load_state_dict(weights)
    other = sharded(again)
    other.load_state_dict(copy.deepcopy(saved))
    trained(again, other, range(SAVED, STEPS))
    assert_same(case, f"{world.size} ranks", again, model)

    alone.load_state_dict(weights)
    one = cls(alone.parameters(), **own)
    one.load_state_dict(saved)
    trained(alone, one, range(SAVED, STEPS))
    assert_same(case, "one process", alone, model)


def from_one(case: str, bucket_view: bool) -> None:
    """A checkpoint of one process goes on as shards."""
    cls, own, dtype = options(case)
    alone, model = network(dtype), network(dtype)
    one = cls(alone.parameters(), **own)
    trained(alone, one, range(SAVED))
    saved = runs.through_a_file(one.state_dict())
    model.load_state_dict(alone.state_dict())
    optimizer = ZeroRedundancyOptimizer(
        model.parameters(), cls, parameters_as_bucket_view=bucket_view, **own
    )
    optimizer.load_state_dict(saved)
    trained(alone, one, range(SAVED, STEPS))
    trained(model, optimizer, range(SAVED, STEPS))
    assert_same(case, "from one process", model, alone)


def all_of(world: World, chosen: list[str], bucket_view: bool = False) -> dict[str, str]:
    """Cases that do not resume, and why: one job, as each costs less than asking for it."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    failed = {}
    for case in chosen:
        try:
            resumed(world, case, bucket_view)
            from_one(case, bucket_view)
        except AssertionError as error:
            failed[case] = str(error)
    return failed


TOGETHER = 3
"""Cases of a job, whose time is limited."""


def check(ranks: Worlds, size: int, chosen: Iterable[str], **own: Any) -> None:
    cases_ = list(chosen)
    for i in range(0, len(cases_), TOGETHER):
        part = cases_[i : i + TOGETHER]
        for failed in ranks(size).run("resume", all_of, chosen=part, **own).checked():
            assert not failed, "\n".join(failed.values())


VIEWS = ("GaLoreAdamW8bit", "FrugalAdamW", "sst active")
"""Which the default run has as views alone."""


def test_what_is_consolidated_goes_on_on_two_ranks_and_on_one(ranks: Worlds) -> None:
    """To the bit, and what one process saved goes on on two ranks."""
    check(ranks, 2, [name for name in SHORT if name not in VIEWS])


def test_parameters_as_views_of_buckets(ranks: Worlds) -> None:
    """Every weight is then a slice of one long vector, which torch sends as a whole."""
    check(ranks, 2, VIEWS, bucket_view=True)


@pytest.mark.slow
@pytest.mark.parametrize(("bucket_view", "size"), [(False, 2), (True, 3)])
def test_every_class_goes_on(bucket_view: bool, size: int, ranks: Worlds) -> None:
    check(ranks, size, CASES, bucket_view=bucket_view)


MISFITS: dict[str, tuple[tuple[str, dict[str, Any]], tuple[str, dict[str, Any]], str]] = {
    "rank": (("GaLoreAdamW", {}), ("GaLoreAdamW", {"rank": 2}), r"rank is 3 there and 2 here"),
    "basis": (
        ("GaLoreAdamW", {}),
        ("GaLoreAdamW", {"projector": "columns"}),
        r"projector is rsvd there and columns here",
    ),
    "class": (("GaLoreAdamW", {}), ("FiraAdamW", {}), r"state is .* there and .*residual_norm"),
    "torch": (("", {}), ("GaLoreAdamW", {}), r"state is .*exp_avg.* there and .*basis"),
    "values": (
        ("FrugalAdamW", {"density": 0.4, "projector": "columns"}),
        ("FrugalAdamW", {"density": 0.4, "projector": "columns"}),
        r"cannot be loaded into parameter \d of FrugalAdamW.*99",
    ),
}


def made(name: str, own: dict[str, Any], model: nn.Module) -> Any:
    cls: Any = getattr(methods, name) if name else torch.optim.AdamW
    ranked = {} if not name or "density" in own else {"rank": 3}
    return ZeroRedundancyOptimizer(model.parameters(), cls, **{"lr": 0.01, **ranked, **own})


def misfit(world: World, case: str) -> Any:
    """The error of a load that does not fit, its notes, and what is left."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    (name, own), other, _ = MISFITS[case]
    model = network(torch.float32)
    optimizer = made(name, own, model)
    trained(model, optimizer, range(2))
    saved = consolidated(optimizer, world.rank)
    if case == "values":
        for entry in saved["state"].values():
            if "index" in entry:
                entry["index"].fill_(99)
    again = network(torch.float32)
    optimizer = made(*other, again)
    try:
        optimizer.load_state_dict(saved)
    except ValueError as error:
        return str(error), error.__notes__, len(optimizer.optim.state)
    return "loaded", [], 0


@pytest.mark.parametrize("case", MISFITS)
def test_a_checkpoint_that_does_not_fit_is_refused(case: str, ranks: Worlds) -> None:
    """torch puts the state in place, and the checkpoint's groups over those of the optimizer."""
    for text, notes, left in ranks(2).run(case, misfit, case=case).checked():
        assert re.search(MISFITS[case][2], text), text
        assert "had replaced the state before" in "".join(notes) and left == 0


def loaded_twice(world: World) -> bool:
    """Whether a step after a load has changed what was loaded."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    model = network(torch.float32)
    optimizer = made("GaLoreAdamW", {}, model)
    trained(model, optimizer, range(2))
    saved = consolidated(optimizer, world.rank)
    entries = [x for own in saved["state"].values() for x in own.values()]
    before = [x.clone() for x in entries]
    optimizer.load_state_dict(saved)
    trained(model, optimizer, range(2, 4))
    return all(torch.equal(x, y) for x, y in zip(entries, before, strict=True))


def test_a_step_leaves_the_loaded_checkpoint_as_it_was(ranks: Worlds) -> None:
    assert all(ranks(2).run("twice", loaded_twice).checked())


def overlapping(world: World) -> str:
    """What torch says of ``overlap_with_ddp``, and that nothing was left registered."""
    model = network(torch.float32)
    try:
        ZeroRedundancyOptimizer(
            model.parameters(), methods.GaLoreAdamW, overlap_with_ddp=True, lr=0.01, rank=3
        )
    except ValueError as error:
        return str(error)
    return "made"


def test_overlap_with_ddp_is_refused_by_torch(ranks: Worlds) -> None:
    """It takes functional optimizers of a table of its own alone."""
    for text in ranks(2).run("overlap", overlapping).checked():
        assert re.search(r"functional optimizer.*GaLoreAdamW", text), text
