"""What a step asks of each matrix it asks once, and of roles only what they are there for."""

from __future__ import annotations

from collections import Counter
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor

from lowrank_optim import GaLoreAdamW
from lowrank_optim.engine import project
from lowrank_optim.optimizer import LowRankOptimizer
from lowrank_optim.residuals import Drop
from lowrank_optim.rules.adamw import AdamW
from lowrank_optim.tensors.matrix import MatrixView
from tests import cases

SHAPES = [(6, 9)] * 3 + [(9, 6)] * 2


@pytest.fixture(params=[False, True], ids=["host", "accelerator"])
def stepped(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> LowRankOptimizer:
    """After a step that has found bases; no other is due."""
    cases.branching(monkeypatch, lambda x: bool(request.param))
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer = GaLoreAdamW(params, rank=2, update_proj_gap=100, weight_decay=0.1)
    optimizer.step()
    return optimizer


def test_a_matrix_is_viewed_once(
    stepped: LowRankOptimizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights and gradient, each in canonical orientation: a view costs as much as a launch."""
    seen: Counter[int] = Counter()
    plain = MatrixView.of

    def of(self: MatrixView, x: Tensor) -> Tensor:
        seen[id(x)] += 1
        return plain(self, x)

    monkeypatch.setattr(MatrixView, "of", of)
    stepped.step()
    params = stepped.param_groups[0]["params"]
    assert seen == {id(x): 1 for p in params for x in (p, p.grad)}


def test_nobody_searches_where_no_basis_is_due(
    stepped: LowRankOptimizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Generators, and who asks them in turns, are for matrices whose basis is due."""
    searched: list[int] = []
    plain = project.together

    def together(searches: Any) -> Any:
        searched.append(len(searches))
        return plain(searches)

    monkeypatch.setattr(project, "together", together)
    stepped.step()
    assert searched == []
    for state in [*stepped.state.values()][:2]:
        state["refresh_step"].fill_(-1)
    stepped.step()
    assert sum(searched) == 2


def test_who_drops_all_is_not_asked_for_it(
    stepped: LowRankOptimizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A residual that wants nothing has no term, and keeps nothing."""

    def asked(*_: object) -> NoReturn:
        raise AssertionError

    for name in ("after", "after_all", "keep_", "keep_all_"):
        monkeypatch.setattr(Drop, name, asked)
    stepped.step()


def test_one_step_has_one_correction(
    stepped: LowRankOptimizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of alike matrices at the same step, which a bucket has on an accelerator."""
    steps: list[float] = []
    plain = AdamW.factors

    def factors(self: AdamW, step: float) -> tuple[float, float]:
        steps.append(step)
        return plain(self, step)

    monkeypatch.setattr(AdamW, "factors", factors)
    stepped.step()
    assert steps == [2.0] * len({*SHAPES})
