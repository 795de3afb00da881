"""What a step knows of a parameter and of its group, and how their state is laid out."""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowrank_optim.ops import Noise
from lowrank_optim.ops.quant import Moment
from lowrank_optim.residuals import Residual
from lowrank_optim.rules.base import Rule, Slot
from lowrank_optim.sharding.parts import Part, noise_at, noise_of
from lowrank_optim.stores import Store, Whole
from lowrank_optim.subspaces.base import Subspace
from lowrank_optim.subspaces.block import Block
from lowrank_optim.tensors.matrix import MatrixView
from lowrank_optim.tensors.projected_grad import ProjectedGrad
from lowrank_optim.tensors.values import COUNTER_MAX, check_counter

State = MutableMapping[str, Tensor]


HOST_SCALARS = ("step", "refresh_step", "postponed", "clock", "key")
"""State kept on the CPU in float32: read every step, and a bfloat16 counter would stop at 256."""


RECORDED = ("step", "refresh_step")
"""Those of them that are on the device where a CUDA graph may hold a step."""


def on_host(key: str, capturable: bool = False) -> bool:
    """Whether a state entry stays on the CPU: the scalars, and what a subspace calls ``host.``."""
    if capturable and key in RECORDED:
        return False
    return key in HOST_SCALARS or key.startswith("host.")


@dataclass(eq=False, slots=True)
class ParamPlan:
    """One parameter with all that a step needs to know about it."""

    alone: ClassVar[bool] = True
    """Whether its gradient is all that its step needs: a factor of a module needs its siblings'."""

    param: Tensor
    name: str
    index: int
    """Its place among all parameters of the optimizer, as in a state dict."""
    uid: int
    """What its draws are of: :func:`lowrank_optim.groups.names.uid_of` its name, or its place."""
    view: MatrixView | None
    subspace: Subspace | None
    kind: int = 0
    """Number of its (view, subspace) among those of its group: hashing them takes a microsecond."""
    part: Part | None = None
    """What of it is on this rank, where it lies on several."""
    local: Any = None
    """What an optimizer keeps of it on this rank: its state, seen from here."""
    tried: int = -1
    """The step whose refresh was taken care of before it, with other ranks."""
    before: Any = None
    """Its first moment before a refresh with other ranks, where a residual asks for it."""
    made: tuple[torch.Size, torch.dtype, torch.device] = field(init=False)
    """Shape, dtype and device that the parameter had then: its state is made for them."""

    def __post_init__(self) -> None:
        self.made = self.param.shape, self.param.dtype, self.param.device

    @property
    def sharded(self) -> bool:
        """Whether it lies on several ranks, a part on each."""
        return self.part is not None and self.part.mesh is not None

    def noise(self, seed: int) -> Noise:
        """Of the stochastic rounding of what is here of the weights, by its place in the whole."""
        part = self.part
        if part is None or part.mesh is None:
            return noise_of(self.param, seed)
        return noise_at(seed, part.shape, part.mesh, part.placements)

    @property
    def key(self) -> tuple[Any, ...]:
        """Items of a group with the same key can be stepped as one bucket."""
        grad, formats = self.param.grad, None
        if isinstance(grad, ProjectedGrad):  # whatever the gradient was
            formats = tuple(x.dtype for x in grad.coords.values())
        return self.kind, self.param.dtype, self.param.device, formats


@dataclass(frozen=True, slots=True)
class Strategies:
    """What one parameter group chose for every role but the subspace."""

    rule: Rule
    residual: Residual
    store: Store
    on_refresh: str
    gap: int
    stagger: bool
    seed: int
    rounding: bool
    maximize: bool
    lr_scale: float = 1.0
    """Factor of the learning rate of projected parameters, but not of their decay."""
    aged: bool = False
    """Whether every row of a coordinate counts its own steps, from when it came in."""
    capturable: bool = False
    """Whether steps are counted on the device, so that a CUDA graph can hold one."""

    def __post_init__(self) -> None:
        """Raise where rows cannot have steps of their own.

        Raises:
            ValueError: the rule's direction depends on the step of the whole matrix.
        """
        if self.aged and not self.rule.by_row:
            raise ValueError(
                f"rows cannot count steps of their own under {self.rule}: its direction depends "
                "on the step of the whole matrix; take another rule, or one step for all rows"
            )


def init_state(
    item: ParamPlan, chosen: Strategies, like: Tensor, active: bool | None = None
) -> State:
    """The whole state of one parameter, all zeros, on the device of ``like``.

    Args:
        item: the parameter, or what stands for a part of it.
        chosen: what its group chose.
        like: a tensor of its shape on the device.
        active: whether a block holds moments (default: if it is among the first that do).
    """
    device = like.device if chosen.capturable else None
    state: State = {"step": torch.zeros((), dtype=torch.float32, device=device)}
    if isinstance(item.subspace, Block):
        assert item.view is not None
        state.update(item.subspace.init(item.view, like))
        state.update(chosen.residual.init(item.view, like))
        if active is None:
            active = item.subspace.position in active_blocks(item, chosen, 0)
        if active:
            alloc_moments(item, chosen, state, like)
        return state
    if item.subspace is not None and item.view is not None:
        state["refresh_step"] = torch.full((), -1.0, device=device)
        state["postponed"] = torch.zeros((), dtype=torch.float32)
        state.update(item.subspace.init(item.view, like))
        state.update(chosen.residual.init(item.view, like))
    for coord, shape in _coords(item).items():
        if chosen.aged and coord:
            state[age_key(coord)] = like.new_zeros(shape[:-1], dtype=torch.float32)
        _alloc(item, chosen, state, coord, shape, like)
    return state


def check_state(item: ParamPlan, chosen: Strategies, state: Mapping[str, Tensor]) -> None:
    """Raise unless a step may read what a saved state of one parameter holds.

    Args:
        item: the parameter.
        chosen: what its group chose.
        state: entries under the keys, and in the shapes, of :func:`init_state`.

    Raises:
        ValueError: with the key, what was found, and what is allowed.
    """
    # a dense parameter's may stand still, as torch's does: nothing is due by it
    check_counter(state, "step", most=COUNTER_MAX if item.subspace is not None else math.inf)
    check_counter(state, "refresh_step", least=-1, most=float(state["step"]))
    for key in ("postponed", "clock"):
        check_counter(state, key)
    if item.subspace is not None and item.view is not None:
        item.subspace.check_state(state, item.view)
        chosen.residual.check_state(state)
    for coord, shape in _coords(item).items():
        check_counter(state, age_key(coord))
        for slot in chosen.rule.slots(shape):
            chosen.store.check_state(state, slot_key(coord, slot.name), slot)


def _coords(item: ParamPlan) -> dict[str, tuple[int, ...]]:
    """Shape of each coordinate that has moments; the parameter itself is one without a name."""
    if item.subspace is None or item.view is None or isinstance(item.subspace, Block):
        return {"": tuple(item.param.shape)}
    return item.subspace.coord_shapes(item.view)


def active_blocks(item: ParamPlan, chosen: Strategies, count: int) -> frozenset[int]:
    """Positions of the blocks that hold moments after ``count`` switches, this one's own group."""
    block = item.subspace
    assert isinstance(block, Block)
    return block.active(count, seeded(chosen.seed, block.first, count))


def alloc_moments(item: ParamPlan, chosen: Strategies, state: State, like: Tensor) -> None:
    """Moments of the whole parameter, zeros."""
    _alloc(item, chosen, state, "", tuple(item.param.shape), like)


def _alloc(
    item: ParamPlan,
    chosen: Strategies,
    state: State,
    coord: str,
    shape: tuple[int, ...],
    like: Tensor,
) -> None:
    """Moments of one coordinate, or of the part of it that is here: whole blocks of columns."""
    part, whole = item.part, Whole(shape)
    if part is not None and part.sharded:
        if not coord:
            whole = Whole(part.shape, by_rows=True, crossed=part.crossed)
        else:
            assert item.subspace is not None and item.view is not None and part.view is not None
            whole = Whole(item.subspace.coord_shapes(part.view)[coord])
            padded = item.view._replace(n=item.view.n + part.padding)
            shape = item.subspace.coord_shapes(padded)[coord]
    for slot in chosen.rule.slots(shape):
        chosen.store.alloc(state, slot_key(coord, slot.name), slot, shape, like, whole)


def unit_of(view: MatrixView, subspace: Subspace, chosen: Strategies) -> int:
    """Columns that ranks must step together, as the moments of columns are kept."""
    shapes = subspace.coord_shapes(view)
    wider = subspace.coord_shapes(view._replace(n=view.n + 1))
    units = [
        chosen.store.unit(slot.shape(shape))
        for coord, shape in shapes.items()
        if shape != wider[coord]
        for slot in chosen.rule.slots(shape)
    ]
    return max(units, default=1)


def slot_key(coord: str, slot: str) -> str:
    """State key of a moment: ``low.exp_avg``, or torch's own ``exp_avg`` when dense."""
    return f"{coord}.{slot}" if coord else slot


def age_key(coord: str) -> str:
    """State key of the steps that each row of a coordinate has taken."""
    return f"{coord}.age"


def mixed(*numbers: int) -> int:
    """One seed for a tuple of counters (splitmix64 of each in turn)."""
    seed = 0
    for number in numbers:
        seed = (seed + number + 0x9E3779B97F4A7C15) % 2**64
        seed = ((seed ^ (seed >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        seed = ((seed ^ (seed >> 27)) * 0x94D049BB133111EB) % 2**64
        seed ^= seed >> 31
    return seed % 2**63


def seeded(*numbers: int) -> torch.Generator:
    """A CPU generator for a tuple of counters."""
    return torch.Generator().manual_seed(mixed(*numbers))


ReadMoments = Sequence[tuple[str, Slot, Moment]]
"""The moments of one coordinate as they were read: key, slot, and what the rule updates."""


Keys = Sequence[tuple[str, Slot]]


def slot_keys(coord: str, shape: Sequence[int], chosen: Strategies) -> Keys:
    """The slots of one coordinate and their state keys, the same for all items of a bucket."""
    return [(slot_key(coord, slot.name), slot) for slot in chosen.rule.slots(shape)]


def read_slots(
    items: Sequence[ParamPlan], states: Sequence[State], keys: Keys, chosen: Strategies
) -> list[ReadMoments]:
    """The moments of one coordinate of alike matrices, each in the form that the rule takes."""
    likes = [item.param for item in items]
    every = [chosen.store.read_all(states, key, slot, likes) for key, slot in keys]
    return [
        [(key, slot, x) for (key, slot), x in zip(keys, own, strict=True)]
        for own in zip(*every, strict=True)
    ] or [[] for _ in items]


def write_slots_(
    items: Sequence[ParamPlan],
    states: Sequence[State],
    held: Sequence[ReadMoments],
    chosen: Strategies,
    finite: Sequence[Tensor] = (),
) -> None:
    """Write back the moments that were copied to be read; the others are in place already."""
    for n, (key, slot, _) in enumerate(held[0] if held else ()):
        at, xs, noises = [], [], []
        for i, (item, state, own) in enumerate(zip(items, states, held, strict=True)):
            x = own[n][2]
            if isinstance(x, Tensor) and x is not state[key]:
                seed = mixed(chosen.seed, item.uid, int(state["step"]), 1, n)
                at.append(i)
                xs.append(x)
                noises.append(moment_noise(state, key, seed))
        if at:
            fine = [finite[i] for i in at] if finite else []
            chosen.store.write_all_([states[i] for i in at], key, slot, xs, noises, fine)


def moment_noise(state: State, key: str, seed: int) -> Noise:
    """Of the stochastic rounding of a moment, a part of which may be all that is here."""
    kept = getattr(state, "outer", state)
    return noise_of(kept[key], seed)


def rounds(item: ParamPlan, chosen: Strategies) -> bool:
    """Whether the weights round stochastically: of bfloat16 alone."""
    return chosen.rounding and item.param.dtype == torch.bfloat16


def weight_noise(item: ParamPlan, state: State, chosen: Strategies) -> Noise | None:
    """Of the stochastic rounding of a weight as it is stored; None to round to nearest."""
    if not rounds(item, chosen):
        return None
    return item.noise(mixed(chosen.seed, item.uid, int(state["step"]), 3))
