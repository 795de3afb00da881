"""Between weights and modules, before a run and in the middle of one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from lowrank_optim.engine.plan import State
from lowrank_optim.engine.refresh import refresh_
from lowrank_optim.engine.schedule import phase, refresh_due
from lowrank_optim.groups import Group, lowrank_groups
from lowrank_optim.groups.names import uid_of
from lowrank_optim.groups.values import check_module
from lowrank_optim.nn.base import CONVERTERS, FORMS, Factored, Reparameterized, layer_of, parent_of
from lowrank_optim.ops.devices import plainly
from lowrank_optim.optimizer import LowRankOptimizer
from lowrank_optim.tensors.matrix import MatrixView, matrix_view

MEMBERS = ("params", "param_names", "indices", "shapes", "form", "targets")
"""Group keys that say what is in a group, not how it is stepped."""


def convert(
    model: nn.Module,
    method: str,
    *,
    rank: int | float = 128,
    target_modules: str | Sequence[str] = "all-linear",
    **options: Any,
) -> list[Group]:
    """Replace the targeted linear layers of a model, in place, by layers of factors.

    Args:
        model: its ``nn.Linear`` and GPT-2 ``Conv1D`` layers are replaced where they are targeted;
            a weight that several layers share stays as it is, and is logged.
        method: "sst" for :class:`SpectralLinear` and ``SSTAdamW``, "switchlora" for
            :class:`SwitchLoRALinear` and ``SwitchLoRAAdamW``, "sltrain" and "lost" for
            :class:`SLTrainLinear` and :class:`LOSTLinear` and any optimizer, or another registered
            form.
        rank: as in :func:`lowrank_optim.lowrank_groups` (default: 128).
        target_modules: likewise (default: "all-linear").
        **options: group keys. Those that decide how a layer starts (``seed``, ``sampling``,
            ``density``, ...) must be given here, not to the optimizer.

    Returns:
        Parameter groups for the matching optimizer. A run on them follows the dense form with
        ``lowrank_groups(model, rank=rank, target_modules=target_modules)``: each layer draws the
        numbers that its weight would.

    Raises:
        ValueError: the method is not known, or a target matches nothing.

    Example:
        >>> import torch
        >>> from lowrank_optim.nn import convert
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6))
        >>> [(g.get("form"), g["param_names"]) for g in convert(model, "sst", rank=2)]
        [('sst', ['0.u', '0.v', '0.s', '0.u_rest', '0.v_rest', '0.order']), (None, ['0.bias'])]
    """
    check_module(model)
    given = {"rank": rank, "target_modules": target_modules, **options}
    with plainly():
        if isinstance(method, str) and method in CONVERTERS:
            return CONVERTERS[method].convert(model, **given)
        cls, out = _form(method), list[Group]()
        for group in lowrank_groups(model, **{**cls.options, **given}):
            if group.get("rank") is None:
                out.append({**group, "indices": [uid_of(name) for name in group["param_names"]]})
            else:
                out += _converted(model, cls, method, group)
        return out


def merge(model: nn.Module) -> nn.Module:
    """Put plain linear layers back, in place; returns the model.

    Exact up to the rounding of one product into the weight's dtype. An optimizer of the factors
    does not know the new weights: in the middle of a run use :func:`to_weights`.

    Args:
        model: as :func:`convert` left it. If it is itself a layer of factors, only what is returned
            is plain.

    Raises:
        ValueError: a layer is no linear map, such as one of "lost" with an activation.

    Example:
        >>> import torch
        >>> from lowrank_optim.nn import convert, merge
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6))
        >>> groups = convert(model, "switchlora", rank=2)
        >>> merge(model)[0]
        Linear(in_features=8, out_features=6, bias=True)
    """
    check_module(model)
    for layer in model.modules():
        if isinstance(layer, Reparameterized):
            layer.check_merge()
    for name, layer in list(model.named_modules()):
        merged = getattr(layer, "merged", None)
        if callable(merged):
            plain = merged()
            if layer is model:
                return cast(nn.Module, plain)
            parent, last = parent_of(model, name)
            setattr(parent, last, plain)
    return model


def to_modules(model: nn.Module, optimizer: LowRankOptimizer, method: str) -> LowRankOptimizer:
    """Replace the weights that ``optimizer`` steps by factors, between two steps of a run.

    Args:
        model: whose weights they are; changed in place.
        optimizer: in its dense form; not to be used afterwards.
        method: a registered form, the one of the optimizer.

    Returns:
        An optimizer of the same class, with all state, for the run to go on with. Schedulers refer
        to the old one: make them anew.

    Raises:
        NotImplementedError: the layers are for training from the start ("sltrain", "lost").
        ValueError: the method is not known.

    Example:
        >>> import torch
        >>> from lowrank_optim import SSTAdamW
        >>> from lowrank_optim.nn import to_modules
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6))
        >>> optimizer = SSTAdamW(model.named_parameters(), rank=2)
        >>> optimizer = to_modules(model, optimizer, "sst")
        >>> type(model[0]).__name__
        'SpectralLinear'
    """
    if method in CONVERTERS:
        return CONVERTERS[method].to_modules(model, optimizer)
    names = {id(p): name for name, p in model.named_parameters()}
    cls, groups, states = _form(method), list[Group](), dict[int, State]()
    for group in optimizer.param_groups:
        taken, low, dense = _Members(), _Members(), _Members()
        chosen = optimizer._strategies(group)
        for item in optimizer._items(group):
            name = names.get(id(item.param), item.name)
            place = layer_of(model, name, item.param) if item.subspace is not None else None
            if place is None or item.view is None:
                (dense if item.subspace is None else low).add(name, item.param, item.uid)
                states[id(item.param)] = dict(optimizer.state.get(item.param, {}))
                continue
            state = dict(optimizer._state_of(item, chosen))
            step, last = int(state["step"]), int(state["refresh_step"])
            # modules look one step ahead
            if refresh_due(step, last, chosen.gap, phase(item, chosen)):
                with torch.no_grad(), plainly():
                    refresh_(item, state, item.view.of(item.param), step, chosen)
            layer = _replace(model, cls, place, group, item.view, state)
            leader = taken.add_layer(layer, place, item.uid)
            states[id(leader)] = state
        groups += _groups(group, method, taken, low, dense)
    return _rebuilt(optimizer, groups, states)


def to_weights(model: nn.Module, optimizer: LowRankOptimizer) -> LowRankOptimizer:
    """The way back from :func:`to_modules`: dense weights, and an optimizer with all state.

    Args:
        model: whose layers of factors are replaced by plain ones, in place.
        optimizer: of the factors; not to be used afterwards.

    Returns:
        An optimizer of the same class, with all state. Schedulers must be made anew.

    Raises:
        NotImplementedError: the layers are for training from the start ("sltrain", "lost").

    Example:
        >>> import torch
        >>> from lowrank_optim import SSTAdamW
        >>> from lowrank_optim.nn import convert, to_weights
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6))
        >>> optimizer = SSTAdamW(convert(model, "sst", rank=2))
        >>> optimizer = to_weights(model, optimizer)
        >>> type(model[0]).__name__
        'Linear'
    """
    for converter in CONVERTERS.values():
        if any(isinstance(layer, converter.layer) for layer in model.modules()):
            return converter.to_weights(model, optimizer)
    layers = {
        id(next(iter(layer.members().values()))): (name, layer)
        for name, layer in model.named_modules()
        if isinstance(layer, Factored)
    }
    groups, states = list[Group](), dict[int, State]()
    for group in optimizer.param_groups:
        low, dense = _Members(), _Members()
        for item in optimizer._items(group):
            state = dict(optimizer.state.get(item.param, {}))
            if id(item.param) in layers:
                name, layer = layers[id(item.param)]
                parent, last = parent_of(model, name)
                merged = layer.merged()
                weight = merged.weight
                assert isinstance(weight, nn.Parameter)
                setattr(parent, last, merged)
                low.add(f"{name}.weight", weight, item.uid)
                states[id(weight)] = {**state, **layer.to_state()} if state else {}
            elif group.get("form") is None:
                (dense if item.subspace is None else low).add(item.name, item.param, item.uid)
                states[id(item.param)] = state
        groups += _groups(group, "", _Members(), low, dense)
    return _rebuilt(optimizer, groups, states)


def _form(method: str) -> type[Factored]:
    if not isinstance(method, str) or method not in FORMS:
        names = ", ".join(repr(name) for name in [*FORMS, *CONVERTERS])
        raise ValueError(f"method must be one of {names}, got {method!r}")
    return FORMS[method]


def _converted(model: nn.Module, cls: type[Factored], method: str, group: Group) -> list[Group]:
    """A group with a rank again, its layers replaced; other matrices stay weights."""
    taken, low = _Members(), _Members()
    for name, param in zip(group["param_names"], group["params"], strict=True):
        uid = uid_of(name)
        place, view = layer_of(model, name, param), matrix_view(param.shape, group["proj_type"])
        if place is None or view is None:
            low.add(name, param, uid)
            continue
        state = cls.initial(group, view, param, uid)
        taken.add_layer(_replace(model, cls, place, group, view, state), place, uid)
    return _groups(group, method, taken, low, _Members())


class _Members:
    """What goes into one group."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.params: list[Tensor] = []
        self.uids: list[int] = []
        self.shapes: list[tuple[int, ...]] = []

    def add(self, name: str, param: Tensor, uid: int) -> None:
        self.names.append(name)
        self.params.append(param)
        self.uids.append(uid)

    def add_layer(self, layer: Factored, name: str, uid: int) -> Tensor:
        """All members of a layer; returns the one that holds the state."""
        for part, param in layer.members().items():
            self.add(f"{name}.{part}", param, uid)
        self.shapes.append(layer.weight_shape)
        return next(iter(layer.members().values()))


def _groups(
    group: Group, method: str, taken: _Members, low: _Members, dense: _Members
) -> list[Group]:
    """The group again, as one of layers, one of matrices and one of all else.

    What is projected is said, not left to names, which the old group may not have had.
    """
    keys = {k: v for k, v in group.items() if k not in MEMBERS}
    of_layers = {"form": method, "shapes": taken.shapes, "targets": "modules"}
    return [
        {
            **keys,
            **own,
            "params": members.params,
            "param_names": members.names,
            "indices": members.uids,
        }
        for members, own in (
            (taken, of_layers),
            (low, {"targets": "all"}),
            (dense, {"rank": None}),
        )
        if members.params
    ]


def _replace(
    model: nn.Module,
    cls: type[Factored],
    name: str,
    group: Group,
    view: MatrixView,
    state: State,
) -> Factored:
    parent, last = parent_of(model, name)
    layer = cls.from_state(parent.get_submodule(last), group, view, state)
    setattr(parent, last, layer)
    return layer


def _rebuilt(
    optimizer: LowRankOptimizer, groups: list[Group], states: dict[int, State]
) -> LowRankOptimizer:
    make: Callable[[list[Group]], LowRankOptimizer] = type(optimizer)  # every method's does
    new = make(groups)
    new.defaults.update(optimizer.defaults)
    for group in new.param_groups:
        for param in group["params"]:
            state = states.get(id(param))
            if state:
                new.state[param] = state
    return new
