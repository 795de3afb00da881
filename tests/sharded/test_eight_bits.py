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
from tests.sharded import training
from tests.sharded.combinations import BLOCKS, EIGHT, WITH_BLOCKS
from tests.sharded.ranks import Ranks, World
from tests.sharded.test_full_state import whole_state
from tests.sharded.test_meshes import PLACES
from tests.sharded.test_meshes_saved import LEGS, ROUTE
from tests.sharded.test_resharding import LEG, leg
from tests.sharded.training import Case, Trained

Worlds = Callable[[int], Ranks]
SIZES = (2, 3, 4)
HOWS = ("fsdp", "fsdp columns", "tensors")
TURNS = [(name, SIZES[i % 3], HOWS[i // 2 % 3]) for i, name in enumerate(EIGHT)]


def check(ranks: Worlds, size: int, name: str, case: Case) -> None:
    """Codes to the bit, whatever the basis: float32 has no room for a difference of 1e-16."""
    expected = training.reference(case.reference)
    training.assert_worth_comparing(case.reference, expected)
    values = ranks(size).run(name, training.train, case=case).checked()
    run = training.assembled(values)
    training.assert_equal_runs(run, expected)
    training.assert_all_moved(case.reference, run)


@pytest.mark.parametrize(("name", "size", "how"), TURNS[::2])
def test_it_is_one_process(name: str, size: int, how: str, ranks: Worlds) -> None:
    check(ranks, size, name, replace(EIGHT[name], how=how))


@pytest.mark.slow
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", EIGHT)
def test_it_is_one_process_everywhere(name: str, size: int, how: str, ranks: Worlds) -> None:
    only = (*WITH_BLOCKS, "four blocks")
    check(ranks, size, name, replace(EIGHT[name], how=how, only=only, steps=training.LONG))


@pytest.mark.parametrize("size", [3])
def test_blocks_of_rows_are_one_process(size: int, ranks: Worlds) -> None:
    check(ranks, size, "frugal block", replace(BLOCKS, steps=6))


@pytest.mark.parametrize("on_refresh", ["keep", "project"])
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


def dense(world: World | None, dtypes: dict[str, str]) -> dict[str, Any]:
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
    optimizer = lowrank_optim.GaLoreAdamW(groups, lr=1e-2)
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


@pytest.mark.parametrize("size", [2, 3])
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


TWO = {
    "galore": ("some blocks", "a few more", "no block", "small"),
    "dct memory": ("some blocks", "a few more"),
    "frugal block": ("some blocks", "table", "no block"),
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
    ("name", "way"), [("galore", way) for way in WAYS] + [("frugal block", WAYS[0])]
)
def test_from_one_process_into_shards_and_back(name: str, way: str, ranks: Worlds) -> None:
    check_one(ranks, 3, name, way)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", TWO)
def test_from_one_process_into_shards_and_back_everywhere(
    name: str, size: int, way: str, ranks: Worlds
) -> None:
    check_one(ranks, size, name, way)


def check_one(ranks: Worlds, size: int, name: str, way: str) -> None:
    """The same bits, but where a moment was decoded: encoded again it is a code away at most."""
    case = case_of(name)
    values = ranks(size).run(f"{name}, {way}", from_one, case=case, way=way).checked()
    one, read, back, later = (training.assembled([[v[i]] for v in values])[0] for i in range(4))
    expected = training.reference(case)
    narrow = "no_block" if name == "frugal block" else "nothing"
    for was, is_ in ((one, read), (one, back), (expected[-1], later)):
        exact = is_ is not later
        for key, state in was[1].items():
            if narrow in key:
                continue
            for k, x in state.items():
                y = training.out_of_blocks(is_[1][key][k], x.shape)
                same = torch.equal(x, y) if exact else torch.allclose(x, y, rtol=0, atol=1e-7)
                assert same, f"{k} of {key}"
    decoded = [s for key, s in one[1].items() if narrow in key and "exp_avg" in s]
    assert bool(decoded) == (name == "frugal block"), "not the turn of what is decoded"
    for key, state in one[1].items():
        if narrow in key:
            assert read[1][key]["exp_avg"].dtype != torch.uint8, "ranks share its blocks"
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


@pytest.mark.parametrize(("name", "how"), [("galore", "parallel"), ("dct", "experts")])
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
@pytest.mark.parametrize("name", ["galore", "dct memory", "frugal rows"])
def test_from_mesh_to_mesh_everywhere(name: str, flat: bool, ranks: Worlds, tmp_path: Path) -> None:
    check_route(ranks, name, ROUTE, tmp_path, flat)


def check_route(ranks: Worlds, name: str, route: tuple[str, ...], folder: Path, flat: bool) -> None:
    case = replace(EIGHT[name], steps=LEG * len(route))
    expected, source = training.reference(case.reference), None
    for i, key in enumerate(route):
        (size, how, mesh), target = LEGS[key], str(folder / str(i))
        args = {"begin": i * LEG, "source": source, "target": target, "flat": flat}
        own = replace(case, how=how, mesh=mesh)
        job = ranks(size).run(f"leg {i}", leg, case=own, plain=False, **args)
        run = training.assembled(job.checked())
        training.assert_equal_runs(run, expected[i * LEG : (i + 1) * LEG])
        source = target


def undone(world: World, case: Case) -> bool:
    """Whether a step that raises leaves all as it was, blocks and what fills them up."""
    trained = Trained(case, world)
    for step in range(3):
        trained.step(step)
    before = trained.held()
    trained.backward(3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lowrank_optim.engine.sharded.step.push", raises)
        with pytest.raises(RuntimeError, match="on purpose"):
            trained.optimizer.step()
    after = trained.held()
    pairs = [(before[0], after[0]), *((x, after[1][name]) for name, x in before[1].items())]
    return all(torch.equal(x[0], b[key][0]) for a, b in pairs for key, x in a.items())


def raises(*_: Any) -> None:
    raise RuntimeError("on purpose")


def test_a_step_that_raises_is_undone(ranks: Worlds) -> None:
    case = replace(EIGHT["dct memory"], only=("some blocks", "no block"))
    assert all(ranks(3).run("undone", undone, case=case).checked())


def test_in_float32_a_code_is_one_away_at_most(ranks: Worlds) -> None:
    """After a step: products over other columns round otherwise, and few codes are at an edge."""
    case = replace(EIGHT["galore lion"], steps=1, dtype=torch.float32, how="tensors")
    case = replace(case, only=("some blocks", "a few more"))
    values = ranks(3).run("float32", training.train, case=case).checked()
    ((_, states),) = training.assembled(values)
    ((_, expected),) = training.reference(case)
    for name, state in expected.items():
        shape = state["low.exp_avg"].shape
        codes = training.out_of_blocks(states[name]["low.exp_avg"], shape).int()
        away = (codes - state["low.exp_avg"].int()).abs()
        assert int(away.max()) <= 1 and float(away.float().mean()) < 1e-3, name
        scales = states[name]["low.exp_avg_scale"].flatten()
        torch.testing.assert_close(scales, state["low.exp_avg_scale"], rtol=1e-5, atol=0)
