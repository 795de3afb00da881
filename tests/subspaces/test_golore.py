"""Exact bases early and random ones late: when they turn, and what noise does to each."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch

from lowrank_optim import GaLoreAdamW
from tests import cases
from tests.oracles import golore
from tests.runs import resumed

STEPS, SIZE, RANK = 200, 8, 2
LATE = {"projector": "golore", "random_from": 0.5, "total_steps": STEPS}


def left(name: str, **options: Any) -> tuple[float, float]:
    """Norm of the gradient of f after half of the steps, and after all, of that at the start."""
    param = torch.nn.Parameter(torch.zeros(SIZE, SIZE, dtype=torch.float64))
    slope, generator = golore.slope(SIZE, SIZE, RANK), torch.Generator().manual_seed(1)
    keys = {key: options.pop(key) for key in ("random_from", "total_steps") if key in options}
    group = {"params": [param], "rank": RANK, **keys}
    own = {"scale": 1.0, "weight_decay": 0.0, "update_proj_gap": 5, **options}
    optimizer = cases.build(name, [group], **own)
    sigma, norms = 20 * float(slope.norm()), []
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / STEPS)
        norms.append(float(golore.gradient(param.detach(), slope, RANK).norm()))
        param.grad = golore.noisy(param.detach(), slope, RANK, sigma, generator)
        optimizer.step()
    return norms[STEPS // 2] / norms[0], norms[-1] / norms[0]


STALLS = {
    "galore": ("GaLoreAdamW", {"projector": "svd"}),
    "galore, rsvd": ("GaLoreAdamW", {"projector": "rsvd"}),
    "galore, sgd": ("GaLoreSGD", {"projector": "svd"}),
    "fira": ("FiraAdamW", {"projector": "svd"}),
    "fira, matrix": ("FiraAdamW", {"projector": "svd", "scaling": "matrix"}),
    "frugal, none": ("FrugalAdamW", {"projector": "svd", "free_rule": "none"}),
    "ldadam": ("LDAdamW", {}),
    "ldadam, no errors": ("LDAdamW", {"error_feedback": None, "update_proj_gap": 1}),
}


LIKE_OTHERS = (
    "galore, rsvd", "galore, sgd", "fira, matrix", "ldadam, no errors",
    "golore", "golore late, sgd", "frugal, sgd",
)  # fmt: skip
"""Variants of a case that the default run has."""


def each(cases: Iterable[str]) -> list[Any]:
    return [pytest.param(x, marks=pytest.mark.slow if x in LIKE_OTHERS else ()) for x in cases]


@pytest.mark.parametrize("case", each(STALLS))
def test_singular_vectors_of_noise_stall(case: str) -> None:
    """All steps are in coordinates where f is flat. Fira's residual has the scale of those steps.

    Of columns without noise Fira's factor is that of coordinates that are zero, and of the whole
    matrix it is the direction over noise. LDAdam keeps what it does not use, for ever: its basis
    turns to a direction only if the gradient has it in a column beside one that is in the basis.
    """
    name, options = STALLS[case]
    assert left(name, **options)[1] > 0.9


CONVERGES = {
    "golore": ("GaLoreAdamW", {"projector": "golore", "on_refresh": "project"}),
    "golore late": ("GaLoreAdamW", {**LATE, "on_refresh": "project", "scale": 3.0}),
    "golore late, sgd": ("GaLoreSGD", {**LATE, "momentum": 0.0, "scale": 5.0}),
    "fira, golore late": ("FiraAdamW", LATE),
    "frugal, sign": ("FrugalAdamW", {"projector": "svd"}),
    "frugal, sgd": ("FrugalAdamW", {"projector": "svd", "free_rule": "sgd"}),
    "frugal, columns": ("FrugalAdamW", {"projector": "columns"}),
}


@pytest.mark.parametrize("case", each(CONVERGES))
def test_random_bases_and_free_rules_get_there(case: str) -> None:
    """The late ones have not moved at half of the run, and are there at its end."""
    name, options = CONVERGES[case]
    middle, end = left(name, **options)
    assert end < 0.3
    if "random_from" in options:
        assert middle > 0.9


@pytest.mark.parametrize("shape", ["wide", "tall", "experts"])
@pytest.mark.parametrize("forced", [False, True])
def test_it_is_svd_before_and_random_after(
    shape: str, forced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit: the turn is by the steps that a matrix has taken, given as a number or a part."""
    if forced:
        cases.branching(monkeypatch, lambda tensor: True)
    size = cases.SHAPES[shape]
    start, grads = cases.parameter(size).detach(), cases.gradients(size, 10)

    def run(count: int, projector: str, **keys: Any) -> tuple[torch.Tensor, torch.Tensor]:
        param = torch.nn.Parameter(start.clone())
        group = {"params": [param], "rank": 2, **keys}
        optimizer = cases.build("GaLoreAdamW", [group], projector=projector)
        cases.run(optimizer, [param], [[g] for g in grads[:count]])
        return param.detach(), optimizer.state[param]["basis"]

    for keys in ({"random_from": 6}, {"random_from": 0.6, "total_steps": 10}):
        assert torch.equal(run(6, "golore", **keys)[0], run(6, "svd")[0])
        drawn = run(7, "golore", **keys)[1]
        assert not torch.allclose(drawn.abs(), run(7, "svd")[1].abs())
        if not forced:  # where noise for a gradient that is not usable comes first from one stream
            assert torch.equal(drawn.abs(), run(7, "random")[1].abs())  # signs: the basis before
    if not forced:
        assert torch.equal(run(10, "golore")[0], run(10, "random")[0])
    late = {"random_from": 1.0, "total_steps": 11}
    assert torch.equal(run(10, "golore", **late)[0], run(10, "svd")[0])


@pytest.mark.parametrize("saved", [5, 6, 8])
def test_a_run_resumes_before_and_after_the_turn(saved: int) -> None:
    size = cases.SHAPES["wide"]
    start, grads = cases.parameter(size).detach(), cases.gradients(size, 12)
    found = []
    for stops in (False, True):
        param = torch.nn.Parameter(start.clone())
        group = {"params": [param], "rank": 2, "random_from": 6}
        optimizer = cases.build("GaLoreAdamW", [group], projector="golore")
        for step, grad in enumerate(grads):
            if stops and step == saved:
                fresh = cases.build("GaLoreAdamW", [group], projector="golore")
                resumed(optimizer, fresh)
                optimizer = fresh
            cases.run(optimizer, [param], [[grad]])
        found.append(param.detach())
    assert torch.equal(*found)


def test_no_sign_is_taken_of_rounding_while_it_is_exact() -> None:
    """A basis of min(m, n) singular vectors leaves nothing of its gradient; a random one does."""
    start, (grad,) = torch.zeros(13, 7, dtype=torch.float64), cases.gradients((13, 7), 1)

    def moved(since: int) -> torch.Tensor:
        param = torch.nn.Parameter(start.clone())
        group = {"params": [param], "rank": 7, "random_from": since, "proj_type": "left"}
        optimizer = cases.build("FrugalSGD", [group], projector="golore", lr=1.0)
        cases.run(optimizer, [param], [[grad]])
        return param.detach()

    torch.testing.assert_close(moved(1), -grad)
    rest = moved(0) + grad
    assert float(rest.abs().max()) > 0.1


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"random_from": 0.8}, "random_from=0.8 is a part of total_steps, which is not given"),
        ({"random_from": 1.5, "total_steps": 9}, "random_from must be a step of at least 0, or a"),
        ({"random_from": -1}, "random_from must be a step of at least 0, or a float in"),
        ({"random_from": True}, "random_from must be a step of at least 0, or a float in"),
        ({"random_form": 3}, "did you mean 'random_from'"),
    ],
)
def test_what_cannot_be_a_turn_is_refused(keys: dict[str, Any], message: str) -> None:
    param = torch.nn.Parameter(torch.zeros(6, 11))
    with pytest.raises(ValueError, match=message):
        GaLoreAdamW([{"params": [param], "rank": 2, "projector": "golore", **keys}])
