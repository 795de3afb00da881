"""Moments in 8 bits on several ranks: the codes of one process, in blocks that no rank shares."""

from __future__ import annotations

import copy
import logging
import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import lowrank_optim
from lowrank_optim.sharding.grid import Cut
from lowrank_optim.sharding.shares import shares
from tests.sharded import test_not_finite, training
from tests.sharded.combinations import BLOCKS, EIGHT, LAYERS, WITH_BLOCKS
from tests.sharded.ranks import Ranks, World
from tests.sharded.test_full_state import whole_state
from tests.sharded.test_meshes import PLACES
from tests.sharded.test_meshes_saved import LEGS, ROUTE
from tests.sharded.test_resharding import LEG, leg
from tests.sharded.training import Case, Trained

Worlds = Callable[[int], Ranks]
SIZES = (2, 3, 4)
HOWS = ("fsdp", "fsdp columns", "tensors")
OF_A_BASIS = [name for name, case in EIGHT.items() if case.only == WITH_BLOCKS]
TURNS = [(name, SIZES[i % 3], HOWS[i // 2 % 3]) for i, name in enumerate(OF_A_BASIS)]
COVERED = (
    "galore dct", "galore sgd", "apollo", "frugal rows", "frugal columns", "ldadam memory 4bit",
)  # fmt: skip
"""The first is compared with one process in ``test_mutations.py``; codes of the others are as those
of columns, and of two moments, of GaLore, and the last's errors as those of DCT-AdamW."""
OTHERS = {
    "sst": ("two sides", "small"),
    "switchlora": ("some blocks", "two sides"),
    "adafactor": ("long", "no block"),
}
"""Of factors and of means the default run has these shapes: what is on every rank, what is filled
up, means in 8 bits, and what is in float32."""


def check(ranks: Worlds, size: int, name: str, case: Case) -> None:
    """Codes to the bit, whatever the basis: float32 has no room for a difference of 1e-16."""
    expected = training.reference(case.reference)
    training.assert_worth_comparing(case.reference, expected)
    values = ranks(size).run(name, training.train, case=case).checked()
    run = training.assembled(values)
    training.assert_equal_runs(run, expected, case.near)
    training.assert_all_moved(case.reference, run)


@pytest.mark.parametrize(
    ("name", "size", "how"), [turn for turn in TURNS[::2] if turn[0] not in COVERED]
)
def test_it_is_one_process(name: str, size: int, how: str, ranks: Worlds) -> None:
    check(ranks, size, name, replace(EIGHT[name], how=how))


@pytest.mark.parametrize("name", OTHERS)
def test_factors_and_means_are_those_of_one_process(name: str, ranks: Worlds) -> None:
    check(ranks, 3, name, replace(EIGHT[name], only=OTHERS[name], steps=5))


@pytest.mark.slow
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", EIGHT)
def test_it_is_one_process_everywhere(name: str, size: int, how: str, ranks: Worlds) -> None:
    only = (*EIGHT[name].only, "four blocks")
    steps = training.LONG if name in OF_A_BASIS else 8
    check(ranks, size, name, replace(EIGHT[name], how=how, only=only, steps=steps))


@pytest.mark.slow
@pytest.mark.parametrize("how", HOWS[::2])
@pytest.mark.parametrize("name", ["adafactor", "adafactor means"])
def test_means_of_experts(name: str, how: str, ranks: Worlds) -> None:
    """Of all experts together, each with a last block that is not full."""
    check(ranks, 3, name, replace(EIGHT[name], how=how, only=("more experts",)))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in EIGHT if name not in OF_A_BASIS])
def test_cases_of_factors_and_means_are_well_posed(name: str) -> None:
    """Gradients rounded otherwise change no code, so that one that differs is a difference."""
    for how in HOWS[::2]:
        case = replace(EIGHT[name], how=how).reference
        training.assert_equal_runs(training.jittered(case), training.reference(case), case.near)


@pytest.mark.parametrize(
    "name",
    ["frugal block", *(pytest.param(name, marks=pytest.mark.slow) for name in LAYERS)],
)
def test_blocks_of_rows_are_one_process(name: str, ranks: Worlds) -> None:
    check(ranks, 3, name, replace(LAYERS.get(name, BLOCKS), steps=6))


@pytest.mark.parametrize("on_refresh", [pytest.param("keep", marks=pytest.mark.slow), "project"])
def test_coordinates_of_two_sides_are_on_every_rank(on_refresh: str, ranks: Worlds) -> None:
    options = {"projector": "random", "proj_type": "full", "rank": 66, "on_refresh": on_refresh}
    case = Case("GaLoreAdamW8bit", options, "tensors", ("two sides",), steps=5)
    assert any(
        x.dtype == torch.uint8 for s in training.reference(case)[0][1].values() for x in s.values()
    )
    check(ranks, 3, on_refresh, case)


DENSE: dict[str, tuple[tuple[int, ...], int, bool]] = {
    "rows": ((37, 260), 0, True),
    "experts": ((3, 24, 520), 0, True),
    "rows of experts": ((3, 24, 520), 1, True),
    "vector": ((5000,), 0, False),
    "narrow": ((60, 240), 0, False),
    "columns": ((16, 1024), 1, False),
    "few": ((4, 260), 0, False),
}
"""Shape, the dimension that is split, and whether moments are in 8 bits as in one process."""


def dense(
    world: World | None, dtypes: dict[str, str], cls: str = "GaLoreAdamW", **options: Any
) -> dict[str, Any]:
    """Dense weights after some steps, and what the optimizer says of them."""
    params = []
    for name, (shape, dim, _) in DENSE.items():
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        if world is not None:
            x = distribute_tensor(x, init_device_mesh("cpu", (world.size,)), [Shard(dim)])
        params.append((f"{name.replace(' ', '_')}.weight", nn.Parameter(x)))
    groups: Any = [
        {"params": [param], "rank": None, "state_dtype": dtypes[name]}
        for param, name in zip(params, DENSE, strict=True)
    ]
    optimizer = getattr(lowrank_optim, cls)(groups, lr=1e-2, **options)
    before = str(optimizer.summary())
    for step in range(4):
        for _, param in params:
            draw = torch.Generator().manual_seed(50 + step)
            grad = torch.randn(param.shape, generator=draw, dtype=torch.float64)
            mesh = None if world is None else param.device_mesh
            param.grad = grad if mesh is None else distribute_tensor(grad, mesh, param.placements)
        optimizer.step()
    assert optimizer.summary().state_bytes == sum(
        (x.to_local() if hasattr(x, "to_local") else x).nbytes
        for state in optimizer.state.values()
        for x in state.values()
    )
    assert before == str(optimizer.summary()), "what is said before a step is what comes"
    found = {name: whole(param) for name, (_, param) in zip(DENSE, params, strict=True)}
    states = [optimizer.state[param] for _, param in params]
    kinds = {n: str(s["exp_avg"].dtype) for n, s in zip(DENSE, states, strict=True)}
    return {"weights": found, "kinds": kinds, "said": before}


def whole(x: Any) -> torch.Tensor:
    found: torch.Tensor = (x.full_tensor() if hasattr(x, "full_tensor") else x).detach()
    return found


@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_dense_weights(size: int, ranks: Worlds) -> None:
    """To the bit: of one process in 8 bits, or in float32 where ranks would share a block."""
    eight = dense(None, dict.fromkeys(DENSE, "8bit"))
    same = {name: "8bit" if in_8bit else "float32" for name, (_, _, in_8bit) in DENSE.items()}
    expected = dense(None, same)
    for own in ranks(size).run("dense", dense, dtypes=dict.fromkeys(DENSE, "8bit")).checked():
        for name, (shape, _, in_8bit) in DENSE.items():
            assert torch.equal(own["weights"][name], expected["weights"][name]), name
            assert own["kinds"][name] == ("torch.uint8" if in_8bit else "torch.float64"), name
            wide = not in_8bit and math.prod(shape) >= 4096
            assert (name in own["said"]) == wide, own["said"]
            assert torch.equal(eight["weights"][name], expected["weights"][name]) != wide, name


@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_dense_means(size: int, ranks: Worlds) -> None:
    """Adafactor: the first moment as that of AdamW, within rounding, and means in float32."""
    args = {"cls": "GaLoreAdafactor", "beta1": 0.9}
    same = {name: "8bit" if in_8bit else "float32" for name, (_, _, in_8bit) in DENSE.items()}
    expected = dense(None, same, **args)
    asked = dict.fromkeys(DENSE, "8bit")
    for own in ranks(size).run("dense means", dense, dtypes=asked, **args).checked():
        for name, (_, _, in_8bit) in DENSE.items():
            gap = float((own["weights"][name] - expected["weights"][name]).abs().max())
            assert gap < 1e-10, f"{name}: {gap:.1e}"
            assert own["kinds"][name] == ("torch.uint8" if in_8bit else "torch.float64"), name


TALL: dict[str, tuple[int, ...]] = {"head": (4200, 260), "wide head": (260, 4200)}
"""Whose means of rows, or of columns, one process has in 8 bits."""


def means_of(world: World) -> Any:
    """Which entries of dense Adafactor are codes, and whether the weight is named."""
    mesh = init_device_mesh("cpu", (world.size,))
    found = {}
    for name, shape in TALL.items():
        for dim in (0, 1):
            x = torch.ones(shape, dtype=torch.float64)
            param = nn.Parameter(distribute_tensor(x, mesh, [Shard(dim)]))
            groups: Any = [{"params": [("weight", param)], "rank": None}]
            optimizer = lowrank_optim.GaLoreAdafactor(groups, beta1=0.9, state_dtype="8bit")
            optimizer._make_state()
            state = optimizer.state[param]
            codes = sorted(key for key, x in state.items() if x.dtype == torch.uint8)
            found[name, dim] = codes, "weight" in str(optimizer.summary())
    return found


def test_dense_means_are_in_float32_on_any_number_of_ranks(ranks: Worlds) -> None:
    """A split of rows cuts their means anywhere; what is not as in one process is named."""
    for own in ranks(2).run("means of", means_of).checked():
        assert own == {(name, dim): ([], True) if dim else (["exp_avg"], True)
                       for name in TALL for dim in (0, 1)}  # fmt: skip


TWO = {
    "galore": ("some blocks", "a few more", "no block", "small"),
    "dct memory": ("some blocks", "a few more"),
    "frugal block": ("some blocks", "table", "no block"),
    "sst": ("two sides", "small"),
    "switchlora": ("some blocks", "two sides", "small"),
    "adafactor": ("long", "a few more"),
}
"""Shapes; of blocks that take turns one that is kept in 8 bits by one process alone."""
CUT = 5
"""Steps before it: the turn of the second of those blocks."""
WAYS = ("rank 0 tells", "every rank has it", "load_state_dict")


def case_of(name: str) -> Case:
    return replace(EIGHT.get(name, BLOCKS), only=TWO[name], steps=7)


def from_one(world: World, case: Case, way: str) -> Any:
    """One process's state in shards, in one process again, and both a few steps later."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    one, shards, again = Trained(case), Trained(case, world), Trained(case)
    for step in range(CUT):
        one.step(step)
    for name, param in shards.named.items():
        own = one.named[name].detach()
        param.to_local().detach().copy_(
            distribute_tensor(own, param.device_mesh, param.placements).to_local()
        )
        again.named[name].detach().copy_(own)
    saved = one.optimizer.state_dict()
    full = StateDictOptions(full_state_dict=True)
    if way == "load_state_dict":
        shards.optimizer.load_state_dict(copy.deepcopy(saved))
    else:
        state = get_optimizer_state_dict(one.model, one.optimizer, options=full)
        told = replace(full, broadcast_from_rank0=way == WAYS[0])
        state = copy.deepcopy(state) if way != WAYS[0] or world.rank == 0 else {}
        set_optimizer_state_dict(shards.model, shards.optimizer, state, options=told)
    read = shards.held()
    if way == "load_state_dict":
        again.optimizer.load_state_dict(whole_state(shards))
    else:
        state = get_optimizer_state_dict(shards.model, shards.optimizer, options=full)
        set_optimizer_state_dict(again.model, again.optimizer, state, options=full)
    back = again.held()
    for step in range(CUT, case.steps):
        shards.step(step)
    return one.held(), read, back, shards.held()


@pytest.mark.parametrize(
    ("name", "way"),
    [("galore", WAYS[2]), ("frugal block", WAYS[0])],
)
def test_from_one_process_into_shards_and_back(name: str, way: str, ranks: Worlds) -> None:
    check_one(ranks, 3, name, way)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("name", TWO)
def test_from_one_process_into_shards_and_back_everywhere(
    name: str, size: int, way: str, ranks: Worlds
) -> None:
    check_one(ranks, size, name, way)


def check_one(ranks: Worlds, size: int, name: str, way: str, case: Case | None = None) -> None:
    """The same bits, but where a moment was decoded: encoded again it is a code away at most."""
    case = case or case_of(name)
    values = ranks(size).run(f"{name}, {way}", from_one, case=case, way=way).checked()
    one, read, back, later = (training.assembled([[v[i]] for v in values])[0] for i in range(4))
    expected = training.reference(case)
    narrow = {
        key
        for was, is_ in ((one, read), (expected[-1], later))
        for key, state in was[1].items()
        for k, x in state.items()
        if x.dtype == torch.uint8 and is_[1][key][k].dtype != torch.uint8
    }
    for was, is_ in ((one, read), (one, back), (expected[-1], later)):
        exact = is_ is not later
        for key, state in was[1].items():
            if key in narrow:
                continue
            for k, x in state.items():
                y = training.out_of_blocks(is_[1][key][k], x.shape)
                same = torch.equal(x, y) if exact else torch.allclose(x, y, rtol=0, atol=1e-7)
                assert same, f"{k} of {key}"
    decoded = [s for key, s in one[1].items() if key in narrow and "exp_avg" in s]
    assert bool(decoded) == (name == "frugal block"), "not the turn of what is decoded"
    for key, state in one[1].items():
        if key in narrow and "exp_avg" in state:
            for k in ("exp_avg", "exp_avg_sq"):
                codes, again = state[k].int(), back[1][key][k].int()
                assert int((codes - again).abs().max()) <= 1, k
                torch.testing.assert_close(state[f"{k}_scale"], back[1][key][f"{k}_scale"])


MESHES: dict[str, dict[str, Any]] = {
    "copies": {"how": "fsdp"},
    "parallel": {"how": "parallel"},
    "parallel placed": {"how": "parallel placed"},
    "tensors": {"how": "tensors", "places": PLACES, "only": ("some blocks",)},
    "blocks that divide": {"how": "parallel columns", "only": ("four blocks", "no block")},
    "experts": {"how": "tensors", "places": ("1r", "21", "r2"), "only": ("experts blocks",)},
    "whole experts": {"how": "tensors", "places": ("0r", "rr"), "only": ("experts blocks",)},
}


@pytest.mark.parametrize(("name", "how"), [("galore", "parallel")])
def test_on_a_mesh_of_two_dimensions(name: str, how: str, ranks: Worlds) -> None:
    check(ranks, 4, f"{name} {how}", replace(EIGHT[name], mesh="square", **MESHES[how]))


NOT_POSED = [("galore larger side", "experts"), ("galore larger side", "whole experts")]
"""A rank of 30 in matrices with 24 rows."""
REFUSED = [("galore columns", "whole experts"), ("frugal columns", "whole experts")]
"""Coordinates of 24 columns."""
ON_MESHES = [
    (name, how) for name in EIGHT for how in MESHES if (name, how) not in NOT_POSED + REFUSED
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "how"), ON_MESHES)
def test_on_a_mesh_of_two_dimensions_everywhere(name: str, how: str, ranks: Worlds) -> None:
    check(ranks, 4, f"{name} {how}", replace(EIGHT[name], mesh="square", **MESHES[how]))


@pytest.mark.slow
def test_from_mesh_to_mesh(ranks: Worlds, tmp_path: Path) -> None:
    check_route(ranks, "galore", ("2 x 2 copies", "2", "2 x 2 parallel"), tmp_path, False)


@pytest.mark.slow
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(
    "name", ["galore", "dct memory", "frugal rows", "sst", "switchlora restarts", "adafactor"]
)
def test_from_mesh_to_mesh_everywhere(name: str, flat: bool, ranks: Worlds, tmp_path: Path) -> None:
    check_route(ranks, name, ROUTE, tmp_path, flat)


def check_route(
    ranks: Worlds,
    name: str,
    route: tuple[str, ...],
    folder: Path,
    flat: bool,
    case: Case | None = None,
) -> None:
    case = replace(case or EIGHT[name], steps=LEG * len(route))
    expected, source = training.reference(case.reference), None
    for i, key in enumerate(route):
        (size, how, mesh), target = LEGS[key], str(folder / str(i))
        args = {"begin": i * LEG, "source": source, "target": target, "flat": flat}
        own = replace(case, how=how, mesh=mesh)
        job = ranks(size).run(f"leg {i}", leg, case=own, plain=False, **args)
        run = training.assembled(job.checked())
        training.assert_equal_runs(run, expected[i * LEG : (i + 1) * LEG], case.near)
        source = target


def undone(world: World, case: Case) -> bool:
    """Whether a step that raises leaves all as it was, blocks and what fills them up."""
    trained = Trained(case, world)
    for step in range(3):
        trained.step(step)
    before = trained.held()
    trained.backward(3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lowrank_optim.engine.sharded.phases.push", raises)
        with pytest.raises(RuntimeError, match="on purpose"):
            trained.optimizer.step()
    after = trained.held()
    pairs = [(before[0], after[0]), *((x, after[1][name]) for name, x in before[1].items())]
    # a switch writes into the pool what nobody reads while its vector is in use
    kept = [(x, b[key]) for a, b in pairs for key, x in a.items() if "pool_" not in key]
    return all(torch.equal(x[0], y[0]) for x, y in kept)


def raises(*_: Any) -> None:
    raise RuntimeError("on purpose")


UNDONE = {
    "dct memory": ("some blocks", "no block"),
    "ldadam": ("some blocks", "no block"),
    "sst": ("some blocks", "two sides"),
    "switchlora": ("some blocks", "two sides"),
    "adafactor": ("long", "no block"),
}


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=pytest.mark.slow if n else ()) for n, x in enumerate(UNDONE)]
)
def test_a_step_that_raises_is_undone(name: str, ranks: Worlds) -> None:
    case = replace(EIGHT[name], only=UNDONE[name])
    assert all(ranks(3).run("undone", undone, case=case).checked())


BAD = "blocks.0.some_blocks.weight"


@pytest.mark.parametrize("when", ["in mid-run", "where bases are due"])
@pytest.mark.parametrize(
    "name", ["galore", "sst", "switchlora", "switchlora restarts", "adafactor"]
)
@pytest.mark.slow
def test_a_gradient_that_is_not_finite_leaves_codes(name: str, when: str, ranks: Worlds) -> None:
    """All of them on all ranks, and those that fill up blocks; the run is that of one process."""
    case = replace(EIGHT[name], only=("some blocks", "no block", "two sides"))
    test_not_finite.check(ranks, 3, case, BAD, when, float("nan"))


def cut(world: World, case: Case, by: int) -> Any:
    """A run in which the columns that a rank steps end so many before the edge of a block."""
    interval = Cut.interval

    def moved(self: Cut, size: int, at: Any, unit: int = 1) -> tuple[int, int]:
        start, stop = interval(self, size, at, unit)
        if unit == 1 or start == stop:
            return start, stop
        return start - by * (start > 0), stop - by * (stop < size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Cut, "interval", moved)
        shares.cache_clear()
        try:
            return training.train(world, case)
        finally:
            shares.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sst", "switchlora", "adafactor"])
def test_blocks_that_are_cut_elsewhere_are_seen(name: str, ranks: Worlds) -> None:
    """By nothing it is one process; by a column codes are not those of one."""
    case = replace(EIGHT[name], only=("some blocks",), steps=4)
    expected = training.reference(case.reference)
    run = training.assembled(ranks(3).run("cut by 0", cut, case=case, by=0).checked())
    training.assert_equal_runs(run, expected, case.near)
    outcome = ranks(3).run("cut by 1", cut, case=case, by=1)
    differ = set()
    for (_, states), (_, one) in zip(training.assembled(outcome.checked()), expected, strict=True):
        for name, state in one.items():
            for key, x in state.items():
                own = states[name][key]
                if own.dtype == torch.uint8 and own.shape != x.shape:  # in blocks
                    own = own.flatten(-2)[..., : x.shape[-1]]
                    differ.add(torch.equal(own, x))
    assert differ == {False}


FLOAT32 = {
    "galore lion": ("some blocks", "a few more"),
    "switchlora": ("some blocks", "two sides"),
    "sst": ("some blocks", "two sides"),
    "adafactor": ("some blocks", "long"),
}


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=pytest.mark.slow if n else ()) for n, x in enumerate(FLOAT32)]
)
def test_in_float32_a_code_is_one_away_at_most(name: str, ranks: Worlds) -> None:
    """After a step: products over other columns round otherwise, and few codes are at an edge."""
    case = replace(EIGHT[name], steps=1, dtype=torch.float32, how="tensors", only=FLOAT32[name])
    values = ranks(3).run("float32", training.train, case=case).checked()
    ((_, states),) = training.assembled(values)
    ((_, expected),) = training.reference(case)
    compared = set()
    for param, state in expected.items():
        for key in [key for key, x in state.items() if x.dtype == torch.uint8]:
            codes = training.out_of_blocks(states[param][key], state[key].shape).int()
            away = (codes - state[key].int()).abs()
            assert int(away.max()) <= 1 and float(away.float().mean()) < 1e-3, (param, key)
            scales = states[param][f"{key}_scale"].flatten()
            torch.testing.assert_close(scales, state[f"{key}_scale"], rtol=1e-5, atol=0)
            compared.add(key)
    assert compared
