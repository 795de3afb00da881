"""Which layer of a model a parameter is of, by its name."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lowrank_optim.groups.names import bare
from lowrank_optim.groups.notices import param_name
from lowrank_optim.groups.values import Group

LAYERS = r"(?:^|\.)(?:layers?|h|blocks?)\.\d+\."
"""What names of transformers have in common: LLaMA's ``layers.0.``, GPT-2's ``h.0.``, BERT's
``layer.0.``."""


def layer_of(group: Group, i: int, place: int = 0) -> str | None:
    """The layer of parameter ``i`` of a group: its name up to where the pattern ends.

    None where it says none. Without names every matrix is a layer, called by the group's place.
    """
    if group.get("param_names") is None:
        return f"{place}.{i}" if group["params"][i].dim() >= 2 else None
    name = bare(param_name(group, i))
    found = re.search(group["layers"], name)
    return name[: found.end()] if found else None


def takes_turns(group: Group, i: int) -> bool:
    """Whether parameter ``i`` of a group with ``layers`` is in a layer, or outside of them too."""
    if group["params"][i].numel() == 0:
        return False
    return group.get("outside", "always") == "turns" or layer_of(group, i) is not None


def layers_of(group: Group, groups: Sequence[Group]) -> tuple[list[str], list[str]]:
    """The layer of each parameter of a group, and those of all groups with this pattern, in order.

    What takes turns outside of layers does so by module: an embedding, a head. A vector without a
    matrix in its module goes with what comes before it, as a last norm with the last layer.
    """
    pattern = group["layers"]
    alike = [g for g in groups if g.get("layers") == pattern and g.get("rank") is not None]
    alike += [] if any(g is group for g in groups) else [group]
    modules = {
        _module(g, i) for g in alike for i, p in enumerate(g["params"]) if p.dim() >= 2
    }  # of matrices
    every: dict[str, None] = {}
    own: list[str] = []
    for place, each in enumerate(alike):
        found = _of_group(each, place, modules)
        turns = (x for i, x in enumerate(found) if takes_turns(each, i))
        every.update(dict.fromkeys(turns))
        own = found if each is group else own
    drawn = group.get("block_order", "random") in ("random", "shuffled")
    named = group.get("param_names") is not None  # else as they come
    return own, sorted(every, key=_natural) if drawn and named else [*every]


def _module(group: Group, i: int) -> str:
    return bare(param_name(group, i)).rpartition(".")[0]


def _of_group(group: Group, place: int, modules: set[str]) -> list[str]:
    found: list[str | None] = []
    for i in range(len(group["params"])):
        layer, module = layer_of(group, i, place), _module(group, i)
        if layer is None and group.get("param_names") is not None and module in modules:
            layer = module
        found.append(layer or (found[-1] if found else None))
    first = next((x for x in found if x is not None), "")
    return [x or first for x in found]


def _natural(layer: str) -> list[tuple[int, str]]:
    """Names in the order of their numbers."""
    return [(int(x), "") if x.isdigit() else (-1, x) for x in re.split(r"(\d+)", layer)]
