"""SwitchLoRA's layers of factors on several ranks: gathered, and stepped as by one process."""

from __future__ import annotations

import importlib
import itertools
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import lowrank_optim
from lowrank_optim.nn import convert
from tests.sharded import models, training
from tests.sharded.meter import Meter
from tests.sharded.mutations import SEAM, Mutation, mutated
from tests.sharded.ranks import Ranks, World
from tests.sharded.test_not_finite import poison
from tests.sharded.test_resharding import load, save
from tests.sharded.training import Case, Trained

Worlds = Callable[[int], Ranks]
SHAPES = {"wide": (5, 12), "tall": (13, 6), "few": (2, 9), "also": (5, 12), "turned": (10, 6)}
"""Outputs and inputs; from three ranks on some have nothing of two outputs."""
OPTIONS: dict[str, dict[str, Any]] = {
    "switched": {},
    "restarts": {"restart_every": 2, "weight_decay": 0.1},
    "weights decay": {"decay_on": "weight", "order": "random", "interval": 4, "freeze_steps": 2},
    "pools beside": {"pool_device": "param", "freeze_step_counter": False},
}


@dataclass(frozen=True)
class Chosen:
    """Options, how the layers are split, and a step with a gradient that is not finite."""

    name: str
    how: str = "rows"
    """By ``fully_shard``, ``rows`` or where it is even ``columns``, or plain ``tensors``."""
    bad: int = -1


class Conv1D(nn.Module):
    """GPT-2's layer, known by this name: its weight is (in, out)."""

    def __init__(self, cols: int, rows: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.3 * torch.randn(cols, rows))
        self.bias = nn.Parameter(torch.zeros(rows))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Model(nn.Module):
    """Linear layers, each with a loss of its own."""

    def __init__(self) -> None:
        super().__init__()
        for name, (rows, cols) in SHAPES.items():
            make = Conv1D if name == "turned" else nn.Linear
            self.add_module(name, make(cols, rows))

    def forward(self, step: int, rank: int, size: int) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for place, (name, (rows, cols)) in enumerate(SHAPES.items()):
            y = self.get_submodule(name)(models.part((cols,), step, place, rank, size)).tanh()
            total = total + (y - models.part((rows,), step, 50 + place, rank, size)).square().mean()
        return total


class Layers(Trained):
    """A run of a converted model."""

    def __init__(self, chosen: Chosen, world: World | None) -> None:
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        self.case = Case("SwitchLoRAAdamW")
        self.rank, self.size = (0, 1) if world is None else world
        torch.manual_seed(3)
        self.model: Any = Model().double()
        own = {"interval": 2, "freeze_steps": 1, **OPTIONS[chosen.name]}
        groups = convert(self.model, "switchlora", rank=2, **own)
        if world is not None:
            self.split(init_device_mesh("cpu", (world.size,)), chosen)
        if chosen.how != "tensors" or world is None:
            self.named = dict(self.model.named_parameters())
        if chosen.how == "tensors":
            self.model = None
        for group in groups:
            group["params"] = [self.named[name] for name in group["param_names"]]
        self.optimizer = lowrank_optim.SwitchLoRAAdamW(groups, lr=1e-2)

    def split(self, mesh: Any, chosen: Chosen) -> None:
        if chosen.how == "tensors":
            places = itertools.cycle([Shard(1), Shard(0), Replicate(), Shard(0)])
            self.named = {}
            for name, x in self.model.named_parameters():
                place = next(places)
                place = Shard(0) if x.dim() == 1 and place.is_shard() else place
                own = distribute_tensor(x.detach(), mesh, [place])
                self.named[name] = nn.Parameter(own, requires_grad=x.requires_grad)
            return
        place = models.by_columns(self.size) if chosen.how == "columns" else None
        for layer in self.model.children():
            fully_shard(layer, mesh=mesh, shard_placement_fn=place)
        fully_shard(self.model, mesh=mesh)

    def backward(self, step: int) -> None:
        if self.model is not None:
            super().backward(step)
            return
        self.optimizer.zero_grad()
        trained = {name: x for name, x in self.named.items() if x.requires_grad}
        training.set_tensor_grads(trained, step)


def train(world: World | None, chosen: Chosen) -> Any:
    run, out = Layers(chosen, world), []
    for step in range(training.STEPS):
        run.backward(step)
        if step == chosen.bad:
            poison(run, "wide.lora_B", float("nan"))
        run.optimizer.step()
        out.append(run.held())
    return out


def switches(run: Any) -> int:
    slots = [s["wide.lora_A"]["host.held"].tolist() for _, s in run]
    return sum(a != b for a, b in itertools.pairwise(slots))


CASES = [
    (2, Chosen("switched")),
    (3, Chosen("restarts")),
    (2, Chosen("weights decay", "columns")),
    (3, Chosen("weights decay", "tensors")),
    (3, Chosen("switched", bad=3)),
]


@pytest.mark.parametrize(("size", "chosen"), CASES, ids=str)
def test_it_is_one_process(size: int, chosen: Chosen, ranks: Worlds) -> None:
    expected = training.assembled([train(None, chosen)])
    assert switches(expected) >= 3
    values = ranks(size).run(str(chosen), train, chosen=chosen).checked()
    run = training.assembled(values)
    training.assert_equal_runs(run, expected)
    moved = [n for n, x in run[-1][0].items() if bool((x != run[0][0][n]).all())]
    assert {"wide.weight", "tall.lora_A", "tall.lora_B", "few.lora_A"} <= {*moved}, moved


@pytest.mark.slow
@pytest.mark.parametrize("how", ["rows", "columns", "tensors"])
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("name", OPTIONS)
def test_it_is_one_process_everywhere(name: str, size: int, how: str, ranks: Worlds) -> None:
    test_it_is_one_process(size, Chosen(name, how), ranks)


def mutant(world: World, chosen: Chosen, mutation: Mutation) -> Any:
    run, out = Layers(chosen, world), []
    with mutated(mutation, world, importlib.import_module(SEAM)) as count:
        for step in range(training.STEPS):
            run.backward(step)
            count.in_step = 0
            run.optimizer.step()
            out.append(run.held())
    assert count.changed
    return out


@pytest.mark.parametrize(
    "mutation",
    [
        Mutation("gather", how="one rank"),
        pytest.param(Mutation("broadcast", how="skip"), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_run_without_a_message_is_seen(mutation: Mutation) -> None:
    chosen, world = Chosen("restarts"), Ranks(2, grace=4.0)
    outcome = world.run("mutant", mutant, chosen=chosen, mutation=mutation)
    world.close()
    if outcome.failed:
        assert "assert count.changed" not in str(outcome.errors)
        return
    with pytest.raises(AssertionError):
        expected = training.assembled([train(None, chosen)])
        training.assert_equal_runs(training.assembled(outcome.values), expected)


LEG = training.STEPS // 3


def leg(world: World, chosen: Chosen, begin: int, source: str | None, target: str) -> Any:
    """Some steps of a run on so many ranks, from a checkpoint to a checkpoint."""
    run, out = Layers(chosen, world if world.size > 1 else None), []
    if source is not None:
        with torch.no_grad():
            for param in run.named.values():
                param.zero_()  # what is not read is seen
        load(run, source, False, strict=False)  # of a layer one factor holds the state
    for step in range(begin, begin + LEG):
        run.step(step)
        out.append(run.held())
    save(run, target, False)
    return out


def test_a_run_over_several_numbers_of_ranks_is_one_run(ranks: Worlds, tmp_path: Path) -> None:
    chosen, source = Chosen("restarts"), None
    expected = training.assembled([train(None, chosen)])
    for i, size in enumerate((2, 1, 3)):
        args = {"chosen": chosen, "begin": i * LEG, "source": source}
        source = str(tmp_path / str(i))
        values = ranks(size).run(f"leg {i}", leg, target=source, **args).checked()
        part = expected[i * LEG : (i + 1) * LEG]
        training.assert_equal_runs(training.assembled(values), part)


def metered(world: World) -> Any:
    run, out = Layers(Chosen("switched"), world), []
    for step in range(3):
        run.backward(step)
        with Meter() as meter:
            run.optimizer.step()
        out.append((meter.counts, meter.bytes))
    split = [run.optimizer.state[run.named["wide.lora_A"]][key] for key in ("A.exp_avg", "A.age")]
    return out, [isinstance(x, DTensor) for x in split]


def test_alike_layers_are_gathered_together(ranks: Worlds) -> None:
    """Factors and gradients of both layers of one shape in one message; the rest is the guard."""
    for steps, kept in ranks(2).run("gathered", metered).checked():
        assert kept == [False, False]
        numbers = [1 * cols + -(-rows // 2) * 2 for rows, cols in SHAPES.values()]
        gathered = 8 * 2 * sum(numbers)
        for counts, sizes in steps:
            assert counts == {"all_gather": 4, "all_reduce": 1}
            assert sizes == {"all_gather": gathered, "all_reduce": 16 * len(SHAPES)}
