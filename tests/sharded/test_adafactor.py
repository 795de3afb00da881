"""Adafactor takes means over whole tensors: a sharded run is still that of one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard

from lowrank_optim.engine.sharded.local import without
from lowrank_optim.rules.adafactor import Adafactor
from lowrank_optim.rules.base import Split, together
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


@pytest.mark.parametrize(("name", "size", "how"), TURNS[::2])
def test_it_is_one_process(name: str, size: int, how: str, ranks: Worlds) -> None:
    """Over three refreshes, of uneven and empty shards, experts and replicas."""
    check(ranks, size, name, how, ONLY)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("name", NAMED)
def test_it_is_one_process_everywhere(name: str, how: str, size: int, ranks: Worlds) -> None:
    check(ranks, size, name, how, (), training.LONG)


@pytest.mark.parametrize("name", ["rsvd follows", "dense"])
def test_a_run_over_several_numbers_of_ranks_is_one_run(
    name: str, ranks: Worlds, tmp_path: Path
) -> None:
    case = case_of(name, "fsdp", ONLY)
    test_resharding.check(ranks, name, case, False, tmp_path, test_resharding.ROUTE[:3])


@pytest.mark.parametrize("dim", [-1, -2, -3, -4])
@pytest.mark.parametrize("shape", [(5,), (6, 5), (3, 4, 6), (4, 3, 2, 5)], ids=str)
def test_pieces_that_are_added_up_are_the_whole(shape: tuple[int, ...], dim: int) -> None:
    """In one process: any dimension, three pieces of which one is empty, two steps."""
    if len(shape) < -dim:
        return
    rule = Adafactor(beta1=0.9, clip_threshold=0.5)
    draw = torch.Generator().manual_seed(0)
    slots = rule.slots(shape)
    whole = [torch.zeros(slot.shape(shape), dtype=torch.float64) for slot in slots]
    sizes = [(shape[dim] + 1) // 2, shape[dim] // 2, 0]

    def pieces(x: torch.Tensor, averaged: int | None) -> list[torch.Tensor]:
        """Of a moment; a mean over the dimension is the same in all."""
        if averaged == dim:
            return [x.clone() for _ in sizes]
        after = averaged is not None and averaged > dim
        return [y.clone() for y in torch.split(x, sizes, dim + after)]

    split = [pieces(x, slot.averaged) for x, slot in zip(whole, slots, strict=True)]
    parts = [list(own) for own in zip(*split, strict=True)]
    for step in (1.0, 2.0):
        g = torch.randn(shape, generator=draw, dtype=torch.float64)
        (expected,), _ = rule.directions_([g], [whole], [step])
        work = [
            rule.phases_([own], [kept], [step], split=Split(shape, dim))
            for own, kept in zip(torch.split(g, sizes, dim), parts, strict=True)
        ]
        asked, results, ranks = 0, [], together(work)
        while True:
            try:
                sums = next(ranks)
            except StopIteration as end:
                results = end.value
                break
            asked += 1
            each = len(sums) // len(sizes)  # what ranks sum, one after the other
            for k in range(each):
                own = sums[k::each]
                total = torch.stack(own).sum(0)
                for x in own:
                    x.copy_(total)
        assert asked <= 2
        direction = torch.cat([own for (own,), _ in results], dim)
        assert torch.allclose(direction, expected, rtol=1e-12, atol=1e-14)
        for n, x in enumerate(whole):
            for got, want in zip([p[n] for p in parts], pieces(x, slots[n].averaged), strict=True):
                assert torch.allclose(got, want, rtol=1e-12, atol=1e-14)


def test_where_means_lie() -> None:
    assert without([Shard(0)], 1) == (Shard(0),)
    assert without([Shard(1)], 0) == (Shard(0),)
    assert without([Shard(1)], 1) == (Replicate(),)
    assert without([Replicate()], 1) == (Replicate(),)
