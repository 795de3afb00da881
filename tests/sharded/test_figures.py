"""What is said of an optimizer whose parameters lie on several ranks."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import lowrank_optim
from lowrank_optim import memory
from tests.sharded.combinations import NAMED, SHORT
from tests.sharded.ranks import Ranks, World
from tests.sharded.test_state_bytes import METHODS, RANK, Weights, dense, pretended
from tests.sharded.training import Case, Trained, make_optimizer

Worlds = Callable[[int], Ranks]


def figures(world: World | None, case: Case) -> dict[str, Any]:
    """Before a step and after it, with what the tensors of this rank hold."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    trained = Trained(case, world)
    own: dict[str, Any] = {"lr": 1e-2, "weight_decay": 1e-2, **case.options}
    named = dict(make_optimizer(case, trained.named.items()).param_groups[0])
    size = {"density": own.pop("density")} if "density" in own else {"rank": named["rank"]}
    cls = getattr(lowrank_optim, case.cls)
    expected = memory.estimate(trained.model, cls, **{**own, **size})
    optimizer: Any = trained.optimizer
    before = optimizer.summary()
    trained.step(0)
    held = [x for state in trained.state().values() for x, _ in state.values()]
    shared = optimizer._shared.tensors()
    report, after = memory.report(optimizer), optimizer.summary()
    return {
        "estimate": (expected.basis, expected.moments, expected.other),
        "report": tuple(report),
        "held": sum(x.nbytes for x in held) + sum(x.nbytes for x in shared),
        "weights": (expected.weights, sum(x.nbytes for x, _ in trained.weights().values())),
        "gradients": expected.gradients,
        "before": str(before).split("; state")[0],
        "after": str(after).split("; state")[0],
        "bytes": (before.state_bytes, after.state_bytes),
    }


@pytest.mark.parametrize("name", ["svd full", "dct memory", "frugal block"])
def test_figures_are_of_this_rank(name: str, ranks: Worlds) -> None:
    """What is held here is what was estimated, reported and summed up; the model is the whole."""
    case = replace(NAMED[name], only=SHORT)
    one = figures(None, case)
    values = ranks(3).run(name, figures, case=case).checked()
    for found in values:
        assert found["estimate"] == found["report"]
        assert sum(found["report"]) == found["held"] == found["bytes"][1]
        assert found["weights"][0] == found["weights"][1] == found["gradients"]
        assert found["before"] == found["after"] == one["before"]
    assert sum(found["weights"][0] for found in values) == one["weights"][0]
    assert sum(found["report"][1] for found in values) >= one["report"][1]


@pytest.mark.parametrize("method", METHODS)
def test_an_estimate_needs_no_state(method: str) -> None:
    """Of one rank of eight, to the byte, and before anything is made."""
    cls, options = METHODS[method]
    own: dict[str, Any] = dict(options)
    groups = dense if "rank" in own and own.pop("rank") is None else None
    if groups is None and not cls.startswith("Frugal"):
        own["rank"] = RANK
    optimizer_class = getattr(lowrank_optim, cls)
    with pretended(8, 7):
        model, mesh = Weights(), init_device_mesh("cpu", (8,))
        for layer in model.children():
            fully_shard(layer, mesh=mesh)
        found = memory.estimate(model, optimizer_class, groups=groups, **own)
        params: Any = model.named_parameters() if groups is None else groups(model)
        optimizer = optimizer_class(params, **own)
        assert found.weights == found.gradients == sum(p.numel() for p in model.parameters()) // 2
        optimizer._make_state()
        held = memory.report(optimizer)
        assert (found.moments, found.other) == (held.moments, held.other)
        for asked in ({"in_backward": "step"}, {"tokens": 8}):
            with pytest.raises(NotImplementedError, match=f"{next(iter(asked))}.* of DTensors"):
                memory.estimate(model, optimizer_class, groups=groups, **own, **asked)


def postponed(world: World | None, case: Case) -> dict[str, int]:
    """Gradients that are zero at first: no basis can be found in them."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    trained = Trained(case, world)
    for step in range(3):
        trained.backward(step)
        for name, param in trained.named.items():
            if "tall" in name and step < 2:
                assert param.grad is not None
                param.grad.zero_()
        trained.optimizer.step()
    found: dict[str, int] = trained.optimizer.postponed_refreshes()  # type: ignore[attr-defined]
    return found


@pytest.mark.parametrize("name", ["svd", "dct"])
def test_postponed_refreshes_are_told_by_every_rank(name: str, ranks: Worlds) -> None:
    case = replace(NAMED[name], only=SHORT)
    one = postponed(None, case)
    assert one == {"blocks.1.tall.weight": 2}
    for found in ranks(3).run(f"postponed, {name}", postponed, case=case).checked():
        assert found == one
