"""APOLLO against the straight-line oracle in float64, on the projections that were drawn."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_optim import ApolloAdamW, ApolloAdamW8bit, GaLoreAdamW, lowrank_groups
from lowrank_optim.engine.plan import seeded
from lowrank_optim.subspaces.base import RefreshContext, view_for
from lowrank_optim.subspaces.random import Gaussian
from tests import cases
from tests.cases import matrices
from tests.compare import assert_close, relative
from tests.oracles.apollo import apollo
from tests.oracles.galore import side
from tests.pairwise import paired
from tests.runs import resumed

HYPER: dict[str, Any] = {"lr": 3e-2, "scale": 3.0, "weight_decay": 0.1, **cases.RULES["adamw"]}
STEPS, GAP = 10, 3
SCALE_TYPES = ["channel", "tensor"]
COMBINATIONS = [(kind, limiter) for kind in SCALE_TYPES for limiter in (1.01, None)]


def growing(size: tuple[int, ...], count: int = STEPS) -> list[Tensor]:
    """Gradients whose norm jumps up and down, so that the limiter acts, and lets go."""
    sizes = [1.0, 5.0, 0.3, 40.0, 40.0, 1e-2, 1e-2, 3.0, 3.0, 0.5]
    grads = cases.gradients(size, count)
    return [g * sizes[i % len(sizes)] for i, g in enumerate(grads)]


def expected(
    start: Tensor, grads: list[Tensor], drawn: dict[int, list[Tensor]], proj_type: str, **own: Any
) -> Tensor:
    """The oracle's weights after each gradient, expert by expert: ``(steps, *shape)``."""
    shape = start.shape
    if start.dim() == 4:
        start, grads = start.flatten(1), [g.flatten(1) for g in grads]
    where, runs = side(matrices(start.detach())[0].shape, proj_type), []
    for i, w in enumerate(matrices(start.detach())):
        given = {s: [matrices(x)[i].double() for x in found] for s, found in drawn.items()}
        sides = {
            s: {"left": (x[0], None), "right": (None, x[0])}.get(where, (x[0], x[-1]))
            for s, x in given.items()
        }
        runs.append(apollo(w, [matrices(g)[i] for g in grads], sides, **own))
    found = [torch.stack(x) if start.dim() == 3 else x[0] for x in zip(*runs, strict=True)]
    return torch.stack([x.reshape(shape) for x in found])


@pytest.mark.filterwarnings("ignore:rank")
@pytest.mark.parametrize(
    ("shape", "proj_type", "combination", "projector"),
    paired([*cases.SHAPES], cases.PROJ_TYPES, COMBINATIONS, ["random", "svd", "dct", "hadamard"]),
)
def test_method_is_the_oracle(
    shape: str, proj_type: str, combination: tuple[str, float | None], projector: str
) -> None:
    """Same weights after every one of ten steps, four projections and a resume on the way."""
    size = cases.SHAPES[shape]
    start, grads = cases.parameter(size), growing(size)
    param = torch.nn.Parameter(start.detach().clone())
    own = {**HYPER, **dict(zip(("scale_type", "limiter"), combination, strict=True))}
    if proj_type == "full":
        own["eps"] = 1e-4  # both sides of an SVD leave a diagonal, and rounding beside it
    optimizer = build(param, proj_type=proj_type, projector=projector, **own)
    drawn, got = {}, []
    for s, grad in enumerate(grads):
        if s == 5:  # between two refreshes
            fresh = build(param, proj_type=proj_type, projector=projector, **own)
            resumed(optimizer, fresh)
            optimizer = fresh
        cases.run(optimizer, [param], [[grad]])
        got.append(param.detach().clone())
        if s % GAP == 0:
            drawn[s] = bases_of(optimizer, param)
    assert_close(torch.stack(got), expected(start, grads, drawn, proj_type, **own))


def build(param: Tensor, **options: Any) -> ApolloAdamW:
    optimizer = cases.build("ApolloAdamW", [{"params": [param], "rank": cases.RANK}], **options)
    assert isinstance(optimizer, ApolloAdamW)
    return optimizer


def bases_of(optimizer: ApolloAdamW, param: Tensor) -> list[Tensor]:
    """P of the left side, and Q of the right, as far as they are: of the stored orientation."""
    ((item,),) = [optimizer._items(group) for group in optimizer.param_groups]
    assert item.subspace is not None and item.view is not None
    found = [x.clone() for x in item.subspace.bases(optimizer.state[param], item.view)]
    return found[::-1] if item.view.flip else found
