"""How the state of one parameter is laid out: its entries, where they lie, what they may hold."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lowrank_optim.engine.draws import seeded
from lowrank_optim.engine.plan import ParamPlan, State, Strategies
from lowrank_optim.ops.devices import apart, pinned
from lowrank_optim.sharding.parts import local
from lowrank_optim.stores import Whole, scale_key
from lowrank_optim.subspaces.base import Subspace
from lowrank_optim.subspaces.block import Block
from lowrank_optim.tensors.matrix import MatrixView
from lowrank_optim.tensors.values import COUNTER_MAX, WIDE_COUNTER_MAX, check_counter

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
        state["refresh_step"] = torch.full((), -1.0, dtype=torch.float32, device=device)
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


def moment_shapes(item: ParamPlan, chosen: Strategies) -> dict[str, tuple[int, ...]]:
    """Shapes of the moments of a whole parameter, however they are kept, under their keys."""
    return {
        slot_key(coord, slot.name): slot.shape(shape)
        for coord, shape in _coords(item).items()
        for slot in chosen.rule.slots(shape)
    }


def moving_keys(item: ParamPlan, chosen: Strategies) -> list[str]:
    """Those that ``state_device`` is about, wherever they lie."""
    keys = moment_shapes(item, chosen)
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
