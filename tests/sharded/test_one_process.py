"""A sharded run is that of one process: weights to rounding, choices to the bit, step by step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests import cases
from tests.pairwise import pairwise
from tests.sharded import training
from tests.sharded.combinations import (
    BLOCKS,
    EIGHT,
    FACTORS,
    LAYERS,
    NAMED,
    SHORT,
    is_defined,
    to_case,
)
from tests.sharded.ranks import Ranks, World
from tests.sharded.training import LONG, Case, Trained

Worlds = Callable[[int], Ranks]
SIZES = (2, 3, 4)
HOWS = ("fsdp", "fsdp columns", "tensors")
ROWS = pairwise(FACTORS, is_defined)


def named(row: tuple[object, ...]) -> str:
    return "-".join("+".join(x) if isinstance(x, tuple) else str(x) for x in row)


def check(ranks: Worlds, size: int, name: str, case: Case, **within: float) -> None:
    expected = training.reference(case.reference)
    if not case.cls.startswith("torch."):
        training.assert_worth_comparing(case.reference, expected)
    values = ranks(size).run(name, training.train, case=case).checked()
    run = training.assembled(values)
    training.assert_equal_runs(run, expected, **within)
    training.assert_all_moved(case.reference, run)


@pytest.mark.parametrize(
    ("size", "how"),
    [
        pytest.param(*x, marks=pytest.mark.slow if i else ())
        for i, x in enumerate(zip(SIZES, HOWS, strict=True))
    ],
)
def test_torch_passes_its_own_measure(size: int, how: str, ranks: Worlds) -> None:
    """What the harness measures is right for an optimizer that is."""
    only = () if how == "fsdp columns" else SHORT
    check(ranks, size, f"torch {how}", Case("torch.AdamW", {"foreach": False}, how, only, steps=4))


def test_every_class_is_run_by_several_ranks() -> None:
    """A class that is added is a case, here or, of means, in ``test_adafactor.py``."""
    every = [*NAMED.values(), *EIGHT.values(), *LAYERS.values(), BLOCKS]
    assert {case.cls for case in every} | {"GaLoreAdafactor"} >= set(cases.method_names())


@pytest.mark.parametrize("name", list(NAMED)[::8])
def test_a_named_case_is_well_posed(name: str) -> None:
    """Gradients rounded otherwise change nothing that is compared, so that a difference is one."""
    case = replace(NAMED[name], only=SHORT)
    training.assert_equal_runs(training.jittered(case), training.reference(case))


@pytest.mark.slow
def test_all_cases_are_well_posed() -> None:
    cases = [
        replace(case, how=how, steps=LONG) for case in NAMED.values() for how in ("fsdp", "tensors")
    ]
    for case in cases + [to_case(row).reference for row in ROWS]:
        training.assert_worth_comparing(case, training.reference(case))
        training.assert_equal_runs(training.jittered(case), training.reference(case))


TURNS = [(name, SIZES[i // 3 % 3], HOWS[i % 3]) for i, name in enumerate(NAMED)]
DEFAULT = (
    "columns", "block", "fira svd", "apollo mini", "frugal rows", "dct memory",
    "ldadam in 8 bits", "ldadam full",
)  # fmt: skip
"""What the default run has of them, by columns and in plain DTensors. ``test_mutations.py`` has
others by rows: each basis, side and residual, SST and SwitchLoRA. All, everywhere, are slow."""


@pytest.mark.parametrize(("name", "size", "how"), [x for x in TURNS if x[0] in DEFAULT])
def test_it_is_one_process(name: str, size: int, how: str, ranks: Worlds) -> None:
    check(ranks, size, name, replace(NAMED[name], how=how, only=SHORT))


def test_blocks_tables_norms_and_convolutions_too(ranks: Worlds) -> None:
    """The whole model, by block and root."""
    check(ranks, 3, "whole model", NAMED["rsvd"])


TORCH = pytest.param("torch", marks=pytest.mark.slow)
"""Of the default run ``test_torch_passes_its_own_measure`` has it."""


def torch_or(name: str, **of: Any) -> Case:
    """A named case, or torch's AdamW, for which the harness must hold too."""
    own = Case("torch.AdamW", {"foreach": False}) if name == "torch" else NAMED[name]
    return replace(own, **of)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        pytest.param("torch", "fsdp", marks=pytest.mark.slow),
        pytest.param("svd", "tensors", marks=pytest.mark.slow),
        ("fira svd", "fsdp"),
        pytest.param("dct each step", "tensors", marks=pytest.mark.slow),
    ],
)
def test_pairs_of_ranks_are_worlds_of_their_own(name: str, how: str, ranks: Worlds) -> None:
    """A rank's number in its group is not its number in the world: who owns, and who sends."""
    case = torch_or(name, how=how, only=("wide", "few"), mesh="pairs", steps=4)
    expected = training.reference(case.reference)
    values = ranks(4).run(name, training.train, case=case).checked()
    for pair in (values[:2], values[2:]):
        training.assert_equal_runs(training.assembled(pair), expected)


@pytest.mark.parametrize("name", [TORCH, pytest.param("svd", marks=pytest.mark.slow), "fira svd"])
def test_one_optimizer_of_two_meshes(name: str, ranks: Worlds) -> None:
    """Weights split by the rows of a square of ranks beside weights split by its columns."""
    case = torch_or(name, how="tensors", only=("wide", "tall"), mesh="crossed", steps=4)
    case = replace(case, places=("0", "0", "1", "1"))
    expected = training.reference(case.reference)
    values = ranks(4).run(name, training.train, case=case).checked()
    for n, group in ((0, (0, 2)), (0, (1, 3)), (1, (0, 1)), (1, (2, 3))):
        own = {key for key in expected[0][0] if int(key.split(".")[0][-1]) % 2 == n}
        part = [[kept(step, own) for step in values[rank]] for rank in group]
        run = training.assembled(part)
        training.assert_equal_runs(run, [kept(step, own) for step in expected])


def kept(step: Any, names: set[str]) -> Any:
    return tuple({key: x for key, x in half.items() if key in names} for half in step)


@pytest.mark.parametrize("name", [TORCH, "rsvd"])
def test_micro_batches_that_are_not_reduced(name: str, ranks: Worlds) -> None:
    check(ranks, 2, name, torch_or(name, only=SHORT, pieces=3, steps=4))


@pytest.mark.parametrize(
    "name",
    [TORCH, "svd", *(pytest.param(x, marks=pytest.mark.slow) for x in ("dct memory", "ldadam"))],
)
def test_float32(name: str, ranks: Worlds) -> None:
    """To the rounding of its products, which are of fewer columns than in one process."""
    case = torch_or(name, how="tensors", only=("wide", "tall", "few"), steps=4, dtype=torch.float32)
    check(ranks, 3, name, case, weights=1e-5, state=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", NAMED)
def test_it_is_one_process_everywhere(name: str, size: int, how: str, ranks: Worlds) -> None:
    check(ranks, size, name, replace(NAMED[name], how=how, steps=LONG))


@pytest.mark.parametrize("at", range(0, len(ROWS), 48), ids=lambda i: named(ROWS[i]))
def test_any_two_choices_go_together(at: int, ranks: Worlds) -> None:
    check(ranks, SIZES[at // 48 % 3], named(ROWS[at]), to_case(ROWS[at]))


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("row", ROWS, ids=named)
def test_any_two_choices_go_together_everywhere(
    row: tuple[object, ...], size: int, ranks: Worlds
) -> None:
    check(ranks, size, named(row), to_case(row))


@pytest.mark.parametrize("name", ["rsvd", pytest.param("dct each step", marks=pytest.mark.slow)])
def test_moments_in_bfloat16(name: str, ranks: Worlds) -> None:
    """Their rounding is drawn, so that a run is near: within a tenth of the way it went."""
    case = replace(NAMED[name], only=SHORT)
    case = replace(case, options={**case.options, "state_dtype": "bfloat16"})
    values = ranks(3).run(name, training.train, case=case).checked()
    actual, expected = training.assembled(values)[-1], training.reference(case)[-1]
    begun = training.start(case)
    for key, x in expected[0].items():
        gone = float((x - begun[key]).norm())
        assert float((actual[0][key] - x).norm()) < 0.1 * gone, key
        assert actual[0][key].dtype == x.dtype
    for key, state in expected[1].items():
        assert {k: x.dtype for k, x in state.items()} == {
            k: x.dtype for k, x in actual[1][key].items()
        }


def test_every_two_values_meet() -> None:
    """The rows are what they say; those that never meet are refused, or are not posed."""
    names = list(FACTORS)
    for i, a in enumerate(names):
        for j, b in enumerate(names[i + 1 :], i + 1):
            met = {(row[i], row[j]) for row in ROWS}
            missing = {(x, y) for x in FACTORS[a] for y in FACTORS[b]} - met
            none = {(x, "block") for x in ("dct memory", "fira", "fira matrix", "fira paper")}
            sets = ("block", "columns", "rows")  # have no basis that could be measured
            none |= {(x, y) for x in ("apollo", "apollo mini") for y in sets}
            assert missing <= none, (a, b, missing)


def faulty(world: World, case: Case, fault: str) -> Any:
    """A run of torch's AdamW in which the last rank does something by itself, once."""
    trained = Trained(case, world)
    out = []
    for step in range(case.steps):
        trained.backward(step)
        if step == 2 and world.rank == world.size - 1:
            for param in trained.named.values():
                grad = param.grad.to_local()
                if fault == "rounds otherwise":
                    grad.mul_(1 + 1e-6)
                elif fault == "misses its gradient":
                    grad.zero_()
                elif fault == "is one ulp away":
                    param.to_local().detach().mul_(1 + 2.0**-52)
        trained.optimizer.step()
        out.append(trained.held())
    return out


FAULTS = {
    "nothing": ("0", ""),
    "rounds otherwise": ("0", "from one process"),
    "misses its gradient": ("1", "from one process"),
    "is one ulp away": ("r", "rank 2 has another"),
}
"""What a rank does, of weights split which way, and what is said of it."""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_one_rank_is_seen(fault: str, ranks: Worlds) -> None:
    place, told = FAULTS[fault]
    case = Case("torch.AdamW", {"foreach": False, "eps": 1e-2}, "tensors", ("tall",), (place,), 5)
    values = ranks(3).run(fault, faulty, case=case, fault=fault).checked()
    if not told:
        training.assert_equal_runs(training.assembled(values), training.reference(case))
        return
    with pytest.raises(AssertionError, match=told):
        training.assert_equal_runs(training.assembled(values), training.reference(case))


def test_a_shard_that_stands_still_is_seen() -> None:
    case = Case("torch.AdamW", {"foreach": False}, "tensors", ("tall",), ("0",), 2)
    run = training.assembled([training.train(None, case)])
    training.assert_all_moved(case, run)
    (name,) = run[-1][0]
    run[-1][0][name][-1] = training.start(case)[name][-1]
    with pytest.raises(AssertionError, match=r"6 of 78 entries of tall_0_0\.weight have not moved"):
        training.assert_all_moved(case, run)
