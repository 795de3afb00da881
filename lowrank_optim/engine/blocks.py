"""Whole tensors that take turns to hold moments: when they switch, and how each steps."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from lowrank_optim import ops
from lowrank_optim.engine.bucket import Bucket, warn_skipped
from lowrank_optim.engine.draws import weight_noise
from lowrank_optim.engine.plan import ParamPlan, State, Strategies
from lowrank_optim.engine.state import active_blocks, alloc_moments
from lowrank_optim.engine.undo import Undo
from lowrank_optim.groups.names import uid_of
from lowrank_optim.ops.devices import on_accelerator
from lowrank_optim.residuals import ResidualInputs
from lowrank_optim.stores import scale_key
from lowrank_optim.subspaces.block import Block
from lowrank_optim.subspaces.coordinate import Rows
from lowrank_optim.subspaces.target import Target
from lowrank_optim.tensors.matrix import shares_memory
from lowrank_optim.tensors.values import set_counter_

States = Mapping[Tensor, State]


def placed(
    items: list[ParamPlan], layers: Sequence[str] = (), every: Sequence[str] = ()
) -> list[ParamPlan]:
    """A group's items, its blocks told which of how many they are; frozen ones count.

    Random sets are of positions in the order of ``uid``, so that the order of the group, where its
    parameters have names, changes nothing; the other orders are of positions in the group.

    Args:
        items: of the group.
        layers: the layer of each, where blocks are layers (default: every tensor is one).
        every: the layers of all groups, which take turns together.

    Raises:
        ValueError: the order needs an even number of active blocks, and theirs is odd.
    """
    blocks = [item for item in items if isinstance(item.subspace, Block)]
    if layers and blocks:
        return _placed_layers(items, layers, every)
    if any(isinstance(b.subspace, Block) and b.subspace.block_order == "random" for b in blocks):
        blocks.sort(key=lambda item: item.uid)
    for position, item in enumerate(blocks):
        assert isinstance(item.subspace, Block)
        count, first = len(blocks), blocks[0].uid
        item.subspace = replace(item.subspace, position=position, count=count, first=first)
        _check_turns(item.subspace)
    return items


def _placed_layers(
    items: list[ParamPlan], layers: Sequence[str], every: Sequence[str]
) -> list[ParamPlan]:
    """All tensors of a layer at one place, the same in each group."""
    first = uid_of(" ".join(sorted(every)))
    place = {layer: n for n, layer in enumerate(every)}
    for item, layer in zip(items, layers, strict=True):
        block = item.subspace
        if isinstance(block, Block):
            position = place[layer]
            item.subspace = replace(block, position=position, count=len(every), first=first)
            _check_turns(item.subspace)
    return items


def _check_turns(block: Block) -> None:
    if block.block_order == "mirror" and block.size % 2:
        raise ValueError(
            "block_order='mirror' needs an even number of active blocks, got "
            f"{block.size} of {block.count}: take another density, or another order"
        )
    weights = block.layer_weights
    if weights is None:
        return
    if len(weights) != block.count:
        raise ValueError(
            f"layer_weights must have a number for each of the {block.count} blocks, got "
            f"{len(weights)}"
        )
    if sum(w > 0 for w in weights) < block.size:
        raise ValueError(
            f"layer_weights has {sum(w > 0 for w in weights)} numbers above 0, and {block.size} "
            "blocks are to be active at a time: raise weights, or lower active_layers"
        )


def turned_(groups: Sequence[tuple[Sequence[ParamPlan], Strategies]], states: States) -> list[bool]:
    """End a step of all groups: one clock for all, and no moments kept of a turn that is over.

    Returns:
        Of each block, in order, whether it is active in the next step.
    """
    kept = [(item, chosen) for items, chosen in groups for item in items]
    blocks = [(item, chosen) for item, chosen in kept if isinstance(item.subspace, Block)]
    now = max((int(states[i.param]["clock"]) for i, _ in blocks if states.get(i.param)), default=0)
    found, sets = [], dict[tuple[Any, ...], frozenset[int]]()
    for item, chosen in blocks:
        block = item.subspace
        assert isinstance(block, Block)
        key = (chosen.gap, chosen.seed, replace(block, position=0, rank=0))
        if key not in sets:
            sets[key] = active_blocks(item, chosen, now // chosen.gap)
        active = block.position in sets[key]
        state = states.get(item.param)
        over = chosen.on_refresh == "reset" and now % chosen.gap == 0
        if state:
            set_counter_(state["clock"], now)
            if over or not active:  # else two of all moments exist where a layer comes twice
                _switch_(item, state, chosen, frozenset(), restart=False)
        found.append(active)
    return found


def advance(
    items: Sequence[ParamPlan],
    states: States,
    chosen: Strategies,
    taken: Collection[int] = (),
) -> None:
    """Begin a step of a group: its clock ticks, and every ``gap`` ticks its blocks switch.

    The clock is the latest of its blocks', so that one without a gradient changes nothing for the
    others, and it needs no place outside the state. Those without a gradient switch too: no
    moments are kept for a turn that is over.

    Args:
        items: of the group.
        states: the optimizer's.
        chosen: what the group chose.
        taken: places of parameters that took this step before it raised: the clock has ticked.
    """
    blocks = [i for i in items if isinstance(i.subspace, Block) and states.get(i.param)]
    begun = any(item.index in taken for item in blocks)
    now = _latest(blocks, states) + (not begun)
    switches, phase = divmod(now - 1, chosen.gap)
    active = active_blocks(blocks[0], chosen, switches)
    for item in blocks:
        if item.index in taken:
            continue
        state = states[item.param]
        _switch_(item, state, chosen, active, restart=phase == 0)
        if item.param.grad is not None:
            set_counter_(state["clock"], now)


def catch_up(
    item: ParamPlan,
    items: Sequence[ParamPlan],
    states: States,
    chosen: Strategies,
    undo: Undo,
    begins: bool | None = None,
) -> None:
    """The same before one block is stepped alone.

    The others are switched with the first of a step, and marked when their own turn comes.

    Args:
        item: the block.
        items: all of its group.
        states: the optimizer's.
        chosen: what the group chose.
        undo: told of the states that change.
        begins: whether it is the first of its group in this step (default: if it comes round
            again, which is a step late for one that the step before left out).
    """
    blocks = [i for i in items if isinstance(i.subspace, Block) and states.get(i.param)]
    now, state = _latest(blocks, states), states[item.param]
    ticks = int(state["clock"]) == now if begins is None else begins
    now += ticks
    switches, phase = divmod(now - 1, chosen.gap)
    active = active_blocks(item, chosen, switches)
    for other in blocks if ticks else [item]:
        undo.begin(states[other.param])
        _switch_(other, states[other.param], chosen, active, restart=ticks and phase == 0)
    set_counter_(state["clock"], now)


def _latest(blocks: Sequence[ParamPlan], states: States) -> int:
    return max(int(states[item.param]["clock"]) for item in blocks)


def _switch_(
    item: ParamPlan, state: State, chosen: Strategies, active: frozenset[int], restart: bool
) -> None:
    """Give a block moments, take them away, or start them again."""
    block = item.subspace
    assert isinstance(block, Block)
    keys = [slot.name for slot in chosen.rule.slots(item.param.shape)]
    if block.position not in active:
        for key in keys:
            state.pop(key, None)
            state.pop(scale_key(key), None)
        state["refresh_step"].fill_(-1)
        return
    restart = restart and chosen.on_refresh == "reset" and float(state["refresh_step"]) >= 0
    if restart or any(key not in state for key in keys):
        alloc_moments(item, chosen, state, item.param)
    elif state["refresh_step"] >= 0:
        return
    set_counter_(state["refresh_step"], float(state["step"]))


class IdleBlock:
    """A block without moments moves by the residual alone; an active one is a dense parameter."""

    def can_step(self, bucket: Bucket) -> bool:
        """A block whose turn it is not."""
        block = isinstance(bucket.items[0].subspace, Block)
        return block and int(bucket.states[0]["refresh_step"]) < 0

    def step_(self, bucket: Bucket) -> None:
        """The term of the residual, on all of the tensor."""
        (item,), (state,), chosen, lr, weight_decay, undo = bucket
        if isinstance(item.subspace, Block) and item.subspace.frozen:
            return
        undo.keep_weights(state, item.param)
        _step_idle(item, state, chosen, lr, weight_decay)


def _step_idle(
    item: ParamPlan, state: State, chosen: Strategies, lr: float | Tensor, weight_decay: float
) -> None:
    view = item.view
    assert view is not None and item.param.grad is not None
    param, grad = view.of(item.param), view.of(item.param.grad)
    (norm,) = ops.total_norms([grad])
    state["step"] += 1
    if not on_accelerator(grad) and not norm.isfinite():
        warn_skipped(item)
        return
    none, size = Rows(0), chosen.rule.step_size(lr, float(state["step"]), param)
    if isinstance(size, Tensor) and size.numel() == 1 and not on_accelerator(param):
        size = float(size)
    low = grad.new_empty(*view.batch, 0, view.n)
    finite = norm.isfinite() if on_accelerator(grad) else None
    term = chosen.residual.after(state, ResidualInputs(grad, low, low, 1.0, none, finite))
    sign = -1 if chosen.maximize else 1
    own = none.init(view, param)
    rounding = weight_noise(item, state, chosen)
    rounding = None if rounding is None else view.noise(rounding)
    size_now = size * chosen.lr_scale * sign
    into = Target(param, grad, low, size_now, 1 - size * weight_decay, rounding, finite)  # type: ignore[arg-type]
    none.push_(into, own, {"low": low}, term)
    if not shares_memory(param, item.param):
        item.param.copy_(param.reshape(view.shape))
