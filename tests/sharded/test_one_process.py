"""A sharded run is that of one process: weights to rounding, choices to the bit, step by step."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.sharded import training
from tests.sharded.ranks import Ranks
from tests.sharded.training import Case

Worlds = Callable[[int], Ranks]
SIZES = (2, 3, 4)


def check(ranks: Worlds, size: int, name: str, case: Case) -> None:
    expected = training.reference(case.reference)
    values = ranks(size).run(name, training.train, case=case).checked()
    run = training.assembled(values)
    training.assert_equal_runs(run, expected)
    training.assert_all_moved(case.reference, run)


@pytest.mark.parametrize("how", ["fsdp", "fsdp columns", "tensors"])
@pytest.mark.parametrize("size", SIZES)
def test_torch_passes_its_own_measure(size: int, how: str, ranks: Worlds) -> None:
    """What the harness measures is right for an optimizer that is."""
    check(ranks, size, f"torch {how}", Case("torch.AdamW", {"foreach": False}, how))
