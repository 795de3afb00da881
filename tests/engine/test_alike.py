"""Alike matrices that are computed as one tensor on an accelerator: the bits of each alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lowrank_optim.ops.stacked import empty_like_all
from lowrank_optim.ops.tiles import fillings
from lowrank_optim.subspaces import spectral, switched
from lowrank_optim.subspaces.target import Target, guarded
from tests import cases

COUNT, STEPS = 3, 5
SHAPES = [(8, 12)] * COUNT + [(12, 6)] * COUNT
RUNS: list[tuple[str, dict[str, Any]]] = [
    ("SSTAdamW", {"factors": "active"}),
    ("SSTAdamW", {"factors": "active", "negative": "flip", "steps_per_iteration": 2, "lr": 0.5}),
    ("SSTAdamW", {"factors": "active", "maximize": True, "stochastic_rounding": True}),
    ("SwitchLoRAAdamW", {"interval": 4, "freeze_steps": 2, "decay_on": "factors"}),
    ("SwitchLoRAAdamW", {"interval": 4, "freeze_steps": 2, "decay_on": "weight"}),
    ("SwitchLoRAAdamW", {"restart_every": 2, "stochastic_rounding": True}),
]


def trained(name: str, options: dict[str, Any], dtype: torch.dtype) -> list[Tensor]:
    """Weights and state after some steps, in one of which a gradient is not finite."""
    params = [cases.parameter(shape, dtype, seed=i) for i, shape in enumerate(SHAPES)]
    optimizer = cases.build(name, params, weight_decay=0.1, **options)
    every = [cases.gradients(shape, STEPS, dtype, seed=i) for i, shape in enumerate(SHAPES)]
    every[1][2] = torch.full_like(every[1][2], torch.nan)
    cases.run(optimizer, params, list(zip(*every, strict=True)))
    states = [x for p in params for _, x in sorted(optimizer.state[p].items())]
    return [*(p.detach() for p in params), *states]


@pytest.mark.filterwarnings("ignore:.*does not use")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name, options", RUNS, ids=str)
def test_together_and_each_alone(
    name: str, options: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And stepped where they lie, or beside that, as on a host."""
    cases.branching(monkeypatch, lambda tensor: True)
    sizes: list[int] = []

    def several(count: int, size: int, like: Tensor) -> list[range]:
        found = fillings(count, size, like)
        sizes.extend(map(len, found))
        return found

    for module in (spectral, switched):
        monkeypatch.setattr(module, "fillings", several)
    together = trained(name, options, dtype)
    assert set(sizes) == {COUNT}

    def alone(count: int, size: int, like: Tensor) -> list[range]:
        return [range(n, n + 1) for n in range(count)]

    def apart(xs: Sequence[Tensor]) -> list[Tensor]:
        return empty_like_all(xs, xs[0].shape, xs[0].dtype)

    for module in (spectral, switched):
        monkeypatch.setattr(module, "fillings", alone)
        monkeypatch.setattr(module, "over_all", apart)
    for mine, theirs in zip(together, trained(name, options, dtype), strict=True):
        assert torch.equal(mine, theirs)


def test_no_more_than_a_tile_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a host, and of experts, each alone: in the cache, or a batch already."""
    matrix, experts = torch.empty(4, 6), torch.empty(3, 4, 6)
    assert [*map(len, fillings(5, 10, matrix))] == [1] * 5
    cases.branching(monkeypatch, lambda tensor: True)
    monkeypatch.setattr("lowrank_optim.ops.tiles.ACCELERATOR_TILE_ELEMENTS", 25)
    assert fillings(5, 10, matrix) == [range(2), range(2, 4), range(4, 5)]
    assert [*map(len, fillings(5, 10, experts))] == [1] * 5
    assert [*map(len, fillings(5, 26, matrix))] == [1] * 5


@pytest.mark.parametrize(
    "decays", [(0.5, 0.5, 0.5), (1.0, 1.0, 1.0), (0.5, 0.25, 0.5), "tensor", "experts"], ids=str
)
def test_guarded_decays_of_several_are_those_of_each(decays: Sequence[float] | str) -> None:
    """The decay where a gradient is finite, else 1."""
    if isinstance(decays, str):
        shape = () if decays == "tensor" else (3, 1, 1)
        decays = [torch.full(shape, 0.3)] * COUNT  # type: ignore[list-item]
    x = torch.zeros(4, 6, dtype=torch.bfloat16)
    flags = torch.tensor([True, False, True]).unbind()
    intos = [
        Target(x, x, None, 1.0, decay, None, flag)
        for decay, flag in zip(decays, flags, strict=True)
    ]
    for alone, together in zip(intos, guarded(intos), strict=True):
        mine, theirs = (torch.as_tensor(y.guarded_decay()) for y in (alone, together))
        assert torch.equal(mine, theirs) and mine.shape == theirs.shape
