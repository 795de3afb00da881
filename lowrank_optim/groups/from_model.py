"""Parameter groups of a model: which of its parameters are projected, and how."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from torch import nn

from lowrank_optim.groups.keys import (
    builtin,
    canonical,
    check_known,
    known_keys,
    remedy,
    unknown_key,
    without_torch_flags,
)
from lowrank_optim.groups.linear_maps import kernels, linear_maps
from lowrank_optim.groups.names import bare
from lowrank_optim.groups.targets import no_match, spelled
from lowrank_optim.groups.values import Group, check, check_module, check_rank

__all__ = ["Group", "canonical", "check", "check_rank", "describe", "lowrank_groups"]

logger = logging.getLogger(__name__)


def _matcher(what: str, target: str, known: Collection[str]) -> Callable[[str], bool]:
    """Whether a parameter is meant by ``target``.

    The full name of a module or a parameter means all that is in it, and only that: ``layers.1`` is
    not ``layers.10``. Anything else is a regular expression, searched in the parameter's name and
    in its module's, so that ``q_proj$`` finds ``q_proj.weight``. Names are also what they were
    before ``torch.compile`` and other wrappers: ``layers.1`` means ``_orig_mod.layers.1``.

    Raises:
        ValueError: it is not a regular expression.
    """
    if target and target in known:
        return lambda name: any(f"{x}.".startswith(f"{target}.") for x in (name, bare(name)))
    try:
        pattern = re.compile(target)
    except re.error as error:
        raise ValueError(f"{what} {target!r} is not a regular expression: {error}") from None
    return lambda name: any(
        pattern.search(x) for own in (name, bare(name)) for x in (own, own.rpartition(".")[0])
    )


def _known(model: nn.Module) -> set[str]:
    """Every name of every module and parameter, with what wrappers add to it and without."""
    modules = model.named_modules(remove_duplicate=False)
    params = model.named_parameters(remove_duplicate=False)
    names = {name for own in (modules, params) for name, _ in own}
    return names | {bare(name) for name in names}


def _targets(
    model: nn.Module,
    target_modules: str | Sequence[str],
    names: Mapping[int, list[str]],
    known: Collection[str],
) -> set[int]:
    """Parameters that ``target_modules`` selects; every part of it must select something."""
    dims = {id(p): p.dim() for p in model.parameters()}
    chosen: set[int] = set()
    for target in spelled(target_modules, known):
        if target == "all-linear":
            hit = linear_maps(model) & names.keys()
            if not hit:
                raise ValueError(no_match(target, model))
        else:
            matches = _matcher("target_modules", target, known)
            hit = {i for i, own in names.items() if dims[i] >= 2 and any(map(matches, own))}
            if not hit:
                raise ValueError(no_match(target, model))
        chosen |= hit
    return chosen


def _patterns(no_decay: str | Sequence[str]) -> list[str]:
    """One pattern or several, as a list.

    Raises:
        ValueError: they are not strings, or there is none.
    """
    found = [no_decay] if isinstance(no_decay, str) else no_decay
    if not isinstance(found, Sequence | set | frozenset) or not all(
        isinstance(x, str) for x in found
    ):
        raise ValueError(f"no_decay must be a pattern or a list of patterns, got {no_decay!r}")
    return list(found)


def lowrank_groups(
    model: nn.Module,
    *,
    rank: int | float = 128,
    target_modules: str | Sequence[str] = "all-linear",
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    no_decay: str | Sequence[str] = (),
    **options: Any,
) -> list[Group]:
    r"""Parameter groups of a model: targeted matrices get ``rank``, everything else stays dense.

    Args:
        model: its trainable parameters are each put in one group, tied ones once; frozen ones are
            left out. Names are kept (``param_names``).
        rank: number of directions, or a fraction of the projected dimension (default: 128).
        target_modules: ``"all-linear"`` (every linear map but embeddings and output heads: the
            weights of ``nn.Linear``, ``Conv1D`` and convolutions, experts, and packed weights of
            attention and recurrent cells, see :mod:`lowrank_optim.groups.linear_maps`), a pattern,
            or a list of them. A pattern that is the full name of a module or a parameter
            means that one; any other is a regular expression, searched in the names of parameters
            and of the modules that hold them, with what ``torch.compile`` and other wrappers add
            to them and without (default: "all-linear").
        overrides: pattern to group keys for the parameters it matches; the first that matches wins.
            ``rank=None`` makes them dense, a rank makes them low-rank (default: None).
        no_decay: patterns; parameters they match get ``weight_decay=0``. One without a match is
            fine here: not every model has biases (default: none).
        **options: further group keys for the targeted matrices, such as ``projector="svd"``;
            ``density`` in place of ``rank``.

    Returns:
        Groups for the constructor of any optimizer of this package, one for each set of keys.

    Raises:
        TypeError: an option is no group key of any optimizer, or ``model`` is no module.
        ValueError: a target or an override matches nothing, is not a regular expression, an
            override holds a key that is not known, or a value is out of range.

    Example:
        >>> import torch
        >>> from lowrank_optim import lowrank_groups
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 8))
        >>> groups = lowrank_groups(model, rank=4, overrides={r"^1\.": dict(rank=2)})
        >>> [(g.get("rank"), g["param_names"]) for g in groups]
        [(4, ['0.weight']), (None, ['0.bias', '1.bias']), (2, ['1.weight'])]
    """
    check_module(model)
    overrides = _checked_overrides(overrides)
    asked, options = options, _checked_options(options)
    rank = builtin(options.pop("rank", rank))
    closed = any("density" in keys for keys in (asked, *overrides.values()))
    check_rank(rank, closed)
    names: dict[int, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        if param.requires_grad:
            names.setdefault(id(param), []).append(name)
    known, flat = _known(model), kernels(model)
    targets = _targets(model, target_modules, names, known)
    rules = [(p, _matcher("override", p, known), canonical(keys)) for p, keys in overrides.items()]
    undecayed = [_matcher("no_decay", p, known) for p in _patterns(no_decay)]
    unused = {pattern for pattern, _, _ in rules}
    buckets: dict[str, Group] = {}
    for name, param in model.named_parameters():
        own = names.get(id(param))
        if own is None:
            continue
        keys: Group = {"rank": rank if id(param) in targets else None}
        for pattern, matches, extra in rules:
            if any(map(matches, own)):
                unused.discard(pattern)
                keys |= extra
                break
        if param.dim() < 2:
            keys["rank"] = None
        if keys["rank"] is not None:
            keys = {**({"flatten": True} if id(param) in flat else {}), **options, **keys}
        if any(matches(n) for matches in undecayed for n in own):
            keys["weight_decay"] = 0.0
        bucket = buckets.setdefault(
            repr(sorted(keys.items())), {**keys, "params": [], "param_names": []}
        )
        bucket["params"].append(param)
        bucket["param_names"].append(name)
    if unused:
        raise ValueError(
            f"overrides {sorted(unused)} match no trainable parameter not taken already"
        )
    return _finished(list(buckets.values()), closed)


def _checked_options(options: Mapping[str, Any]) -> Group:
    """``options`` in our spelling.

    Raises:
        TypeError: one is no group key of any optimizer.
    """
    given, allowed = without_torch_flags(options, "lowrank_groups"), known_keys()
    key = unknown_key(given, allowed)
    if key is not None:
        own = allowed | {"target_modules", "overrides", "no_decay"}
        raise TypeError(
            f"lowrank_groups() got an unexpected keyword argument {key!r}{remedy(key, own)}"
        )
    return canonical(given)


def _checked_overrides(overrides: Mapping[str, Mapping[str, Any]] | None) -> dict[str, Group]:
    """Patterns and the group keys that they stand for.

    Raises:
        ValueError: they are something else, or a key is none of any optimizer.
    """
    overrides = {} if overrides is None else overrides
    if not isinstance(overrides, Mapping) or not all(
        isinstance(p, str) and isinstance(keys, Mapping) for p, keys in overrides.items()
    ):
        raise ValueError(
            "overrides must be a dict of patterns and dicts of group keys, such as "
            f"{{'lm_head': {{'rank': None}}}}, got {overrides!r}"
        )
    out = {}
    for pattern, keys in overrides.items():
        own = without_torch_flags(keys, "lowrank_groups")
        check_known(own, known_keys(), "lowrank_groups", f"the override of {pattern!r}")
        out[pattern] = own
    return out


def _finished(groups: list[Group], closed: bool) -> list[Group]:
    """Groups checked and logged, and dense ones without ``rank``, as galore-torch has them.

    Only where none has a rank do all say ``rank=None``, or the optimizer's own would apply.
    """
    some = any(group["rank"] is not None for group in groups)
    for group in groups:
        check(group, closed)
        if some and group["rank"] is None:
            del group["rank"]
    logger.info("%s", describe(groups))
    return groups


def describe(groups: Sequence[Group]) -> str:
    """The split of parameters into groups, as a table."""
    lines = [f"{'rank':>6} {'tensors':>8} {'parameters':>14}  first"]
    for group in groups:
        count = sum(p.numel() for p in group["params"])
        rank = group.get("rank") or "dense"
        first = group.get("param_names", [""])[0]
        lines.append(f"{rank!s:>6} {len(group['params']):>8} {count:>14,}  {first}")
    return "\n".join(lines)
