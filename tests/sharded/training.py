"""One run, on one process and on many, and what is held of it at every step."""

from __future__ import annotations

import functools
import itertools
import logging
import warnings
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard
from torch.optim import Optimizer

import lowrank_optim
from tests.sharded import models
from tests.sharded.models import here
from tests.sharded.ranks import World

WEIGHTS, STATE = 1e-10, 1e-7
"""Largest difference to one process. Bases and moments are as good as the gap that they turn on."""
RANK, GAP, STEPS, LONG = 0.3, 2, 6, 9
"""A fraction, so that a matrix of two rows is projected too, though most ranks hold none of it.
Each basis is found three times at least, with a step between; more often in what is slow."""


@dataclass(frozen=True)
class Case:
    """An optimizer, the model it trains and how that is split."""

    cls: str
    """Of :mod:`lowrank_optim`, or of ``torch.optim`` as ``"torch.AdamW"``."""
    options: dict[str, Any] = field(default_factory=dict)
    how: str = "fsdp"
    """How it is split.

    ``fsdp``: by rows. ``fsdp columns``: by columns wherever that is even. ``fsdp placed``: as
    ``lowrank_optim.distributed`` places it. ``tensors``: plain DTensors of every placement.
    ``parallel``: by FSDP2 over weights that tensor parallel has split by rows and by columns in
    turn; ``parallel columns`` and ``parallel placed`` as under FSDP2 alone. ``fsdp offloaded``:
    with weights on the host.
    """
    only: tuple[str, ...] = ()
    """Shapes; all if empty."""
    places: tuple[str, ...] = ("0", "1", "r")
    """Of plain DTensors: dimensions that are split, or "r" where none is; of a square of ranks two
    letters, with "a" for a strided split of dimension 0, and "b" of dimension 1."""
    steps: int = STEPS
    mesh: str = "all"
    """``all`` ranks in one dimension, ``pairs`` of them, each a world of its own, or ``crossed``:
    of plain DTensors some by the rows of a square of ranks and some by its columns. ``square``: a
    mesh of two dimensions, over which FSDP2 has copies of shards."""
    dtype: torch.dtype = torch.float64
    pieces: int = 1
    """Micro-batches of a step."""
    near: float = WEIGHTS
    """Largest difference of a weight to that of one process."""
    drawn: bool = False
    """Gradients are drawn, as those of plain DTensors always are, and not those of a loss: they are
    the same bits on any number of ranks."""

    def __hash__(self) -> int:
        return hash(repr(self))

    @property
    def reference(self) -> Case:
        """The case whose run by one process is the same."""
        how = self.how if self.how == "tensors" else "fsdp"
        return replace(self, how=how, mesh="all", pieces=1)


class Region(NamedTuple):
    """Where a rank's part of a tensor is, as DTensor has it."""

    shape: tuple[int, ...]
    """Of the whole."""
    offset: tuple[int, ...]


Part = tuple[Tensor, int | Region | None]
"""What a rank holds of a tensor, and the dimension that is split, if any; or where it is."""
Held = dict[str, Part]


def make_optimizer(case: Case, named: Iterable[tuple[str, Tensor]]) -> Optimizer:
    """Of named parameters: draws depend on names."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ranks above what a small matrix has
        if case.cls.startswith("torch."):
            cls = getattr(torch.optim, case.cls.removeprefix("torch."))
            optimizer: Optimizer = cls(named, **{"lr": 1e-2, "weight_decay": 1e-2, **case.options})
            return optimizer
        own: dict[str, Any] = {"lr": 1e-2, "weight_decay": 1e-2}
        if not case.cls.startswith(("DCT", "SST", "Switch", "LDAdam")):
            own["update_proj_gap"] = GAP
        if "density" not in case.options:
            own["rank"] = RANK
        own |= case.options
        keys = {k: own.pop(k) for k in ("random_from",) if k in own}  # keys of groups alone
        if own.get("rank", 0) is None:
            keys["rank"] = own.pop("rank")
        if keys:
            named = [{"params": list(named), **keys}]  # type: ignore[assignment]
        optimizer = getattr(lowrank_optim, case.cls)(named, **own)
        return optimizer


def placed(size: int, case: Case) -> Any:
    """The package's own placement for FSDP2, under which a step sends nothing but its guard."""
    from lowrank_optim.distributed import shard_placement_fn

    own = {k: v for k, v in case.options.items() if k in ("proj_type", "projector")}
    return shard_placement_fn(size, **own)


_squares: weakref.WeakKeyDictionary[Any, DeviceMesh] = weakref.WeakKeyDictionary()


def square_mesh(size: int) -> DeviceMesh:
    """The mesh of two dimensions of this world: each that is made leaves groups with threads."""
    world = dist.group.WORLD
    if world not in _squares:
        names = ("down", "across")
        _squares[world] = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=names)
    return _squares[world]


def meshes_of(case: Case, size: int) -> list[DeviceMesh]:
    """Where the parameters of a case are, in turn."""
    if case.mesh == "all":
        return [init_device_mesh("cpu", (size,))]
    square = square_mesh(size)
    if case.mesh == "square":
        return [square]
    return [square["across"]] if case.mesh == "pairs" else [square["down"], square["across"]]


@functools.cache
def _drawn(every: bool, places: int) -> list[Tensor]:
    """A tensor for each shape and place, whether a case has it or not."""
    generator = torch.Generator().manual_seed(3)
    shapes = (models.EVERY if every else models.SHAPES).values()
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in shapes
        for _ in range(places)
    ]


def tensors_of(case: Case, meshes: Sequence[DeviceMesh]) -> dict[str, nn.Parameter]:
    """Plain parameters, one of each shape and placement; DTensors if there are meshes."""
    drawn = iter(_drawn(bool(case.only), len(case.places)))
    found = {}
    for name, shape in (models.EVERY if case.only else models.SHAPES).items():
        for n, place in enumerate(case.places):
            x = next(drawn).clone()
            dense = case.options.get("rank", 0) is None
            if (case.only and name not in case.only) or not places_fit(shape, place, dense):
                continue
            x = x.to(case.dtype)
            if meshes:
                x = here(x, meshes[n % len(meshes)], [placement(letter) for letter in place])
            found[f"{name.replace(' ', '_')}_{place}_{n}.weight"] = nn.Parameter(x)
    return found


STRIDED = {"a": 0, "b": 1}


def placement(place: str) -> Any:
    if place in STRIDED:
        return _StridedShard(STRIDED[place], split_factor=2)
    return Replicate() if place == "r" else Shard(int(place))


def places_fit(shape: Sequence[int], place: str, dense: bool = False) -> bool:
    """Whether there are such dimensions, and splitting them leaves intervals of matrices."""
    dims = {STRIDED.get(x, x) for x in place if x != "r"}
    found = {int(x) for x in dims}
    if not models.CUTS_UNEVENLY and any(shape[STRIDED[x]] % 4 for x in place if x in STRIDED):
        return False
    if dense:
        return all(x < len(shape) for x in found)
    if len(shape) == 3 and 0 in found and len(found) > 1:
        return False  # both the matrices and their number
    return all(x < (2 if len(shape) == 4 else len(shape)) for x in found)


def set_tensor_grads(named: dict[str, nn.Parameter], step: int) -> None:
    """Gradients of a noisy quadratic, in the placement of their parameter."""
    generator = torch.Generator().manual_seed(500 + step)
    for param in named.values():
        noise = torch.randn(param.shape, generator=generator, dtype=torch.float64).to(param.dtype)
        if isinstance(param, DTensor):
            mesh, places = param.device_mesh, param.placements
            own = here(noise, mesh, places).to_local()
            local = own + 0.3 * param.detach().to_local()
            shape, stride = param.shape, param.stride()
            args = {"run_check": False, "shape": shape, "stride": stride}
            param.grad = DTensor.from_local(local, mesh, places, **args)
        else:
            param.grad = noise + 0.3 * param.detach()


class Trained:
    """A case on this process: alone, or as one of the ranks of a world."""

    def __init__(self, case: Case, world: World | None = None) -> None:
        self.case = case
        self.rank, self.size = (0, 1) if world is None else world
        meshes = [] if world is None else meshes_of(case, world.size)
        if (
            case.mesh in ("pairs", "crossed") and meshes
        ):  # a world of its own, with the data of all of it
            self.rank, self.size = meshes[0].get_local_rank(), meshes[0].size()
        self.model: models.Model | None = None
        if case.how == "tensors":
            self.named: dict[str, nn.Parameter] = tensors_of(case, meshes)
        else:
            self.model = models.awkward(case.only).to(case.dtype)
            if meshes:
                own: dict[str, Any] = {"mesh": meshes[0]}
                if case.how.startswith("parallel"):
                    models.parallelize(self.model, meshes[0]["across"])
                    own["mesh"] = meshes[0]["down"]
                    self.rank, self.size = own["mesh"].get_local_rank(), own["mesh"].size()
                if case.how.endswith(" columns"):
                    own["shard_placement_fn"] = models.by_columns(self.size)
                if case.how.endswith(" placed"):
                    own["shard_placement_fn"] = placed(self.size, case)
                if case.how.endswith(" offloaded"):
                    own["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
                for block in self.model.blocks:
                    fully_shard(block, **own)
                fully_shard(self.model, **own)
            self.named = dict(self.model.named_parameters())
        self.optimizer = make_optimizer(case, self.named.items())

    def backward(self, step: int) -> None:
        """Gradients of a step: averaged over the ranks, as whoever shards does it."""
        self.optimizer.zero_grad()
        if self.model is None or self.case.drawn:
            set_tensor_grads(self.named, step)
            return
        for piece in range(self.case.pieces):
            if self.case.pieces > 1:
                self.model.set_requires_gradient_sync(piece == self.case.pieces - 1)
            count = self.size * self.case.pieces
            loss = self.model(step, self.rank + piece * self.size, count)
            (loss / self.case.pieces).backward()

    def step(self, step: int) -> None:
        self.backward(step)
        self.optimizer.step()

    def weights(self) -> Held:
        return {name: part_of(param.detach()) for name, param in self.named.items()}

    def state(self) -> dict[str, Held]:
        """State by name of its parameter, once devices have said what became of refreshes."""
        if isinstance(self.optimizer, lowrank_optim.LowRankOptimizer):
            self.optimizer._settle()
        return {
            name: {key: part_of(x) for key, x in self.optimizer.state[param].items()}
            for name, param in self.named.items()
        }

    def held(self) -> tuple[Held, dict[str, Held]]:
        return self.weights(), self.state()


def part_of(x: Any) -> Part:
    if not isinstance(x, DTensor):
        return torch.as_tensor(x).clone(), None
    if x.device_mesh.ndim > 1:
        return in_place(x)
    (place,) = x.placements
    split = place.dim if isinstance(place, Shard) else None
    return x.to_local().detach().clone(), split


def in_place(x: DTensor) -> Part:
    """What is here, and where that is in the whole, as torch says."""
    local = x.to_local().detach().clone()
    shape, offset = compute_local_shape_and_global_offset(x.shape, x.device_mesh, x.placements)
    assert shape == tuple(local.shape), f"{shape} of {x.shape} as {x.placements}: {local.shape}"
    return local, Region(tuple(x.shape), tuple(offset))


def whole(parts: Sequence[Part], where: str) -> Tensor:
    """What the ranks hold together; copies must be alike to the bit."""
    regions = [split for _, split in parts if isinstance(split, Region)]
    if regions:
        assert len(regions) == len(parts), f"{where} is not everywhere a DTensor of one mesh"
        return pieced([x for x, _ in parts], regions, where)
    splits = {split for _, split in parts}
    assert len(splits) == 1, f"{where} is split differently: {splits}"
    (split,) = splits
    if isinstance(split, int):
        return torch.cat([x for x, _ in parts], split)
    first = parts[0][0]
    for i, (x, _) in enumerate(parts):
        assert x.dtype == first.dtype and torch.equal(x, first), f"{where}: rank {i} has another"
    return first


def pieced(parts: Sequence[Tensor], regions: Sequence[Region], where: str) -> Tensor:
    """Parts in their places: all of it, and where two ranks have a place they agree."""
    out = torch.empty(regions[0].shape, dtype=parts[0].dtype)
    seen = torch.zeros(regions[0].shape, dtype=torch.bool)
    for i, (x, region) in enumerate(zip(parts, regions, strict=True)):
        assert region.shape == regions[0].shape and x.dtype == out.dtype, where
        at = tuple(slice(a, a + n) for a, n in zip(region.offset, x.shape, strict=True))
        before = seen[at]
        assert torch.equal(x[before], out[at][before]), f"{where}: rank {i} has another"
        out[at] = x
        seen[at] = True
    assert bool(seen.all()), f"{where}: nobody has {int((~seen).sum())} entries"
    return out


def together(held: Sequence[Held], where: str) -> dict[str, Tensor]:
    """One dictionary of what all ranks hold."""
    for own in held:
        assert own.keys() == held[0].keys(), f"{where}: {own.keys() ^ held[0].keys()}"
    return {key: whole([own[key] for own in held], f"{where} {key}") for key in held[0]}


Step = tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]
"""Weights, and state, after a step."""


def assembled(values: Sequence[Sequence[tuple[Held, dict[str, Held]]]]) -> list[Step]:
    """The run of a whole world, step by step."""
    out = []
    for i, ranks in enumerate(zip(*values, strict=True)):
        weights = together([w for w, _ in ranks], f"weights after step {i}")
        states = {
            name: together([s[name] for _, s in ranks], f"state of {name} after step {i}")
            for name in ranks[0][1]
        }
        out.append((weights, states))
    return out


def train(world: World | None, case: Case) -> list[tuple[Held, dict[str, Held]]]:
    """A whole run: what is held after every step. A job of :class:`tests.sharded.ranks.Ranks`."""
    logging.disable(logging.WARNING)
    trained = Trained(case, world)
    out = []
    for step in range(case.steps):
        trained.step(step)
        out.append(trained.held())
    return out


@functools.lru_cache(maxsize=64)
def reference(case: Case) -> list[Step]:
    """The run of one process."""
    return assembled([train(None, case)])


def start(case: Case) -> dict[str, Tensor]:
    """Weights before the first step."""
    return together([Trained(case).weights()], "start")


def assert_equal_runs(
    actual: Sequence[Step], expected: Sequence[Step], weights: float = WEIGHTS, state: float = STATE
) -> None:
    """Weights and state within rounding after every step; choices and counters to the bit."""
    for i, ((w, s), (w0, s0)) in enumerate(zip(actual, expected, strict=True)):
        assert w.keys() == w0.keys()
        for name in w0:
            assert_within(w[name], w0[name], weights, f"{name} after step {i}")
            own, one = s[name], s0[name]
            assert own.keys() == one.keys(), (
                f"state of {name} after step {i} differs in {own.keys() ^ one.keys()}"
            )
            for key in one:
                x = out_of_blocks(own[key], one[key].shape)
                assert_within(x, one[key], state, f"{key} of {name} after step {i}")


def out_of_blocks(x: Tensor, shape: Sequence[int]) -> Tensor:
    """An entry as one process has it, if ranks keep it in blocks; what fills them up is zero.

    Two dimensions ``(blocks, entries)`` are one there; scales have a dimension of blocks, and are
    flat there.
    """
    if len(shape) == 1 and x.dim() > 1 and x.numel() == shape[0]:
        return x.flatten()
    for dim in range(x.dim() - 1 if x.dim() == len(shape) + 1 else 0):
        flat = x.flatten(dim, dim + 1)
        if flat.shape[:dim] + flat.shape[dim + 1 :] == (*shape[:dim], *shape[dim + 1 :]):
            rest = flat.narrow(dim, shape[dim], flat.shape[dim] - shape[dim])
            zeros = (0, 127, 0x77) if x.dtype == torch.uint8 else (0,)
            assert len(rest.unique()) <= 1 and all(int(y) in zeros for y in rest.unique())
            return flat.narrow(dim, 0, shape[dim])
    return x


COUNTERS = ("step", "refresh_step", "postponed", "clock", "key", "host.iteration")


def assert_within(actual: Tensor, expected: Tensor, most: float, what: str) -> None:
    shapes = tuple(actual.shape), tuple(expected.shape)
    assert shapes[0] == shapes[1], f"{what} is {shapes[0]} together, {shapes[1]} in one process"
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype}, {expected.dtype}"
    exact = what.split()[0] in COUNTERS or not expected.is_floating_point()
    if exact:
        assert torch.equal(actual, expected), f"{what} is {actual}, {expected} in one process"
    elif expected.numel():
        gap = float((actual.double() - expected.double()).abs().max())
        assert gap <= most, f"{what} is {gap:.2e} from one process"  # NaN is never within


def assert_all_moved(case: Case, run: Sequence[Step]) -> None:
    """Every entry of every weight, so that no shard stood still."""
    for name, x in start(case).items():
        still = int((run[-1][0][name] == x).sum())
        assert still == 0, f"{still} of {x.numel()} entries of {name} have not moved"


def choices(run: Sequence[Step]) -> dict[str, int]:
    """How often each projected matrix got a basis, or became another kind of block."""
    found = {}
    for name in run[0][1]:
        states = [s[name] for _, s in run]
        if "clock" in states[0]:
            held = [len(s) for s in states]
            found[name] = sum(a != b for a, b in itertools.pairwise(held))
        elif "host.held" in states[0]:
            slots = [s["host.held"].tolist() for s in states]
            if len(slots[0][0]) > 1:  # one slot is never switched
                found[name] = sum(a != b for a, b in itertools.pairwise(slots))
        elif "refresh_step" in states[0]:
            found[name] = len({float(s["refresh_step"]) for s in states} - {-1.0})
    return found


def assert_worth_comparing(case: Case, run: Sequence[Step]) -> None:
    """Matrices are projected, chose at least three times, and no weight stood still."""
    found = choices(run)
    blocks = any("clock" in s for s in run[0][1].values())
    assert found, f"{case} projects nothing"
    most = max(found.values()) if blocks else min(found.values())
    turns = 1 if len(found) > 1 else 0  # a single block takes none
    few = case.steps < STEPS or case.options.get("update_proj_gap", GAP) > GAP
    assert most >= (turns if blocks else 2 if few else 3), found
    assert_all_moved(case, run)


def jittered(case: Case) -> list[Step]:
    """The run of one process whose gradients are rounded otherwise: how well the case is posed."""
    trained = Trained(case)
    generator = torch.Generator().manual_seed(9)
    out = []
    for step in range(case.steps):
        trained.backward(step)
        for param in trained.named.values():
            noise = torch.randn(param.shape, generator=generator, dtype=torch.float64)
            if param.grad is not None:
                param.grad.mul_(1 + 2.0**-52 * noise)
        trained.optimizer.step()
        out.append(trained.held())
    return assembled([out])
