"""Meshes of two dimensions: copies of shards, tensor parallel, both. One process is the measure."""

from __future__ import annotations

import importlib
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from lowrank_optim.engine.sharded import finding
from lowrank_optim.engine.sharded import step as sharded_step
from lowrank_optim.engine.sharded.guard import agreed
from lowrank_optim.stores.floating import FloatStore
from lowrank_optim.subspaces.fixed import FixedBasis
from tests.sharded import training
from tests.sharded.combinations import NAMED, SHORT
from tests.sharded.meter import assert_collectives
from tests.sharded.mutations import SEAM, Mutation, mutated
from tests.sharded.ranks import Ranks, World
from tests.sharded.test_collectives import (
    BASIS,
    DUE,
    FINE,
    GUARD,
    ITEM,
    OWNER,
    SCORES,
    TURNED,
    TWO_SCALARS,
    M,
    N,
    R,
    Table,
    measured,
    metered,
    plus,
)
from tests.sharded.training import Case, Trained

Worlds = Callable[[int], Ranks]

PLACES = ("r0", "r1", "0r", "00", "01", "10", "11", "a0", "b1", "rr")
"""Of plain DTensors: copies of shards, shards of shards, and FSDP2 over tensor parallel."""
FLAT = ("wide", "tall", "few", "large")
HOWS: dict[str, dict[str, Any]] = {
    "copies": {"how": "fsdp", "only": SHORT},
    "copies of columns": {"how": "fsdp columns", "only": SHORT},
    "parallel": {"how": "parallel", "only": FLAT},
    "parallel columns": {"how": "parallel columns", "only": FLAT},
    "parallel placed": {"how": "parallel placed", "only": FLAT},
    "tensors": {"how": "tensors", "only": ("wide", "tall"), "places": PLACES},
    "other tensors": {"how": "tensors", "only": ("few", "conv", "experts"), "places": PLACES},
}


def on_square(name: str, how: str, **of: Any) -> Case:
    own = Case("torch.AdamW", {"foreach": False}) if name == "torch" else NAMED[name]
    if "active_layers" in own.options and HOWS[how]["how"] == "tensors":
        # of two layers and of three: where all are active none takes a turn
        own = replace(own, options={**own.options, "active_layers": 1})
    return replace(own, mesh="square", **{**HOWS[how], **of})


def check(ranks: Worlds, name: str, case: Case) -> None:
    expected = training.reference(case.reference)
    if not case.cls.startswith("torch.") and case.options.get("rank", 0) is not None:
        training.assert_worth_comparing(case.reference, expected)
    values = ranks(4).run(name, training.train, case=case).checked()
    run = training.assembled(values)
    training.assert_equal_runs(run, expected)
    training.assert_all_moved(case.reference, run)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        pytest.param("rsvd", "copies", marks=pytest.mark.slow),  # as what is found once for all
        ("fira svd", "parallel"),
        pytest.param("sst", "parallel", marks=pytest.mark.slow),
        ("switchlora of weights", "copies"),
        ("ldadam", "parallel"),
        pytest.param("ldadam full", "copies", marks=pytest.mark.slow),
    ],
)
def test_it_is_one_process(name: str, how: str, ranks: Worlds) -> None:
    check(ranks, f"{name} {how}", on_square(name, how))


EVERY_TENSOR: dict[str, Any] = {
    "how": "tensors",
    "only": ("few", "experts", "conv"),
    "places": ("r0", "01", "11", "a0", "12", "20"),
}
ADAFACTOR = {"scale_parameter": True, "beta1": None, "clip_threshold": 0.7}


@pytest.mark.parametrize(
    ("how", "rank"),
    [
        ("every tensor", None),
        pytest.param("parallel", 3, marks=pytest.mark.slow),
        *(pytest.param(how, None, marks=pytest.mark.slow) for how in HOWS),
        pytest.param("tensors", 3, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_means_of_whole_tensors(how: str, rank: int | None, ranks: Worlds) -> None:
    """Copies count once in the weights' root mean square, and not in sums over columns.

    Dense ones have means over what both dimensions split, and over what one of them does.
    """
    own = HOWS.get(how, EVERY_TENSOR)
    only = ("wide", "tall", "large") if rank else own["only"]
    check(ranks, f"means {how}", means(how, only, rank))


def means(how: str, only: tuple[str, ...], rank: int | None = None, **of: Any) -> Case:
    case = Case("GaLoreAdafactor", {**ADAFACTOR, "projector": "svd", "rank": rank})
    return replace(case, mesh="square", **{**HOWS.get(how, EVERY_TENSOR), "only": only, **of})


@pytest.mark.slow
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("name", ["torch", *NAMED])
def test_it_is_one_process_everywhere(name: str, how: str, ranks: Worlds) -> None:
    check(ranks, f"{name} {how}", on_square(name, how, steps=training.LONG))


# ------------------------------------------------------------------ mutations

WITHOUT: dict[str, tuple[str, Case, Mutation]] = {
    "turn to columns": ("parallel", NAMED["svd"], Mutation("to_columns", how="one rank")),
    "turn to blocks": ("parallel", NAMED["frugal svd"], Mutation("to_blocks", how="one rank")),
    "guard of copies": ("copies", NAMED["svd"], Mutation("sum_", "first")),
    "guard of shards": ("copies", NAMED["svd"], Mutation("sum_", "later")),
    "basis to copies": ("copies", NAMED["svd"], Mutation("broadcast", how="one rank")),
    "scores to copies": ("copies", NAMED["dct"], Mutation("broadcast", how="one rank")),
}
"""How the mesh is used, the case, and what does not happen. Of a single weight the first rank is
the owner, so that all that is lost of broadcasts is what the second rank sends to its copy."""


def without(world: World | None, case: Case, mutation: Mutation | None, poisoned: bool) -> Any:
    logging.disable(logging.CRITICAL)
    trained, out = Trained(case, world), []
    rank, last = (0, True) if world is None else (world.rank, world.rank == world.size - 1)
    with mutated(mutation, World(rank, 0), importlib.import_module(SEAM)) as count:
        for step in range(case.steps):
            trained.backward(step)
            if poisoned and step == 2:
                for param in trained.named.values():
                    if last:  # one rank alone has it
                        grad = param.grad
                        (grad.to_local() if isinstance(grad, DTensor) else grad).fill_(math.nan)
            count.in_step = 0
            trained.optimizer.step()
            out.append(trained.held())
    return out, count.changed


@pytest.fixture
def brief() -> Iterator[Ranks]:
    """A world that takes a few seconds of waiting for a hang: here ranks part on purpose.

    One for each test: where a group has failed, torch still knows meshes of it.
    """
    world = Ranks(4, grace=4.0)
    yield world
    world.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", WITHOUT)
def test_a_run_without_it_is_seen(name: str, brief: Ranks) -> None:
    how, case, mutation = WITHOUT[name]
    only = ("wide", "tall") if how == "parallel" else ("large",)
    case = replace(case, mesh="square", **{**HOWS[how], "only": only}, steps=5)
    args: dict[str, Any] = {"case": case, "poisoned": name.startswith("guard")}
    out, _ = without(None, mutation=None, **{**args, "case": case.reference})
    expected = training.assembled([out])
    told = {}
    for kind, given in (("whole", None), ("without", mutation)):
        outcome = brief.run(f"{kind} {name}", without, mutation=given, **args)
        told[kind] = "".join(filter(None, outcome.errors))
        if not outcome.failed:
            assert (given is None) or any(changed for _, changed in outcome.values), "no call"
            try:
                steps = training.assembled([own for own, _ in outcome.values])
                training.assert_equal_runs(steps, expected)
            except AssertionError as error:
                told[kind] = str(error)
    assert told["whole"] == "", told["whole"]
    assert told["without"], f"a run without {name} passes for one process's"
    assert "has no attribute" not in told["without"], told["without"]


# ------------------------------------------------------------------ copies


def alone(world: World, case: Case, how: str) -> Any:
    """A run in which ranks beyond the first copy could not find what the first finds."""
    logging.disable(logging.WARNING)
    trained = Trained(case, world)
    with pytest.MonkeyPatch.context() as patch:
        if world.rank >= world.size // 2:

            def never(*_: Any, **__: Any) -> Any:
                raise AssertionError("a basis was found by another copy too")

            def others(self: FixedBasis, grad: torch.Tensor) -> torch.Tensor:
                return torch.rand(grad.shape[0], dtype=grad.dtype)

            patch.setattr(finding, "finding", never)
            patch.setattr(FixedBasis, "scores", others)
        if how == "threads":
            torch.set_num_threads(1 + world.rank)
        out = []
        for step in range(case.steps):
            trained.step(step)
            out.append(trained.held())
    return out


FOUND = ("svd", "random", "dct", "svd full", "dct memory", "frugal momentum")


@pytest.mark.parametrize("name", ["svd", "dct"])
def test_a_basis_is_found_once_for_all_copies(name: str, ranks: Worlds) -> None:
    """Copies are alike to the bit, as ``assembled`` asks, though only the first can find it."""
    case = on_square(name, "copies", only=("wide", "tall"), steps=6)
    values = ranks(4).run(name, alone, case=case, how="").checked()
    training.assert_equal_runs(training.assembled(values), training.reference(case.reference))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["copies", "copies of columns", "tensors"])
@pytest.mark.parametrize("name", FOUND)
def test_a_basis_is_found_once_for_all_copies_everywhere(
    name: str, how: str, ranks: Worlds
) -> None:
    places = {"places": ("r0", "r1")} if how == "tensors" else {}
    case = on_square(name, how, **places)
    values = ranks(4).run(name, alone, case=case, how="threads").checked()
    training.assert_equal_runs(training.assembled(values), training.reference(case.reference))


@pytest.mark.parametrize(
    "places",
    [("r0", "0r", "rr"), pytest.param(("r1", "a0"), marks=pytest.mark.slow)],
    ids=str,
)
def test_copies_round_alike(places: tuple[str, ...], ranks: Worlds) -> None:
    """Moments in bfloat16 are rounded by noise, which all copies of a part share."""
    options = {"state_dtype": "bfloat16", "projector": "columns", "density": 0.5}
    case = Case("FrugalAdamW", options, "tensors", ("wide", "few"), places, 4, "square")
    dense = replace(case, options={"state_dtype": "bfloat16", "density": 1.0})
    for own in (case, dense):
        values = ranks(4).run("bfloat16", training.train, case=own).checked()
        training.assembled(values)  # which compares copies
        kept = {k: x.dtype for s in values[0][-1][1].values() for k, (x, _) in s.items()}
        assert torch.bfloat16 in kept.values(), kept


# ------------------------------------------------------------------ what DTensor says


def gathered(world: World, case: Case) -> Any:
    """Weights and state as torch puts them together, after some steps."""
    logging.disable(logging.CRITICAL)
    trained = Trained(case, world)
    for step in range(case.steps):
        trained.step(step)
    states = {
        name: {k: full(x) for k, x in trained.optimizer.state[param].items()}
        for name, param in trained.named.items()
    }
    places = {
        name: {k: tuple(x.placements) for k, x in trained.optimizer.state[param].items() if dt(x)}
        for name, param in trained.named.items()
    }
    return [({name: full(x) for name, x in trained.named.items()}, states)], places


def dt(x: Any) -> bool:
    return isinstance(x, DTensor)


def full(x: Any) -> torch.Tensor:
    return (x.detach().full_tensor() if isinstance(x, DTensor) else torch.as_tensor(x)).clone()


@pytest.mark.parametrize(
    "how",
    ["parallel", *(pytest.param(x, marks=pytest.mark.slow) for x in ("tensors", "every tensor"))],
)
def test_torch_gathers_what_one_process_has(how: str, ranks: Worlds) -> None:
    """``full_tensor`` of weights and of moments: a second account of what is where."""
    if how == "every tensor":  # whose row and column means lie on the ranks in ways of their own
        case = means(how, ("large", "experts"), steps=3)
    else:
        case = on_square("rsvd", how, steps=4)
    expected = training.reference(case.reference)[-1:]
    for run, _ in ranks(4).run(how, gathered, case=case).checked():
        training.assert_equal_runs(run, expected)


MOMENTS = {
    "r0": "(Replicate(), Shard(dim=1))",
    "0r": "(Shard(dim=1), Replicate())",
    "rr": "(Replicate(), Replicate())",
    "00": "(Shard(dim=1), Shard(dim=1))",
    "10": "(Shard(dim=1), Shard(dim=1))",
    "a0": "(Shard(dim=1), Shard(dim=1))",
    "01": "(_StridedShard(dim=1, sf=2), Shard(dim=1))",
    "b1": "(_StridedShard(dim=1, sf=2), Shard(dim=1))",
}
"""Of a wide weight: whoever splits columns splits them first, so that as little as can be moves."""


def test_where_moments_lie(ranks: Worlds) -> None:
    case = on_square("rsvd", "tensors", only=("wide",), places=tuple(MOMENTS), steps=1)
    for _, places in ranks(4).run("places", gathered, case=case).checked():
        for name, own in places.items():
            assert str(own["low.exp_avg"]) == MOMENTS[name.split("_")[1]], name
            assert str(own["basis"]) == "(Replicate(), Replicate())"


# ------------------------------------------------------------------ what is sent

HALF = M * N // 2 * ITEM
GUARDS: Table = {"all_reduce": (2, 2 * GUARD)}
"""One for each dimension of the mesh."""
COPIED: Table = {"broadcast": (1, M * R * ITEM + FINE)}
SVD = ("GaLoreAdamW", {"projector": "svd"})
DCT = ("GaLoreAdamW", {"projector": "dct"})
FIRA = ("FiraAdamW", {"projector": "svd"})
ON_SQUARE: dict[str, tuple[str, Any, Table, Table, Table]] = {
    "copies of rows": (
        "r0", SVD, {"all_to_all": (2, 2 * HALF)},
        plus({"all_to_all": (1, HALF)}, BASIS), COPIED,
    ),
    "copies of columns": ("r1", SVD, {}, plus({"all_to_all": (1, HALF)}, BASIS), COPIED),
    "copies, scores": ("r1", DCT, {}, SCORES, {"broadcast": (1, M * ITEM)}),
    "rows of columns": ("01", SVD, TURNED, OWNER, {}),
    "columns of columns": ("b1", SVD, {}, OWNER, {}),
    "rows of rows": ("a0", FIRA, plus(TURNED, TWO_SCALARS), OWNER, {}),
    "columns of columns, scores": ("11", DCT, {}, SCORES, {}),
}  # fmt: skip
"""Placement, class, what a step sends beside the guard; what a refresh adds in the first copy,
and in all of them."""


@pytest.mark.parametrize(
    "name",
    [
        # of columns nothing turns, and who sends a basis or scores is in the others
        pytest.param(
            x,
            marks=pytest.mark.slow
            if x.startswith(("copies of col", "copies, ", "columns of columns, "))
            else (),
        )
        for x in ON_SQUARE
    ],
)
def test_a_step_sends_exactly_this(name: str, ranks: Worlds) -> None:
    place, (cls, options), each, first, copies = ON_SQUARE[name]
    args = {"cls": cls, "options": options, "place": place, "alike": 1}
    for rank, steps in enumerate(ranks(4).run(name, measured, **args).checked()):
        for step, (collectives, news, _) in enumerate(steps):
            expected = plus(GUARDS, each)
            if step in DUE:
                expected = plus(expected, copies, first if not copies or rank < 2 else {})
            assert_collectives(metered(collectives, news), expected)


def in_units(world: World, unit: int, place: str, cls: str, options: dict[str, Any]) -> Any:
    """Moments kept in units of some columns, as a store would ask for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FloatStore, "unit", lambda *_: unit)
        return measured(world, cls, options, place, 1)


def test_only_edges_travel_to_units(ranks: Worlds) -> None:
    """Of 96 columns each rank stores 24, and in units of ten steps 30, 30, 30 and 6."""
    there, back = (0, 6, 12, 18), (6, 12, 18, 0)
    args = {"unit": 10, "place": "1", "cls": SVD[0], "options": SVD[1]}
    for rank, steps in enumerate(ranks(4).run("units", in_units, **args).checked()):
        collectives, news, _ = steps[1]
        size = (there[rank] + back[rank]) * M * ITEM
        expected = {"all_reduce": (1, GUARD), "all_to_all": (2, size)}
        assert_collectives(metered(collectives, news), expected)


def train_in_units(world: World, case: Case, unit: int) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FloatStore, "unit", lambda *_: unit)
        trained = Trained(case, world)
        logging.disable(logging.WARNING)
        out = []
        for step in range(case.steps):
            trained.step(step)
            out.append((trained.weights(), {}))
    return out


@pytest.mark.parametrize(
    ("size", "places"),
    [(3, ("0", "1")), pytest.param(4, ("01", "b1", "a0", "r1"), marks=pytest.mark.slow)],
)
def test_steps_in_units_are_one_process(size: int, places: Any, ranks: Worlds) -> None:
    mesh = "square" if size == 4 else "all"
    case = replace(NAMED["svd"], how="tensors", only=("wide", "tall"), places=places, mesh=mesh)
    values = ranks(size).run("units", train_in_units, case=case, unit=5).checked()
    for i, (weights, _) in enumerate(training.assembled(values)):
        for key, x in training.reference(case.reference)[i][0].items():
            training.assert_within(weights[key], x, training.WEIGHTS, f"{key} after step {i}")


# ------------------------------------------------------------------ guard


def norms(world: World, places: tuple[str, ...], bad: str) -> Any:
    """What the guard says of every gradient, one of which has a NaN on the last rank alone."""
    logging.disable(logging.CRITICAL)
    case = Case("GaLoreAdamW", {}, "tensors", ("wide", "few"), places, mesh="square")
    trained = Trained(case, world)
    trained.backward(0)
    if bad and world.rank == world.size - 1:
        local = trained.named[bad].grad.to_local()
        local.view(-1)[-1] = math.nan
    before = trained.weights()
    seen: dict[int, Any] = {}

    def look(items: Any) -> Any:
        seen.update(agreed(items))
        return seen

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharded_step, "agreed", look)
        trained.optimizer.step()
    moved = {
        name: not torch.equal(x, before[name][0]) for name, (x, _) in trained.weights().items()
    }
    return [(name, float(seen[id(p)].norm), moved[name]) for name, p in trained.named.items()]


@pytest.mark.parametrize("bad", ["", "wide_r1_1.weight"])
def test_norms_are_those_of_whole_gradients(bad: str, ranks: Worlds) -> None:
    """Copies count once, and what one copy has that is not finite stops all."""
    places = ("r0", "r1", "0r", "rr", "01", "a0")
    one = Trained(Case("GaLoreAdamW", {}, "tensors", ("wide", "few"), places))
    one.backward(0)
    expected = {name: float(torch.linalg.vector_norm(p.grad)) for name, p in one.named.items()}
    told = ranks(4).run("norms", norms, places=places, bad=bad).checked()
    for own in told:
        for name, norm, moved in own:
            if name == bad:
                assert math.isnan(norm) and not moved, (name, norm, moved)
            else:
                assert norm == pytest.approx(expected[name], rel=1e-12), name
                assert moved or "few" in name


# ------------------------------------------------------------------ other orders, other groups


def across_first(world: World, order: Any, case: Case) -> Any:
    """A mesh whose ranks do not follow each other as they do in a group of all."""
    logging.disable(logging.WARNING)
    mesh = DeviceMesh("cpu", torch.tensor(order))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "meshes_of", lambda *_: [mesh])
        trained = Trained(case, world)
    out = []
    for step in range(case.steps):
        trained.step(step)
        out.append(({name: training.in_place(x.detach()) for name, x in trained.named.items()}, {}))
    return out


DOWN_FIRST = [[0, 2], [1, 3]]
"""Along each dimension ranks ascend, and not along both, as of a mesh that is transposed."""
COPIES_TURNED = [[2, 3], [0, 1]]
"""What dimension 1 splits ascends, and of the copies along dimension 0 the first are ranks 2, 3."""


@pytest.mark.parametrize(
    ("order", "places", "name"),
    [
        (DOWN_FIRST, "01", "rsvd"),
        (COPIES_TURNED, "r1", "rsvd"),
        pytest.param(DOWN_FIRST, "a0", "svd full", marks=pytest.mark.slow),
        pytest.param(COPIES_TURNED, "r0", "svd full", marks=pytest.mark.slow),
    ],
)
def test_ranks_in_another_order(order: Any, places: str, name: str, ranks: Worlds) -> None:
    """Those that a dimension splits among ascend: others are refused, in ``test_refused.py``."""
    case = replace(NAMED[name], how="tensors", only=("wide", "tall"), places=(places,), steps=5)
    run = training.assembled(ranks(4).run(name, across_first, order=order, case=case).checked())
    for i, (weights, _) in enumerate(training.reference(case.reference)):
        for key, x in weights.items():
            training.assert_within(run[i][0][key], x, training.WEIGHTS, f"{key} after step {i}")


def of_a_stage(world: World, places: str) -> Any:
    """Four ranks of five have a square mesh; the fifth, as another stage, knows nothing of it."""
    logging.disable(logging.WARNING)
    mesh = DeviceMesh("cpu", torch.arange(4).view(2, 2))
    if world.rank == 4:
        return None
    case = replace(NAMED["svd"], how="tensors", only=("wide",), places=(places,), steps=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "meshes_of", lambda *_: [mesh])
        trained = Trained(case, world)
    for step in range(case.steps):
        trained.step(step)
    return [full(x) for x in trained.named.values()]


@pytest.mark.slow
@pytest.mark.parametrize("places", ["01", "a0", "rr"])
def test_other_ranks_need_not_know(places: str, ranks: Worlds) -> None:
    """A group of several dimensions is made by its members alone."""
    case = replace(NAMED["svd"], how="tensors", only=("wide",), places=(places,), steps=4)
    (expected,) = training.reference(case)[-1][0].values()
    for own in ranks(5).run("stage", of_a_stage, places=places).checked()[:4]:
        assert float((own[0] - expected).abs().max()) <= training.WEIGHTS
