"""Adafactor takes means over whole tensors: a sharded run is still that of one process."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from lowrank_optim.engine.sharded.local import without
from lowrank_optim.rules.adafactor import Adafactor
from lowrank_optim.rules.base import Split, Sum, together
from tests.sharded import test_resharding, training
from tests.sharded.ranks import Ranks
from tests.sharded.training import Case

Worlds = Callable[[int], Ranks]
ONLY = ("wide", "tall", "few", "experts")

NAMED: dict[str, dict[str, Any]] = {
    "svd": {"projector": "svd", "rank": 3},
    "svd momentum": {"projector": "svd", "rank": 3, "beta1": 0.9, "on_refresh": "reset"},
    "rsvd relative": {"lr": None, "relative_step": True, "scale_parameter": True},
    "rsvd follows": {"on_refresh": "project", "beta1": 0.9, "scale_parameter": True},
    "dct": {"projector": "dct", "on_refresh": "project", "maximize": True},
    "columns": {"projector": "columns", "rank": 0.5, "on_refresh": "project", "beta1": 0.9},
    "two sides": {"projector": "svd", "proj_type": "full", "scale_parameter": True},
    "two sides follow": {"projector": "dct", "proj_type": "full", "on_refresh": "project"},
    "dense": {"rank": None, "scale_parameter": True},
    "dense momentum": {"rank": None, "beta1": 0.9, "lr": None, "relative_step": True},
}
HOWS = ("fsdp", "tensors", "fsdp columns")
TURNS = [(name, (3, 2)[i % 2], HOWS[i % 3]) for i, name in enumerate(NAMED)]


def case_of(name: str, how: str, only: tuple[str, ...]) -> Case:
    """With a decay, and a scale at which the clip of the direction is at work."""
    options = {"scale_parameter": False, "beta1": None, "clip_threshold": 0.7, **NAMED[name]}
    return Case("GaLoreAdafactor", options, how, only)


def check(
    ranks: Worlds,
    size: int,
    name: str,
    how: str,
    only: tuple[str, ...],
    steps: int = training.STEPS,
) -> None:
    case = replace(case_of(name, how, only), steps=steps)
    expected = training.reference(case.reference)
    if NAMED[name].get("rank", 0) is not None:
        training.assert_worth_comparing(case.reference, expected)
    values = ranks(size).run(f"{name} {how}", training.train, case=case).checked()
    run = training.assembled(values)
    training.assert_equal_runs(run, expected)
    training.assert_all_moved(case.reference, run)


@pytest.mark.parametrize(("name", "size", "how"), TURNS[::5])
def test_it_is_one_process(name: str, size: int, how: str, ranks: Worlds) -> None:
    """Over three refreshes, of uneven and empty shards, experts and replicas."""
    check(ranks, size, name, how, ONLY)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("name", NAMED)
def test_it_is_one_process_everywhere(name: str, how: str, size: int, ranks: Worlds) -> None:
    check(ranks, size, name, how, (), training.LONG)


@pytest.mark.parametrize("name", ["rsvd follows", pytest.param("dense", marks=pytest.mark.slow)])
def test_a_run_over_several_numbers_of_ranks_is_one_run(
    name: str, ranks: Worlds, tmp_path: Path
) -> None:
    case = case_of(name, "fsdp", ONLY)
    test_resharding.check(ranks, name, case, False, tmp_path, (3, 1, 2))


DIMS = [(-1,), (-2,), (-3,), (-4,), (-2, -1), (-1, -2), (-3, -2), (-1, -3), (-2, -2), (-1, -1)]
"""Of a gradient, and which of them the first and the second dimension of a mesh split."""


@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("shape", [(5,), (6, 5), (3, 4, 6), (4, 3, 2, 5)], ids=str)
def test_pieces_that_are_added_up_are_the_whole(
    shape: tuple[int, ...], dims: tuple[int, ...]
) -> None:
    """In one process: any dimensions, three pieces of each of which one is empty, two steps."""
    if len(shape) < -min(dims):
        return
    rule = Adafactor(beta1=0.9, clip_threshold=0.5)
    draw = torch.Generator().manual_seed(0)
    slots = rule.slots(shape)
    whole = [torch.zeros(slot.shape(shape), dtype=torch.float64) for slot in slots]
    places = list(itertools.product(*[range(3)] * len(dims)))
    over = {dim: tuple(i for i, own in enumerate(dims) if own == dim) for dim in dims}

    def piece(x: torch.Tensor, at: tuple[int, ...], averaged: int | None = None) -> torch.Tensor:
        """Of a moment; a mean over a dimension is the same in all pieces of that."""
        for dim, i in zip(dims, at, strict=True):
            if averaged != dim:
                dim += averaged is not None and averaged > dim
                size = x.shape[dim]
                x = torch.split(x, [(size + 1) // 2, size // 2, 0], dim)[i]
        return x.clone()

    parts = [[piece(x, at, s.averaged) for x, s in zip(whole, slots, strict=True)] for at in places]
    for step in (1.0, 2.0):
        g = torch.randn(shape, generator=draw, dtype=torch.float64)
        (expected,), _ = rule.directions_([g], [whole], [step])
        work = [
            rule.phases_([piece(g, at)], [kept], [step], split=Split(shape, over))
            for at, kept in zip(places, parts, strict=True)
        ]
        asked, results, ranks = 0, [], together(work)
        while True:
            try:
                sums = next(ranks)
            except StopIteration as end:
                results = end.value
                break
            asked += 1
            each = len(sums) // len(places)  # what ranks sum, one after the other
            for k in range(each):
                add_up(sums[k::each], places)
        assert asked <= (2 if len(over) == 1 else 3)
        for at, ((direction,), _), kept in zip(places, results, parts, strict=True):
            assert torch.allclose(direction, piece(expected, at), rtol=1e-12, atol=1e-14)
            for got, x, slot in zip(kept, whole, slots, strict=True):
                want = piece(x, at, slot.averaged)
                assert torch.allclose(got, want, rtol=1e-12, atol=1e-14)


def add_up(sums: Sequence[Sum], places: Sequence[tuple[int, ...]]) -> None:
    """As ranks do: those that differ in some dimensions of the mesh alone."""
    alike: dict[Any, list[torch.Tensor]] = {}
    for at, (x, over) in zip(places, sums, strict=True):
        alike.setdefault(tuple(i for k, i in enumerate(at) if k not in over), []).append(x)
    for own in alike.values():
        total = torch.stack(own).sum(0)
        for x in own:
            x.copy_(total)


def test_where_means_lie() -> None:
    assert without([Shard(0)], 1) == (Shard(0),)
    assert without([Shard(1)], 0) == (Shard(0),)
    assert without([Shard(1)], 1) == (Replicate(),)
    assert without([Replicate()], 1) == (Replicate(),)
    strided = _StridedShard(1, split_factor=2)
    assert without([strided, Shard(1)], 1) == (Replicate(), Replicate())
    assert without([strided, Shard(1)], 0) == (_StridedShard(0, split_factor=2), Shard(0))
