"""Ctrl-C before any line of a step: each parameter has taken it, or not, or is named.

Python hears of a signal between two of its own operations. One that comes while a kernel runs,
where most of a step's time is, is heard when that kernel has written, and before anybody has noted
that it did. Weights that one kernel writes were then written and their moments put back.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lowrank_optim import LowRankOptimizer
from tests import cases
from tests.engine.snapshots import everything, same
from tests.reliability.injection import Interrupted
from tests.reliability.test_step_raises import GAP, copied, prepared, set_grads

KINDS: list[tuple[str, str | None, dict[str, Any]]] = [
    ("GaLoreAdamW", "columns", {}),
    ("DCTAdamW", "dct", {"error_feedback": "float32"}),
    ("FrugalAdamW", "block", {}),
    ("GaLoreAdamW", "svd", {"state_dtype": "8bit"}),
    ("FrugalAdamW", "columns", {"state_dtype": "bfloat16"}),
    ("FiraAdamW", "rsvd", {}),
    ("GaLoreAdafactor", "svd", {}),
    ("ApolloAdamW", None, {}),
    ("LDAdamW", None, {}),
    ("SSTAdamW", None, {}),
]
EVERY = 5
"""Lines of which one is tried, of some thousands a step."""


def of_each(optimizer: LowRankOptimizer) -> dict[str, dict[str, torch.Tensor]]:
    """Weights and state of each parameter, by its place."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, x in everything(optimizer).items():
        found.setdefault(key.split(".")[0], {})[key] = x
    return found


def names_of(optimizer: LowRankOptimizer) -> list[str]:
    return [i.name for group in optimizer.param_groups for i in optimizer._items(group)]


def lines_of(base: LowRankOptimizer) -> list[tuple[str, int]]:
    copied(base).step()  # what is made once a process
    counting, new = Interrupted(), copied(base)
    with counting:
        new.step()
    return counting.lines


def after_a_kernel(base: LowRankOptimizer) -> list[int]:
    """Numbers of the lines after the call into the library, and of those that note its end."""
    lines = lines_of(base)
    last = {line: n for n, line in enumerate(lines) if line[0] == "ops/native/loader.py"}
    first = {line: n for n, line in enumerate(lines) if line[0].startswith("engine/fused/")}
    return [*sorted(last.values())[-4:], *sorted(first.values())[-1:]]


def options_of(optimizer: LowRankOptimizer) -> set[str]:
    return {group["projector"] for group in optimizer.param_groups}


def check(base: LowRankOptimizer, numbers: list[int]) -> int:
    """Interrupt at lines of these numbers; returns how often somebody was named."""
    taken = copied(base)
    taken.step()
    before, wanted, named = of_each(base), of_each(taken), 0
    for at in numbers:
        optimizer, stop = copied(base), Interrupted(at)
        with pytest.raises(KeyboardInterrupt) as caught, stop:
            optimizer.step()
        notes = getattr(caught.value, "__notes__", [])
        told = " ".join(note for note in notes if "in part" in note or "lack a part" in note)
        named += bool(told)
        for place, own in of_each(optimizer).items():
            name = names_of(optimizer)[int(place)]
            whole = not same(own, wanted[place]) or not same(own, before[place])
            whole |= "block" in options_of(optimizer)  # moments that start again do so again
            assert whole or name in told, (at, stop.lines[-1], name, notes)
        if notes and not told:  # without notes it had not begun, or had ended
            optimizer.step()
            assert not same(everything(optimizer), everything(taken)), (at, stop.lines[-1])
    return named


def named(base: LowRankOptimizer) -> LowRankOptimizer:
    """With names that tell parameters of two groups apart."""
    for n, group in enumerate(base.param_groups):
        group["param_names"] = [f"{n}_{i}_of_group" for i in range(len(group["params"]))]
    base._plans.clear()
    return base


@pytest.mark.parametrize(
    ("name", "projector", "options"),
    [pytest.param(*x, marks=() if x is KINDS[0] else pytest.mark.slow) for x in KINDS],
    ids=str,
)
def test_who_has_taken_an_interrupted_step_is_known(
    name: str, projector: str | None, options: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    """The lines that follow a kernel; slow ones are of all lines."""
    base = named(prepared(name, projector, GAP, **options))
    if request.node.get_closest_marker("slow") is None:
        check(base, after_a_kernel(base))
    else:
        check(base, list(range(0, len(lines_of(base)), EVERY)))


@pytest.mark.slow
@pytest.mark.parametrize("projector", ["columns", "svd"])
def test_large_weights_that_were_being_written_are_named(projector: str) -> None:
    """Nothing of them is copied."""
    params = [("weight", nn.Parameter(torch.ones(300, 300)))]
    base = cases.build("GaLoreAdamW", [{"params": params, "rank": 3}], projector=projector)
    for row in range(2):
        set_grads(base, row)
        if not row:
            base.step()
    assert check(base, list(range(0, len(lines_of(base)), EVERY)))
