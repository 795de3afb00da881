"""What a run of several ranks meets now and then, beside one process: step by step the same."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

import lowrank_optim
from lowrank_optim.engine.bucket import CHUNK_BYTES
from lowrank_optim.engine.sharded import phases
from lowrank_optim.engine.sharded import step as sharded_step
from tests.sharded.models import here
from tests.sharded.ranks import Ranks, World

Worlds = Callable[[int], Ranks]


def drawn(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def spread(x: Tensor, world: World | None, place: int | None) -> Tensor:
    """A DTensor on all ranks; of one process the tensor itself."""
    if world is None:
        return x.clone()
    mesh = init_device_mesh("cpu", (world.size,))
    places = [Replicate() if place is None else Shard(place)]
    return here(x, mesh, places)


def whole(x: Tensor) -> Tensor:
    x = x.detach()
    return x.full_tensor().clone() if isinstance(x, DTensor) else x.clone()


def quiet() -> None:
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")


class Run:
    """Weights of one shape each, and an optimizer of them."""

    def __init__(
        self,
        world: World | None,
        shapes: list[tuple[int, ...]],
        places: list[int | None],
        dtype: torch.dtype = torch.float64,
    ) -> None:
        quiet()
        self.world, self.places, self.dtype = world, places, dtype
        self.params = [
            nn.Parameter(spread(drawn(shape, i, dtype), world, place))
            for i, (shape, place) in enumerate(zip(shapes, places, strict=True))
        ]
        self.named = [(f"layer{i}.weight", p) for i, p in enumerate(self.params)]

    def grads(self, step: int, factor: float = 1.0) -> None:
        for i, (p, place) in enumerate(zip(self.params, self.places, strict=True)):
            noise = factor * drawn(tuple(p.shape), 1000 + 100 * step + i, self.dtype)
            p.grad = spread(noise, self.world, place)

    def weights(self) -> list[Tensor]:
        return [whole(p) for p in self.params]


def nearest(one: Any, values: list[Any], most: float = 1e-10) -> None:
    """Lists of tensors of all ranks, and of one process."""
    for rank, own in enumerate(values):
        for i, (x, y) in enumerate(zip(own, one, strict=True)):
            gap = float((x.double() - y.double()).abs().max())
            assert gap <= most, f"{i} of rank {rank} is {gap:.2e} from one process"


# ---------------------------------------------------------------- chunks


def in_chunks(world: World | None, cls: str, place: int, options: dict[str, Any]) -> list[Tensor]:
    """Seven alike weights, of which fewer fill a chunk on one rank than on another."""
    run = Run(world, [(13, 16) if place == 0 else (16, 13)] * 7, [place] * 7)
    before = dict(CHUNK_BYTES)
    CHUNK_BYTES[False] = 2000
    try:
        optimizer = getattr(lowrank_optim, cls)(run.named, lr=1e-2, rank=3, **options)
        for step in range(4):
            run.grads(step)
            optimizer.step()
    finally:
        CHUNK_BYTES.update(before)
    return run.weights()


@pytest.mark.parametrize("place", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("cls", "options"),
    [
        ("DCTAdamW", {"error_feedback": "float32", "update_proj_gap": 2}),
        ("GaLoreAdamW", {"projector": "svd", "update_proj_gap": 2}),
        ("GaLoreAdamW", {"projector": "dct", "proj_type": "full", "update_proj_gap": 2}),
        pytest.param("LDAdamW", {}, marks=pytest.mark.slow),
    ],
    ids=["memory", "svd", "full", "ldadam"],
)
def test_ranks_cut_alike_weights_into_the_same_chunks(
    cls: str, options: dict[str, Any], place: int, ranks: Worlds
) -> None:
    args = {"cls": cls, "place": place, "options": options}
    nearest(in_chunks(None, **args), ranks(3).run(cls, in_chunks, **args).checked())


# ---------------------------------------------------------------- gradients


def frozen(world: World | None) -> list[Tensor]:
    """A weight that is frozen with its gradient there, then without one, and trained again."""
    run = Run(world, [(8, 12), (8, 12)], [0, 0])
    optimizer = lowrank_optim.GaLoreAdamW(run.named, lr=1e-2, rank=3, update_proj_gap=2)
    for step in range(6):
        run.grads(step)
        run.params[0].requires_grad_(step not in (2, 3))
        if step == 3:
            run.params[0].grad = None
        optimizer.step()
    return run.weights()


def test_a_frozen_weight_with_a_gradient_steps_as_in_torch(ranks: Worlds) -> None:
    nearest(frozen(None), ranks(2).run("frozen", frozen).checked())


def without_news(world: World | None, projector: str, place: int, factor: float) -> Any:
    """Gradients of zeros, or small ones, where the first basis is due."""
    run = Run(world, [(6, 12)], [place], torch.float32)
    own: dict[str, Any] = {"update_proj_gap": 3, "stagger": False, "projector": projector}
    optimizer = lowrank_optim.GaLoreAdamW(run.named, lr=1e-2, rank=3, **own)
    counts = []
    for step in range(5):
        run.grads(step, factor if step < 2 else 1.0)
        optimizer.step()
        state = optimizer.state[run.params[0]]
        counts.append(torch.stack([state["postponed"], state["refresh_step"]]))
    return [*counts, *run.weights()]


@pytest.mark.parametrize("place", [0, 1, None])
@pytest.mark.parametrize(
    "projector",
    [
        "random",
        "dct",
        *(pytest.param(x, marks=pytest.mark.slow) for x in ("svd", "hadamard", "columns")),
    ],
)
def test_gradients_of_zeros_postpone_as_in_one_process(
    projector: str, place: int | None, ranks: Worlds
) -> None:
    args: dict[str, Any] = {"projector": projector, "place": place, "factor": 0.0}
    nearest(
        without_news(None, **args), ranks(2).run(projector, without_news, **args).checked(), 1e-5
    )


# ---------------------------------------------------------------- arithmetic


def decayed(
    world: World | None, place: int, dtype: torch.dtype, lr: Any, steps: int
) -> list[Tensor]:
    run = Run(world, [(32, 48)], [place], dtype)
    optimizer = lowrank_optim.GaLoreAdamW(
        run.named, lr=lr, rank=8, update_proj_gap=steps // 2, weight_decay=0.1, projector="svd"
    )
    for step in range(steps):
        run.grads(step)
        optimizer.step()
    return run.weights()


def test_bfloat16_weights_of_split_rows_lose_nothing(ranks: Worlds) -> None:
    """Decay and update are rounded once, together: as near to float32 as one process.

    A decay of 0.002 by itself is less than half of a last bit, and never comes about.
    """
    args: dict[str, Any] = {"place": 0, "lr": 2e-2, "steps": 100}
    (exact,) = decayed(None, dtype=torch.float32, **args)
    (one,) = decayed(None, dtype=torch.bfloat16, **args)
    ((many,), _) = ranks(2).run("bf16", decayed, dtype=torch.bfloat16, **args).checked()
    gaps = [float((x.double() - exact.double()).norm()) for x in (one, many)]
    assert gaps[1] <= 1.02 * gaps[0], gaps


@pytest.mark.parametrize("place", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_learning_rate_that_is_a_tensor(place: int, ranks: Worlds) -> None:
    args: dict[str, Any] = {"place": place, "dtype": torch.float64, "steps": 8}
    one = decayed(None, lr=torch.tensor(1e-2, dtype=torch.float64), **args)
    lr = torch.tensor(1e-2, dtype=torch.float64)
    nearest(one, ranks(2).run("tensor lr", decayed, lr=lr, **args).checked())


# ---------------------------------------------------------------- errors


def raising(world: World | None, cls: str, place: int, when: str, options: dict[str, Any]) -> Any:
    """A step that ends in an error on every rank, and is taken again when all have said so."""
    run = Run(world, [(8, 12), (8, 12), (3,)], [place, place, 0])
    optimizer = getattr(lowrank_optim, cls)(run.named, lr=1e-2, rank=3, **options)
    for step in range(3):
        run.grads(step)
        optimizer.step()
    run.grads(3)
    before = run.weights()[:2] + entries(optimizer, run)
    target, name = WHERE[when]
    kept = getattr(target, name)

    def fail(*_: Any, **__: Any) -> Any:
        raise MemoryError("on purpose")

    setattr(target, name, fail)
    try:
        optimizer.step()
        raise AssertionError("nothing was raised")
    except MemoryError:
        pass
    finally:
        setattr(target, name, kept)
    after = run.weights()[:2] + entries(optimizer, run)
    same = all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    with pytest.raises(RuntimeError, match="amid what ranks do together"):
        optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    return same, run.weights()


def entries(optimizer: Any, run: Run) -> list[Tensor]:
    states = [optimizer.state[p] for p in run.params[:2]]
    return [whole(state[key]) for state in states for key in sorted(state)]


WHERE = {
    "after refreshes": (sharded_step, "step_chunks"),
    "after moments": (phases, "_finish"),
    "in refreshes": (sharded_step, "refresh_together"),
}


@pytest.mark.parametrize("when", WHERE)
@pytest.mark.parametrize("place", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("cls", "options"),
    [
        ("DCTAdamW", {"error_feedback": "float32", "update_proj_gap": 3}),
        ("FiraAdamW", {"projector": "svd", "update_proj_gap": 3, "on_refresh": "project"}),
        pytest.param("LDAdamW", {}, marks=pytest.mark.slow),
    ],
    ids=["memory", "fira", "ldadam"],
)
def test_an_error_leaves_every_bit(
    cls: str, options: dict[str, Any], place: int, when: str, ranks: Worlds
) -> None:
    options = {**options, "stagger": False}
    run = Run(None, [(8, 12), (8, 12), (3,)], [0, 0, 0])
    optimizer = getattr(lowrank_optim, cls)(run.named, lr=1e-2, rank=3, **options)
    for step in range(4):
        run.grads(step)
        optimizer.step()
    args = {"cls": cls, "options": options, "place": place, "when": when}
    values = ranks(2).run(when, raising, **args).checked()
    if when != "after moments":
        assert all(same for same, _ in values)
    # the dense one has taken its step: twice here
    nearest(run.weights()[:2], [weights[:2] for _, weights in values])


# ---------------------------------------------------------------- groups


def grouped(world: World | None) -> list[Tensor]:
    """Groups of other ranks, projectors and learning rates, one of them added later."""
    shapes = [(8, 12), (8, 12), (8, 12), (3, 6, 8), (4, 4, 2, 2), (5,)]
    places: list[int | None] = [0, 1, 0, 2, 1, 0]
    run = Run(world, shapes, places)
    named = run.named
    optimizer = lowrank_optim.FiraAdamW(
        [
            {"params": named[:1], "rank": 3, "lr": 1e-2, "projector": "svd"},
            {"params": named[1:2], "rank": 2, "lr": 3e-2, "projector": "dct"},
            {"params": named[5:], "rank": None},
        ],
        lr=1e-3,
        update_proj_gap=2,
        weight_decay=0.1,
    )
    for step in range(8):
        run.grads(step)
        if step == 3:
            optimizer.add_param_group(
                {"params": named[2:4], "rank": 8, "projector": "random", "maximize": True}
            )
        if step == 4:
            optimizer.add_param_group({"params": named[4:5], "rank": 1e-9, "projector": "svd"})
        optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] *= 0.9
    return run.weights()


def test_groups_of_all_kinds(ranks: Worlds) -> None:
    nearest(grouped(None), ranks(2).run("groups", grouped).checked())
    nearest(grouped(None), ranks(1).run("groups", grouped).checked())


def alone(world: World) -> str:
    run = Run(world, [(8, 12)], [0])
    optimizer = lowrank_optim.GaLoreAdamW(run.named, lr=1e-2, rank=3)
    run.grads(0)
    try:
        optimizer.step_param(run.params[0])
    except NotImplementedError as error:
        return str(error)
    return "stepped"


def test_one_weight_of_several_ranks_cannot_step_alone(ranks: Worlds) -> None:
    for text in ranks(2).run("alone", alone).checked():
        assert "layer0.weight" in text, text
