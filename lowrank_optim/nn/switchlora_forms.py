"""A run of SwitchLoRA between its two forms: state goes along."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.optim import Optimizer

from lowrank_optim.engine.plan import State
from lowrank_optim.groups import Group
from lowrank_optim.nn.base import CONVERTERS, Converter, is_conv1d
from lowrank_optim.nn.switchlora import (
    SwitchLoRALinear,
    append_triple,
    convert,
    layers,
    merge,
    replace_layer,
)
from lowrank_optim.optimizer import LowRankOptimizer
from lowrank_optim.subspaces.switched import Switched


def to_modules(model: nn.Module, optimizer: LowRankOptimizer) -> LowRankOptimizer:
    """Go on with modules where a run with dense weights stands.

    Factors, pools, moments, row steps and counters go along: the run continues as it would have,
    but for the rounding of W0.

    Args:
        model: of the optimizer's weights; its linear layers that have factors are replaced.
        optimizer: a :class:`lowrank_optim.SwitchLoRAAdamW` that has stepped; not to be used after.

    Returns:
        An optimizer of the same class and settings. Schedulers must be attached to it anew.

    Raises:
        ValueError: a weight with factors is not that of a linear layer of its own, or a ``Conv1D``
            was trained without ``fan_in_fan_out=True``.
    """
    owners = layers(model)
    plan = [(group, list(optimizer._items(group))) for group in optimizer.param_groups]
    for group, items in plan:  # before anything changes
        for item in items:
            if item.subspace is not None and not group["factor_starts"]:
                owner = owners.get(id(item.param))
                if owner is None:
                    raise ValueError(f"{item.name} is not the weight of a linear layer of its own")
                if is_conv1d(owner[2]) != group["fan_in_fan_out"]:
                    raise ValueError(f"{item.name}: fan_in_fan_out does not fit the layer")
    groups: list[Group] = []
    states: dict[Tensor, State] = {}
    for group, items in plan:
        turned: Group = {**group, "params": [], "factor_starts": ()}
        names = group.get("param_names") or [item.name for item in items]
        turned["param_names"] = []
        for item, name in zip(items, names, strict=True):
            state = dict(optimizer.state.get(item.param, {}))
            if isinstance(item.subspace, Switched) and not group["factor_starts"]:
                if not state or int(state["refresh_step"]) < 0:
                    raise ValueError(f"{name} has no factors yet: step first, or use convert")
                factors = [state.pop("basis_A"), state.pop("basis_B")]
                module = replace_layer(owners[id(item.param)], item.subspace, factors)
                append_triple(turned, name, module)
                states[module.lora_A] = state
            else:
                turned["params"].append(item.param)
                turned["param_names"].append(name)
                if state:
                    states[item.param] = state
        if group["factor_starts"]:
            turned["factor_starts"] = group["factor_starts"]
        groups.append(_named_as(group, turned))
    return _remade(optimizer, groups, states)


def to_weights(model: nn.Module, optimizer: LowRankOptimizer) -> LowRankOptimizer:
    """Go on with dense weights where a run with modules stands: :func:`to_modules` undone.

    Args:
        model: its modules are merged.
        optimizer: a :class:`lowrank_optim.SwitchLoRAAdamW` that has stepped; not to be used after.

    Returns:
        An optimizer of the same class and settings. Schedulers must be attached to it anew.
    """
    groups: list[Group] = []
    states: dict[Tensor, State] = {}
    for group in optimizer.param_groups:
        turned: Group = {**group, "params": [], "param_names": [], "factor_starts": ()}
        for params, name in _entries(group):
            state = dict(optimizer.state.get(params[0], {}))
            if len(params) == 3 and state:
                a, b = (x.detach().clone() for x in (params[0], params[1].mT))
                state |= {"basis_A": a, "basis_B": b.contiguous()}
            turned["params"].append(params[-1])
            turned["param_names"].append(name)
            if state:
                states[params[-1]] = state
        groups.append(_named_as(group, turned))
    merge(model)
    return _remade(optimizer, groups, states)


def _named_as(group: Group, turned: Group) -> Group:
    """Without the names that no user gave: draws are of names, where there are some."""
    keys = () if group.get("param_names") else ("param_names",)
    return {key: value for key, value in turned.items() if key not in keys}


def _entries(group: Group) -> Iterator[tuple[list[Tensor], str]]:
    """Parameters and triples of a group, each with the name of its weight."""
    params = group["params"]
    names = group.get("param_names") or [f"parameter {i}" for i in range(len(params))]
    starts, i = set(group["factor_starts"]), 0
    while i < len(params):
        width = 3 if i in starts else 1
        yield params[i : i + width], names[i + width - 1]
        i += width


def _remade(
    optimizer: LowRankOptimizer, groups: list[Group], states: dict[Tensor, State]
) -> LowRankOptimizer:
    """The same class over other groups, whose keys are all there, and other state."""
    make: type[Optimizer] = type(optimizer)
    new = make(groups)  # type: ignore[call-arg]
    assert isinstance(new, LowRankOptimizer)
    new.state.update(states)
    return new


CONVERTERS["switchlora"] = Converter(SwitchLoRALinear, convert, to_modules, to_weights)
