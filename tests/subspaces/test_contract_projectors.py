"""What every registered projector must keep: registering one enrols it here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from lowrank_optim import PROJECTORS, Projector, register
from lowrank_optim.engine.draws import seeded
from lowrank_optim.subspaces import RefreshContext
from tests import cases
from tests.pairwise import paired
from tests.subspaces.contract import (
    CONTRACT,
    SHAPES,
    coordinates_invert_the_lift,
    deterministic,
    orthonormal,
    setup,
)


@pytest.mark.parametrize(
    ("clause", "projector", "proj_type"),
    [
        pytest.param(
            clause,
            projector,
            proj_type,
            id=f"{clause.__name__}-{projector}-{proj_type}",
            # a clause has every side, and so has a projector
            marks=pytest.mark.slow if (i + j) % len(cases.PROJ_TYPES) != k else (),
        )
        for i, clause in enumerate(CONTRACT)
        for j, projector in enumerate(cases.projector_names())
        for k, proj_type in enumerate(cases.PROJ_TYPES)
    ],
)
def test_projector(clause: Callable[[str, str], None], projector: str, proj_type: str) -> None:
    clause(projector, proj_type)


@pytest.mark.parametrize("shape", SHAPES)
def test_seed_index_and_count_decide_what_is_drawn(shape: tuple[int, ...]) -> None:
    """Three counters, three independent streams; a projector that draws sees all of them."""
    grads = cases.gradients(shape, 1)
    view, subspace = setup("random", "std", shape)
    drawn = []
    for numbers in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0)]:
        state = subspace.init(view, grads[0])
        subspace.refresh_(state, view.of(grads[0]), RefreshContext(view, seeded(*numbers)))
        drawn.append(state["basis"])
    for i, x in enumerate(drawn):
        assert not any(torch.allclose(x, y) for y in drawn[i + 1 :])


@pytest.fixture
def newcomer() -> Iterator[tuple[str, str]]:
    """Two projectors registered for one test: one that keeps the contract, one that does not."""

    @register("tmp_rows")
    @dataclass(frozen=True)
    class LargestRows(Projector):
        def find(self, grad: Tensor, previous: Tensor | None, ctx: RefreshContext) -> Tensor:
            rows = grad.square().sum(-1).topk(self.rank).indices.sort().values
            eye = torch.eye(grad.shape[-2], dtype=torch.promote_types(grad.dtype, torch.float32))
            return eye[rows].mT

    @register("tmp_bad")
    @dataclass(frozen=True)
    class Skewed(Projector):
        def find(self, grad: Tensor, previous: Tensor | None, ctx: RefreshContext) -> Tensor:
            return torch.randn(*grad.shape[:-1], self.rank).to(grad.dtype)

    yield "tmp_rows", "tmp_bad"
    del PROJECTORS["tmp_rows"], PROJECTORS["tmp_bad"]


def test_a_new_projector_is_enrolled_and_held_to_the_contract(newcomer: tuple[str, str]) -> None:
    """One class and ``@register``: it is in the registry that the grid above is made from."""
    good, bad = newcomer
    assert {good, bad} <= set(cases.projector_names())
    for proj_type in cases.PROJ_TYPES:
        for clause in CONTRACT:
            clause(good, proj_type)
    for clause in (orthonormal, coordinates_invert_the_lift, deterministic):
        with pytest.raises(AssertionError):
            clause(bad, "std")


def test_the_throw_away_projectors_are_gone() -> None:
    assert not {"tmp_rows", "tmp_bad"} & set(cases.projector_names())


RESIDUALS: dict[str, tuple[str, dict[str, Any]]] = {
    "dropped": ("GaLoreAdamW", {}),
    "scaled": ("FiraAdamW", {}),
    "scaled, paper": ("FiraAdamW", {"alpha_mode": "paper", "scaling": "matrix"}),
    "sign": ("FrugalAdamW", {"free_rule": "sign"}),
    "raw": ("FrugalAdamW", {"free_rule": "sgd"}),
    "none": ("FrugalAdamW", {"free_rule": "none"}),
    "kept": ("DCTAdamW", {"error_feedback": "float32"}),
}


@pytest.mark.parametrize(
    ("projector", "residual", "forced"),
    paired(cases.projector_names(), [*RESIDUALS], [False, True]),
)
def test_no_entry_of_a_bad_gradient_goes_unseen(
    projector: str, residual: str, forced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN or Inf anywhere, in the subspace or not: no weight moves and nothing is remembered.

    A set of indices does not see the entries outside it; what moves those is the gradient itself,
    and one bad entry there would be in the weights for good. Three matrices and a batch, of which
    some blocks are idle. An active block is a dense parameter, which on an accelerator follows
    ``torch.optim`` and is not guarded.
    """
    if forced:
        cases.branching(monkeypatch, lambda tensor: True)
    shapes = [(6, 11), (13, 7), (8, 8), (2, 6, 5)]
    params = [torch.nn.Parameter(cases.parameter(s, seed=i).detach()) for i, s in enumerate(shapes)]
    name, own = RESIDUALS[residual]
    options: dict[str, Any] = {"projector": projector, "update_proj_gap": 50, "rank": 3, **own}
    if (projector, residual) == ("block", "kept"):  # raised at the first idle step, a KeyError
        with pytest.raises(ValueError, match="error_feedback does not go with projector='block'"):
            cases.build(name, params, **options)
        return
    optimizer = cases.build(name, params, weight_decay=0.1, **options)
    good = [cases.gradients(s, 1, seed=i)[0] for i, s in enumerate(shapes)]
    cases.run(optimizer, params, [good, good])

    guarded = params
    if projector == "block" and forced:
        guarded = [p for p in params if int(optimizer.state[p]["refresh_step"]) < 0]
        assert guarded

    def held() -> list[Tensor]:
        states = [optimizer.state[p] for p in guarded]
        counters = ("step", "clock", "low.age")
        kept = [v.clone() for s in states for k, v in s.items() if k not in counters]
        return [p.detach().clone() for p in guarded] + kept

    before = held()
    for number, place in enumerate(range(0, 60, 13)):
        bad = [g.clone() for g in good]
        for g in bad:
            g.view(-1)[place] = (float("nan"), float("inf"), -float("inf"))[number % 3]
        cases.run(optimizer, params, [bad])
        for a, b in zip(held(), before, strict=True):
            assert torch.equal(a, b)
    cases.run(optimizer, params, [good])
    assert all(bool(p.isfinite().all()) for p in guarded)
