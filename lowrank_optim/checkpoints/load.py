"""Loading state: nothing loses bits, nothing is aliased, and a misfit changes nothing."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from lowrank_optim.checkpoints.counters import dtype_of
from lowrank_optim.checkpoints.form import Entries, by_name, check_form, check_owners, check_shared
from lowrank_optim.checkpoints.placed import as_one_process, send_as_kept
from lowrank_optim.engine.plan import (
    ParamPlan,
    State,
    Strategies,
    alloc_moments,
    check_state,
    counts,
    on_host,
    resting_keys,
)
from lowrank_optim.engine.planned import PlannedOptimizer
from lowrank_optim.engine.sharded.forms import forms_of, whole_meta_state
from lowrank_optim.engine.sharded.local import LocalState, here, kept_as
from lowrank_optim.groups import Group, canonical
from lowrank_optim.ops.devices import pinned
from lowrank_optim.ops.quant4 import scale_count
from lowrank_optim.sharding.parts import is_sharded, local
from lowrank_optim.stores import scale_key
from lowrank_optim.subspaces.block import Block
from lowrank_optim.tensors.values import as_dtype, readable, widen_

StateDict = dict[str, Any]
STRUCTURE = ("rank", "proj_type", "projector", "basis", "flatten")
"""Group keys that shape the state: a checkpoint may not change them silently."""


def load_state_dict(
    optimizer: PlannedOptimizer, torch_load: Callable[[StateDict], None], state_dict: StateDict
) -> None:
    """Let torch load the groups and run every hook, and put the state in place ourselves.

    Stock torch casts every state tensor but ``step`` to its parameter's dtype: under bfloat16
    parameters float32 moments lose 16 bits, uint8 codes become floats and index 4097 becomes 4096.
    So a hook that runs after the user's pre-hooks checks the checkpoint and takes the state out,
    and one that runs before the user's post-hooks puts it back as it was saved.

    Raises:
        ValueError: the checkpoint does not fit. The optimizer is left as it was, as by any failure.
    """
    saved: dict[int, Entries] = {}  # by position of the parameter
    dtypes: dict[int, dict[str, torch.dtype]] = {}

    def take(_: Any, incoming: StateDict) -> StateDict:
        check_form(incoming)  # after the user's hooks, which may have replaced it
        ids = [i for group in incoming["param_groups"] for i in group["params"]]
        groups = [
            {
                **_without_params(g),
                "method": "another optimizer",
                **_named_as_here(canonical(s), g),
                # of the run that loads, as its device is
                "capturable": g["capturable"],
                "state_device": g["state_device"],
            }
            for s, g in zip(incoming["param_groups"], optimizer.param_groups, strict=False)
        ]
        groups += incoming["param_groups"][len(groups) :]
        state = incoming["state"]
        params = [p for group in optimizer.param_groups for p in group["params"]]
        mine = enumerate(zip(ids, params, strict=False))  # torch reports the wrong number
        saved.update((n, _entries(state[i], p)) for n, (i, p) in mine if i in state)
        if [len(g["params"]) for g in groups] == [len(g["params"]) for g in optimizer.param_groups]:
            check_shared(optimizer.param_groups, groups)
            told = [canonical(s).get("state_dtype") for s in incoming["param_groups"]]
            dtypes.update(check_fit(optimizer, groups, saved, told))
        return {**incoming, "param_groups": groups, "state": {}}

    def put(_: Any) -> None:
        for group in optimizer.param_groups:
            group["method"] = type(optimizer).__name__
        for n, (item, chosen) in enumerate(_every(optimizer)):
            if n in saved:
                resting = resting_keys(item, chosen)
                stays = {k: k in resting or on_host(k, chosen.capturable) for k in dtypes[n]}
                optimizer.state[item.param] = kept_as(
                    item,
                    chosen,
                    {
                        k: _placed(saved[n][k], item.param, dt, stays[k])
                        for k, dt in dtypes[n].items()
                    },
                )
        for group in optimizer.param_groups:
            optimizer._items(group)  # from here on edits are noticed

    handles = [
        optimizer.register_load_state_dict_pre_hook(take),
        optimizer.register_load_state_dict_post_hook(put, prepend=True),
    ]
    before = dict(vars(optimizer))
    try:
        if not isinstance(state_dict, Mapping):
            check_form(state_dict)
        torch_load(state_dict)
    except BaseException:
        vars(optimizer).clear()  # torch and we have replaced what is here, and written into none
        vars(optimizer).update(before)
        raise
    finally:
        for handle in handles:
            handle.remove()


def _every(optimizer: PlannedOptimizer) -> Iterator[tuple[ParamPlan, Strategies]]:
    """Every parameter, in order, with what its group chose."""
    for group in optimizer.param_groups:
        chosen = optimizer._strategies(group)
        yield from ((item, chosen) for item in optimizer._planned(group))


def hold_blocks(optimizer: PlannedOptimizer) -> None:
    """Give moments to idle blocks too, zeros, until the next step takes them back.

    For readers that fill in the entries which an optimizer has and look for no others:
    ``torch.distributed.checkpoint`` from disk, and flattened state. An optimizer that has not
    stepped must have its state first (``get_optimizer_state_dict`` makes it).

    Args:
        optimizer: of groups with ``projector="block"``; nothing happens to others.

    Example:
        >>> import torch
        >>> from lowrank_optim import FrugalAdamW
        >>> from lowrank_optim.checkpoints.load import hold_blocks
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
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_name != "_load_optim_state_dict":
        frame = frame.f_back
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
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "_init_optim_state":
            return str(frame.f_globals.get("__name__")).startswith("torch.distributed")
        frame = frame.f_back
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


def _without_params(group: Group) -> Group:
    """The keys that fill in for what a checkpoint of an older or another optimizer lacks."""
    return {k: v for k, v in group.items() if k not in ("params", "param_names")}


def _named_as_here(saved: Group, mine: Group) -> Group:
    """A group whose parameters were matched by name keeps this optimizer's order of names."""
    if not by_name(saved) or "param_names" not in mine:
        return saved
    return {**saved, "param_names": mine["param_names"]}


def _entries(saved: Mapping[str, Any], param: Tensor) -> Entries:
    """A parameter's saved state without empty dicts, and without moments that nobody filled in.

    ``torch.distributed.checkpoint`` puts an empty dict where a flattened checkpoint lacks a key
    that the optimizer has.
    """
    return {
        k: v
        for k, v in saved.items()
        if not (isinstance(v, Mapping) and not v)
        and not any(
            isinstance(x, Tensor) and _unfilled(x, param) for x in (v, saved.get(scale_key(k)))
        )
    }


def _unfilled(x: Tensor, param: Tensor) -> bool:
    """Whether a saved entry is still one of :func:`with_places`."""
    if not is_sharded(x):
        return not x.numel() and bool(param.numel())
    own = local(x)
    return own.is_floating_point() and bool(own.numel()) and bool(own.isnan().all())


def _placed(value: Any, param: Tensor, dtype: torch.dtype, stays: bool) -> Tensor:
    """A contiguous copy of one saved entry, on the device it belongs to.

    Args:
        value: the entry.
        param: its parameter.
        dtype: that it is to have.
        stays: whether it belongs to the host.
    """
    device = torch.device("cpu") if stays else param.device
    tensor: Tensor = torch.as_tensor(value).detach()
    if is_sharded(tensor):
        if is_sharded(param):
            return tensor.clone().to(dtype)
        tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    placed = tensor.to(device, dtype, copy=True, memory_format=torch.contiguous_format)
    # what a device copies from and to: unpinned, the host would wait for each copy
    return pinned(placed, param.device) if placed.dim() and stays else placed


def check_fit(
    optimizer: PlannedOptimizer,
    groups: list[Group],
    saved: dict[int, Entries],
    told: Sequence[str | None] | None = None,
) -> dict[int, dict[str, torch.dtype]]:
    """Compare every saved entry with the state that this optimizer would make.

    Args:
        optimizer: what the checkpoint is to be loaded into.
        groups: the groups it would have then, as many and as long as its own.
        saved: state by position of the parameter; entries get the shapes of one process.
        told: the format of moments that each group of the checkpoint tells of itself (default: none
            does).

    Returns:
        The dtype of every entry. It is the saved one, unless the checkpoint comes from another
        optimizer or from parameters of another dtype: a moment in a format that its store does not
        write would be read, updated and forgotten.

    Raises:
        ValueError: with the parameter's name and both values.
    """
    dtypes: dict[int, dict[str, torch.dtype]] = {}
    check_owners(optimizer.param_groups, groups)
    n = 0
    told = told or [None] * len(groups)
    for mine, loaded, format_ in zip(optimizer.param_groups, groups, told, strict=True):
        merged = {**loaded, "params": mine["params"]}
        if "param_names" in mine:
            merged.setdefault("param_names", mine["param_names"])
        optimizer._check(merged)
        chosen = optimizer._strategies(merged)
        pairs = zip(optimizer._planned(mine), optimizer._planned(merged), strict=True)
        for ours, there in pairs:
            if n in saved:
                _same_structure(optimizer, ours, there, mine, merged, saved[n])
                expected = whole_meta_state(there, chosen, active=True)
                # or torch may have read codes into floats, of another format that it was made for
                alike = format_ is not None and format_ == mine["state_dtype"]
                saved[n] = as_one_process(there, chosen, saved[n], expected, alike)
                dtypes[n] = _fitting(optimizer, there, chosen, loaded, saved[n])
            n += 1
    return dtypes


def _fitting(
    optimizer: PlannedOptimizer, item: ParamPlan, chosen: Strategies, loaded: Group, found: Entries
) -> dict[str, torch.dtype]:
    """Dtypes of the entries of one parameter, all of which are what its state may hold."""
    with _named(optimizer, item, loaded):
        tensors = {key: readable(key, value) for key, value in found.items()}
    # a block's moments are there or not, by when the checkpoint was written
    active = any(slot.name in found for slot in chosen.rule.slots(item.param.shape))
    last = tensors.get("refresh_step")
    active |= last is not None and bool((last >= 0).any())  # must be: nobody else has them
    expected = whole_meta_state(item, chosen, active)
    _same_shapes(optimizer, item, chosen, loaded, tensors, expected)
    with _named(optimizer, item, loaded):
        check_state(
            item, chosen, {k: as_dtype(k, local(x), expected[k].dtype) for k, x in tensors.items()}
        )
        dtypes = {k: dtype_of(k, x, tensors[k]) for k, x in expected.items()}
    idle = isinstance(item.subspace, Block) and float(tensors["refresh_step"]) < 0
    # moments that a reader left in its place: of another turn, or zeros of :func:`hold_blocks`
    kept = whole_meta_state(item, chosen, active=False) if idle else expected
    return {k: dtypes[k] for k in kept}


@contextmanager
def _named(optimizer: PlannedOptimizer, item: ParamPlan, loaded: Group) -> Iterator[None]:
    """Say in an error about a value whose it is."""
    try:
        yield
    except ValueError as error:
        raise ValueError(
            f"checkpoint written by {loaded['method']} cannot be loaded into {item.name} of "
            f"{type(optimizer).__name__}: {error}. Nothing was loaded: the checkpoint is damaged, "
            "was written for other parameters, or the run had failed when it was saved"
        ) from None


def _same_structure(
    optimizer: PlannedOptimizer,
    here: ParamPlan,
    there: ParamPlan,
    mine: Group,
    loaded: Group,
    found: Entries,
) -> None:
    """Raise if the groups see the parameter in different ways."""
    if "projector" in found:
        raise ValueError(
            f"the state of {here.name} holds a projector object: "
            "read this checkpoint with lowrank_optim.import_galore_torch"
        )
    if here.subspace is not None:
        for key in STRUCTURE:
            if loaded.get(key) != mine.get(key):
                raise _misfit(optimizer, here.name, key, loaded.get(key), mine.get(key), loaded)
    if (here.subspace is None) != (there.subspace is None):
        theirs, ours = ("dense" if x.subspace is None else "projected" for x in (there, here))
        raise _misfit(optimizer, here.name, "the parameter", theirs, ours, loaded)


def _same_shapes(
    optimizer: PlannedOptimizer,
    item: ParamPlan,
    chosen: Strategies,
    loaded: Group,
    found: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
) -> None:
    """Raise if the saved entries are not those of the optimizer, or have other shapes."""
    for key in sorted(expected.keys() & found.keys()):
        theirs, ours = _format(key, found), _format(key, expected)
        if theirs != ours and "bit" in theirs + ours:
            raise _misfit(optimizer, item.name, f"format of {key}", theirs, ours, loaded)
    if expected.keys() != found.keys():
        raise _misfit(optimizer, item.name, "state", sorted(found), sorted(expected), loaded)
    forms = forms_of(item, chosen) if item.sharded else {}
    for key, tensor in expected.items():
        shape, own = tuple(found[key].shape), tuple(tensor.shape)
        if is_sharded(found[key]) and key in forms:
            own = forms[key].shape
        if shape != own:
            raise _misfit(optimizer, item.name, f"shape of {key}", shape, own, loaded)


def _format(key: str, entries: Mapping[str, Tensor]) -> str:
    """Name of the store that wrote an entry: codes have scales beside them."""
    x, scales = entries[key], entries.get(scale_key(key))
    if scales is not None:
        in_4bit = scales.shape == (*x.shape[:-1], scale_count(2 * x.shape[-1]))
        return "4bit" if in_4bit else "8bit"
    return "codes without scales" if x.dtype == torch.uint8 else str(x.dtype).removeprefix("torch.")


def _misfit(
    optimizer: PlannedOptimizer, name: str, what: str, theirs: Any, mine: Any, loaded: Group
) -> ValueError:
    return ValueError(
        f"checkpoint written by {loaded['method']} does not fit {name} in "
        f"{type(optimizer).__name__}: {what} is {theirs} there and {mine} here"
    )
