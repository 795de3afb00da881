"""Every GaLore class against straight-line GaLore, in float64; and that against the release."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests import cases
from tests.cases import matrices
from tests.compare import assert_close, assert_mostly_close, relative
from tests.oracles.galore import galore
from tests.pairwise import paired
from tests.runs import resumed

CLASSES = {
    "adamw": "GaLoreAdamW",
    "lion": "GaLoreLion",
    "sgd": "GaLoreSGD",
    "adafactor": "GaLoreAdafactor",
}
COMMON: dict[str, Any] = {"lr": 3e-2, "scale": 0.7, "weight_decay": 0.1}
STEPS = 10  # with a gap of 3: refreshes at 0, 3, 6 and 9
SHAPES = ["wide", "tall", "square", "small", "experts"]


def expected(start: Tensor, grads: list[Tensor], rank: int, **kwargs: Any) -> Tensor:
    """The oracle's weights after each gradient, expert by expert: ``(steps, *shape)``."""
    runs = [
        galore(w, [matrices(g)[i] for g in grads], rank=min(rank, *w.shape), **kwargs)
        for i, w in enumerate(matrices(start.detach()))
    ]
    steps = zip(*runs, strict=True)
    return torch.stack([torch.stack(x) if start.dim() == 3 else x[0] for x in steps])


@pytest.mark.filterwarnings("ignore:rank 4 is clamped")
@pytest.mark.parametrize(
    ("shape", "proj_type", "rule", "on_refresh"),
    paired(SHAPES, cases.PROJ_TYPES, [*CLASSES], ["keep", "reset", "project"]),
)
def test_method_is_the_oracle(shape: str, proj_type: str, rule: str, on_refresh: str) -> None:
    """Same weights after every one of ten steps, four refreshes and a resume on the way.

    Two-sided bases make ``P^T G Q`` diagonal at a refresh: off the diagonal it is rounding noise,
    1e-16 that Adam divides by eps and Lion takes the sign of. There Adam gets an eps of 1e-4, and
    Lion a learning rate of zero on refresh steps (which checks a changing rate as well).
    """
    size = cases.SHAPES[shape]
    start, grads = cases.parameter(size), cases.gradients(size, STEPS)
    hyper = {**COMMON, **cases.RULES[rule], "proj_type": proj_type, "on_refresh": on_refresh}
    rates = [COMMON["lr"]] * STEPS
    if proj_type == "full":  # see the docstring
        hyper |= {"eps": 1e-4} if rule == "adamw" else {}
        rates = [0.0 if rule == "lion" and s % 3 == 0 else x for s, x in enumerate(rates)]
    want = expected(start, grads, cases.RANK, rule=rule, gap=3, **{**hyper, "lr": rates})

    param = torch.nn.Parameter(start.detach().clone())

    def make() -> torch.optim.Optimizer:
        return cases.build(CLASSES[rule], [{"params": [param], "rank": cases.RANK}], **hyper)

    optimizer = make()
    for i, grad in enumerate(grads):
        if i == 5:  # between two refreshes
            fresh = make()
            resumed(optimizer, fresh)
            optimizer = fresh
        optimizer.param_groups[0]["lr"] = rates[i]
        cases.run(optimizer, [param], [[grad]])
        assert_close(param, want[i])


@pytest.mark.parametrize("proj_type", cases.PROJ_TYPES)
def test_adafactor_with_its_own_step_size_is_the_oracle(proj_type: str) -> None:
    """The relative step and the parameter's scale, which the grid above turns off."""
    size = cases.SHAPES["wide"]
    start, grads = cases.parameter(size), cases.gradients(size, STEPS)
    hyper = {"scale": 0.7, "weight_decay": 0.1, "proj_type": proj_type, "relative_step": True}
    want = expected(start, grads, 4, rule="adafactor", lr=0.0, gap=3, **hyper)
    got, _ = cases.train("GaLoreAdafactor", start, grads, lr=None, scale_parameter=True, **hyper)
    assert_close(got, want[-1])


@pytest.mark.parametrize("rule", CLASSES)
@pytest.mark.parametrize("shape", ["wide", "tall"])
def test_float32_follows_the_float64_oracle(shape: str, rule: str) -> None:
    """One rounding per operation, not a different algorithm; signs may flip near zero."""
    size = cases.SHAPES[shape]
    start, grads = cases.parameter(size), cases.gradients(size, 6)
    hyper = {**COMMON, **cases.RULES[rule], "proj_type": "std"}
    want = expected(start, grads, 2, rule=rule, gap=3, **hyper)
    singles = [g.float() for g in grads]
    got, _ = cases.train(CLASSES[rule], start.detach().float(), singles, rank=2, **hyper)
    rate = 0.05 if rule == "lion" else 0.0
    assert_mostly_close(got, want[-1], torch.float32, max_error_rate=rate)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("proj_type", cases.PROJ_TYPES)
@pytest.mark.parametrize("shape", ["wide", "tall", "square"])
def test_oracle_is_the_release(shape: str, proj_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """galore-torch's own GaLoreAdamW, ten steps and four refreshes.

    The oracle puts eps where the release does (before bias correction) and takes the SVD's own
    signs; decay, which the release applies last, is off. The release casts float64 gradients to
    float32 for the SVD; its cast is disabled so that the comparison is exact.
    """
    released = pytest.importorskip("galore_torch").GaLoreAdamW
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self)
    size = cases.SHAPES[shape]
    start, grads = cases.parameter(size), cases.gradients(size, STEPS)
    param = torch.nn.Parameter(start.detach().clone())
    group = {"rank": 4, "update_proj_gap": 3, "scale": 0.7, "proj_type": proj_type}
    theirs = released(
        [{"params": [param], **group}], lr=3e-2, betas=(0.8, 0.95), eps=1e-4,
        no_deprecation_warning=True,
    )  # fmt: skip
    ours = galore(
        start.detach(), grads, rank=4, gap=3, scale=0.7, proj_type=proj_type, rule="adamw",
        lr=3e-2, betas=(0.8, 0.95), eps=1e-4, eps_first=True, align=False,
    )  # fmt: skip
    for grad, want in zip(grads, ours, strict=True):
        cases.run(theirs, [param], [[grad]])
        assert relative(param, want) < 1e-12
