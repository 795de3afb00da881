"""Layers of factors on several ranks, SwitchLoRA's and SST's: stepped as by one process."""

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
from torch.distributed.tensor.placement_types import _StridedShard

import lowrank_optim
from lowrank_optim.distributed import shard_placement_fn
from lowrank_optim.nn import convert
from lowrank_optim.ops import quant
from lowrank_optim.subspaces.spectral_module import SpectralModule
from tests.sharded import models, training
from tests.sharded.meter import Meter
from tests.sharded.mutations import SEAM, Mutation, mutated
from tests.sharded.ranks import Ranks, World
from tests.sharded.test_full_state import WAYS, assert_same, takes_over
from tests.sharded.test_resharding import load, save
from tests.sharded.training import Case, Trained

Worlds = Callable[[int], Ranks]
SHAPES = {"wide": (5, 12), "tall": (13, 6), "few": (2, 9), "also": (5, 12), "turned": (10, 6)}
"""Outputs and inputs; from three ranks on some have nothing of two outputs."""
SST: dict[str, dict[str, Any]] = {
    "sst": {"steps_per_iteration": 2, "warmup_steps": 1, "iterations_per_round": 2},
    "sst seldom": {"steps_per_iteration": 3, "warmup_steps": 1},
    "sst flips": {
        "steps_per_iteration": 2,
        "iterations_per_round": 3,
        "negative": "flip",
        "s_lr_scale": 30.0,
        "on_refresh": "project",
        "stagger": False,
    },
    "sst by the rule": {
        "steps_per_iteration": 2,
        "iterations_per_round": 1,
        "enhanced": False,
        "sampling": "uniform",
        "maximize": True,
    },
    "sst eight bits": {"steps_per_iteration": 2, "state_dtype": "8bit"},
    "sst four bits": {"steps_per_iteration": 2, "state_dtype": "4bit"},
}
BROAD = {"wide": (8, 2100), "tall": (12, 5)}
"""Of which one has moments that are large enough for 8 bits."""
OPTIONS: dict[str, dict[str, Any]] = {
    "switched": {},
    "restarts": {"restart_every": 3, "weight_decay": 0.1},
    "weights decay": {
        "decay_on": "weight",
        "weight_decay": 1.0,
        "order": "random",
    },
    "pools beside": {"pool_device": "param", "freeze_step_counter": False},
    **SST,
    "in 8 bits": {"state_dtype": "8bit"},
    "in 4 bits": {"state_dtype": "4bit"},
}
OFTEN = [name for name in OPTIONS if name != "sst seldom"]


@dataclass(frozen=True)
class Chosen:
    """Options, how the layers are split, and a step with a gradient that is not finite."""

    name: str
    how: str = "rows"
    """By ``fully_shard``, ``rows`` or where it is even ``columns``, the same but for whole numbers,
    which are ``left out``, or plain ``tensors``, or by FSDP2 over tensor parallel, ``parallel``.
    The last two have gradients that are drawn."""
    bad: int = -1
    mesh: str = "all"
    """Ranks in one dimension, or in a ``square``, over which FSDP2 has copies of shards."""
    dtype: torch.dtype = torch.float64
    """In bfloat16 gradients are drawn, and weights rounded stochastically."""

    @property
    def method(self) -> str:
        return "sst" if self.name in SST else "switchlora"

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        return BROAD if "eight" in self.name or "four" in self.name else SHAPES

    @property
    def drawn(self) -> bool:
        return self.how in ("tensors", "parallel") or self.dtype != torch.float64

    @property
    def factors(self) -> tuple[str, ...]:
        """Of a layer, what is trained; the first holds the state."""
        return ("u", "v", "s") if self.method == "sst" else ("lora_A", "lora_B")


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

    def __init__(self, shapes: dict[str, tuple[int, int]]) -> None:
        super().__init__()
        self.shapes = shapes
        for name, (rows, cols) in shapes.items():
            make = Conv1D if name == "turned" else nn.Linear
            self.add_module(name, make(cols, rows))

    def forward(self, step: int, rank: int, size: int) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for place, (name, (rows, cols)) in enumerate(self.shapes.items()):
            y = self.get_submodule(name)(models.part((cols,), step, place, rank, size)).tanh()
            total = total + (y - models.part((rows,), step, 50 + place, rank, size)).square().mean()
        return total


class Layers(Trained):
    """A run of a converted model."""

    def __init__(self, chosen: Chosen, world: World | None) -> None:
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        sst = chosen.method == "sst"
        self.case = Case("SSTAdamW" if sst else "SwitchLoRAAdamW")
        self.rank, self.size = (0, 1) if world is None else world
        torch.manual_seed(3)
        self.model: Any = Model(chosen.shapes).to(chosen.dtype)
        own: dict[str, Any] = {} if sst else {"interval": 2, "freeze_steps": 1}
        own |= OPTIONS[chosen.name]
        groups = convert(self.model, chosen.method, rank=2, **own)
        self.named = {}
        if world is not None:
            self.split(mesh_of(world.size, chosen.mesh), chosen)
        self.named = self.named or dict(self.model.named_parameters())
        self.chosen, self.drawn = chosen, chosen.drawn
        for group in groups:
            group["params"] = [self.named[name] for name in group["param_names"]]
        rounds = chosen.dtype == torch.bfloat16
        cls = getattr(lowrank_optim, self.case.cls)
        self.optimizer = cls(groups, lr=1e-2, stochastic_rounding=rounds)

    def poison(self, name: str) -> None:
        """A gradient that is not finite, on one rank alone: of copies in one of them."""
        grad = self.named[name].grad
        assert grad is not None
        if self.rank == 0:
            (grad.to_local() if isinstance(grad, DTensor) else grad).fill_(float("nan"))

    def split(self, mesh: Any, chosen: Chosen) -> None:
        if chosen.how == "tensors":
            places = itertools.cycle(PLACES[mesh.ndim])
            for name, x in self.model.named_parameters():
                own = distribute_tensor(x.detach(), mesh, [fitting(p, x) for p in next(places)])
                self.named[name] = nn.Parameter(own, requires_grad=x.requires_grad)
            return
        if chosen.how == "parallel":
            parallelize(self.model, mesh["across"], chosen)
            mesh = mesh["down"]
        place = models.by_columns(self.size) if chosen.how == "columns" else None
        own = models.left_out(self.model, chosen.how == "left out")
        for layer in self.model.children():
            fully_shard(layer, mesh=mesh, shard_placement_fn=place, **own)
        fully_shard(self.model, mesh=mesh, **own)

    def backward(self, step: int) -> None:
        if not self.drawn:
            super().backward(step)
            return
        self.optimizer.zero_grad()
        trained = {name: x for name, x in self.named.items() if x.requires_grad}
        training.set_tensor_grads(trained, step)


def mesh_of(size: int, kind: str) -> Any:
    return training.square_mesh(size) if kind == "square" else init_device_mesh("cpu", (size,))


PLACES: dict[int, list[tuple[Any, ...]]] = {
    1: [(Shard(1),), (Shard(0),), (Replicate(),), (Shard(0),)],
    2: [
        (Shard(0), Shard(1)),
        (Shard(0), Shard(0)),
        (Replicate(), Shard(1)),
        (_StridedShard(1, split_factor=2), Shard(1)),
        (Shard(1), Replicate()),
    ],
}
"""Of plain DTensors, in turn, on meshes of so many dimensions."""


def fitting(place: Any, x: Tensor) -> Any:
    """A placement, or one like it that a tensor can have."""
    if place.is_replicate() or (x.dim() > 1 and type(place) is Shard):
        return place
    even = x.dim() > 1 and x.shape[1] % 4 == 0
    return place if even else Shard(x.dim() - 1)


def parallelize(model: nn.Module, mesh: Any, chosen: Chosen) -> None:
    """Layers split by outputs and by inputs in turn, as tensor parallel splits them."""
    for i, layer in enumerate(model.children()):
        for name, param in list(layer.named_parameters(recurse=False)):
            by_output = {"lora_A": None, "lora_B": 0, "weight": int(isinstance(layer, Conv1D))}
            by_input = {"lora_A": 1, "lora_B": None, "weight": 1 - by_output["weight"]}
            dim = (by_input if i % 2 else by_output).get(name)
            place = Replicate() if dim is None else Shard(dim)
            x = distribute_tensor(param.detach(), mesh, [place])
            layer.register_parameter(name, nn.Parameter(x, requires_grad=param.requires_grad))


def train(world: World | None, chosen: Chosen) -> Any:
    run, out = Layers(chosen, world), []
    for step in range(training.STEPS + 2 * (chosen.method == "sst")):
        run.backward(step)
        if step == chosen.bad:
            run.poison(f"wide.{chosen.factors[1]}")
        run.optimizer.step()
        out.append(run.held())
    return out


def train_in_codes(world: World | None, chosen: Chosen) -> Any:
    """The same, as if these moments were large enough."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quant, "MIN_SIZE", 8)
        return train(world, chosen)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["in 8 bits", "in 4 bits"])
@pytest.mark.parametrize("how", ["rows", "columns", "tensors"])
def test_moments_in_codes(how: str, name: str, ranks: Worlds) -> None:
    """Whole on every rank, in the blocks of one process."""
    chosen = Chosen(name, how)
    expected = training.assembled([train_in_codes(None, chosen)])
    assert any(x.dtype == torch.uint8 for s in expected[-1][1].values() for x in s.values())
    values = ranks(3).run(name, train_in_codes, chosen=chosen).checked()
    training.assert_equal_runs(training.assembled(values), expected)


def switches(run: Any, chosen: Chosen) -> int:
    """How often vectors were exchanged, or drawn anew."""
    key = "refresh_step" if chosen.method == "sst" else "host.held"
    slots = [s[f"wide.{chosen.factors[0]}"][key].tolist() for _, s in run]
    return sum(a != b for a, b in itertools.pairwise(slots))


def slow(*values: Any) -> Any:
    """Parameters whose parts other cases of the default run have."""
    return pytest.param(*values, marks=pytest.mark.slow, id="-".join(map(str, values)))


def sharded(*values: Any) -> Any:
    """Parameters of layers with whole numbers under FSDP2."""
    own = models.shards_whole_numbers
    return pytest.param(*values, marks=own, id="-".join(map(str, values)))


CASES = [
    (2, Chosen("switched")),
    slow(3, Chosen("restarts")),  # which a mesh of two dimensions has, and what misses a message
    slow(2, Chosen("weights decay", "columns")),
    sharded(3, Chosen("sst")),
    sharded(2, Chosen("sst", "left out")),
    slow(3, Chosen("weights decay", "tensors")),
    slow(3, Chosen("switched", bad=3)),
    slow(2, Chosen("sst flips", "tensors", bad=3)),
    slow(2, Chosen("sst eight bits", "tensors")),
]
SQUARE = [
    Chosen("restarts", mesh="square", bad=3),
    slow(Chosen("weights decay", "tensors", mesh="square", bad=3)),
    slow(Chosen("switched", "parallel", mesh="square")),
    slow(Chosen("sst", mesh="square", bad=3)),
]
NARROW = [
    (4, Chosen("weights decay", "tensors", mesh="square", dtype=torch.bfloat16)),
    slow(3, Chosen("weights decay", dtype=torch.bfloat16)),
    slow(2, Chosen("sst", "tensors", dtype=torch.bfloat16)),
]


@pytest.mark.parametrize(("size", "chosen"), CASES, ids=str)
def test_it_is_one_process(size: int, chosen: Chosen, ranks: Worlds) -> None:
    expected = training.assembled([train(None, chosen)])
    assert switches(expected, chosen) >= 3
    values = ranks(size).run(str(chosen), train, chosen=chosen).checked()
    run = training.assembled(values)
    same = {"weights": 0, "state": 0} if chosen.dtype == torch.bfloat16 else {}
    training.assert_equal_runs(run, expected, **same)
    exact = chosen.dtype == torch.float64  # else a switch may be less than bfloat16 can tell
    moved = [
        n for n, x in run[-1][0].items()
        if bool((x != run[0][0][n]).all() if exact else (x != run[0][0][n]).any())
    ]  # fmt: skip
    moved += [n for n, x in run[0][0].items() if any(bool((w[n] != x).any()) for w, _ in run)
              and n.endswith("order")]  # fmt: skip
    also = ("u_rest", "v_rest", "order") if chosen.method == "sst" else ("weight",)
    names = {f"{name}.{x}" for name in ("wide", "tall") for x in (*chosen.factors, *also)}
    assert names <= {*moved}, names - {*moved}


@pytest.mark.parametrize("chosen", SQUARE, ids=str)
def test_on_a_mesh_of_two_dimensions(chosen: Chosen, ranks: Worlds) -> None:
    """Copies of shards, of which one has a gradient that is not finite; shards of shards; FSDP2
    over tensor parallel."""
    test_it_is_one_process(4, chosen, ranks)


@pytest.mark.parametrize(("size", "chosen"), NARROW, ids=str)
def test_bfloat16_is_one_process_to_the_bit(size: int, chosen: Chosen, ranks: Worlds) -> None:
    """W0 is rounded by noise of where an entry lies in all of it."""
    test_it_is_one_process(size, chosen, ranks)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["rows", "tensors", "parallel"])
@pytest.mark.parametrize("name", OFTEN)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_on_a_mesh_of_two_dimensions_everywhere(
    dtype: torch.dtype, name: str, how: str, ranks: Worlds
) -> None:
    test_it_is_one_process(4, Chosen(name, how, mesh="square", dtype=dtype), ranks)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["rows", "columns", "tensors"])
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("name", OFTEN)
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
    ("name", "mutation"),
    [
        ("restarts", Mutation("gather", how="one rank")),
        slow("restarts", Mutation("broadcast", how="skip")),
        slow("sst", Mutation("gather", how="one rank")),
        slow("sst", Mutation("exchange", "first", how="one rank")),
        slow("sst", Mutation("exchange", "later", how="one rank")),
        slow("sst", Mutation("broadcast", how="one rank")),
    ],
    ids=str,
)
def test_a_run_without_a_message_is_seen(name: str, mutation: Mutation) -> None:
    chosen, world = Chosen(name), Ranks(2, grace=4.0)
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


@pytest.mark.parametrize("name", [sharded("sst"), slow("restarts")])
def test_a_run_over_several_numbers_of_ranks_is_one_run(
    name: str, ranks: Worlds, tmp_path: Path
) -> None:
    chosen, source = Chosen(name), None
    expected = training.assembled([train(None, chosen)])
    for i, size in enumerate((2, 1, 3)):
        args = {"chosen": chosen, "begin": i * LEG, "source": source}
        source = str(tmp_path / str(i))
        values = ranks(size).run(f"leg {i}", leg, target=source, **args).checked()
        part = expected[i * LEG : (i + 1) * LEG]
        training.assert_equal_runs(training.assembled(values), part)


def metered(world: World, of: str) -> Any:
    """What each step sends, and which rank found new factors of which layer in it."""
    found: list[str] = []
    original = SpectralModule.refresh_

    def counted(self: SpectralModule, state: Any, grad: Tensor, ctx: Any) -> Any:
        found.append(f"{ctx.uid} {ctx.count}")
        return original(self, state, grad, ctx)

    run, out = Layers(Chosen(of), world), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SpectralModule, "refresh_", counted)
        for step in range(5):
            run.backward(step)
            with Meter() as meter:
                run.optimizer.step()
            out.append((meter.counts, meter.bytes))
    first = run.optimizer.state[run.named[f"wide.{run.chosen.factors[0]}"]]
    return out, [key for key, x in first.items() if isinstance(x, DTensor)], found


def test_alike_layers_are_gathered_together(ranks: Worlds) -> None:
    """Factors and gradients of both layers of one shape in one message; the rest is the guard."""
    for steps, split, _ in ranks(2).run("gathered", metered, of="switched").checked():
        assert not split
        numbers = [1 * cols + -(-rows // 2) * 2 for rows, cols in SHAPES.values()]
        gathered = 8 * 2 * sum(numbers)
        for counts, sizes in steps:
            assert counts == {"all_gather": 4, "all_reduce": 1}
            assert sizes == {"all_gather": gathered, "all_reduce": 16 * len(SHAPES)}


@models.shards_whole_numbers
def test_what_is_not_in_use_goes_to_one_rank_alone(ranks: Worlds) -> None:
    """Of SST a step gathers the vectors in use; a layer that is due is refreshed by one rank."""
    values = ranks(2).run("spectral", metered, of="sst seldom").checked()
    half = {x: -(-min(shape) // 2) for x, shape in SHAPES.items()}
    gathered = sum(8 * 2 * (sum(shape) + half[x]) for x, shape in SHAPES.items())
    if models.TAKES_WHOLE_NUMBERS:
        gathered += sum(-(-half[x] // 2) * 8 for x in SHAPES)
    quiet = 0
    for steps, split, _ in values:
        assert not split
        for counts, sizes in steps:
            assert counts["all_gather"] == 4 and sizes["all_gather"] == gathered
            assert counts["all_reduce"] == 1
            quiet += set(counts) == {"all_gather", "all_reduce"}
            assert counts.get("broadcast", 0) >= counts.get("all_to_all", 0) // 2
    assert quiet
    found = [x for _, _, own in values for x in own]
    assert len(found) == len({*found}) >= len(SHAPES)
    assert all(own for _, _, own in values), "one rank does it all"


def failing(world: World) -> str:
    """One rank cannot factor a layer that it owns."""
    run = Layers(Chosen("sst"), world)

    def refuses(*_: Any) -> Any:
        raise MemoryError("no memory")

    with pytest.MonkeyPatch.context() as patch:
        if world.rank == 1:
            patch.setattr(SpectralModule, "refresh_", refuses)
        try:
            for step in range(4):
                run.step(step)
        except (MemoryError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"
    return "nothing"


@pytest.mark.slow
def test_all_ranks_raise_what_an_owner_raises(ranks: Worlds) -> None:
    first, second = ranks(2).run("failing", failing).checked()
    assert first.startswith("RuntimeError: rank 1 could not refresh") and "no memory" in first
    assert second == "MemoryError: no memory"


def taken_over(world: World, of: str, way: str) -> None:
    """A whole state in place of the parts, in mid-run."""
    one, other = Layers(Chosen(of), world), Layers(Chosen(of), world)
    for step in range(LEG):
        one.step(step)
    takes_over(one, other, way, world.rank, strict=False)
    for step in range(LEG, LEG + 3):
        assert_same(other, one, f"before step {step}")
        one.step(step)
        other.step(step)
    assert_same(other, one, "at the end")


@pytest.mark.parametrize(
    ("name", "way"),
    [slow(name, way) for name in ("sst", "restarts") for way in WAYS],
)
def test_a_run_goes_on_from_a_whole_state(name: str, way: str, ranks: Worlds) -> None:
    ranks(2).run(f"{name}, {way}", taken_over, of=name, way=way).checked()


def attached(world: World, of: str, mode: Any) -> Any:
    """A run whose gradients are taken inside backward, where a layer waits for the step."""
    run, out = Layers(Chosen(of), world), []
    for given in ({"max_norm": 1.0}, {"keep_norms": True}):
        with pytest.raises(ValueError, match=r"a DTensor: .* of a layer of factors"):
            lowrank_optim.attach_in_backward(run.optimizer, "step", **given)
    lowrank_optim.attach_in_backward(run.optimizer, mode)
    for step in range(6):
        run.step(step)
        out.append(run.held())
    return out


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        sharded("sst", "step"),
        slow("sst", "project"),
        slow("switched", "step"),
        slow("switched", "project"),
    ],
)
def test_layers_wait_for_the_step(name: str, mode: str, ranks: Worlds) -> None:
    expected = training.assembled([train(None, Chosen(name))])[:6]
    values = ranks(2).run(f"{name} {mode}", attached, of=name, mode=mode).checked()
    training.assert_equal_runs(training.assembled(values), expected)


def disordered(world: World) -> str:
    """Weights in which one rank's part of an order has an index that another has too."""
    run = Layers(Chosen("sst"), world)
    state = run.model.state_dict()
    if world.rank == 1:
        state["wide.order"].to_local().fill_(0)
    try:
        run.model.load_state_dict(state)
    except RuntimeError as error:
        return str(error)
    return "nothing"


@pytest.mark.skipif(
    not models.TAKES_WHOLE_NUMBERS, reason="before torch 2.13 each rank reads an order of its own"
)
def test_an_order_that_is_none_is_refused_by_every_rank(ranks: Worlds) -> None:
    for said in ranks(2).run("disordered", disordered).checked():
        assert "order holds 0 twice" in said, said


def test_of_nothing_rows_are_split() -> None:
    """A layer whose rank is full has no vectors that are not in use: (0, n), which FSDP2 takes as
    Shard(0) alone."""
    place = shard_placement_fn(2)
    assert place(nn.Parameter(torch.empty(0, 12))) is None
    assert place(nn.Parameter(torch.empty(2, 12))) == Shard(1)
