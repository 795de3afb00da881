"""attach_in_backward under FSDP2: the run is that without, and fewer gradients are alive."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import lowrank_optim
from lowrank_optim import attach_in_backward
from lowrank_optim.distributed import shard_placement_fn
from lowrank_optim.engine.sharded.local import here
from lowrank_optim.tensors.projected_grad import ProjectedGrad, projection
from tests.sharded.combinations import EIGHT
from tests.sharded.meter import Meter
from tests.sharded.models import SAMPLES, awkward, parallelize
from tests.sharded.ranks import Ranks, World
from tests.sharded.training import (
    GAP,
    Case,
    Held,
    Step,
    Trained,
    assembled,
    assert_equal_runs,
    assert_worth_comparing,
    make_optimizer,
)

Worlds = Callable[[int], Ranks]
SHORT = ("wide", "tall", "few", "experts")
SVD = Case("GaLoreAdamW", {"projector": "svd"}, how="fsdp columns", only=SHORT)
FLAT = ("large", "wide")
"""Tensor parallel splits the first by rows and the second by columns: the larger side of both."""


@dataclass(frozen=True)
class Run:
    """A case, trained inside backward or after it."""

    case: Case
    mode: Literal["project", "step"] | None = "project"
    pieces: int = 1
    sync: bool = True
    """Whether every micro-batch reduces its gradients, or the last alone."""
    clip: float | None = None
    reshard: bool = True
    nan: int | None = None
    """The step in which an entry of the loss of the last rank is not a number."""
    resumed: int | None = None
    """The step before which all is saved, made anew and loaded."""
    zeroed: bool = False
    """Whether gradients are zeroed in place, not let go of."""
    whole: int | None = None
    """Matrices whose shards stay whole, if no other is projected."""
    told: int | None = None
    """``accumulation_steps`` (default: what it should be)."""

    @property
    def plain(self) -> Run:
        """The same without."""
        return replace(self, mode=None, resumed=None)


def attached(run: Run, optimizer: Any) -> Any:
    if run.mode is None:
        return None
    told = run.told or (run.pieces if run.sync else 1)
    steps = {} if run.mode == "project" else {"accumulation_steps": told}
    return attach_in_backward(optimizer, run.mode, **steps)


def backward(trained: Trained, run: Run, step: int) -> None:
    """All micro-batches of a step."""
    model = trained.model
    assert model is not None
    count = trained.size * run.pieces
    for piece in range(run.pieces):
        if not run.sync:
            model.set_requires_gradient_sync(piece == run.pieces - 1)
        if not run.reshard:
            last = piece == run.pieces - 1
            model.set_reshard_after_backward(last)
            model.set_is_last_backward(last)
        loss = model(step, trained.rank + piece * trained.size, count) / run.pieces
        if run.nan == step and trained.rank == trained.size - 1:
            loss = loss * float("nan")
        loss.backward()


def resumed(trained: Trained, world: World) -> Trained:
    """Another that goes on from what this one saves."""
    file = io.BytesIO()
    own = {name: param.detach().to_local() for name, param in trained.named.items()}
    torch.save({"weights": own, "state": trained.optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=False)
    new = Trained(trained.case, world)
    with torch.no_grad():
        for name, param in new.named.items():
            param.to_local().copy_(saved["weights"][name])
    new.optimizer.load_state_dict(saved["state"])
    return new


def train(world: World, run: Run) -> list[tuple[Held, dict[str, Held]]]:
    """What is held after every step."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    trained = Trained(run.case, world)
    handle, out = attached(run, trained.optimizer), []
    found: set[str] = set()
    for step in range(run.case.steps):
        if run.resumed == step:
            handle.remove()
            trained = resumed(trained, world)
            handle = attached(run, trained.optimizer)
        backward(trained, run, step)
        if run.mode == "step" and run.told is None:
            assert all(p.grad is None for p in trained.named.values()), "a gradient is left"
        if run.clip is not None:
            torch.nn.utils.clip_grad_norm_(trained.named.values(), run.clip)
        found |= {n for n, p in trained.named.items() if projection(p.grad) is not None}
        trained.optimizer.step()
        trained.optimizer.zero_grad(set_to_none=not run.zeroed)
        out.append(trained.held())
    if run.mode == "project":
        whole = set(handle.whole_shards)
        assert not found & whole, f"{found & whole} said to be whole"
        assert len(whole) == run.whole if run.whole else found, "nothing is projected"
    return out


def beside(world: World, runs: list[Run]) -> list[Any]:
    return [train(world, run) for run in runs]


def compared(run: Run, world: Ranks, name: str) -> tuple[list[Step], list[Step]]:
    values = world.run(name, beside, runs=[run, run.plain]).checked()
    ours, plain = (assembled([own[i] for own in values]) for i in range(2))
    return ours, plain


EQUAL: dict[str, Run] = {
    "project": Run(SVD),
    "step": Run(replace(SVD, cls="FiraAdamW"), "step"),
}
SLOW: dict[str, Run] = {
    "project, accumulated": Run(SVD, pieces=2),
    "project, three in one": Run(SVD, pieces=3, sync=False),
    "project, kept unsharded": Run(SVD, pieces=2, reshard=False),
    "project, all shapes": Run(replace(SVD, only=())),
    "project, by rows": Run(replace(SVD, how="fsdp", only=())),
    "project, both sides": Run(
        replace(SVD, options={"projector": "svd", "proj_type": "full", "eps": 1e-3}),
        whole=3,
    ),
    "project, columns": Run(
        replace(SVD, options={"projector": "columns", "rank": 0.5, "on_refresh": "project"})
    ),
    "project, dct": Run(replace(SVD, options={"projector": "dct", "on_refresh": "reset"})),
    "project, random, up": Run(replace(SVD, options={"projector": "random", "maximize": True})),
    "project, lion": Run(Case("GaLoreLion", {}, how="fsdp columns", only=SHORT), pieces=2),
    "project, not a number": Run(SVD, nan=3),
    "project, where bases are due": Run(
        replace(SVD, options={"projector": "svd", "stagger": False}), nan=2
    ),
    "project, columns not a number": Run(
        replace(SVD, options={"projector": "columns", "rank": 0.5}), nan=3
    ),
    "step, accumulated": Run(SVD, "step", pieces=2),
    "step, three in one": Run(SVD, "step", pieces=3, sync=False),
    "step, told of backwards": Run(SVD, "step", pieces=3, sync=False, told=3),
    "step, kept unsharded": Run(SVD, "step", pieces=2, reshard=False),
    "step, all shapes": Run(replace(SVD, how="fsdp", only=()), "step"),
    "step, not a number": Run(SVD, "step", nan=3),
    "step, blocks": Run(
        Case("FrugalAdamW", {"density": 0.5}, how="fsdp columns", only=SHORT), "step"
    ),
    "step, blocks told of backwards": Run(
        Case("FrugalAdamW", {"density": 0.5}, how="fsdp", only=SHORT),
        "step", pieces=3, sync=False, told=3,
    ),
    "step, memory": Run(
        Case("DCTAdamW", {"error_feedback": "float32"}, how="fsdp columns", only=SHORT), "step"
    ),
    "step, following": Run(Case("LDAdamW", how="fsdp columns", only=SHORT), "step"),
    "step, following by rows": Run(Case("LDAdamW", how="fsdp", only=SHORT), "step", pieces=2),
    "project, following": Run(
        Case(
            "LDAdamW", {"error_feedback": None, "update_proj_gap": 2},
            how="fsdp columns", only=SHORT,
        )
    ),
    "project, zeroed in place": Run(SVD, pieces=2, zeroed=True),
    "project, offloaded": Run(replace(SVD, how="fsdp offloaded", only=()), pieces=2),
    "step, offloaded": Run(replace(SVD, how="fsdp offloaded"), "step"),
    "project, over tensor parallel": Run(
        replace(SVD, how="parallel placed", mesh="square", only=FLAT)
    ),
    "step, over tensor parallel": Run(
        replace(SVD, how="parallel", mesh="square", only=FLAT), "step"
    ),
    "project, copies": Run(replace(SVD, mesh="square"), pieces=2),
    "step, copies": Run(replace(SVD, mesh="square"), "step"),
    "step, switchlora in 8 bits": Run(replace(EIGHT["switchlora"], how="fsdp columns"), "step"),
    "project, sst in 8 bits": Run(replace(EIGHT["sst"], how="fsdp columns"), whole=3),
    "project, adafactor in 8 bits": Run(
        replace(EIGHT["adafactor"], how="fsdp columns", only=("six blocks", "long")), pieces=2
    ),
}  # fmt: skip


def on_ranks() -> Iterator[Any]:
    """Each run on 2 ranks and on 3, or on the 4 of a square; by default the quickest."""
    for name, run in (EQUAL | SLOW).items():
        for size in (4,) if run.case.mesh == "square" else (2, 3):
            quick = name in EQUAL and size == 2
            yield pytest.param(name, size, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize(("name", "size"), list(on_ranks()))
def test_it_is_fsdp2_without(name: str, size: int, ranks: Worlds) -> None:
    """Weights, state, choices and counters, over refreshes; stepped inside, to the bit."""
    run = (EQUAL | SLOW)[name]
    ours, plain = compared(run, ranks(size), name)
    exact = run.mode == "step" and size == 2
    assert_equal_runs(ours, plain, *((0.0, 0.0) if exact else (run.case.near,)))
    if run.nan is None:
        assert_worth_comparing(run.case, ours)


RESUMED = {
    "project": Run(replace(SVD, options={"on_refresh": "project"}), resumed=3),
    "step": Run(replace(SVD, cls="FiraAdamW"), "step", resumed=3),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_is_the_same_bits(name: str, ranks: Worlds) -> None:
    run = RESUMED[name]
    values = ranks(2).run(name, beside, runs=[run, replace(run, resumed=None)]).checked()
    ours, through = (assembled([own[i] for own in values]) for i in range(2))
    assert_equal_runs(ours, through, 0.0, 0.0)


def parallel(world: World, mode: Any, pieces: int) -> tuple[list[Tensor], dict[str, int]]:
    """Weights that tensor parallel has split, without FSDP2, and how often each was projected."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    model = awkward(("large", "tall", "wide"))
    parallelize(model, init_device_mesh("cpu", (world.size,)))
    optimizer = make_optimizer(SVD, model.named_parameters())
    own = {"accumulation_steps": pieces} if mode == "step" else {}
    if mode:
        attach_in_backward(optimizer, mode, **own)
    count = {name.split(".")[2]: 0 for name, _ in model.named_parameters()}
    for step in range(SVD.steps):
        for piece in range(pieces):
            (model(step, piece, pieces) / pieces).backward()
        for name, param in model.named_parameters():
            count[name.split(".")[2]] += projection(param.grad) is not None
        assert mode != "step" or all(p.grad is None for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().full_tensor() for p in model.parameters()], count


@pytest.mark.slow
@pytest.mark.parametrize("pieces", [1, 2])
def test_tensor_parallel_alone(pieces: int, ranks: Worlds) -> None:
    run = ranks(2).run
    of = {
        mode: run(str(mode), parallel, mode=mode, pieces=pieces).checked()[0]
        for mode in (None, "project", "step")
    }
    # each step but those in which a basis is due; "wide" is split by columns, and its gradient is
    # given whole, which is no shard
    often = SVD.steps - SVD.steps // GAP
    assert of["project"][1] == {"large": often, "tall": often, "wide": 0}
    for mode, most in (("project", 1e-10), ("step", 0.0)):
        gaps = [float((a - b).abs().max()) for a, b in zip(of[mode][0], of[None][0], strict=True)]
        assert max(gaps) <= most, (mode, gaps)


# ---------------------------------------------------------------- nets whose layers have inputs


def net(width: int = 16, layers: int = 3) -> nn.Sequential:
    torch.manual_seed(5)
    sizes = [(width, 4 * width), (4 * width, width)] * layers
    return nn.Sequential(*(nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in sizes))


def sharded(world: World, dtype: torch.dtype = torch.float64, **own: Any) -> nn.Sequential:
    """Layers that are handed over one by one while backward runs; four ranks have copies."""
    size = world.size
    if size == 4:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards"))
        size = 2
    else:
        mesh = init_device_mesh("cpu", (size,))
    place = shard_placement_fn(size)
    model = net().to(dtype)
    for layer in model:
        fully_shard(layer, mesh=mesh, shard_placement_fn=place, **own)
    fully_shard(model, mesh=mesh, **own)
    return model


def optimizer_of(model: nn.Module, cls: str = "GaLoreAdamW", **own: Any) -> Any:
    given = {"rank": 2, "lr": 1e-2, "update_proj_gap": 4, **own}
    return getattr(lowrank_optim, cls)(model.named_parameters(), **given)


def loss_of(
    model: nn.Module, step: int, world: World, dtype: torch.dtype = torch.float64
) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(SAMPLES, 16, generator=generator, dtype=torch.float64)[world.rank :: world.size]
    return (model(x.to(dtype)) - x[:, :1].to(dtype)).square().mean()


def alive(params: Any) -> int:
    """Bytes of all storages that gradients hold on this rank."""
    found = {}
    for param in params:
        if param.grad is None:
            continue
        own = param.grad.to_local() if isinstance(param.grad, DTensor) else param.grad
        for x in own.coords.values() if isinstance(own, ProjectedGrad) else [own]:
            storage = x.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def peaks(world: World, mode: Any) -> list[tuple[int, int]]:
    """Of each step the most bytes of gradients alive around an arrival, and after backward."""
    logging.disable(logging.WARNING)
    model = sharded(world)
    params, seen = list(model.parameters()), []

    def look(_: Tensor) -> None:
        seen.append(alive(params))

    optimizer = optimizer_of(model, stagger=False)
    for param in params:
        param.register_post_accumulate_grad_hook(look)
    handle = attach_in_backward(optimizer, mode) if mode else None
    for param in params:
        param.register_post_accumulate_grad_hook(look)
    out = []
    for step in range(4):
        seen.clear()
        loss_of(model, step, world).backward()
        out.append((max(seen), alive(params)))
        optimizer.step()
        optimizer.zero_grad()
    assert handle is None or mode == "step" or handle.whole_shards == ()
    return out


def test_what_is_alive_of_gradients(ranks: Worlds) -> None:
    """Coordinates and biases beside one module's shards, or these alone; without, all shards."""
    matrix, low, biases = 64 * 16, 2 * 64, (64, 16)
    module, size = matrix + biases[0], 8 // 2  # bytes of a number, of two ranks
    kept = 6 * low + 3 * sum(biases)
    run = ranks(2).run
    plain = run("without", peaks, mode=None).checked()[0]
    assert plain == [(size * (6 * matrix + 3 * sum(biases)),) * 2] * 4
    project = run("project", peaks, mode="project").checked()[0]
    assert project[1:] == [(size * (kept - biases[0] + module), size * kept)] * 3
    step = run("step", peaks, mode="step").checked()[0]
    assert step[1:] == [(size * module, 0)] * 3
    assert step[0] == (size * (2 * matrix + sum(biases)), 0)  # whose last is not known yet


def messages(world: World, mode: Any) -> list[dict[str, int]]:
    """What the ranks send in each step, by kind, without what FSDP2 does."""
    logging.disable(logging.WARNING)
    model = sharded(world)
    optimizer = optimizer_of(model, stagger=False)
    attach_in_backward(optimizer, mode)
    out = []
    for step in range(4):
        with Meter() as meter:
            loss_of(model, step, world).backward()
            optimizer.step()
            optimizer.zero_grad()
        out.append({k: n for k, n in meter.counts.items() if k in ("all_reduce", "broadcast")})
    return out


def test_messages_of_a_step(ranks: Worlds) -> None:
    """One guard in all, or one of each module and one for what none has brought."""
    for mode, count in (("project", 1), ("step", 7)):
        found = ranks(2).run(mode, messages, mode=mode).checked()[0]
        assert [own["all_reduce"] for own in found[1:]] == [count] * 3, (mode, found)


class Skipping(nn.Module):
    """Layers of which a forward leaves some out, the same on every rank."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = net()

    def forward(self, x: Tensor, left_out: int | None) -> Tensor:
        for i in range(0, len(self.layers), 2):
            if i != left_out:
                x = x + self.layers[i + 1](self.layers[i](x))
        return x


def skipping(world: World, mode: Any, cls: str) -> list[Tensor]:
    """Weights of a run in which backwards do not reach some layers, or not at last."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    model = Skipping().double()
    mesh = init_device_mesh("cpu", (world.size,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    own = {"density": 0.5} if cls.startswith("Frugal") else {"rank": 2}
    optimizer = getattr(lowrank_optim, cls)(
        model.named_parameters(), lr=1e-2, update_proj_gap=2, **own
    )
    if mode:
        steps = {"accumulation_steps": 2} if mode == "step" else {}
        attach_in_backward(optimizer, mode, **steps)
    for step, left_out in enumerate([(None, 2), (None, None), (2, None), (4, 4), (None, 0)] * 2):
        for piece, one in enumerate(left_out):
            generator = torch.Generator().manual_seed(10 * step + piece)
            x = torch.randn(SAMPLES, 16, generator=generator, dtype=torch.float64)
            (model(x[world.rank :: world.size], one) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().full_tensor() for p in model.parameters()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cls", "mode"), [("FrugalAdamW", "step"), ("FiraAdamW", "step"), ("GaLoreAdamW", "project")]
)
def test_backwards_that_leave_layers_out(cls: str, mode: str, ranks: Worlds) -> None:
    """Those that come late are stepped in step(), and blocks take no second turn then."""
    run = ranks(2).run
    ours, plain = (run(str(x), skipping, mode=x, cls=cls).checked()[0] for x in (mode, None))
    gap = max(float((a - b).abs().max()) for a, b in zip(ours, plain, strict=True))
    assert gap <= (1e-10 if mode == "project" else 0.0), gap


# ---------------------------------------------------------------- clipping, scaling, precision


def clipped(world: World, how: str) -> dict[str, float]:
    """Norms and weights of a run that clips or scales, inside backward and after it."""
    logging.disable(logging.WARNING)
    dtype = torch.float32 if how == "scaled" else torch.float64
    found = []
    for mode in ("project", None):
        model = sharded(world, dtype)
        optimizer = optimizer_of(model, projector="svd", stagger=False)
        if mode:
            attach_in_backward(optimizer, mode)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=how == "scaled")
        norms = []
        for step in range(6):
            scaler.scale(loss_of(model, step, world, dtype)).backward()
            scaler.unscale_(optimizer)
            if mode is None and step % 4:  # what the subspace sees is all that coordinates have
                see_alone(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            norms.append(float(norm.full_tensor()))
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        found.append((norms, [p.detach().full_tensor() for p in model.parameters()]))
    (ours, w), (plain, w0) = found
    assert min(ours) > 2e-3, "nothing is clipped"
    gap = max(float((a - b).abs().max()) for a, b in zip(w, w0, strict=True))
    return {"norm": max(abs(a / b - 1) for a, b in zip(ours, plain, strict=True)), "weights": gap}


def see_alone(optimizer: Any) -> None:
    """Gradients become those of their subspaces: P P^T G."""
    for plan in optimizer._items(optimizer.param_groups[0]):
        if plan.subspace is None:
            continue
        basis = optimizer.state[plan.param]["basis"].to_local()  # (m, r)
        grad = here(plan).view.of(plan.param.grad.to_local())
        grad.copy_(basis @ (basis.mT @ grad))


@pytest.mark.parametrize("how", ["clipped", pytest.param("scaled", marks=pytest.mark.slow)])
def test_clipping_sees_all_ranks_coordinates(how: str, ranks: Worlds) -> None:
    """The norm is that of what all subspaces see, and the step that of gradients so scaled."""
    for found in ranks(2).run(how, clipped, how=how).checked():
        norm, weights = (1e-5, 1e-5) if how == "scaled" else (1e-12, 1e-10)
        assert found["norm"] <= norm, found
        assert found["weights"] <= weights, found


def overflowing(world: World) -> Any:
    """An infinity on one rank under a scaler: no rank steps."""
    logging.disable(logging.WARNING)
    model = sharded(world, torch.float32)
    optimizer = optimizer_of(model, stagger=False)
    attach_in_backward(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    same = []
    for step in range(3):
        before = [p.detach().to_local().clone() for p in model.parameters()]
        loss = loss_of(model, step, world, torch.float32)
        bad = step == 2 and world.rank == 1
        scaler.scale(loss * (float("inf") if bad else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        now = [p.detach().to_local() for p in model.parameters()]
        same.append(all(torch.equal(a, b) for a, b in zip(before, now, strict=True)))
    return same, scaler.get_scale()


@pytest.mark.slow
def test_a_scaler_skips_on_all_ranks(ranks: Worlds) -> None:
    values = ranks(2).run("inf", overflowing).checked()
    assert values == [([False, False, True], 2.0**9)] * 2


def poisoned(world: World, mode: Any, projector: str) -> list[list[bool]]:
    """Whether each weight stood still, by step; one entry on one rank is not a number in one."""
    logging.disable(logging.WARNING)
    model = sharded(world)
    size = {"rank": 0.5} if projector == "columns" else {}
    optimizer = optimizer_of(model, projector=projector, stagger=False, **size)
    now = 0

    def poison(param: Tensor) -> None:
        if now == 2 and world.rank == 1:
            param.grad.to_local()[-1, -1] = float("nan")

    model[1][0].weight.register_post_accumulate_grad_hook(poison)  # before what takes it
    attach_in_backward(optimizer, mode)
    out = []
    for now in range(4):
        before = [p.detach().full_tensor() for p in model.parameters()]
        loss_of(model, now, world).backward()
        optimizer.step()
        optimizer.zero_grad()
        after = [p.detach().full_tensor() for p in model.parameters()]
        out.append([torch.equal(a, b) for a, b in zip(before, after, strict=True)])
        assert all(bool(x.isfinite().all()) for x in after)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("projector", ["svd", "columns"])
@pytest.mark.parametrize("mode", ["project", "step"])
def test_not_a_number_on_one_rank(mode: str, projector: str, ranks: Worlds) -> None:
    """All ranks skip that weight, and no other, in that step alone."""
    args = {"mode": mode, "projector": projector}
    for still in ranks(2).run(mode, poisoned, **args).checked():
        expected = [[False] * len(still[0]) for _ in still]
        expected[2][2] = True
        assert still == expected


def narrow(world: World, mode: Any) -> list[Tensor]:
    """Weights of a run whose layers see bfloat16 and whose gradients travel in it."""
    logging.disable(logging.WARNING)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
    model = sharded(world, torch.float32, mp_policy=policy)
    optimizer = optimizer_of(model)
    if mode:
        attach_in_backward(optimizer, mode)
    for step in range(8):
        loss_of(model, step, world, torch.bfloat16).backward()
        if mode == "project":
            kept = [projection(p.grad) for p in model.parameters()]
            kinds = {x.coords["low"].dtype for x in kept if x is not None}
            assert kinds <= {torch.float32}
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().full_tensor() for p in model.parameters()]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["project", "step"])
def test_mixed_precision(mode: str, ranks: Worlds) -> None:
    """Shards are float32, whatever gradients travelled in: one micro-batch loses nothing."""
    run = ranks(2).run
    ours, plain = (run(str(x), narrow, mode=x).checked()[0] for x in (mode, None))
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


def rounded(world: World, mode: Any) -> list[list[Tensor]]:
    """Weights of each step, here and whole, where coordinates are added up in bfloat16."""
    logging.disable(logging.WARNING)
    model = sharded(world, torch.float32)
    optimizer = optimizer_of(model)
    if mode:
        attach_in_backward(optimizer, coords_dtype="bfloat16")
    for step in range(8):
        for piece in range(2):
            loss_of(model, 2 * step + piece, world, torch.float32).backward()
        optimizer.step()
        optimizer.zero_grad()
    params = [p.detach() for p in model.parameters()]
    return [[p.to_local() for p in params], [p.full_tensor() for p in params]]


@pytest.mark.slow
def test_coordinates_in_bfloat16(ranks: Worlds) -> None:
    """Copies round alike, to the bit, and the run is near that in float32."""
    run, begin = ranks(4).run, list(net().parameters())
    ours, plain = (run(str(x), rounded, mode=x).checked() for x in ("project", None))
    for rank in (0, 1):
        for a, b in zip(ours[rank][0], ours[rank + 2][0], strict=True):
            assert torch.equal(a, b)
    for x, y, x0 in zip(ours[0][1], plain[0][1], begin, strict=True):
        assert 0 < (x - y).norm() < 0.05 * (y - x0).norm()


# ---------------------------------------------------------------- what is refused


def refusals(world: World) -> list[str]:
    """Errors of arguments that do not go with DTensors, each before anything is attached."""
    logging.disable(logging.WARNING)
    model = sharded(world)
    optimizer = optimizer_of(model)
    told = []
    for own in (
        {"process_group": torch.distributed.group.WORLD},
        {"first_basis": "micro"},
    ):
        with pytest.raises(ValueError) as error:
            attach_in_backward(optimizer, **own)
        told.append(str(error.value))
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    return told


def test_what_does_not_go_with_shards(ranks: Worlds) -> None:
    words = ("an optimizer of their own with the process_group", "boundary")
    for told in ranks(2).run("refused", refusals).checked():
        for text, word in zip(told, words, strict=True):
            assert word in text and "0.0.weight, a DTensor" in text, text


def miscounted(world: World) -> tuple[str, list[str]]:
    """Backwards that bring gradients more, and less, often than was said."""
    logging.disable(logging.WARNING)
    model = sharded(world)
    handle = attach_in_backward(optimizer_of(model), "step")
    loss_of(model, 0, world).backward()
    with pytest.raises(RuntimeError) as error:
        loss_of(model, 1, world).backward()
    handle.remove()
    model = sharded(world)
    optimizer = optimizer_of(model)
    attach_in_backward(optimizer, "step", accumulation_steps=2)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            for piece in range(2):
                model.set_requires_gradient_sync(piece == 1)
                loss_of(model, piece, world).backward()
            optimizer.step()
            optimizer.zero_grad()
    return str(error.value), [str(w.message) for w in said if "arrived" in str(w.message)]


def test_a_wrong_count_is_told(ranks: Worlds) -> None:
    for error, said in ranks(2).run("miscounted", miscounted).checked():
        assert "2 times" in error and "accumulation_steps=1" in error, error
        assert len(said) == 1 and "Pass accumulation_steps=1" in said[0], said


def by_rows(world: World) -> tuple[list[str], tuple[str, ...]]:
    """What is said of a model whose matrices are split along their projected side."""
    model = net().double()
    for layer in model:
        fully_shard(layer, mesh=init_device_mesh("cpu", (world.size,)))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        handle = attach_in_backward(optimizer_of(model))
    return [str(w.message) for w in said], handle.whole_shards


def test_matrices_that_stay_whole_are_told(ranks: Worlds) -> None:
    """Those of 16 rows; those of 64 rows are split along their larger side."""
    for said, names in ranks(2).run("rows", by_rows).checked():
        assert names == ("1.0.weight", "3.0.weight", "5.0.weight")
        (text,) = [x for x in said if "3 of 6 matrices" in x]
        assert "shard_placement_fn" in text and "1.0.weight" in text


def too_early(world: World) -> str:
    """fully_shard after attach_in_backward, as accelerate's prepare would."""
    logging.disable(logging.WARNING)
    model = net().double()
    optimizer = optimizer_of(model)
    attach_in_backward(optimizer)
    fully_shard(model, mesh=init_device_mesh("cpu", (world.size,)))
    optimizer.param_groups[0]["params"] = list(model.parameters())
    loss_of(model, 0, world).backward()
    with pytest.raises(RuntimeError) as error:
        optimizer.step()
    return str(error.value)


def test_attached_before_it_is_sharded(ranks: Worlds) -> None:
    for text in ranks(2).run("early", too_early).checked():
        assert "after fully_shard" in text, text
