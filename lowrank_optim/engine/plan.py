"""What a step knows of a parameter and of its group, and how their state is laid out."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowrank_optim.ops import Noise
from lowrank_optim.ops.devices import apart, pinned
from lowrank_optim.ops.noise import signed, splitmix, splitmix_
from lowrank_optim.ops.quant import Moment
from lowrank_optim.residuals import Residual
from lowrank_optim.rules.base import Rule, Slot
from lowrank_optim.sharding.parts import Part, local, noise_at, noise_of
from lowrank_optim.stores import Store, Whole, scale_key
from lowrank_optim.subspaces.base import Subspace
from lowrank_optim.subspaces.block import Block
from lowrank_optim.tensors.matrix import MatrixView
from lowrank_optim.tensors.projected_grad import ProjectedGrad
from lowrank_optim.tensors.values import COUNTER_MAX, WIDE_COUNTER_MAX, check_counter

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


def counts(key: str, x: Tensor) -> bool:
    """Whether an entry, as it is made, is a counter of the host, and so may become float64."""
    return on_host(key) and x.dim() == 0 and x.is_cpu and x.dtype == torch.float32


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
    needs: tuple[Hashable, int, Sequence[int]] | None = None
    """What its bucket made of memory in phases three and four, as of :mod:`.reserve`."""
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

    def noise(self, seed: int | Tensor) -> Noise:
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
    offload: bool = False
    """Whether what :func:`resting_keys` names lies in host memory, where that is not the device's.
    False while a bucket is stepped: what it needs is on the device then."""

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
        state.update(_remembered(item.view, chosen, like))
        if active is None:
            active = item.subspace.position in active_blocks(item, chosen, 0)
        if active:
            alloc_moments(item, chosen, state, like)
        return state
    if item.subspace is not None and item.view is not None:
        state["refresh_step"] = torch.full((), -1.0, device=device)
        state["postponed"] = torch.zeros((), dtype=torch.float32)
        state.update(item.subspace.init(item.view, like))
        if device is not None:  # of a layer of factors, which came with its first refresh
            state["refresh_step"] = state["refresh_step"].to(device)
        state.update(_remembered(item.view, chosen, like))
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
    most = WIDE_COUNTER_MAX
    check_counter(state, "step", most=most if item.subspace is not None else math.inf)
    check_counter(state, "refresh_step", least=-1, most=float(state["step"]))
    check_counter(state, "postponed")
    check_counter(state, "clock", most=most)
    if item.subspace is not None and item.view is not None:
        item.subspace.check_state(state, item.view)
        chosen.residual.check_state(state)
    for coord, shape in _coords(item).items():
        check_counter(state, age_key(coord), most=COUNTER_MAX + 1)  # where ages stand still
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
    return block.active(count, seeded(chosen.seed, block.first, block.draw(count)))


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
    made: State = {}
    for slot in chosen.rule.slots(shape):
        key = slot_key(coord, slot.name)
        chosen.store.alloc(made, key, slot, shape, _beside(like, chosen), whole)
    state.update({k: _at_rest(x, like, chosen) for k, x in made.items()})


def _remembered(view: MatrixView, chosen: Strategies, like: Tensor) -> State:
    """What a residual remembers of one matrix."""
    if not chosen.residual.memory:
        return chosen.residual.init(view, like)
    made = chosen.residual.init(view, _beside(like, chosen))
    return {k: _at_rest(x, like, chosen) for k, x in made.items()}


def _rests(like: Tensor, chosen: Strategies) -> bool:
    return chosen.offload and apart(like)


def _beside(like: Tensor, chosen: Strategies) -> Tensor:
    """A tensor of the same dtype, on the device where what rests is to be."""
    moves = _rests(like, chosen) and not like.is_meta
    return torch.empty(0, dtype=like.dtype) if moves else like


def _at_rest(x: Tensor, like: Tensor, chosen: Strategies) -> Tensor:
    return pinned(x, like.device) if _rests(like, chosen) and x.is_cpu else x


def resting_keys(item: ParamPlan, chosen: Strategies) -> list[str]:
    """State keys of what lies in host memory between steps, if ``chosen`` asks for it.

    Moments, with their scales, and the memory of error feedback: what only a step reads, and all of
    it. Bases stay on the device, as backward projects with them.
    """
    return moving_keys(item, chosen) if _rests(local(item.param), chosen) else []


def moving_keys(item: ParamPlan, chosen: Strategies) -> list[str]:
    """Those that ``state_device`` is about, wherever they lie."""
    keys = [
        slot_key(coord, slot.name)
        for coord, shape in _coords(item).items()
        for slot in chosen.rule.slots(shape)
    ]
    remembers = item.subspace is not None and item.view is not None
    memory = chosen.residual.memory if remembers else ()
    return [*(k for key in keys for k in (key, scale_key(key))), *memory]


def refreshed_keys(subspace: Subspace, state: State, chosen: Strategies) -> list[str]:
    """State keys that a refresh may overwrite: all but the memory of a residual."""
    return [key for key in subspace.refreshed(state) if key not in chosen.residual.memory]


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
        seed = splitmix(seed, number)
    return seed % 2**63


def seeds_of(
    items: Sequence[ParamPlan], states: Sequence[State], chosen: Strategies, *salt: int
) -> Sequence[int | Tensor]:
    """``mixed(seed, uid, step, *salt)`` of each; ``()`` on the device if it counts the steps."""
    if not chosen.capturable:
        pairs = zip(items, states, strict=True)
        return [mixed(chosen.seed, i.uid, int(state["step"]), *salt) for i, state in pairs]
    steps = [state["step"] for state in states]
    starts = [splitmix(splitmix(0, chosen.seed), item.uid) for item in items]
    # one fill each: a table of the host would have to be kept for as long as a graph that reads it
    device = steps[0].device
    fills = [torch.full((), signed(x), dtype=torch.int64, device=device) for x in starts]
    seeds = splitmix_(torch.stack(fills), torch.stack(steps).to(torch.int64))
    for number in salt:
        seeds = splitmix_(seeds, number)
    return (seeds & (2**63 - 1)).unbind()


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
    items: Sequence[ParamPlan],
    states: Sequence[State],
    coord: str,
    shape: Sequence[int],
    chosen: Strategies,
) -> list[ReadMoments]:
    """The moments of one coordinate of alike matrices, each in the form that the rule takes."""
    likes, keys = [item.param for item in items], slot_keys(coord, shape, chosen)
    every = [chosen.store.read_all(states, key, slot, shape, likes) for key, slot in keys]
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
    rows: slice | None = None,
) -> None:
    """Write back the moments that were copied to be read; the others are in place already.

    Args:
        items: alike matrices.
        states: of each.
        held: what was read of each, and updated.
        chosen: what their group chose.
        finite: of each, 0-d bools on the device; where False what is stored does not change.
        rows: of the first dimension, that were read (default: all).
    """
    into = states if rows is None else [rows_of(state, held[0], rows) for state in states]
    for n, (key, slot, _) in enumerate(held[0] if held else ()):
        every = [own[n][2] for own in held]
        at = [i for i, x in enumerate(every) if isinstance(x, Tensor) and x is not into[i][key]]
        if at:
            own = [states[i] for i in at]
            seeds = seeds_of([items[i] for i in at], own, chosen, 1, n)
            noises = [moment_noise(x, key, seed) for x, seed in zip(own, seeds, strict=True)]
            if rows is not None:
                noises = [noise.narrow(0, rows.start) for noise in noises]
            xs, places = [every[i] for i in at], [into[i] for i in at]
            fine = [finite[i] for i in at] if finite else []
            chosen.store.write_all_(places, key, slot, xs, noises, fine)  # type: ignore[arg-type]


def rows_of(state: State, keys: Sequence[tuple[Any, ...]], rows: slice) -> State:
    """Some rows of the first dimension of slots, as they are stored, with their scales."""
    names = [name for key, *_ in keys for name in (key, scale_key(key)) if name in state]
    return {name: state[name][rows] for name in names}


def moment_noise(state: State, key: str, seed: int | Tensor) -> Noise:
    """Of the stochastic rounding of a moment, a part of which may be all that is here."""
    kept = getattr(state, "outer", state)
    return noise_of(kept[key], seed)


def rounds(item: ParamPlan, chosen: Strategies) -> bool:
    """Whether the weights round stochastically: of bfloat16 alone."""
    return chosen.rounding and item.param.dtype == torch.bfloat16


def weight_noises(
    items: Sequence[ParamPlan], states: Sequence[State], chosen: Strategies
) -> Sequence[Noise | None]:
    """Of the stochastic rounding of weights as they are stored; None to round to nearest."""
    at = [n for n, item in enumerate(items) if rounds(item, chosen)]
    if not at:
        return [None] * len(items)
    seeds = seeds_of([items[n] for n in at], [states[n] for n in at], chosen, 3)
    known = dict(zip(at, seeds, strict=True))
    return [item.noise(known[n]) if n in known else None for n, item in enumerate(items)]


def weight_noise(item: ParamPlan, state: State, chosen: Strategies) -> Noise | None:
    """:func:`weight_noises` of one."""
    (noise,) = weight_noises([item], [state], chosen)
    return noise
