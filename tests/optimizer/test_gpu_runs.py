"""A run on a GPU is that of a host: every class, projector, store and residual of recorded runs.

What a host computes is held to oracles elsewhere; here the same run, saved and loaded in its
middle, is taken by both. Weights are compared by how far they moved: a sum in another order is
rounding, which codes and signs make larger.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from lowrank_optim import LowRankOptimizer
from tests import cases, trajectories
from tests.compare import relative
from tests.optimizer import torch_infos

GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
ROUNDING = 1e-3
"""Of float32 state, as a share of the way that a weight went in all steps."""
NARROW = 3e-2
"""Of state in codes or bfloat16, where a sum in another order may become the next code."""


def moved(optimizer: LowRankOptimizer, starts: list[Tensor]) -> list[Tensor]:
    """How far each weight went."""
    ends = [p.detach().cpu() for group in optimizer.param_groups for p in group["params"]]
    return [end.double() - start.double() for end, start in zip(ends, starts, strict=True)]


def outcome(run: Callable[[str], LowRankOptimizer], device: str) -> LowRankOptimizer | str:
    """What the run ends with, or the words of its refusal."""
    try:
        return run(device)
    except ValueError as error:
        return str(error)


def differences(
    run: Callable[[str], LowRankOptimizer], starts: list[Tensor], device: str
) -> list[float]:
    """Of each weight, as a share of its way on the host; none if both refuse in the same words."""
    host, other = outcome(run, "cpu"), outcome(run, device)
    if isinstance(host, str) or isinstance(other, str):
        assert host == other
        return []
    ways = zip(moved(other, starts), moved(host, starts), strict=True)
    return [relative(a, b) if float(b.norm()) else float(a.norm()) for a, b in ways]


def gradients(shape: Sequence[int], *args: Any, **keys: Any) -> list[Tensor]:
    """Those of all runs, and noise: no entry is below what a device keeps of float32."""
    found = cases.gradients(shape, *args, **keys)
    generator = torch.Generator().manual_seed(len(shape))
    return [x + 1e-2 * torch.randn(x.shape, generator=generator).to(x) for x in found]


def conditioned(name: str, options: dict[str, Any]) -> dict[str, Any] | None:
    """Options whose run rounding does not decide; None where it decides all.

    Right after a refresh coordinates of both sides are a diagonal, beside which is rounding: Adam
    makes steps of it, whose size eps bounds, and Lion takes its signs.
    """
    if options.get("proj_type") != "full":
        return options
    if "eps" not in cases.RULES[torch_infos.rule(name)]:
        return options if name.endswith("SGD") else None
    return {**options, "eps": 1e-2}


def allowed(options: dict[str, Any], name: str) -> float:
    """Rounding, or that of codes or of signs."""
    text = f"{name} {options}"
    if any(x in text for x in ("8bit", "4bit", "bfloat16")):
        return NARROW
    signs = name.startswith("Frugal") and options.get("free_rule", "sign") == "sign"
    return SIGNS if signs else ROUNDING


SIGNS = 1e-2
"""Where a rule takes the sign of what is left of a gradient: of 16,384 entries a few are within
rounding of zero in one of eight steps."""

RUNS = [
    pytest.param(name, projector, own, id=f"{name}-{projector}-{options}")
    for name, projector, options in trajectories.runs()
    if (own := conditioned(name, options)) is not None
]


@pytest.fixture(autouse=True)
def as_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hosts search and repair without looking, as a device must: rsvd's iterations are fixed."""
    cases.branching(monkeypatch, lambda _: True)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize(("name", "projector", "options"), RUNS)
def test_a_run(name: str, projector: str, options: dict[str, Any], device: str) -> None:
    starts = [cases.parameter(shape, torch.float32).detach() for shape in trajectories.SHAPES]

    def run(where: str) -> LowRankOptimizer:
        return trajectories.trained(name, projector, options, torch.float32, where, gradients)

    found = differences(run, starts, device)
    assert max(found, default=0.0) <= allowed(options, name), found


def starting_weights() -> list[Tensor]:
    """Of the network of the recorded runs, in its order."""
    torch.manual_seed(0)
    return [p.detach().clone() for p in trajectories.network().parameters()]


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize("mode", ["project", "step"])
@pytest.mark.parametrize("name", trajectories.INSIDE)
def test_inside_backward(name: str, mode: str, device: str) -> None:
    """Steps wait for nothing there either; micro-batches add up on the device."""
    run = partial(trajectories.inside_backward, name, mode)
    found = differences(run, starting_weights(), device)
    assert max(found, default=0.0) <= ROUNDING, found


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize("name", trajectories.MODULES)
def test_modules(name: str, device: str) -> None:
    """Factors as parameters, converted where the network lies."""

    def run(where: str) -> list[Tensor]:
        optimizer = trajectories.in_modules(name, trajectories.MODULES[name], where)
        return [x.detach().cpu() for x in trajectories.weights(optimizer)]

    for there, here in zip(run(device), run("cpu"), strict=True):
        assert relative(there, here) <= ROUNDING
