"""What must hold before a step changes anything: a step that cannot end does not begin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lowrank_optim.engine.plan import ParamPlan, State, Strategies
from lowrank_optim.engine.sharded.forms import kept_meta_state
from lowrank_optim.engine.state import counts
from lowrank_optim.groups import Group
from lowrank_optim.groups.notices import param_name
from lowrank_optim.sharding.parts import local
from lowrank_optim.stores import FloatStore
from lowrank_optim.subspaces.base import Subspace
from lowrank_optim.tensors.matrix import MatrixView
from lowrank_optim.tensors.projected_grad import projection

AT_A_REFRESH = frozenset({"on_refresh"})
"""Keys that say how long the moments of a matrix have been averaged: its bias correction."""

REMEDY = "set it back, or make a new optimizer, whose state starts again"


def moved(item: ParamPlan) -> bool:
    """Whether the parameter of an item is not what it was any more."""
    param = item.param
    return (param.shape, param.dtype, param.device) != item.made


def check_moved(items: Sequence[ParamPlan]) -> None:
    """Raise for parameters that have a state, of another shape, dtype or device.

    Raises:
        RuntimeError: naming the first.
    """
    for item in items:
        if not moved(item):
            continue
        param, (shape, dtype, device) = item.param, item.made
        what = (
            f"the optimizer's state of {item.name} is for a parameter {tuple(shape)} in {dtype} on "
            f"{device}, which is {tuple(param.shape)} in {param.dtype} on {param.device} now"
        )
        if param.shape == shape:
            raise RuntimeError(
                f"{what}: convert a model before its first step, or convert the state too, by "
                "optimizer.load_state_dict(optimizer.state_dict())"
            )
        raise RuntimeError(f"{what}: make the optimizer after what reshapes or shards parameters")


def check_replaced(
    items: Sequence[ParamPlan], was: Sequence[ParamPlan], states: Mapping[Any, State]
) -> None:
    """Raise if other tensors stand in a group for parameters whose state would be left behind.

    Raises:
        RuntimeError: naming the first.
    """
    if len(items) != len(was):
        return
    for old, new in zip(was, items, strict=True):
        same = old.param is new.param or old.name != new.name
        if not same and states.get(old.param) and not states.get(new.param):
            raise RuntimeError(
                f"{new.name} is not the tensor that the optimizer has a state of, which would "
                "start again: shard the model (fully_shard, or accelerator.prepare with the "
                "optimizer) before the first step, and load a checkpoint after that"
            )


def check_given(group: Group, method: str) -> None:
    """Raise for parameters that no optimizer here could step, as a group is added.

    Args:
        group: that group.
        method: the class.

    Raises:
        ValueError: one is complex, flattened or has several entries in one place, or names are not
            as many as there are parameters.
    """
    for i, param in enumerate(group["params"]):
        if param.is_complex():
            raise ValueError(
                f"{method} does not support complex parameters: {param_name(group, i)}"
            )
    check_flattened(group)
    check_named(group)
    for i, param in enumerate(group["params"]):
        check_overlap(param, param_name(group, i))


def check_flattened(group: Group) -> None:
    """Raise for a group that is to be projected and whose matrices have been flattened.

    Raises:
        ValueError: ``FullyShardedDataParallel`` (FSDP1) holds pieces of one long vector in their
            place, with ``use_orig_params=True`` too.
    """
    params = group["params"]
    if group.get("rank") is None or not any(getattr(p, "_fsdp_flattened", False) for p in params):
        return
    if not any(p.dim() >= 2 for p in params):
        raise ValueError(
            f"rank={group['rank']} in a group whose parameters FullyShardedDataParallel has "
            "flattened: no matrix is left to project, and all would be dense. Train under "
            "DistributedDataParallel, with ShardingStrategy.NO_SHARD, or pass rank=None for dense "
            "steps on purpose"
        )


def check_partitioned(group: Group, matrices: int, chosen: Strategies, method: str) -> None:
    """Raise if vectors stand for the matrices that a group was given, and that is not the same.

    DeepSpeed puts this rank's piece of one long vector into the group, under ZeRO 1 to 3. A dense
    rule that looks at each entry by itself steps that as it would step the matrices.

    Args:
        group: as it is now.
        matrices: how many it was given.
        chosen: what it chose.
        method: the class.

    Raises:
        ValueError: with what to use in its place.
    """
    params = group["params"]
    if not matrices or not params or any(p.dim() != 1 for p in params):
        return
    why = ""
    if group["rank"] is not None:
        why = f"rank={group['rank']} has no matrix left to project, and all would be dense"
    elif not chosen.rule.elementwise:
        why = f"{type(chosen.rule).__name__} needs whole tensors"
    elif not isinstance(chosen.store, FloatStore):
        why = "blocks of moments in 8 or 4 bits would go across parameters"
    if why:
        shapes = ", ".join(str(tuple(p.shape)) for p in params[:3])
        raise ValueError(
            f"{shapes} stands in a group of {method} for the {matrices} matrices that it was "
            f"given, as under DeepSpeed's ZeRO 1, 2 and 3: {why}. Take ZeRO stage 0, "
            "DistributedDataParallel, torch's ZeroRedundancyOptimizer or FSDP2 (fully_shard), or "
            "for such steps on purpose rank=None with an AdamW, Lion or SGD class and moments in "
            "float32 or bfloat16"
        )


def check_named(group: Group) -> None:
    """Raise unless every parameter of a group has a name, or none: draws, and more, go by them.

    Raises:
        ValueError: ``param_names`` are not as many strings as there are parameters.
    """
    names, count = group.get("param_names"), len(group["params"])
    if names is None:
        return
    given = names if isinstance(names, list | tuple) else [names]
    wrong = [name for name in given if not isinstance(name, str)]
    if given is not names or wrong or len(given) != count:
        got = repr(names) if given is not names or wrong else f"{len(given)}"
        raise ValueError(
            f"param_names of a group of {count} parameters must be {count} strings, got {got}: "
            "pass model.named_parameters(), or leave param_names out"
        )


def check_factor_rank(
    group: Group, name: str, factor: Tensor, kind: type[Subspace], view: MatrixView
) -> None:
    """Raise if the rank of a group of layers is not that of their factors.

    Raises:
        ValueError: it was edited after ``convert``.
    """
    rank, own = group["rank"], factor.shape[0]
    if rank is None or min(kind.directions(rank, view), kind.limit(view)) != own:
        raise ValueError(
            f"rank={rank} of a group of layers, but {name} has {own} vectors: the rank is that of "
            f"nn.convert, which made them. Set it back to {own}, or convert the model again"
        )


def check_overlap(param: Tensor, name: str) -> None:
    """Raise if entries of a parameter share memory: a step would move each several times.

    Raises:
        ValueError: as of ``expand``.
    """
    own = local(param)
    if own.layout == torch.strided and own.numel() > 1 and _overlaps(own.shape, own.stride()):
        raise ValueError(
            f"entries of {name} share memory: it is {tuple(own.shape)} with strides "
            f"{own.stride()}, as expand() or as_strided() makes them, and one place cannot be "
            "stepped as several. Pass nn.Parameter(x.clone()), or train what was expanded"
        )


def _overlaps(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether two entries have one place."""
    dims = sorted((stride, n) for stride, n in zip(strides, shape, strict=True) if n > 1)
    reach, apart = 0, True
    for stride, n in dims:
        apart &= stride > reach  # longer than all that is within it
        reach += stride * (n - 1)
    if apart or (dims and dims[0][0] == 0):
        return not apart
    places = torch.zeros((), dtype=torch.int64)
    for stride, n in dims:
        places = places.unsqueeze(-1) + stride * torch.arange(n)
    return len(set(places.flatten().tolist())) < places.numel()


def check_owned(params: Sequence[Tensor]) -> None:
    """Raise for parameters that ``fully_shard`` has replaced in their model.

    Raises:
        RuntimeError: the optimizer was made before.
    """
    for param in params:
        if hasattr(param, "_fsdp_orig_uid") and not hasattr(param, "placements"):
            raise RuntimeError(
                "fully_shard has replaced the parameters that this optimizer was made for, which "
                "would train nothing: make the optimizer after fully_shard(model)"
            )


def check_gradients(items: Sequence[ParamPlan], method: str) -> None:
    """Raise if a step could not use the gradients.

    Raises:
        RuntimeError: one is sparse, of another dtype or device than its parameter, was zeroed in
            place when only its coordinates existed, or has those of a basis before a load.
    """
    for item in items:
        grad, param = item.param.grad, item.param
        if grad is None:
            continue
        if grad.layout != torch.strided:
            raise RuntimeError(
                f"{method} does not support sparse gradients: that of {item.name} is {grad.layout}."
                " Make the embedding with sparse=False, or give it to a torch.optim.SparseAdam"
            )
        kept = projection(grad)
        if kept is not None and kept.spill is not None:
            raise RuntimeError(
                f"the gradient of {item.name} was kept in its subspace and zeroed in place, and no "
                "attach_in_backward took the next one: call zero_grad() with set_to_none=True, and "
                "backward() again"
            )
        if kept is not None and kept.outdated and not kept.empty:
            raise RuntimeError(
                f"the gradient of {item.name} was projected before load_state_dict, and has "
                "coordinates in a basis that is no more: call zero_grad(), and begin the batch "
                "again"
            )
        if grad.dtype != param.dtype or grad.device != param.device:
            wide = getattr(param, "grad_dtype", param.dtype)
            remedy = "compute it again, or convert it"
            if wide is None or wide != param.dtype:
                remedy = f"set grad_dtype of the parameter to {param.dtype} before backward()"
            raise RuntimeError(
                f"the gradient of {item.name} is in {grad.dtype} on {grad.device}, its parameter "
                f"in {param.dtype} on {param.device}: {remedy}"
            )


def check_edits(
    items: Sequence[ParamPlan],
    was: Sequence[ParamPlan],
    states: Mapping[Any, State],
    chosen: Strategies,
    before: Mapping[str, str],
    now: Mapping[str, str],
) -> None:
    """Raise if a group was edited in a way that the state of its parameters cannot follow.

    Args:
        items: of the group as it is now.
        was: as it was when last looked at, empty if it was not.
        states: the optimizer's.
        chosen: what the group chooses now.
        before: the group's :func:`structure` then, empty if it is not known.
        now: and now.

    Raises:
        ValueError: naming the parameter, the keys and both values.
    """
    edited = {k for k in {*now, *before} if before and now.get(k) != before.get(k)}
    old = {id(item.param): item for item in was}
    for item in items:
        state = states.get(item.param)
        if not state:
            continue
        why = ""
        if id(item.param) in old and not _same_meaning(old[id(item.param)], item):
            why = f"the state of {item.name} is of other coordinates"
        elif edited & AT_A_REFRESH and state.get("refresh_step", -1) >= 0:
            edited = edited & AT_A_REFRESH
            why = f"the moments of {item.name} are corrected by it"
        why = why or _misfit(item, state, chosen)
        if why:
            raise ValueError(f"{_told(sorted(edited), before, now)} {why}: {REMEDY}")


def _told(edited: Sequence[str], before: Mapping[str, str], now: Mapping[str, str]) -> str:
    parts = [f"{k} was {before.get(k, 'absent')} and is {now.get(k, 'absent')}" for k in edited]
    return f"in a parameter group {', '.join(parts)}, but" if parts else "in a parameter group"


def _same_meaning(old: ParamPlan, new: ParamPlan) -> bool:
    if old.subspace is None or new.subspace is None:
        return old.subspace is new.subspace
    return old.view == new.view and old.subspace.meaning == new.subspace.meaning


def _misfit(item: ParamPlan, state: State, chosen: Strategies) -> str:
    """How the state of a parameter differs from what its group needs; "" if it does not."""
    held = any(slot.name in state for slot in chosen.rule.slots(item.param.shape))
    needed = kept_meta_state(item, chosen, held)
    if needed.keys() != state.keys():
        parts = sorted(needed.keys() ^ state.keys())
        return f"the state of {item.name} differs in {', '.join(parts)}"
    for key in sorted(needed):
        have, need = state[key], needed[key]
        wide = have.dtype == torch.float64 and counts(key, need)  # of a long run
        if have.shape != need.shape or (have.dtype != need.dtype and not wide):
            return (
                f"{key} of {item.name} is {tuple(have.shape)} in {have.dtype} where "
                f"{tuple(need.shape)} in {need.dtype} is needed"
            )
    return ""
