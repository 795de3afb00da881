"""States that torch's distributed loaders fill in: what they find there, and what they leave."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping
from traceback import walk_stack

import torch
from torch import Tensor

from lowrank_optim.checkpoints.form import StateDict
from lowrank_optim.checkpoints.placed import send_as_kept
from lowrank_optim.engine.plan import ParamPlan, State, Strategies
from lowrank_optim.engine.planned import PlannedOptimizer
from lowrank_optim.engine.sharded.local import LocalState, here
from lowrank_optim.engine.state import alloc_moments, counts
from lowrank_optim.engine.stepped import SteppedOptimizer
from lowrank_optim.sharding.parts import is_sharded, local
from lowrank_optim.subspaces.block import Block
from lowrank_optim.tensors.values import widen_


def hold_blocks(optimizer: SteppedOptimizer) -> None:
    """Give moments to idle blocks too, zeros, until the next step takes them back.

    For readers that fill in the entries which an optimizer has and look for no others:
    ``torch.distributed.checkpoint`` from disk, and flattened state. An optimizer that has not
    stepped must have its state first (``get_optimizer_state_dict`` makes it).

    Args:
        optimizer: of groups with ``projector="block"``; nothing happens to others.

    Example:
        >>> import torch
        >>> from lowrank_optim import FrugalAdamW
        >>> from lowrank_optim.checkpoints import hold_blocks
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
        >>> optimizer = FrugalAdamW([p for p in model.parameters() if p.dim() == 2], density=0.5)
        >>> model(torch.randn(3, 8)).sum().backward()
        >>> optimizer.step()
        >>> sorted("exp_avg" in state for state in optimizer.state.values())
        [False, True]
        >>> hold_blocks(optimizer)
        >>> sorted("exp_avg" in state for state in optimizer.state.values())
        [True, True]
    """
    for group in optimizer.param_groups:
        chosen = optimizer._strategies(group)
        for item in optimizer._items(group):
            state = optimizer.state.get(item.param)
            if not isinstance(item.subspace, Block) or not state:
                continue
            if any(slot.name not in state for slot in chosen.rule.slots(item.param.shape)):
                part = here(item)
                alloc_moments(part, chosen, optimizer._state_of(item, chosen), part.param)


def filled_in(optimizer: PlannedOptimizer) -> bool:
    """Whether torch's loader asks for a state that it lets rank 0 fill in, on every rank.

    What it is about to cut for the ranks, or to send, gets the shapes that they have. It is made
    contiguous too: a moment that was put together from uneven columns need not be, and torch 2.6
    sends its memory as it lies.
    """
    callers = walk_stack(sys._getframe(1))
    frame = next((x for x, _ in callers if x.f_code.co_name == "_load_optim_state_dict"), None)
    info = None if frame is None else frame.f_locals.get("info")
    flat = getattr(info, "flatten_optimizer_state_dict", False)
    found = bool(getattr(info, "broadcast_from_rank0", False)) and not flat
    sent = None if frame is None else frame.f_locals.get("optim_state_dict")
    if frame is not None and sent and not flat:
        send_as_kept(optimizer, frame.f_locals["model"], sent)
    if found and sent:
        for entry in sent.get("state", {}).values():
            entry.update({k: x.contiguous() for k, x in entry.items() if isinstance(x, Tensor)})
    return found


def makes_state() -> bool:
    """Whether torch's loader takes this step, of zeros, to have a state that it can fill in.

    It has loaded the weights by then, so that what a step would do to factors must not be done.
    """
    for frame, _ in walk_stack(sys._getframe(1)):
        if frame.f_code.co_name == "_init_optim_state":
            return str(frame.f_globals.get("__name__")).startswith("torch.distributed")
    return False


def holds_any_count(states: Iterable[Mapping[str, Tensor]]) -> None:
    """Let counters be float64 in a state that a loader fills in, whatever it has read.

    It writes into the tensors that are there, and a float32 would round what is beyond 2^24.
    Numbers that float32 can count on from are in float32 again once they are loaded.

    Args:
        states: of each parameter.
    """
    for state in states:
        for key, x in state.items():
            if counts(key, x):
                widen_(x)


def with_places(optimizer: PlannedOptimizer, state_dict: StateDict) -> StateDict:
    """A state dict that has a key for every moment of every block, and no values there.

    The loader of torch lets rank 0 fill in the keys that a rank has, drops others and leaves what
    rank 0 does not have as it was. Which blocks are idle is another matter in the checkpoint. It
    replaces a plain tensor and writes into a DTensor, which is NaN until then.
    """
    state = dict(state_dict["state"])
    for group, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        chosen = optimizer._strategies(group)
        for i, item in zip(saved["params"], optimizer._items(group), strict=True):
            if isinstance(item.subspace, Block) and state.get(i):
                state[i] = {**state[i], **_places(item, chosen)}
    return {**state_dict, "state": state}


def _places(item: ParamPlan, chosen: Strategies) -> State:
    """What :func:`with_places` puts in the place of a block's moments."""
    if not is_sharded(item.param):
        moments: State = {}
        alloc_moments(item, chosen, moments, torch.empty_like(item.param, device="meta"))
        return {k: item.param.new_empty(0, dtype=x.dtype) for k, x in moments.items()}
    part, held = here(item), LocalState({}, item, chosen)
    alloc_moments(part, chosen, held, part.param)
    for x in held.values():
        if x.is_floating_point():  # codes are known by their scales
            x.fill_(math.nan)
    return held.outer


def unfilled(x: Tensor, param: Tensor) -> bool:
    """Whether a saved entry is still one of :func:`with_places`.

    What a state keeps of nothing has other shapes, such as vectors that are not in use.
    """
    if not is_sharded(x):
        return tuple(x.shape) == (0,) and bool(param.numel())
    own = local(x)
    return own.is_floating_point() and bool(own.numel()) and bool(own.isnan().all())
