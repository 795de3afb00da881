"""A refresh of shards on an accelerator: what its host waits for, and what it selects; on CPUs."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

import lowrank_optim
from lowrank_optim import LowRankOptimizer
from lowrank_optim.engine.sharded import alike
from lowrank_optim.nn import convert
from lowrank_optim.sharding.parts import local
from lowrank_optim.subspaces import svd
from tests import cases
from tests.compare import assert_close
from tests.engine.watch import Watch
from tests.sharded.models import left_out
from tests.sharded.ranks import Ranks, World

Worlds = Callable[[int], Ranks]
LAYERS = 4
GAP: dict[str, Any] = {"rank": 3, "update_proj_gap": 2, "stagger": False}
LATER = ("refresh_step", "postponed")
"""What is known a step later, where each rank finds out by itself."""
ON_HOST = "sharding/groups.py"
"""Which ranks a mesh has is known to the host: no device is asked."""


def made(
    cls: str, options: dict[str, Any], mesh: DeviceMesh, layers: int, dtype: torch.dtype
) -> tuple[nn.Module, LowRankOptimizer]:
    """Equal layers under FSDP2, by rows."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(16, 16, bias=False, dtype=dtype) for _ in range(layers)))
    fully_shard(model, mesh=mesh)
    return model, getattr(lowrank_optim, cls)(model.named_parameters(), lr=1e-2, **options)


def looks(world: World, asked: dict[str, tuple[str, dict[str, Any]]]) -> dict[str, list[Any]]:
    """What is waited for in the second and the third step, by place."""
    mesh = init_device_mesh("cpu", (world.size,))
    found: dict[str, list[Any]] = {}
    for name, (cls, options) in asked.items():
        model, optimizer = made(cls, options, mesh, LAYERS, torch.float32)
        generator = torch.Generator().manual_seed(world.rank)
        for step in range(3):
            optimizer.zero_grad()
            model(torch.randn(32, 16, generator=generator)).square().mean().backward()
            with Watch(optimizer) as seen:
                optimizer.step()
            where = {k: n for k, n in seen.where.items() if k.split()[0] != ON_HOST}
            if step:
                found.setdefault(name, []).append(where)
    return found


EIGH, SVD = "subspaces/randomized.py eigh", "subspaces/svd.py _driven"
FACTORED, BALANCED = "subspaces/factors.py _driven", "subspaces/lora.py balanced"
WAITS: dict[str, tuple[str, dict[str, Any], dict[str, int]]] = {
    "rsvd": ("GaLoreAdamW", {**GAP, "projector": "rsvd"}, {EIGH: 1}),
    "svd": ("GaLoreAdamW", {**GAP, "projector": "svd", "on_refresh": "project"}, {SVD: 1}),
    "LDAdam": ("LDAdamW", {"rank": 3}, {}),
    "dct": ("GaLoreAdamW", {**GAP, "projector": "dct"}, {}),
    "SST": ("SSTAdamW", {"rank": 3, "factors": "active", "steps_per_iteration": 2,
                         "stagger": False}, {FACTORED: 1}),
    "SwitchLoRA": ("SwitchLoRAAdamW", {"rank": 3, "restart_every": 2},
                   {BALANCED: 1}),
}  # fmt: skip
"""Class, options, and what is waited for in a refresh of four matrices by two ranks: the status of
one factorisation, which torch reads, of the two that each finds. A step waits for nothing."""


def test_what_a_refresh_of_shards_waits_for(ranks: Worlds) -> None:
    """The status of one factorisation of all that a rank owns; nobody asks what owners found.

    It was 22 of ``rsvd`` and of ``svd``, and 4 in each step between; then 3, and 7 of a restart.
    """
    asked = {name: row[:2] for name, row in WAITS.items()}
    for found in ranks(2).run("looks", looks, asked=asked).checked():
        for name, (_, _, refresh) in WAITS.items():
            assert found[name] == [{}, refresh], (name, found[name])


LAYERED: dict[str, tuple[str, str, dict[str, Any], list[dict[str, int]]]] = {
    "SST": ("sst", "SSTAdamW", {"steps_per_iteration": 1, "iterations_per_round": 2},
            [{FACTORED: 1}, {}, {FACTORED: 1}]),
    "SwitchLoRA": ("switchlora", "SwitchLoRAAdamW",
                   {"restart_every": 2, "interval": 4, "freeze_steps": 1},
                   [{}, {BALANCED: 1}, {}]),
    "SLTrain": ("sltrain", "GaLoreAdamW", {}, [{}] * 3),
    "LOST": ("lost", "GaLoreAdamW", {}, [{}] * 3),
}  # fmt: skip
"""Layers of factors: the kind, class, options, and what is waited for in the second step and on."""


def layered(
    name: str, mesh: DeviceMesh, dtype: torch.dtype = torch.float32, **others: Any
) -> tuple[nn.Module, LowRankOptimizer]:
    """Four converted layers under FSDP2."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    kind, cls, options, _ = LAYERED[name]
    torch.manual_seed(0)
    layers = [nn.Linear(16, 16, bias=False, dtype=dtype) for _ in range(LAYERS)]
    model = nn.Sequential(*layers)
    groups = convert(model, kind, rank=3)  # type: ignore[arg-type]
    for group in groups:
        group.update({key: x for key, x in options.items() if "rank" in group})
    own = left_out(model, True)
    for layer in (*model, model):
        fully_shard(layer, mesh=mesh, **own)
    named = dict(model.named_parameters())
    for group in groups:
        group["params"] = [named[key] for key in group["param_names"]]
    return model, getattr(lowrank_optim, cls)(groups, lr=1e-2, stagger=False, rank=3, **others)


def looks_of_layers(world: World, asked: list[str]) -> dict[str, list[Any]]:
    """What they wait for in steps, by place."""
    mesh = init_device_mesh("cpu", (world.size,))
    found: dict[str, list[Any]] = {}
    for name in asked:
        model, optimizer = layered(name, mesh)
        generator = torch.Generator().manual_seed(world.rank)
        for step in range(4):
            optimizer.zero_grad()
            model(torch.randn(8, 16, generator=generator)).square().mean().backward()
            with Watch(optimizer) as seen:
                optimizer.step()
            where = {k: n for k, n in seen.where.items() if k.split()[0] != ON_HOST}
            if step:
                found.setdefault(name, []).append(where)
    return found


@pytest.mark.parametrize(
    "asked",
    [["SST", "SwitchLoRA"], pytest.param(["SLTrain", "LOST"], marks=pytest.mark.slow)],
    ids=" ".join,
)
def test_what_layers_of_factors_wait_for(asked: list[str], ranks: Worlds) -> None:
    """One factorisation of all that a rank owns, where there is one.

    It was 30 of a draw of SST, 34 of a round, and 12 and 4 of a restart of SwitchLoRA.
    """
    wanted = {name: row[-1] for name, row in LAYERED.items()}
    for rank, found in enumerate(ranks(2).run("layers", looks_of_layers, asked=asked).checked()):
        for name, rows in found.items():
            want = wanted[name]
            if rank and name == "SwitchLoRA":  # the first rank restarts all
                want = [{}] * len(want)
            assert rows == want, (rank, name, rows)


def layers_selected(world: World, forced: bool, raises: bool) -> tuple[Any, ...]:
    """Factors and counts after steps with a round whose owner fails, or that has a bad factor."""
    mesh = init_device_mesh("cpu", (world.size,))
    model, optimizer = layered("SST", mesh, torch.float64, on_refresh="keep")
    (u, *_) = (p for key, p in model.named_parameters() if key.startswith("1."))
    generator, ends, said = torch.Generator().manual_seed(world.rank), [], []
    honest = alike.finding

    def fails(*args: Any) -> Any:
        if world.rank == 1 and step == 1 and raises:
            raise MemoryError("no memory")
        return honest(*args)

    with pytest.MonkeyPatch.context() as patch:
        cases.branching(patch, lambda tensor: forced)
        patch.setattr(alike, "finding", fails)
        for step in range(6):
            optimizer.zero_grad()
            x = torch.randn(8, 16, generator=generator, dtype=torch.float64)
            model(x).square().mean().backward()
            kept = local(u.detach()).clone()
            if step == 1 and not raises:
                local(u.detach()).fill_(torch.nan)
                local(u.grad).zero_()
            try:
                optimizer.step()
            except (RuntimeError, MemoryError) as error:
                said.append((step, " ".join([str(error), *error.__notes__])))
            if step == 1 and not raises:
                local(u.detach()).copy_(kept)
            ends.append([local(p.detach()).clone() for p in model.parameters()])
    states = [{k: local(x).clone() for k, x in s.items()} for s in optimizer.state.values()]
    return ends, said, optimizer.postponed_refreshes(), states


def test_what_a_device_selects_of_layers(ranks: Worlds) -> None:
    """A factor that is not finite when a round begins: as of a host, a step later."""
    runs = [
        ranks(2).run("layers selected", layers_selected, forced=forced, raises=False).checked()
        for forced in (False, True)
    ]
    for want, got in zip(*runs, strict=True):
        assert want[2] == got[2] and set(want[2].values()) == {1}
        for rows in zip(want[0], got[0], strict=True):
            for x, y in zip(*rows, strict=True):
                assert_close(x, y)
        for own, other in zip(want[3], got[3], strict=True):
            assert own.keys() == other.keys()
            for key, x in own.items():
                assert_close(other[key], x)


def test_an_owner_of_layers_that_raises_on_a_device(ranks: Worlds) -> None:
    """All ranks raise in the next step, which changes nothing, and go on alike."""
    runs = ranks(2).run("layers raise", layers_selected, forced=True, raises=True).checked()
    for ends, said, counts, _ in runs:
        ((step, text),) = said
        assert step == 2 and "rank 1 could not refresh 1." in text and "no memory" in text
        assert all(map(torch.equal, ends[1], ends[2]))
        assert not all(map(torch.equal, ends[2], ends[3]))
        assert set(counts.values()) == {1} and len(counts) == 2


def trained(
    forced: bool, cls: str, options: dict[str, Any], mesh: DeviceMesh, bad: float
) -> tuple[dict[str, Tensor], dict[str, int], list[float]]:
    """Parts of weights and of a state, what was postponed, and when bases were found.

    At a refresh the gradient of a layer is ``bad``, or its weight where that is factored.
    """
    with pytest.MonkeyPatch.context() as patch:
        cases.branching(patch, lambda tensor: forced)
        model, optimizer = made(cls, options, mesh, 3, torch.float64)
        params = list(model.parameters())
        generator = torch.Generator().manual_seed(mesh.get_rank())
        ends: dict[str, Tensor] = {}
        for step in range(6):
            optimizer.zero_grad()
            model(
                torch.randn(32, 16, generator=generator, dtype=torch.float64)
            ).square().mean().backward()
            kept, of_weight = local(params[1].detach()).clone(), cls.startswith("SST")
            if step == 2:
                x = params[1].grad if not of_weight else params[1].detach()
                assert x is not None
                local(x).fill_(bad)
            optimizer.step()
            if step == 2 and of_weight:
                local(params[1].detach()).copy_(kept)
            ends[f"{step} weights"] = torch.cat([local(p.detach()).reshape(-1) for p in params])
            state = optimizer.state[params[1]]
            ends |= {f"{step} {k}": local(x).clone() for k, x in state.items() if k not in LATER}
        counts = optimizer.postponed_refreshes()
        return ends, counts, [float(optimizer.state[p]["refresh_step"]) for p in params]


def selected(world: World, asked: list[tuple[str, str]]) -> dict[str, list[Any]]:
    """Runs of a host that decides, and of a device that selects."""
    mesh = init_device_mesh("cpu", (world.size,))
    found: dict[str, list[Any]] = {}
    for name, on_refresh in asked:
        cls, options = WAITS[name][0], {**WAITS[name][1], "on_refresh": on_refresh}
        # with reset moments start again where nothing is found too, as of one process
        one = cls == "SSTAdamW" or on_refresh == "reset"
        for bad in (torch.nan,) if one else (0.0, torch.nan):
            runs = [trained(forced, cls, options, mesh, bad) for forced in (False, True)]
            found.setdefault(f"{name} {on_refresh}", []).append(runs)
    return found


@pytest.mark.parametrize(
    "asked",
    [
        [("svd", "project"), ("svd", "reset"), ("SST", "project")],
        pytest.param(
            [("LDAdam", "project"), ("dct", "project"), ("SST", "reset")], marks=pytest.mark.slow
        ),
    ],
    ids=["some", "others"],
)
def test_what_a_device_selects_is_what_a_host_decides(
    ranks: Worlds, asked: list[tuple[str, str]]
) -> None:
    """A zero and a NaN at a refresh: the same weights, counts and turns."""
    for found in ranks(2).run("selected", selected, asked=asked).checked():
        for name, runs in found.items():
            for want, got in runs:
                # momentum is of use to LDAdam where a gradient is not
                assert name == "LDAdam project" or want[1] == {"1.weight": 1}
                assert got[1:] == want[1:], name
                for key, x in want[0].items():
                    # what moves by steps since the refresh is put right in the next step
                    late = name.startswith("SST") or name.endswith("reset")
                    if key == "2 weights" or not (late and key.startswith("2 ")):
                        assert_close(got[0][key], x)


def raising(world: World) -> list[tuple[str, bool, dict[str, int]]]:
    """What each step raised where rank 1 once has no memory, and whether it changed nothing."""
    mesh = init_device_mesh("cpu", (world.size,))
    model, optimizer = made("GaLoreAdamW", WAITS["svd"][1], mesh, 4, torch.float64)
    params, found = list(model.parameters()), []
    honest = svd._driven

    def fails(x: Tensor) -> Any:
        if world.rank == 1:
            raise MemoryError("no memory")
        return honest(x)

    for step in range(6):
        optimizer.zero_grad()
        x = torch.randn(32, 16, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        model(x).square().mean().backward()

        def held() -> list[Tensor]:
            states = [x for p in params for x in optimizer.state[p].values()]
            return [local(x.detach()).clone() for x in (*params, *states)]

        before, said = held() if step else [], ""
        with pytest.MonkeyPatch.context() as patch:
            cases.branching(patch, lambda tensor: True)
            if step == 2:
                patch.setattr(svd, "_driven", fails)
            try:
                optimizer.step()
            except (RuntimeError, MemoryError) as error:
                said = " ".join([f"{type(error).__name__}: {error}", *error.__notes__])
        same = bool(before) and all(map(torch.equal, before, held()))
        found.append((said, same, optimizer.postponed_refreshes() if step > 2 else {}))
    return found


def test_an_owner_that_raises_on_a_device_is_told_to_all(ranks: Worlds) -> None:
    """The step goes on with the bases in use; the next one raises, and changes nothing; then all
    goes on, and what was not found is due.
    """
    values = ranks(2).run("raising", raising).checked()
    for found in values:
        assert [bool(said) for said, *_ in found] == [False, False, False, True, False, False]
        assert [same for _, same, _ in found] == [False, False, False, True, False, False]
        assert found[-1][2] == {"0.weight": 1, "1.weight": 1}
        said = "rank 1 could not refresh 1.weight or one like it: MemoryError: no memory"
        assert said in found[3][0]
    assert [v[3][0].partition(":")[0] for v in values] == ["RuntimeError", "MemoryError"]
