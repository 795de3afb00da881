"""Moments in 4 bits on several ranks: the codes of one process, in blocks that no rank shares."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.sharded import (
    test_eight_bits,
    test_meshes_saved,
    test_not_finite,
    test_resharding,
    training,
)
from tests.sharded.combinations import BLOCKS as BLOCKS8
from tests.sharded.combinations import FOUR, in_4_bits
from tests.sharded.combinations import LAYERS as LAYERS8
from tests.sharded.ranks import Ranks
from tests.sharded.test_eight_bits import DENSE, HOWS, MESHES, SIZES, WAYS, check, dense
from tests.sharded.training import Case

Worlds = Callable[[int], Ranks]
BLOCKS = in_4_bits(BLOCKS8)
LAYERS = {name: in_4_bits(case) for name, case in LAYERS8.items()}
slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "size", "how", "only"),
    [
        ("galore", 3, "fsdp", ("some blocks", "odd", "small")),
        ("frugal columns", 2, "tensors", ("no block", "odd row")),
        ("dct memory 4bit", 3, "fsdp columns", ("odd",)),
        ("adafactor", 3, "fsdp", ("odd",)),
    ],
)
def test_it_is_one_process(
    name: str, size: int, how: str, only: tuple[str, ...], ranks: Worlds
) -> None:
    check(ranks, size, name, replace(FOUR[name], how=how, only=only))


@pytest.mark.slow
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", FOUR)
def test_it_is_one_process_everywhere(name: str, size: int, how: str, ranks: Worlds) -> None:
    check(ranks, size, name, replace(FOUR[name], how=how))


@pytest.mark.slow
@pytest.mark.parametrize("name", FOUR)
def test_moments_are_codes(name: str) -> None:
    """Some of each case, so that it says something."""
    _, states = training.reference(replace(FOUR[name], steps=1).reference)[0]
    assert any(key.endswith("_scale") for state in states.values() for key in state)


@pytest.mark.parametrize("name", ["frugal block", *(pytest.param(x, marks=slow) for x in LAYERS)])
def test_blocks_of_rows_are_one_process(name: str, ranks: Worlds) -> None:
    check(ranks, 3, name, replace(LAYERS.get(name, BLOCKS), steps=6))


@pytest.mark.slow
@pytest.mark.parametrize("on_refresh", ["keep", "project"])
def test_coordinates_of_two_sides_are_on_every_rank(on_refresh: str, ranks: Worlds) -> None:
    options = {"projector": "random", "proj_type": "full", "rank": 66, "on_refresh": on_refresh}
    case = in_4_bits(Case("GaLoreAdamW8bit", options, "tensors", ("two sides",), steps=5))
    check(ranks, 3, on_refresh, case)


WHOLE_ROWS = {name: name not in ("vector", "columns", "few") for name in DENSE}
"""Whether moments are in 4 bits as in one process: of rows of any length."""


@pytest.mark.parametrize("size", [pytest.param(2, marks=slow), 3])
def test_dense_weights(size: int, ranks: Worlds) -> None:
    """To the bit one process in 4 bits, or in float32 where ranks would share a row.

    But for the last bits of the latter: torch's own step does not write what rounds.
    """
    asked = dict.fromkeys(DENSE, "4bit")
    four = dense(None, asked)
    expected = dense(None, {k: "4bit" if kept else "float32" for k, kept in WHOLE_ROWS.items()})
    for own in ranks(size).run("dense", dense, dtypes=asked).checked():
        for name, (shape, _, _) in DENSE.items():
            kept = WHOLE_ROWS[name]
            gap = float((own["weights"][name] - expected["weights"][name]).abs().max())
            assert gap <= (0 if kept else 1e-14), f"{name}: {gap:.1e}"
            assert own["kinds"][name] == ("torch.uint8" if kept else "torch.float64"), name
            wide = not kept and math.prod(shape) >= 4096
            assert (name in own["said"]) == wide, own["said"]
            gap = float((four["weights"][name] - expected["weights"][name]).abs().max())
            assert (gap > 1e-6) == wide, name


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_dense_means(size: int, ranks: Worlds) -> None:
    """Adafactor: the first moment in 4 bits, and means in float32."""
    args = {"cls": "GaLoreAdafactor", "beta1": 0.9}
    same = {k: "4bit" if kept else "float32" for k, kept in WHOLE_ROWS.items()}
    expected = dense(None, same, **args)
    asked = dict.fromkeys(DENSE, "4bit")
    for own in ranks(size).run("dense means", dense, dtypes=asked, **args).checked():
        for name, kept in WHOLE_ROWS.items():
            gap = float((own["weights"][name] - expected["weights"][name]).abs().max())
            assert gap < 1e-10, f"{name}: {gap:.1e}"
            assert own["kinds"][name] == ("torch.uint8" if kept else "torch.float64"), name


ON_MESHES = [
    (name, how)
    for name in FOUR
    for how in MESHES
    if (name, how) not in test_eight_bits.NOT_POSED
    and (name, how) != ("galore larger side", "blocks that divide")  # dense at that rank
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "how"), ON_MESHES)
def test_on_a_mesh_of_two_dimensions(name: str, how: str, ranks: Worlds) -> None:
    """Experts whose moments are narrower than a block too: none holds rows of two."""
    check(ranks, 4, f"{name} {how}", replace(FOUR[name], mesh="square", **MESHES[how]))


ONE = {
    **{name: replace(FOUR[name], only=("odd", "odd row")) for name in ("galore", "dct memory")},
    **{name: replace(FOUR[name], only=("two sides", "small")) for name in ("sst", "switchlora")},
    "adafactor": replace(FOUR["adafactor"], only=("long", "odd")),
    "frugal block": replace(BLOCKS, how="fsdp columns", only=("some blocks", "table", "no block")),
}
"""Of blocks, 3 ranks split columns of one while it has moments: decoded, and encoded again."""


@pytest.mark.parametrize(
    ("name", "size", "way"),
    [
        pytest.param(*row, marks=() if row[1:] == (3, WAYS[2]) and row[0] == "galore" else slow)
        for row in [(name, size, way) for name in ONE for size in SIZES for way in WAYS]
        if row[0] != "frugal block" or row[1] == 3
    ],
)
def test_from_one_process_into_shards_and_back(
    name: str, size: int, way: str, ranks: Worlds
) -> None:
    test_eight_bits.check_one(ranks, size, name, way, replace(ONE[name], steps=7))


@pytest.mark.parametrize(
    ("name", "flat"),
    [("galore", False), *(pytest.param(x, False, marks=slow) for x in ("block", *FOUR)),
     *(pytest.param(x, True, marks=slow) for x in FOUR)],
)  # fmt: skip
def test_over_several_numbers_of_ranks(
    name: str, flat: bool, ranks: Worlds, tmp_path: Path
) -> None:
    """To the bit at every step, so that nothing was rounded again on the way."""
    case = BLOCKS if name == "block" else FOUR[name]
    if name == "galore" and not flat:
        case = replace(case, only=("odd", "small"))
    test_resharding.check(ranks, name, case, flat, tmp_path, (3, 1, 2), plain=not flat)


@pytest.mark.slow
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("name", ["galore", "frugal rows", "sst", "switchlora restarts"])
def test_from_mesh_to_mesh(name: str, flat: bool, ranks: Worlds, tmp_path: Path) -> None:
    test_eight_bits.check_route(ranks, name, test_meshes_saved.ROUTE, tmp_path, flat, FOUR[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dct memory", "ldadam", "sst", "switchlora", "adafactor"])
def test_a_step_that_raises_is_undone(name: str, ranks: Worlds) -> None:
    case = replace(FOUR[name], only=(*FOUR[name].only[:1], "odd"))
    assert all(ranks(3).run("undone", test_eight_bits.undone, case=case).checked())


@pytest.mark.slow
@pytest.mark.parametrize("when", ["in mid-run", "where bases are due"])
@pytest.mark.parametrize("name", ["galore", "sst", "switchlora", "adafactor"])
def test_a_gradient_that_is_not_finite_leaves_codes(name: str, when: str, ranks: Worlds) -> None:
    case = replace(FOUR[name], only=("some blocks", "no block", "odd"))
    test_not_finite.check(ranks, 3, case, test_eight_bits.BAD, when, float("nan"))
