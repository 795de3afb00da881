"""The four phases of a step: refresh?, project, adapt, apply. The only place that knows them."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.linalg import LinAlgError

from lowrank_optim import ops, quant
from lowrank_optim.matrix import MatrixView
from lowrank_optim.projected import ProjectedGrad
from lowrank_optim.quant import Moment, Quantized
from lowrank_optim.residuals import Drop, Residual, Seen
from lowrank_optim.rules.base import Rule, Slot, compute_dtype
from lowrank_optim.stores import Store
from lowrank_optim.subspaces.base import Context, Into, Moved, Subspace, identity
from lowrank_optim.subspaces.block import Block
from lowrank_optim.transports import TRANSPORTS, take_rows

logger = logging.getLogger(__name__)
State = dict[str, Tensor]

HOST_SCALARS = ("step", "refresh_step", "postponed", "clock", "key")
"""State kept on the CPU in float32: read every step, and a bfloat16 counter would stop at 256."""
GOLDEN = 0.6180339887498949


def on_host(key: str) -> bool:
    """Whether a state entry stays on the CPU: the scalars, and what a subspace calls ``host.``."""
    return key in HOST_SCALARS or key.startswith("host.")


@dataclass(eq=False, slots=True)
class Item:
    """One parameter with all that a step needs to know about it."""

    param: Tensor
    name: str
    index: int
    view: MatrixView | None
    subspace: Subspace | None
    kind: int = 0
    """Number of its (view, subspace) among those of its group: hashing them takes a microsecond."""

    @property
    def key(self) -> tuple[Any, ...]:
        """Items of a group with the same key can be stepped as one bucket."""
        taken = isinstance(self.param.grad, ProjectedGrad)  # float32 whatever the gradient was
        return self.kind, self.param.dtype, self.param.device, taken


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


def init_state(item: Item, chosen: Strategies, like: Tensor, active: bool | None = None) -> State:
    """The whole state of one parameter, all zeros, on the device of ``like``.

    Args:
        item: the parameter.
        chosen: what its group chose.
        like: a tensor on the device.
        active: whether a block holds moments (default: if it is among the first that do).
    """
    state: State = {"step": torch.zeros((), dtype=torch.float32)}
    shapes: dict[str, tuple[int, ...]] = {"": tuple(item.param.shape)}
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
        state["refresh_step"] = torch.tensor(-1.0)
        state["postponed"] = torch.zeros((), dtype=torch.float32)
        state.update(item.subspace.init(item.view, like))
        state.update(chosen.residual.init(item.view, like))
        shapes = item.subspace.coord_shapes(item.view)
    for coord, shape in shapes.items():
        if chosen.aged and coord:
            state[age_key(coord)] = like.new_zeros(shape[:-1], dtype=torch.float32)
        for slot in chosen.rule.slots(shape):
            chosen.store.alloc(state, slot_key(coord, slot.name), slot, shape, like)
    return state


def active_blocks(item: Item, chosen: Strategies, count: int) -> frozenset[int]:
    """Positions of the blocks that hold moments after ``count`` switches, this one's own group."""
    block = item.subspace
    assert isinstance(block, Block)
    return block.active(count, seeded(chosen.seed, block.first, count))


def alloc_moments(item: Item, chosen: Strategies, state: State, like: Tensor) -> None:
    """Moments of the whole parameter, zeros."""
    shape = tuple(item.param.shape)
    for slot in chosen.rule.slots(shape):
        chosen.store.alloc(state, slot.name, slot, shape, like)


def slot_key(coord: str, slot: str) -> str:
    """State key of a moment: ``low.exp_avg``, or torch's own ``exp_avg`` when dense."""
    return f"{coord}.{slot}" if coord else slot


def age_key(coord: str) -> str:
    """State key of the steps that each row of a coordinate has taken."""
    return f"{coord}.age"


def refresh_due(step: int, last: int, gap: int, offset: int) -> bool:
    """Whether a basis is due before step ``step`` (counted from 0), last refreshed at ``last``.

    The first is due at once, the others whenever ``step - offset`` enters a new multiple of the
    gap; a postponed one stays due until it succeeds.
    """
    return last < 0 or (step - offset) // gap > (last - offset) // gap


def basis_due(item: Item, state: State, chosen: Strategies) -> bool:
    """Whether the next step of a matrix refreshes its basis, if its gradient allows."""
    offset = stagger_offset(item.index, chosen.gap) if chosen.stagger else 0
    return refresh_due(int(state["step"]), int(state["refresh_step"]), chosen.gap, offset)


def stagger_offset(index: int, gap: int) -> int:
    """Multiples of the golden ratio spread over the gap: even for any number of parameters."""
    return int(gap * ((index * GOLDEN) % 1.0))


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


def branchless(tensor: Tensor) -> bool:
    """Whether branching on a value of this tensor would stall its device."""
    return not tensor.is_cpu


@dataclass(eq=False, slots=True)
class Work:
    """One matrix on its way through a step."""

    item: Item
    state: State
    grad: Tensor
    coords: dict[str, Tensor]
    time: float
    """Steps that the moments have seen, this one included."""
    norm: Tensor = field(init=False)
    """Of its coordinates, on its device: not finite where the gradient is not."""

    @property
    def sound(self) -> Tensor:
        """Whether the gradient is finite, on its device."""
        return self.norm.isfinite()


def step_matrices(
    items: Sequence[Item],
    states: Sequence[State],
    chosen: Strategies,
    lr: float | Tensor,
    weight_decay: float,
) -> None:
    """One step of a bucket of matrices that share view, subspace, dtype and device."""
    work = [_project(item, state, chosen) for item, state in zip(items, states, strict=True)]
    torch._foreach_add_([w.state["step"] for w in work], [torch.ones(())] * len(work))
    _measure(work)
    if not branchless(work[0].grad):
        work = [w for w in work if _sound(w)]
    if not work:
        return
    directions: list[dict[str, tuple[Tensor, float]]] = [{} for _ in work]
    for coord in work[0].coords:
        for own, result in zip(directions, _adapt(work, coord, chosen), strict=True):
            own[coord] = result
    for w, own in zip(work, directions, strict=True):
        _apply(w, own, chosen, lr, weight_decay)


def _measure(work: Sequence[Work]) -> None:
    """Norms of all coordinates, one call for each; of gradients that they do not see whole."""
    if work[0].item.subspace is not None and not work[0].item.subspace.sees_all:
        norms = [ops.total_norms([w.grad for w in work])]
    else:
        norms = [ops.total_norms([w.coords[name] for w in work]) for name in work[0].coords]
    for w, *own in zip(work, *norms, strict=True):
        w.norm = own[0] if len(own) == 1 else torch.stack(own).sum()


def _sound(w: Work) -> bool:
    sound = math.isfinite(w.norm)
    if not sound:
        logger.warning("the gradient of %s is not finite: its step is skipped", w.item.name)
    return sound


def _project(item: Item, state: State, chosen: Strategies) -> Work:
    """Phases one and two: refresh the basis if it is due, then take coordinates."""
    view, subspace = item.view, item.subspace
    assert view is not None and subspace is not None and item.param.grad is not None
    grad, step = item.param.grad, int(state["step"])
    coords: dict[str, Tensor] = {}
    if isinstance(grad, ProjectedGrad):  # taken inside backward, in a basis that is not due
        state.update(grad.fresh)
        if int(state["refresh_step"]) < 0:
            state["postponed"] += 1  # no gradient yet that says something
        coords = {k: x.clone() if chosen.maximize else x for k, x in grad.coords.items()}
    else:
        grad = chosen.residual.before(state, view.of(grad))
        if basis_due(item, state, chosen):
            refresh_(item, state, grad, step, chosen, coords)
        coords = coords or subspace.coords(state, grad, reduce=identity)
    last = max(int(state["refresh_step"]), 0)
    time = step + 1 - (last if chosen.on_refresh == "reset" else 0)
    if chosen.maximize:
        coords = {name: x.neg_() for name, x in coords.items()}
    return Work(item, state, grad, coords, float(time))


def refresh_(
    item: Item,
    state: State,
    grad: Tensor,
    step: int,
    chosen: Strategies,
    found: dict[str, Tensor] | None = None,
) -> bool:
    """Refresh one basis and carry its moments over; False if it had to be postponed.

    Coordinates that the search came by are put in ``found``.

    A gradient that is zero or not finite says nothing about a basis, and one that no factorisation
    can take must not end a run: the refresh is counted as postponed and stays due.
    """
    view, subspace = item.view, item.subspace
    assert view is not None and subspace is not None
    if subspace.needs_grad and not _tells(item, state, grad, step):
        return False
    generator = seeded(chosen.seed, item.index, step)
    ctx = Context(view, generator, item.index, step, param=view.of(item.param))
    try:
        moved = subspace.refresh_(state, grad, ctx)
    except LinAlgError as error:
        state["postponed"] += 1
        logger.warning("refresh of %s postponed at step %d: %s", item.name, step, error)
        return False
    last = int(state["refresh_step"])
    if last >= 0 and chosen.on_refresh != "keep":
        time = step - (last if chosen.on_refresh == "reset" else 0)
        for coord, shape in subspace.coord_shapes(view).items():
            if chosen.aged:
                _carry_ages_(state[age_key(coord)], moved[coord], chosen.on_refresh)
            _transport(item, state, coord, shape, moved[coord], float(time), chosen)
    for coord, own in moved.items():
        if own.fresh:
            _restart_(state, coord, subspace.coord_shapes(view)[coord], own.fresh, chosen)
    state["refresh_step"].fill_(step)
    if found is not None:
        found.update({k: m.low for k, m in moved.items() if m.low is not None})
    return True


def _tells(item: Item, state: State, grad: Tensor, step: int) -> bool:
    """Whether a gradient says something about a basis; if not, the refresh counts as postponed."""
    norm = float(torch.linalg.vector_norm(ops.matrix_norm(grad)))
    if norm != 0 and math.isfinite(norm):
        return True
    state["postponed"] += 1
    logger.log(
        logging.DEBUG if norm == 0 else logging.WARNING,
        "refresh of %s postponed at step %d: gradient norm %s",
        item.name,
        step,
        norm,
    )
    return False


def _transport(
    item: Item,
    state: State,
    coord: str,
    shape: Sequence[int],
    moved: Moved,
    time: float,
    chosen: Strategies,
) -> None:
    slots = chosen.rule.slots(shape)
    keys = [slot_key(coord, slot.name) for slot in slots]
    if chosen.on_refresh == "project" and _moved_as_stored(state, keys, slots, moved, chosen):
        return
    moments = []
    for key, slot, bias in zip(keys, slots, chosen.rule.biases(time), strict=False):
        x = chosen.store.read(state, key, slot, item.param, dense=True)
        assert isinstance(x, Tensor)
        moments.append((slot, x, bias))
    TRANSPORTS[chosen.on_refresh](moments, moved)
    for n, (key, (slot, x, _)) in enumerate(zip(keys, moments, strict=True)):
        seed = mixed(chosen.seed, item.index, int(time), 2, n)
        chosen.store.write_(state, key, slot, x, seed)


def _moved_as_stored(
    state: State, keys: Sequence[str], slots: Sequence[Slot], moved: Moved, chosen: Strategies
) -> bool:
    """Whether moments were whole rows in a new order, and moved in the format they are kept in."""
    source = moved.source
    if source is None or moved.source_right is not None:
        return False
    if any(slot.averaged is not None for slot in slots):
        return False
    return all(
        chosen.store.move_rows_(state, key, slot, source)
        for key, slot in zip(keys, slots, strict=True)
    )


def _restart_(
    state: State, coord: str, shape: Sequence[int], rows: Sequence[slice], chosen: Strategies
) -> None:
    """Zero moments and ages of some rows where they are kept: no other row is read or written."""
    for slot in chosen.rule.slots(shape):
        kept = state[slot_key(coord, slot.name)]
        zero = quant.zero_code(slot.signed) if kept.dtype == torch.uint8 else 0
        for own in rows:
            kept[..., own, :].fill_(zero)
    for own in rows if chosen.aged else ():
        state[age_key(coord)][..., own].zero_()


def _carry_ages_(age: Tensor, moved: Moved, on_refresh: str) -> None:
    if on_refresh == "reset":
        age.zero_()
    elif moved.source is not None:
        age.copy_(take_rows(age, moved.source, -1))


def _adapt(work: Sequence[Work], coord: str, chosen: Strategies) -> list[tuple[Tensor, float]]:
    """Phase three: directions of one coordinate, moments read, updated and written back."""
    grads = [w.coords[coord] for w in work]
    keys = slot_keys(coord, grads[0].shape, chosen)
    held = [read_slots(w.item, w.state, keys, chosen) for w in work]
    # no host may wait for `sound`: the ops select on the device
    sound = [w.sound for w in work] if branchless(grads[0]) else []
    times = [w.time for w in work]
    # in the weights' dtype if it goes into their GEMM as it is, else in that of arithmetic
    plain = coord == "low" and isinstance(chosen.residual, Drop) and not chosen.rounding
    dtype = work[0].item.param.dtype if plain else compute_dtype(work[0].item.param.dtype)
    moments = [[x for _, _, x in own] for own in held]
    ages = [_older_(w, coord) for w in work] if chosen.aged else []
    directions, corrections = chosen.rule.directions_(grads, moments, times, dtype, sound, ages)
    for n, (w, own) in enumerate(zip(work, held, strict=True)):
        write_slots_(w.item, w.state, own, chosen, sound[n] if sound else None)
    return list(zip(directions, corrections, strict=True))


def _older_(w: Work, coord: str) -> Tensor:
    """The age of each row, this step included."""
    age = w.state[age_key(coord)]
    return age.add_(w.sound if branchless(age) else 1)


Held = Sequence[tuple[str, Slot, Moment]]
"""The moments of one coordinate as they were read: key, slot, and what the rule updates."""


Keys = Sequence[tuple[str, Slot]]


def slot_keys(coord: str, shape: Sequence[int], chosen: Strategies) -> Keys:
    """The slots of one coordinate and their state keys, the same for all items of a bucket."""
    return [(slot_key(coord, slot.name), slot) for slot in chosen.rule.slots(shape)]


def read_slots(item: Item, state: State, keys: Keys, chosen: Strategies) -> Held:
    """The moments of one coordinate, each in the form that the rule takes."""
    return [(k, slot, chosen.store.read(state, k, slot, item.param)) for k, slot in keys]


def write_slots_(
    item: Item, state: State, held: Held, chosen: Strategies, sound: Tensor | None = None
) -> None:
    """Write back the moments that were copied to be read; the others are in place already."""
    for n, (key, slot, x) in enumerate(held):
        if isinstance(x, Tensor) and x is not state[key]:
            seed = mixed(chosen.seed, item.index, int(state["step"]), 1, n)
            chosen.store.write_(state, key, slot, x, seed, sound)


def weight_seed(item: Item, state: State, chosen: Strategies) -> int | None:
    """Seed of the stochastic rounding of a weight; None to round to nearest."""
    if not chosen.rounding:
        return None
    return mixed(chosen.seed, item.index, int(state["step"]), 3)


def _apply(
    w: Work,
    directions: dict[str, tuple[Tensor, float]],
    chosen: Strategies,
    lr: float | Tensor,
    weight_decay: float,
) -> None:
    """Phase four: lift the direction and add it to the weights."""
    view, subspace = w.item.view, w.item.subspace
    assert view is not None and subspace is not None
    param = view.of(w.item.param)
    low = w.coords.get("low")
    sound = w.sound if branchless(param) else None
    term = None
    if low is not None:
        seen = Seen(w.grad, low, *directions["low"], subspace, sound)
        term = chosen.residual.after(w.state, seen)
    size = chosen.rule.step_size(lr, float(w.state["step"]), param)
    if isinstance(size, Tensor) and size.numel() == 1 and not branchless(param):
        size = float(size)
    factor = subspace.lr_factor(int(w.state["step"]) - 1 - max(0, int(w.state["refresh_step"])))
    size = size if factor == 1 else size * factor  # never in place: it may be the group's tensor
    decay = 1 - size * weight_decay
    size = size if chosen.lr_scale == 1 else size * chosen.lr_scale
    if len(directions) == 1 and isinstance(size, float):
        ((name, (direction, correction)),) = directions.items()
        update, lr_now = {name: direction}, size * correction
    else:
        update, lr_now = {k: x * (c * size) for k, (x, c) in directions.items()}, 1.0
        if term is not None and isinstance(size, Tensor):
            term = term.times(size * directions["low"][1])
    if chosen.maximize and low is not None and subspace.applies_grad(term):
        # coordinates are those of -G, and so is all that is linear in them: turn both back
        update, low, lr_now = {k: -x for k, x in update.items()}, -low, -lr_now
    rounding = weight_seed(w.item, w.state, chosen) if chosen.rounding else None
    into = Into(param, w.grad, low, lr_now, decay, rounding, sound)
    subspace.push_(into, w.state, update, term)
    if param.data_ptr() != w.item.param.data_ptr():
        stored = param.mT if view.flip else param  # strides that allow no matrix view
        w.item.param.copy_(stored.reshape(view.shape))


def step_dense(
    item: Item,
    state: State,
    chosen: Strategies,
    lr: float | Tensor,
    weight_decay: float,
    since: int = 0,
) -> None:
    """One step of a parameter without a subspace: the rule alone, on the whole tensor.

    Args:
        item: the parameter.
        state: its state.
        chosen: what its group chose.
        lr: learning rate.
        weight_decay: decoupled decay.
        since: steps it had taken before its moments began.
    """
    factor = 1.0 if item.subspace is None else chosen.lr_scale
    param, grad, rule = item.param, item.param.grad, chosen.rule
    assert grad is not None
    norm = ops.matrix_norm(grad if grad.dim() > 1 else grad.reshape(1, -1))
    if not branchless(grad) and not norm.isfinite().all():
        state["step"] += 1
        logger.warning("the gradient of %s is not finite: its step is skipped", item.name)
        return
    keys = [slot.name for slot in rule.slots(param.shape)]
    same = all(x.dtype == param.dtype for x in (grad, *(state[k] for k in keys)))
    if (
        same and not chosen.store.rounds and factor == 1
    ):  # torch rounds a bfloat16 moment to nearest: it sticks
        slots = [state[k] for k in keys]
        steps = state["step"] - since if since else state["step"]
        if rule.step_dense_(
            param,
            grad,
            slots,
            steps,
            lr=lr,
            weight_decay=weight_decay,
            maximize=chosen.maximize,
        ):
            state["step"].copy_(steps + since)
            return
    state["step"] += 1
    step = float(state["step"]) - since
    size = rule.step_size(lr, step, param)
    decay = 1 - size * weight_decay
    size = size if factor == 1 else size * factor
    held = read_slots(item, state, slot_keys("", param.shape, chosen), chosen)
    moments = [x for _, _, x in held]
    rounding = weight_seed(item, state, chosen)
    rows = param.shape[0] if param.dim() else 1
    if rule.elementwise and rows:
        rows = max(1, ops.TILE_ELEMENTS * rows // max(1, param.numel()))
    whole: Iterable[Tile] = [(param, grad, moments)]
    tiles = _tiles(rows, param, grad, moments) if rule.elementwise else whole
    for tile, (p, g, own) in enumerate(tiles):
        g = g.to(compute_dtype(param.dtype))
        g = g.neg() if chosen.maximize else g
        ((direction,), (correction,)) = rule.directions_([g], [own], [step])
        tile_seed = None if rounding is None else mixed(rounding, tile)
        ops.add_(p, direction * (size * correction), decay, -1.0, tile_seed)
    write_slots_(item, state, held, chosen)


Tile = tuple[Tensor, Tensor, Sequence[Moment]]
"""A parameter, its gradient and its moments, or matching pieces of them."""


def _tiles(rows: int, param: Tensor, grad: Tensor, moments: Sequence[Moment]) -> Iterator[Tile]:
    """Matching pieces of at least ``rows`` rows and whole blocks, so that temporaries stay small.

    Moments in 8 bits are cut as they are: none of them exists in float32.
    """
    if param.dim() == 0:
        yield param, grad, moments
        return
    period = math.lcm(*(x.period for x in moments if isinstance(x, Quantized)))
    rows = -(-rows // period) * period
    pieces = [x.split(rows) if isinstance(x, Quantized) else torch.split(x, rows) for x in moments]
    own = zip(*pieces, strict=True) if pieces else itertools.repeat(())
    yield from zip(torch.split(param, rows), torch.split(grad, rows), own, strict=bool(pieces))
