"""The form of a saved state dict, and whose state it is: checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lowrank_optim.groups import Group
from lowrank_optim.groups.names import bare

StateDict = dict[str, Any]
"""What ``state_dict()`` returns."""

Entries = dict[str, Any]
"""The saved state of one parameter."""

LAYOUT = ("form", "shapes", "factor_starts")
"""Group keys that say which of its parameters are factors of one layer."""


def check_form(state_dict: Any) -> None:
    """Raise unless this is a dict of groups and of the state of their parameters.

    Raises:
        TypeError: it is no dict.
        ValueError: with what is missing, or in the wrong place.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"a state dict must be a dict, got {type(state_dict).__name__}")
    for key, kind in (("state", Mapping), ("param_groups", Sequence)):
        value = state_dict.get(key)
        if not isinstance(value, kind) or isinstance(value, str):
            got = type(value).__name__ if key in state_dict else f"only {_keys(state_dict)}"
            raise ValueError(
                f"not the state dict of an optimizer: {key!r} must be a "
                f"{'dict' if kind is Mapping else 'list'}, got {got}"
            )
    for n, group in enumerate(state_dict["param_groups"]):
        if not isinstance(group, Mapping) or not all(isinstance(key, str) for key in group):
            raise ValueError(f"group {n} of the checkpoint is not a dict of names: {group!r}")
        ids = group.get("params")
        if not isinstance(ids, Sequence) or isinstance(ids, str):
            raise ValueError(f"group {n} of the checkpoint has no list of params, got {ids!r}")
        if not all(isinstance(i, int | str) for i in ids):
            raise ValueError(f"params of group {n} must be numbers or names, got {ids!r}")
    known = {i for group in state_dict["param_groups"] for i in group["params"]}
    for i, entry in state_dict["state"].items():
        if i not in known:
            raise ValueError(
                f"the checkpoint has state of parameter {i!r}, which is in none of its groups"
            )
        if not isinstance(entry, Mapping) or not all(isinstance(key, str) for key in entry):
            raise ValueError(
                f"the state of parameter {i!r} must be a dict of names, got {type(entry).__name__}"
            )


def check_owners(mine: Sequence[Group], groups: Sequence[Group]) -> None:
    """Raise unless the groups of a checkpoint are of the same parameters, in the same order.

    Names are compared where both sides have them, but for what wrappers put into them. Where the
    checkpoint goes by name already (``torch.distributed.checkpoint``), its order is ours.

    Args:
        mine: the optimizer's groups.
        groups: those of the checkpoint, as many and as long.

    Raises:
        ValueError: with the first name that differs and the remedy.
    """
    ours, theirs = list[str](), list[str]()
    for n, (own, group) in enumerate(zip(mine, groups, strict=True)):
        for key in LAYOUT:
            if _plain(own.get(key)) != _plain(group.get(key)):
                raise ValueError(
                    f"group {n} of the checkpoint has {key}={group.get(key)!r}, the optimizer's "
                    f"has {own.get(key)!r}: convert the model alike before loading"
                )
        indices = group.get("indices")
        if indices is not None and not _listed(indices, len(own["params"]), int):
            raise ValueError(
                f"indices of group {n} must be {len(own['params'])} ints, got {indices!r}"
            )
        names, saved = own.get("param_names"), group.get("param_names")
        if saved is not None and not _listed(saved, len(own["params"]), str):
            raise ValueError(
                f"param_names of group {n} must be {len(own['params'])} strings, got {saved!r}"
            )
        if names is None or saved is None:
            continue
        ours += [bare(name) for name in names]
        theirs += [bare(name) for name in saved]
    for here, there in zip(ours, theirs, strict=True):
        if here == there:
            continue
        if sorted(ours) == sorted(theirs):
            remedy = (
                "the parameters are the same in another order: make the groups in the order of "
                "the checkpoint, or load by name with torch.distributed.checkpoint.state_dict"
            )
        else:
            remedy = (
                "load it into the model that it was saved from; if a parameter was renamed, rename "
                "it in param_names of the checkpoint's groups, or delete param_names from them to "
                "load by position"
            )
        raise ValueError(f"the checkpoint has {there} where the optimizer has {here}: {remedy}")


def check_shared(mine: Sequence[Group], groups: Sequence[Group]) -> None:
    """Raise if two parameters would get one saved state; one that is listed twice may.

    Raises:
        ValueError: with its number.
    """
    params = [p for group in mine for p in group["params"]]
    taken: dict[Any, Any] = {}
    for i, param in zip((i for g in groups for i in g["params"]), params, strict=True):
        if taken.setdefault(i, param) is not param:
            raise ValueError(f"the checkpoint lists parameter {i!r} twice, for two parameters here")


def by_name(group: Group) -> bool:
    """Whether its parameters are named, and so were matched by whoever made the dict."""
    return bool(group["params"]) and all(isinstance(i, str) for i in group["params"])


def _listed(values: Any, count: int, kind: type) -> bool:
    listed = isinstance(values, list | tuple) and len(values) == count
    return listed and all(isinstance(value, kind) for value in values)


def _plain(value: Any) -> Any:
    """Lists for tuples, which some formats do not keep, and None for nothing."""
    if isinstance(value, list | tuple):
        return [_plain(x) for x in value] or None
    return value


def _keys(state_dict: Mapping[Any, Any]) -> str:
    keys: Iterator[str] = map(repr, state_dict)
    return ", ".join(sorted(keys)[:5]) or "nothing"
