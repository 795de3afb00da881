"""What a user may not expect of a group, and is told: ranks that do not fit, missing names."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lowrank_optim.groups.linear_maps import looks_like_vocabulary
from lowrank_optim.groups.values import Group
from lowrank_optim.subspaces.base import PROJECTORS, view_for
from lowrank_optim.tensors.matrix import MatrixView

Asked = Callable[[Group, int], bool]
"""Whether something holds of parameter ``i`` of a group."""

LIBRARIES = ("lowrank_optim.", "torch.optim.")
"""Modules that a warning does not point at."""

WORTH_SAYING = 0.01
"""Share of a group's matrices below which a notice about them would be noise."""


def param_name(group: Group, i: int) -> str:
    """Name of parameter ``i`` of a group, or its position."""
    names = group.get("param_names")
    return names[i] if names else f"parameter {i}"


def users_level() -> int:
    """``stacklevel`` of the user's line: one that constructs an optimizer, or adds a group to it.

    For a warning that the caller of this function gives: classes differ in how deep they call.
    """
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(LIBRARIES):
        level, frame = level + 1, frame.f_back
    return level


def warn_of(
    group: Group,
    told: set[str],
    owner: str,
    projected: Asked,
    is_map: Asked,
    unread: Mapping[str, tuple[Any, str]],
) -> None:
    """Warn of what a user may not expect of a group: each kind once, clamped ranks every time.

    Args:
        group: a completed one.
        told: kinds of what the optimizer has said; what is said now is added.
        owner: name of its class.
        projected: whether it projects a parameter, if that is a matrix.
        is_map: whether a parameter is a linear map.
        unread: as :func:`unused` takes them.
    """
    ranked = group.get("layers") is None
    texts = {
        "clamped": clamped(group) if ranked else None,
        "vocabulary": vocabulary(group, projected) if ranked else None,
        "covered": covered(group, is_map) if ranked else None,
        "whole": whole(group) if ranked else None,
        "unused": unused(group, owner, unread),
    }
    for kind, text in texts.items():
        if text is not None and (kind == "clamped" or kind not in told):
            told.add(kind)
            warnings.warn(text, stacklevel=users_level())


def unheard(rank: Any, named: Sequence[Any], owner: str) -> str:
    """That a constructor was given a rank which is that of no group, as groups name others.

    Args:
        rank: of the constructor.
        named: those of groups.
        owner: name of the optimizer class.
    """
    own = next((x for x in named if x is not None), None)
    return (
        f"rank={rank} of {owner}() has no effect, as groups name ranks of their own, such as "
        f"{own}, and a group without one is dense: give it to the groups, as "
        f"lowrank_groups(model, rank={rank}) does, or leave it out"
    )


def clamped(group: Group) -> str | None:
    """Ranks that matrices of an explicit group cannot have; the release is silent."""
    rank, projector = group["rank"], PROJECTORS[group["projector"]]
    if not _names_number(group):
        return None
    small = [
        (i, view)
        for i, view in _views(group)
        if projector.directions(rank, view) > projector.limit(view)
    ]
    if not small:
        return None
    i, view = small[0]
    return (
        f"rank {rank} is clamped to {projector.limit(view)} for {param_name(group, i)} of shape "
        f"{view.shape}{_and_more(small)}"
    )


def whole(group: Group) -> str | None:
    """Matrices of an explicit group that its rank fits exactly, where they weigh something.

    A number is meant to leave something out. A fraction that covers is 1.0, which says what it
    means, or of a matrix with a side of one.
    """
    rank, projector = group["rank"], PROJECTORS[group["projector"]]
    if not _names_number(group):
        return None
    views = _views(group)
    full = [
        (i, view)
        for i, view in views
        if projector.covers(rank, view)
        and projector.directions(rank, view) == projector.limit(view)
    ]
    size, total = (sum(group["params"][i].numel() for i, _ in x) for x in (full, views))
    if not full or size < WORTH_SAYING * total:
        return None
    i, view = full[0]
    return (
        f"rank {rank} leaves nothing out of {param_name(group, i)} of shape {view.shape}"
        f"{_and_more(full)}, {size / total:.0%} of the matrices of its group: moments are as large "
        "as dense ones, and a basis is kept besides. Put them in a group of their own without a "
        f"rank, which is dense, or name a rank below {projector.limit(view)}"
    )


def vocabulary(group: Group, projected: Asked) -> str | None:
    """Embeddings and heads that are projected because no name says what they are."""
    if group["rank"] is None or group["targets"] != "auto" or group.get("param_names") is not None:
        return None
    shapes = [tuple(p.shape) for p in group["params"]]
    found = [i for i, s in enumerate(shapes) if looks_like_vocabulary(s, shapes)]
    found = [i for i in found if projected(group, i)]
    if not found:
        return None
    listed = " and ".join(f"{param_name(group, i)} of shape {shapes[i]}" for i in found)
    return (
        f"{listed} {'looks' if len(found) == 1 else 'look'} like an embedding or an output head, "
        "and without names will be projected: pass model.named_parameters(), or the groups of "
        "lowrank_groups(model), which leave these dense"
    )


def covered(group: Group, is_map: Asked) -> str | None:
    """Matrices that the rank of the constructor leaves dense, where they weigh something."""
    rank, projector = group["rank"], PROJECTORS[group["projector"]]
    if rank is None or rank == 1.0 or group["targets"] != "auto":
        return None
    maps = [(i, view) for i, view in _views(group) if is_map(group, i)]
    small = [(i, view) for i, view in maps if projector.covers(rank, view)]
    size, total = (sum(group["params"][i].numel() for i, _ in x) for x in (small, maps))
    if not small or size < WORTH_SAYING * total:
        return None
    i, view = small[0]
    return (
        f"rank {rank} leaves nothing out of {param_name(group, i)} of shape {view.shape}"
        f"{_and_more(small)}, {size / total:.0%} of the matrices, which stay dense: a rank below "
        f"{projector.limit(view)}, or a fraction such as 0.25, projects them"
    )


def unused(group: Group, owner: str, keys: Mapping[str, tuple[Any, str]]) -> str | None:
    """Arguments that every optimizer takes, where they were given to one that does not read them.

    Args:
        group: a completed one.
        owner: name of the optimizer class.
        keys: the keys, the default of each, and why it means nothing.
    """
    given = [
        f"{k}={group[k]!r} ({why})" for k, (own, why) in keys.items() if group[k] not in (own, None)
    ]
    return f"{owner} does not use {', '.join(given)}: leave it out" if given else None


def _names_number(group: Group) -> bool:
    """Whether every matrix of a group is to have a rank that it names as a number."""
    # modules have clamped it already
    return (
        isinstance(group["rank"], int)
        and group["targets"] == "all"
        and not group.get("factor_starts")
    )


def _views(group: Group) -> list[tuple[int, MatrixView]]:
    views = ((i, view_for(group, p.shape)) for i, p in enumerate(group["params"]))
    return [(i, view) for i, view in views if view is not None]


def _and_more(found: list[tuple[int, MatrixView]]) -> str:
    return f" and {len(found) - 1} more" if len(found) > 1 else ""
