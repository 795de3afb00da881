"""Which parameters replicas share, and what becomes of those that they do not."""

from __future__ import annotations

import copy
import logging
import pickle
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import lowrank_optim
from lowrank_optim.backward import attach_in_backward
from lowrank_optim.engine import stepped
from lowrank_optim.engine.sharded import alike as owners
from tests import cases
from tests.compare import assert_close
from tests.engine.watch import Watch
from tests.sharded.ranks import Ranks, World

Worlds = Callable[[int], Ranks]
OPTIONS: dict[str, Any] = {"lr": 1e-2, "rank": 3, "projector": "svd", "update_proj_gap": 2}


def network(seed: int = 0, layers: int = 2) -> nn.Sequential:
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.manual_seed(seed)
    return nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(layers))).double()


def batch(step: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(16, 8, generator=generator, dtype=torch.float64)


def backward(model: nn.Module, step: int, rank: int) -> None:
    model(batch(step, rank)).square().mean().backward()


def other_bits(world: World) -> Any:
    """Let each rank find another basis: what only an owner's broadcast makes good.

    Returns what puts it back.
    """
    from lowrank_optim.subspaces.svd import SVD

    find = SVD.find

    def found(self: Any, *args: Any) -> Tensor:
        return find(self, *args) * (1 + 2.0**-30 * world.rank)

    SVD.find = found  # type: ignore[method-assign]
    return lambda: setattr(SVD, "find", find)


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def alike(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def following(world: World, cls: str, memory: str | None) -> Any:
    """Weights under DDP where each rank would find other bases, and of one process on the mean."""
    from lowrank_optim.subspaces.power import PowerIteration

    model, one = network(), network()
    ddp = DistributedDataParallel(model)
    make = getattr(lowrank_optim, cls)
    options = {"lr": 1e-2, "rank": 3, "error_feedback": memory}
    optimizer = make(model.named_parameters(), **options)
    single = make(one.named_parameters(), **options)
    find = PowerIteration.find
    for step in range(5):
        optimizer.zero_grad()
        single.zero_grad()
        backward(ddp, step, world.rank)
        for rank in range(world.size):
            backward(one, step, rank)
        for p in one.parameters():
            p.grad /= world.size
        single.step()
        factor = 1 + 2.0**-40 * world.rank
        PowerIteration.find = lambda *args, f=factor: find(*args) * f  # type: ignore
        try:
            optimizer.step()
        finally:
            PowerIteration.find = find  # type: ignore[method-assign]
    return weights(model), weights(one)


@pytest.mark.parametrize("memory", ["float32", None])
def test_a_basis_that_follows_moments_is_that_of_all(memory: str | None, ranks: Worlds) -> None:
    """LDAdam: what the momentum lost is known to ranks that did not find the basis, too."""
    values = ranks(2).run("following", following, cls="LDAdamW", memory=memory).checked()
    (mine, one), (theirs, _) = values
    assert alike(mine, theirs)
    for a, b in zip(mine, one, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def beside(world: World, layers: int) -> Any:
    """A model of all ranks, and a weight of each rank's own that has a gradient on one only."""
    back = other_bits(world)
    model, own = network(), network(5 + world.rank)
    ddp = DistributedDataParallel(model)
    named = [*model.named_parameters("shared"), *own.named_parameters("own")]
    optimizer = lowrank_optim.GaLoreAdamW(named, stagger=False, **OPTIONS)
    one = network(5 + world.rank)
    single = lowrank_optim.GaLoreAdamW(one.named_parameters("own"), stagger=False, **OPTIONS)
    try:
        for step in range(5):
            optimizer.zero_grad()
            single.zero_grad()
            backward(ddp, step, world.rank)
            if world.rank == 0 or layers:
                backward(own, step, world.rank)
                backward(one, step, world.rank)
                single.step()
            optimizer.step()
    finally:
        back()
    return weights(model), alike(weights(own), weights(one))


@pytest.mark.parametrize("both", [0, 1], ids=["gradient on one rank", "gradients of each rank"])
def test_what_no_ddp_averages_is_of_the_rank_alone(both: int, ranks: Worlds) -> None:
    first, second = ranks(2).run("beside", beside, layers=both).checked()
    assert alike(first[0], second[0])
    assert first[1] and second[1], "another rank's basis came into it"


def two_models(world: World) -> Any:
    """One of all ranks and one of pairs of them, by one optimizer."""
    back = other_bits(world)
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    models = network(), network(7 + world.rank // 2)
    ddps = [
        DistributedDataParallel(models[0]),
        DistributedDataParallel(models[1], process_group=pairs[world.rank // 2]),
    ]
    named = [*models[0].named_parameters("all"), *models[1].named_parameters("pair")]
    optimizer = lowrank_optim.GaLoreAdamW(named, **OPTIONS)
    try:
        for step in range(5):
            optimizer.zero_grad()
            for ddp in ddps:
                backward(ddp, step, world.rank)
            optimizer.step()
    finally:
        back()
    return weights(models[0]), weights(models[1])


def test_two_models_of_other_ranks(ranks: Worlds) -> None:
    values = ranks(4).run("two models", two_models).checked()
    assert all(alike(values[0][0], all_) for all_, _ in values)
    assert alike(values[0][1], values[1][1]) and alike(values[2][1], values[3][1])
    assert not alike(values[0][1], values[2][1])


def wrapped_later(world: World) -> Any:
    """The first step is taken before there is a wrapper."""
    back = other_bits(world)
    model = network()
    optimizer = lowrank_optim.GaLoreAdamW(model.named_parameters(), **OPTIONS)
    try:
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        ddp = DistributedDataParallel(model)
        for step in range(6):
            optimizer.zero_grad()
            backward(ddp, step, world.rank)
            optimizer.step()
    finally:
        back()
    return weights(model)


def test_a_model_wrapped_after_a_step(ranks: Worlds) -> None:
    first, second = ranks(2).run("wrapped later", wrapped_later).checked()
    assert alike(first, second)


def set_apart(world: World, key: str, values: list[Any], how: str) -> Any:
    """What ranks raise whose groups differ in a key, in which weights, and after a mend."""
    model = network()
    ddp = DistributedDataParallel(model)
    own = {**OPTIONS, **({} if key == "lr of a group" else {key: values[world.rank]})}
    named = list(model.named_parameters())
    groups = [{"params": named[:1], "rank": 2}, {"params": named[1:], "rank": 3}]
    optimizer = lowrank_optim.GaLoreAdamW(groups, **own)
    if key == "lr of a group":
        optimizer.param_groups[1]["lr"] = values[world.rank]
    before, said = weights(model), ""
    try:
        if how == "attached":
            attach_in_backward(optimizer, process_group=dist.group.WORLD)
        else:
            backward(ddp, 0, world.rank)
            optimizer.step()
    except ValueError as error:
        said = str(error)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2
    unmoved = alike(before, weights(model))
    if key == "lr of a group" and how == "stepped":
        optimizer.step()
    return said, unmoved, weights(model)


@pytest.mark.parametrize("how", ["stepped", "attached"])
@pytest.mark.parametrize(
    ("key", "values", "said"),
    [
        ("lr of a group", [1e-2, torch.tensor(2e-2)], r"rank 1 .* lr=0.0\d+ for 1.weight .* 0.01"),
        ("betas", [(0.9, 0.999), (0.9, 0.95)], r"betas=\(0.9, 0.95\) for 0.weight .* 0.999"),
        ("update_proj_gap", [2, 3], "update_proj_gap=3 for 0.weight where rank 0 has 2"),
        ("seed", [0, 1], "seed=1"),
    ],
    ids=["lr", "betas", "gap", "seed"],
)
def test_ranks_that_are_set_apart_raise_with_the_key(
    key: str, values: list[Any], said: str, how: str, ranks: Worlds
) -> None:
    """Weights of replicas drifted apart without a word, or a collective met another."""
    outcome = ranks(2).run("set apart", set_apart, key=key, values=values, how=how).checked()
    for text, unmoved, _ in outcome:
        assert re.search(said, text) and "the same groups on every rank" in text, text
        assert unmoved
    assert alike(outcome[0][2], outcome[1][2])


def test_what_is_a_ranks_own_may_differ(ranks: Worlds) -> None:
    """Moments in host memory are the same moments."""
    values = [None, "cpu"]
    outcome = ranks(2).run("set apart", set_apart, key="state_device", values=values, how="stepped")
    assert [said for said, *_ in outcome.checked()] == ["", ""]


def joined(world: World, projector: str, more: int, **how: Any) -> Any:
    """Steps within ``join()``: rank 1 has more batches. What was raised, steps taken, weights."""
    ddp, one = DistributedDataParallel(network()), network()
    options = {**OPTIONS, "projector": projector}
    if projector == "columns":
        options["rank"] = 0.5
    optimizer = lowrank_optim.GaLoreAdamW(ddp.module.named_parameters(), **options)
    single = lowrank_optim.GaLoreAdamW(one.named_parameters(), **options)
    for step in range(4):
        single.zero_grad()
        for rank in range(world.size):
            backward(one, step, rank)
        for p in one.parameters():
            p.grad /= world.size
        single.step()
    taken, said = 0, ""
    try:
        with ddp.join(**how):
            for step in range(4 + more * world.rank):
                optimizer.zero_grad()
                backward(ddp, step, world.rank)
                optimizer.step()
                taken += 1
    except RuntimeError as error:
        said = str(error)
    moved = not alike(weights(ddp), weights(network()))
    return said, taken, moved, weights(ddp), weights(one)


def test_ranks_that_may_leave_one_by_one_find_no_bases_together(ranks: Worlds) -> None:
    """Those with a batch left waited in a refresh until the time-out, for one that had none."""
    for said, taken, moved, *_ in ranks(2).run("joined", joined, projector="svd", more=0).checked():
        assert all(x in said for x in ("as many batches", "throw_on_early_termination", "0.weight"))
        assert taken == 0 and not moved


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("columns", {}),
        ("svd", {"enable": False}),
        ("svd", {"throw_on_early_termination": True}),
    ],
    ids=["columns", "not enabled", "ends together"],
)
def test_join_where_no_rank_waits_for_another(
    name: str, how: dict[str, bool], ranks: Worlds
) -> None:
    """Draws need no message, and with ``throw_on_early_termination`` all end together."""
    more = int("throw_on_early_termination" in how)
    values = ranks(2).run("joined", joined, projector=name, more=more, **how).checked()
    for said, taken, _, mine, one in values:
        assert (taken, "exhausted" in said) == (4, bool(more))
        for x, y in zip(mine, one, strict=True):
            assert_close(x, y)


def zero(world: World) -> Any:
    """More ranks than parameters: one has none, and must not keep the others waiting."""
    model = network(layers=2)
    ddp = DistributedDataParallel(model)
    optimizer = ZeroRedundancyOptimizer(
        model.parameters(), optimizer_class=lowrank_optim.GaLoreAdamW, **OPTIONS
    )
    for step in range(4):
        optimizer.zero_grad()
        backward(ddp, step, world.rank)
        optimizer.step()
    return weights(model)


def test_zero_redundancy_with_a_rank_without_parameters(ranks: Worlds) -> None:
    first, *others = ranks(3).run("zero", zero).checked()
    assert all(alike(first, other) for other in others)


def failing(world: World) -> Any:
    """An error after the refreshes of a step: it is taken again, with the same bases."""
    back = other_bits(world)
    model = network()
    ddp = DistributedDataParallel(model)
    own = {**OPTIONS, "stagger": False, "on_refresh": "project"}
    optimizer = lowrank_optim.GaLoreAdamW(model.named_parameters(), **own)
    step_items = stepped.step_items

    def fail(*_: Any) -> None:
        raise MemoryError("on purpose")

    same = True
    try:
        for step in range(5):
            optimizer.zero_grad()
            backward(ddp, step, world.rank)
            if step == 2:
                before = [x.clone() for s in optimizer.state.values() for x in s.values()]
                stepped.step_items = fail  # type: ignore[assignment]
                with pytest.raises(MemoryError):
                    optimizer.step()
                stepped.step_items = step_items
                same = alike(before, [x for s in optimizer.state.values() for x in s.values()])
            optimizer.step()
    finally:
        back()
        stepped.step_items = step_items
    refreshed = [float(s["refresh_step"]) for s in optimizer.state.values()]
    return same, refreshed, weights(model)


def test_an_error_leaves_bases_as_they_were(ranks: Worlds) -> None:
    first, second = ranks(2).run("failing", failing).checked()
    assert first[0] and second[0], "the state has changed"
    assert first[1] == second[1] == [4.0, 4.0]
    assert alike(first[2], second[2])


def copies(world: World) -> Any:
    """An optimizer that knows its ranks can be copied, pickled and traced."""
    model = network()
    ddp = DistributedDataParallel(model)
    optimizer = lowrank_optim.GaLoreAdamW(model.named_parameters(), **OPTIONS)
    for step in range(3):
        optimizer.zero_grad()
        backward(ddp, step, world.rank)
        optimizer.step()
    twin = copy.deepcopy(optimizer)
    again = pickle.loads(pickle.dumps(optimizer))
    for other in (twin, again):
        for group, mine in zip(other.param_groups, optimizer.param_groups, strict=True):
            for p, q in zip(group["params"], mine["params"], strict=True):
                assert torch.equal(p, q)
                p.grad = q.grad.clone()
        other.step()
    optimizer.step()
    moved = [
        [p.detach() for g in o.param_groups for p in g["params"]] for o in (optimizer, twin, again)
    ]
    return alike(moved[0], moved[1]) and alike(moved[0], moved[2])


def test_an_optimizer_of_replicas_can_be_copied(ranks: Worlds) -> None:
    assert all(ranks(2).run("copies", copies).checked())


def compiled(world: World) -> Any:
    back = other_bits(world)
    model = network()
    ddp = DistributedDataParallel(model)
    optimizer = lowrank_optim.GaLoreAdamW(model.named_parameters(), **OPTIONS)
    step_ = torch.compile(optimizer.step, backend="eager")
    try:
        for step in range(5):
            optimizer.zero_grad()
            backward(ddp, step, world.rank)
            step_()
    finally:
        back()
    return weights(model)


def test_a_compiled_step_of_replicas(ranks: Worlds) -> None:
    first, second = ranks(2).run("compiled", compiled).checked()
    assert alike(first, second)


def looks(world: World, cls: str, options: dict[str, Any]) -> list[dict[str, int]]:
    """What steps of six equal layers make a host wait for, by place, after the first."""
    model = network(layers=6)
    wrapped = DistributedDataParallel(model)
    optimizer = getattr(lowrank_optim, cls)(model.parameters(), **options)
    found = []
    for step in range(4):
        optimizer.zero_grad()
        backward(wrapped, step, world.rank)
        with Watch(optimizer) as seen:
            optimizer.step()
        found.append(dict(seen.where))
    return found[1:]


WAITS: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "GaLoreAdamW": ({"projector": "svd", "update_proj_gap": 2}, {"subspaces/svd.py _driven": 1}),
    "SSTAdamW": ({"steps_per_iteration": 2, "iterations_per_round": 1},
                 {"subspaces/factors.py _driven": 1}),
    "SwitchLoRAAdamW": ({"restart_every": 2}, {"subspaces/lora.py balanced": 1}),
    "LDAdamW": ({}, {}),
}  # fmt: skip
"""Options, and what is waited for in a refresh of six equal matrices by two ranks."""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(x, marks=pytest.mark.slow if x in ("LDAdamW", "SwitchLoRAAdamW") else ())
        for x in WAITS
    ],
)
def test_what_a_refresh_with_others_waits_for(ranks: Worlds, name: str) -> None:
    """One factorisation of all that a rank owns; nobody asks what others found."""
    own, waits = WAITS[name]
    options = {"lr": 1e-2, "rank": 3, **({} if "SwitchLoRA" in name else {"stagger": False}), **own}
    for first, refresh, second in ranks(2).run("looks", looks, cls=name, options=options).checked():
        assert first == second == {}
        assert refresh == waits  # it was 21 with svd, 27 of SST; then 2


def selected(
    world: World, cls: str, options: dict[str, Any], forced: bool, raises: bool
) -> tuple[Any, ...]:
    """Weights after steps whose third has a bad gradient, or weight, or an owner that raises."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(12, 12, bias=False) for _ in range(3))).double()
    ddp, params = DistributedDataParallel(model), list(model.parameters())
    optimizer = getattr(lowrank_optim, cls)(model.parameters(), lr=1e-2, rank=3, **options)
    honest, ends, said = owners.finding, [], []

    def fails(*args: Any) -> Any:
        if world.rank == 1 and step == 2 and raises:
            raise MemoryError("no memory")
        return honest(*args)

    with pytest.MonkeyPatch.context() as patch:
        cases.branching(patch, lambda tensor: forced)
        patch.setattr(owners, "finding", fails)
        for step in range(7):
            optimizer.zero_grad()
            generator = torch.Generator().manual_seed(10 * step + world.rank)
            x = torch.randn(6, 12, generator=generator, dtype=torch.float64)
            ddp(x).square().mean().backward()
            kept = params[1].detach().clone()
            if step == 2 and not raises:
                bad = params[1].detach() if cls.startswith("SST") else params[1].grad
                assert bad is not None
                bad[0, 0] = torch.nan
            try:
                optimizer.step()
            except (RuntimeError, MemoryError) as error:
                said.append((step, " ".join([str(error), *error.__notes__])))
            if step == 2 and not raises:
                params[1].data.copy_(kept)
            ends.append([p.detach().clone() for p in params])
    counts = optimizer.postponed_refreshes()
    states = [{k: x.clone() for k, x in s.items()} for s in optimizer.state.values()]
    return ends, said, counts, states


DECIDED: dict[str, tuple[str, dict[str, Any]]] = {
    "svd": ("GaLoreAdamW", {"projector": "svd", "update_proj_gap": 2, "stagger": False,
                            "on_refresh": "project"}),
    "SST": ("SSTAdamW", {"steps_per_iteration": 2, "iterations_per_round": 1, "stagger": False,
                         "on_refresh": "keep"}),
    "LDAdam": ("LDAdamW", {}),
}  # fmt: skip


@pytest.mark.parametrize("name", DECIDED)
def test_what_a_device_selects_of_replicas(ranks: Worlds, name: str) -> None:
    """A NaN at a refresh: as of a host that decides; and ranks are the same to the bit."""
    cls, options = DECIDED[name]
    args: dict[str, Any] = {"cls": cls, "options": options, "raises": False}
    want, got = (
        ranks(2).run("selected replicas", selected, forced=forced, **args).checked()
        for forced in (False, True)
    )
    for one, other in zip(want, got, strict=True):
        assert one[1:3] == other[1:3]
        assert name == "LDAdam" or one[2] == {"parameter 1": 1}
        for rows in zip(one[0], other[0], strict=True):
            for x, y in zip(*rows, strict=True):
                assert_close(x, y)
    for x, y in zip(got[0][0][-1], got[1][0][-1], strict=True):
        assert torch.equal(x, y)


def test_an_owner_of_replicas_that_raises_on_a_device(ranks: Worlds) -> None:
    """All raise in the next step, which changes nothing; then they go on alike."""
    cls, options = DECIDED["svd"]
    args: dict[str, Any] = {"cls": cls, "options": options, "forced": True, "raises": True}
    runs = ranks(2).run("replicas raise", selected, **args).checked()
    for ends, said, counts, _ in runs:
        ((step, text),) = said
        assert step == 3 and "rank 1 could not refresh" in text and "no memory" in text
        assert all(map(torch.equal, ends[2], ends[3]))
        assert not any(map(torch.equal, ends[3], ends[4]))
        assert set(counts.values()) == {1} and len(counts) < 3
    for x, y in zip(runs[0][0][-1], runs[1][0][-1], strict=True):
        assert torch.equal(x, y)
