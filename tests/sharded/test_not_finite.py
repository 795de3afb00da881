"""One entry of one shard on one rank is not a number: all ranks skip that weight, and say so."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from tests import cases
from tests.sharded import training
from tests.sharded.combinations import NAMED, SHORT
from tests.sharded.ranks import Ranks, World
from tests.sharded.training import Case, Trained

Worlds = Callable[[int], Ranks]
STEPS = training.STEPS
WHEN = {"in mid-run": 3, "where bases are due": 2, "at the first step": 0}
"""With a gap of two and no stagger."""

CASES: dict[str, Case] = (
    {
        name: replace(NAMED[name], only=SHORT, steps=STEPS)
        for name in ("svd", "rsvd", "dct", "columns", "fira svd", "frugal svd", "frugal block")
    }
    | {
        name: replace(NAMED[name], only=SHORT, steps=STEPS)
        for name in ("dct each step", "dct memory", "svd full", "frugal rows")
    }
    | {
        name: replace(NAMED[name], only=SHORT, steps=STEPS)
        for name in ("sst", "switchlora restarts", "ldadam", "ldadam bare")
    }
)


class Said(logging.Handler):
    """What the package logs."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def poison(trained: Trained, name: str, value: float) -> None:
    """One entry, the last of the weight: of a sharded one only its rank knows."""
    grad = trained.named[name].grad
    assert grad is not None
    if not isinstance(grad, DTensor):
        grad.view(-1)[-1] = value
        return
    local = grad.to_local()
    holders = [i for i in range(trained.size) if chunk_of(grad, i, trained.size)]
    if trained.rank == holders[-1]:
        local[(-1,) * local.dim()] = value


def chunk_of(x: DTensor, rank: int, size: int) -> int:
    """How much of the split dimension a rank has."""
    (place,) = x.placements
    if not place.is_shard():
        return 1
    chunks = torch.empty(x.shape[place.dim]).chunk(size)
    return len(chunks[rank]) if rank < len(chunks) else 0


def run(world: World | None, case: Case, bad: str, at: int, value: float) -> Any:
    """What is held before the bad step and after every step, and what was said in it."""
    logging.disable(logging.NOTSET)
    trained = Trained(replace(case, options={**case.options, "stagger": False}), world)
    log, said = logging.getLogger("lowrank_optim"), Said()
    log.addHandler(said)
    log.setLevel(logging.WARNING)
    out, before, texts = [], None, []
    try:
        for step in range(STEPS):
            trained.backward(step)
            if step == at:
                poison(trained, bad, value)
                before = trained.held()
                said.texts.clear()
            trained.optimizer.step()
            if step == at:
                texts = list(said.texts)
            out.append(trained.held())
    finally:
        log.removeHandler(said)
    return before, out, texts


DRAWN = ("columns", "rows", "block")
"""Choices that look at no gradient, and that one process makes though a step is skipped."""


def step_due(case: Case, at: int) -> bool:
    return at % training.GAP == 0 or case.cls.startswith("Switch")


COUNTERS = ("step", "clock", "postponed")


def check(ranks: Worlds, size: int, case: Case, bad: str, when: str, value: float) -> None:
    at = WHEN[when]
    args = {"case": case, "bad": bad, "at": at, "value": value}
    values = ranks(size).run(f"{value} {when}", run, **args).checked()
    kept = case.options.get("projector", "block" if "Frugal" in case.cls else "") not in DRAWN
    kept = kept and not case.cls.startswith(("SST", "Switch"))
    _, expected, told = run(None, case.reference, bad, at, value)
    steps = training.assembled([out for _, out, _ in values])
    training.assert_equal_runs(steps, training.assembled([expected]), case.near)
    for rank, (before, out, texts) in enumerate(values):
        assert any(bad in text and "not finite" in text for text in texts), (rank, texts)
        assert sorted(texts) == sorted(told), f"rank {rank} said {texts}, one process {told}"
        weight, state = before[0][bad][0], before[1][bad]
        assert torch.equal(out[at][0][bad][0], weight), f"rank {rank} moved the weight"
        if not state or (step_due(case, at) and not kept):
            continue  # the first step made it, all zeros; or one process draws all the same
        for key, (x, _) in out[at][1][bad].items():
            if key not in COUNTERS:
                assert torch.equal(x, state[key][0]), f"rank {rank} changed {key}"
    moved = [
        name for name, x in steps[at][0].items() if not torch.equal(x, before_of(values, name))
    ]
    assert set(moved) == set(steps[at][0]) - {bad}, "the others take their step"
    assert bool((steps[-1][0][bad] != steps[at][0][bad]).all()), "and this one goes on"


def before_of(values: Any, name: str) -> torch.Tensor:
    return training.whole([before[0][name] for before, _, _ in values], name)


BAD = {"wide": "blocks.0.wide.weight", "tall": "blocks.1.tall.weight", "few": "blocks.0.few.weight"}
TURNS = [
    (name, when, list(BAD)[i % 3], (2, 3, 4)[(i + i // 3) % 3])
    for i, (name, when) in enumerate((n, list(WHEN)[i % 2]) for i, n in enumerate(CASES))
]


@pytest.mark.parametrize(("name", "when", "bad", "size"), TURNS[1:7:5])
def test_all_ranks_skip_the_weight(
    name: str, when: str, bad: str, size: int, ranks: Worlds
) -> None:
    """Weight, moments, basis and memory as they were; counters, and the run, as of one process."""
    check(ranks, size, CASES[name], BAD[bad], when, float("nan"))


@pytest.mark.slow
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("how", ["fsdp", "fsdp columns"])
@pytest.mark.parametrize("name", CASES)
def test_all_ranks_skip_the_weight_everywhere(
    name: str, how: str, when: str, bad: str, value: float, ranks: Worlds
) -> None:
    check(ranks, 3, replace(CASES[name], how=how), BAD[bad], when, value)


@pytest.mark.parametrize(("name", "when"), [("sst", "where bases are due"),
                                            ("switchlora restarts", "in mid-run")])  # fmt: skip
def test_factors_of_the_weight_are_found_all_the_same(name: str, when: str, ranks: Worlds) -> None:
    """By an owner, from W or from the factors, in the step that is skipped, as one process does."""
    check(ranks, 2, CASES[name], BAD["wide"], when, float("nan"))


@pytest.mark.parametrize("place", ["0", pytest.param("r", marks=pytest.mark.slow)])
def test_plain_dtensors_too(place: str, ranks: Worlds) -> None:
    case = replace(CASES["svd"], how="tensors", places=(place,))
    check(ranks, 3, case, f"wide_{place}_0.weight", "in mid-run", float("nan"))


def test_a_dense_weight_too(ranks: Worlds) -> None:
    """The embedding of the whole model."""
    case = replace(CASES["svd"], only=())
    check(ranks, 2, case, "blocks.0.table.embed.weight", "in mid-run", float("nan"))


def missing(world: World | None, case: Case) -> Any:
    """A weight without a gradient for a step, on all ranks."""
    logging.disable(logging.WARNING)
    trained = Trained(case, world)
    out = []
    for step in range(STEPS):
        trained.backward(step)
        if step in (0, 3):
            trained.named[BAD["wide"]].grad = None
        trained.optimizer.step()
        out.append(trained.held())
    return out


@pytest.mark.parametrize(
    "name", ["fira svd", "frugal block", pytest.param("dct memory", marks=pytest.mark.slow)]
)
def test_a_weight_without_a_gradient_stands_still(name: str, ranks: Worlds) -> None:
    """As in one process, and the others step."""
    case = replace(CASES[name], only=SHORT)
    values = ranks(3).run(name, missing, case=case).checked()
    expected = training.assembled([missing(None, case.reference)])
    training.assert_equal_runs(training.assembled(values), expected)


def missing_on_one(world: World, case: Case) -> str:
    """Of plain DTensors a rank may have none: an error on all, or a step that is skipped by all."""
    trained = Trained(case, world)
    trained.step(0)
    trained.backward(1)
    before = trained.weights()
    if world.rank == 1:
        trained.named["wide_0_0.weight"].grad = None
    try:
        trained.optimizer.step()
    except RuntimeError as error:
        return f"error: {error}"
    x, y = trained.weights()["wide_0_0.weight"][0], before["wide_0_0.weight"][0]
    return f"moved: {not torch.equal(x, y)}"


def test_a_gradient_that_only_some_ranks_have_is_no_hang(ranks: Worlds) -> None:
    """All ranks do the same, whatever it is: none moves its part of a weight alone."""
    case = replace(CASES["svd"], how="tensors", places=("0",))
    told = ranks(3).run("missing on one", missing_on_one, case=case).checked()
    kinds = {text.partition(":")[0] for text in told}
    assert len(kinds) == 1, told
    if kinds == {"moved"}:
        assert set(told) == {"moved: False"}, told
    else:
        assert all("wide_0_0.weight" in text for text in told), told


def unasked(world: World | None, case: Case, bad: str, at: int) -> Any:
    """The same where a host may not look at what a device has: it selects, and asks nobody."""
    with pytest.MonkeyPatch.context() as patch:
        cases.branching(patch, lambda _: True)
        return run(world, case, bad, at, float("nan"))[1]


@pytest.mark.parametrize("name", [pytest.param("svd", marks=pytest.mark.slow), "ldadam"])
def test_a_device_selects_what_a_host_would_skip(name: str, ranks: Worlds) -> None:
    """Where a basis is due: neither it, moments nor errors take anything of such a gradient."""
    case = replace(CASES[name], only=("wide", "tall"), steps=4)
    bad = BAD["tall"]
    found = ranks(2).run(name, unasked, case=case, bad=bad, at=2).checked()
    expected = run(None, case.reference, bad, 2, float("nan"))[1]
    training.assert_equal_runs(training.assembled(found), training.assembled([expected]))
