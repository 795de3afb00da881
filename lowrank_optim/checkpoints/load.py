"""Loading state: nothing loses bits, nothing is aliased, and a misfit changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lowrank_optim.checkpoints.form import Entries, StateDict, by_name, check_form, check_shared
from lowrank_optim.checkpoints.loaders import hold_blocks as hold_blocks  # its first address
from lowrank_optim.checkpoints.loaders import unfilled
from lowrank_optim.checkpoints.matching import FOREIGN, check_fit
from lowrank_optim.engine.plan import ParamPlan, Strategies
from lowrank_optim.engine.planned import PlannedOptimizer
from lowrank_optim.engine.sharded.local import kept_as
from lowrank_optim.engine.state import on_host, resting_keys
from lowrank_optim.groups import Group, canonical
from lowrank_optim.ops.devices import pinned
from lowrank_optim.sharding.parts import is_sharded
from lowrank_optim.stores import scale_key
from lowrank_optim.tensors.projected_grad import projection


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
    loading = _Loading(optimizer)
    handles = [
        optimizer.register_load_state_dict_pre_hook(loading.take),
        optimizer.register_load_state_dict_post_hook(loading.put, prepend=True),
    ]
    before = dict(vars(optimizer))
    try:
        if not isinstance(state_dict, Mapping):
            check_form(state_dict)
        torch_load(state_dict)
        for group in optimizer.param_groups:
            for kept in map(projection, (param.grad for param in group["params"])):
                if kept is not None:
                    kept.outdated = True
    except BaseException:
        vars(optimizer).clear()  # torch and we have replaced what is here, and written into none
        vars(optimizer).update(before)
        raise
    finally:
        for handle in handles:
            handle.remove()


class _Loading:
    """State on its way from a checkpoint into an optimizer, past torch."""

    def __init__(self, optimizer: PlannedOptimizer) -> None:
        self.optimizer = optimizer
        self.saved: dict[int, Entries] = {}
        """By position of the parameter."""
        self.dtypes: dict[int, dict[str, torch.dtype]] = {}
        """That entries are to have."""

    def take(self, _: Any, incoming: StateDict) -> StateDict:
        """Check a checkpoint, and give torch one without state."""
        check_form(incoming)  # after the user's hooks, which may have replaced it
        read = map(self.optimizer._group_of_checkpoint, incoming["param_groups"])
        incoming = {**incoming, "param_groups": list(read)}
        ours = self.optimizer.param_groups
        ids = [i for group in incoming["param_groups"] for i in group["params"]]
        groups = [
            {
                **_without_params(g),
                "method": FOREIGN,
                **_named_as_here(canonical(s), g),
                # of the run that loads, as its device is
                "capturable": g["capturable"],
                "state_device": g["state_device"],
            }
            for s, g in zip(incoming["param_groups"], ours, strict=False)
        ]
        groups += incoming["param_groups"][len(groups) :]
        state = incoming["state"]
        params = [p for group in ours for p in group["params"]]
        mine = enumerate(zip(ids, params, strict=False))  # torch reports the wrong number
        self.saved.update((n, _entries(state[i], p)) for n, (i, p) in mine if i in state)
        if [len(g["params"]) for g in groups] == [len(g["params"]) for g in ours]:
            check_shared(ours, groups)
            told = [canonical(s).get("state_dtype") for s in incoming["param_groups"]]
            self.dtypes.update(check_fit(self.optimizer, groups, self.saved, told))
        return {**incoming, "param_groups": groups, "state": {}}

    def put(self, _: Any) -> None:
        """Give the optimizer the state, once torch has loaded the groups."""
        optimizer = self.optimizer
        for group in optimizer.param_groups:
            group["method"] = type(optimizer).__name__
        for n, (item, chosen) in enumerate(_every(optimizer)):
            if n in self.saved:
                resting, placed = resting_keys(item, chosen), {}
                for key, dtype in self.dtypes[n].items():
                    stays = key in resting or on_host(key, chosen.capturable)
                    placed[key] = _placed(self.saved[n][key], item.param, dtype, stays)
                optimizer.state[item.param] = kept_as(item, chosen, placed)
        for group in optimizer.param_groups:
            optimizer._items(group)  # from here on edits are noticed


def _every(optimizer: PlannedOptimizer) -> Iterator[tuple[ParamPlan, Strategies]]:
    """Every parameter, in order, with what its group chose."""
    for group in optimizer.param_groups:
        chosen = optimizer._strategies(group)
        yield from ((item, chosen) for item in optimizer._planned(group))


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
            isinstance(x, Tensor) and unfilled(x, param) for x in (v, saved.get(scale_key(k)))
        )
    }


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
