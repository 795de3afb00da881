"""bfloat16 that is rounded stochastically: a sharded run is that of one process, to the bit."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from lowrank_optim import GaLoreAdamW, ops
from lowrank_optim.sharding.regions import noise_of
from tests.sharded import training
from tests.sharded.ranks import Ranks, World
from tests.sharded.training import Case, here

Worlds = Callable[[int], Ranks]

ROUNDED: dict[str, Any] = {"stochastic_rounding": True, "lr": 1e-2}
NARROW: dict[str, Any] = {**ROUNDED, "state_dtype": "bfloat16"}
COLUMNS: dict[str, Any] = {"projector": "columns", "rank": 0.5, "on_refresh": "project"}
ROWS: dict[str, Any] = {"projector": "rows", "density": 0.4, "on_refresh": "reset"}

ELEMENTWISE: dict[str, tuple[str, dict[str, Any]]] = {
    "dense adamw": ("GaLoreAdamW", {**NARROW, "rank": None}),
    "dense lion": ("GaLoreLion", {**NARROW, "rank": None, "maximize": True}),
    "dense sgd": ("GaLoreSGD", {**ROUNDED, "rank": None, "momentum": 0.0}),
    "galore columns": ("GaLoreAdamW", {**NARROW, **COLUMNS}),
    "galore lion columns": ("GaLoreLion", {**NARROW, **COLUMNS, "maximize": True}),
    "galore float32 moments": ("GaLoreAdamW", {**ROUNDED, **COLUMNS}),
    "frugal sign": ("FrugalAdamW", {**NARROW, **ROWS, "free_rule": "sign"}),
    "frugal sgd": ("FrugalSGD", {**ROUNDED, **ROWS, "momentum": 0.9, "free_rule": "sgd"}),
    "frugal blocks": ("FrugalAdamW", {**NARROW, "density": 0.5}),
}
"""Methods in which an entry's arithmetic depends on no other entry."""
HOWS = ("fsdp", "fsdp columns", "tensors")
TURNS = [(name, (2, 3)[i % 2], HOWS[(i + i // 3) % 3]) for i, name in enumerate(ELEMENTWISE)]


def check(
    ranks: Worlds, size: int, name: str, how: str, only: tuple[str, ...], steps: int = 6
) -> None:
    cls, options = ELEMENTWISE[name]
    case = Case(cls, options, how, only, dtype=torch.bfloat16, steps=steps, drawn=True)
    expected = training.reference(case.reference)
    nearest = {**options, "stochastic_rounding": False}
    other = training.reference(Case(cls, nearest, case.reference.how, only, steps=steps,
                                    dtype=torch.bfloat16, drawn=True))  # fmt: skip
    assert any(not torch.equal(x, other[-1][0][key]) for key, x in expected[-1][0].items())
    for key, x in training.start(case).items():
        assert float((expected[-1][0][key] != x).double().mean()) > 0.5, f"{key} stood still"
    values = ranks(size).run(f"{name} {how}", training.train, case=case).checked()
    training.assert_equal_runs(training.assembled(values), expected, weights=0, state=0)


COVERED = (
    "dense adamw", "dense lion", "galore lion columns", "galore float32 moments", "frugal sign",
)  # fmt: skip
"""Lion's rule has no noise of its own, wide moments have none, and rows are those of SGD."""


@pytest.mark.parametrize(("name", "size", "how"), [x for x in TURNS if x[0] not in COVERED])
def test_it_is_one_process_to_the_bit(name: str, size: int, how: str, ranks: Worlds) -> None:
    """Uneven and empty shards among them, of rows, of columns, of experts; replicas too."""
    check(ranks, size, name, how, ("wide", "tall", "few", "experts"))


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_it_is_one_process_to_the_bit_everywhere(
    name: str, how: str, size: int, ranks: Worlds
) -> None:
    check(ranks, size, name, how, (), training.LONG)


PRODUCTS: dict[str, tuple[str, dict[str, Any]]] = {
    "svd": ("GaLoreAdamW", {"projector": "svd", "rank": 3}),
    "dct": ("GaLoreAdamW", {"projector": "dct", "rank": 3}),
    "fira": ("FiraAdamW", {"projector": "rsvd", "rank": 3}),
    "dct adamw": ("DCTAdamW", {"rank": 3, "update_proj_gap": 3}),
}


SPLIT = ("fsdp", "tensors", "tensors", "fsdp columns")


@pytest.mark.parametrize(
    ("name", "how"),
    [
        pytest.param(*x, marks=pytest.mark.slow if x[0] == "fira" else ())
        for x in zip(PRODUCTS, SPLIT, strict=True)
    ],
)
def test_products_are_near(name: str, how: str, ranks: Worlds) -> None:
    """A product of other shapes differs in its last bits, and then a number goes the other way.

    Weights are within a tenth of the way that they went, and nearly all are the same bits: noise
    that depends on the number of ranks leaves a third of them.
    """
    cls, options = PRODUCTS[name]
    options = {**options, **ROUNDED, "eps": 1e-3}
    only = ("wide", "tall", "large")
    case = Case(cls, options, how, only, dtype=torch.bfloat16, steps=4, drawn=True)
    expected = training.reference(case.reference)[-1][0]
    values = ranks(3).run(f"{name} {how}", training.train, case=case).checked()
    actual, begun = training.assembled(values)[-1][0], training.start(case)
    same = torch.cat([(actual[key] == x).flatten() for key, x in expected.items()])
    assert float(same.double().mean()) > 0.8
    for key, x in expected.items():
        gone = float((x - begun[key]).float().norm())
        assert float((actual[key] - x).float().norm()) < 0.1 * gone, key


def twins(world: World) -> Any:
    """Equal shards of equal gradients, whose updates lie between two numbers."""
    warnings.simplefilter("ignore")
    mesh = init_device_mesh("cpu", (world.size,))
    start = torch.ones(128, 64, dtype=torch.bfloat16)
    param = nn.Parameter(here(start, mesh, [Shard(0)]))
    group: Any = {"params": [("weight", param)], "rank": None}
    optimizer = GaLoreAdamW([group], lr=2**-9, stochastic_rounding=True, weight_decay=0.0)
    param.grad = here(torch.ones_like(start), mesh, [Shard(0)])
    optimizer.step()  # the step of Adam's first is lr: half of what is between 1 and the next below
    return param.detach().to_local() < 1


def test_equal_shards_draw_different_noise_without_bias(ranks: Worlds) -> None:
    first, second = (x.double() for x in ranks(2).run("twins", twins).checked())
    for x in (first, second, (first == second).double()):
        assert abs(float(x.mean()) - 0.5) < 5 * (0.25 / x.numel()) ** 0.5


PLACES: list[tuple[tuple[int, ...], list[Any]]] = [
    ((7, 5, 3), [Shard(0), Shard(1)]),
    ((7, 5, 3), [Shard(1), Shard(2)]),
    ((9, 4), [Shard(0), Shard(0)]),
    ((2, 9), [Replicate(), Shard(1)]),
    ((2, 9), [Shard(0), Replicate()]),
    ((8, 6), [_StridedShard(0, split_factor=2), Shard(0)]),
]


def numbered(world: World) -> Any:
    """Positions that are said to be here, beside those of a DTensor that holds its own."""
    mesh = init_device_mesh("cpu", (world.size // 2, 2))
    found = []
    for shape, places in PLACES:
        index = torch.arange(torch.Size(shape).numel()).view(shape)
        if isinstance(places[0], _StridedShard):  # as FSDP over tensor parallelism makes it
            inner = distribute_tensor(index, mesh, [Replicate(), Shard(0)])
            rows = inner.to_local().chunk(world.size // 2)[mesh.get_local_rank(0)]
            x: Any = DTensor.from_local(rows, mesh, places, run_check=False, shape=index.shape,
                                        stride=index.stride())  # fmt: skip
        else:
            x = distribute_tensor(index, mesh, places)
        own, noise = x.to_local(), noise_of(x, 0)
        said = torch.full_like(own, noise.start)
        for d, stride in enumerate(noise.strides):
            steps = stride * torch.arange(own.shape[d])
            said += steps.view(-1, *[1] * (own.dim() - d - 1))
        found.append((places, bool(own.numel()), torch.equal(said, own)))
        assert ops.stochastic_round(own.float(), noise).shape == own.shape
    return found


def test_positions_on_a_mesh_of_two_dimensions(ranks: Worlds) -> None:
    for found in ranks(4).run("numbered", numbered).checked():
        for places, some, same in found:
            assert same or not some, places
