"""What ``TrainingArguments`` say of an optimizer, and what they cannot say of this one."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re
from collections.abc import Collection, Mapping
from typing import Any

from lowrank_optim.groups import Group, canonical
from lowrank_optim.optimizer import LowRankOptimizer

FIELDS = {
    "lr": ("learning_rate",),
    "weight_decay": ("weight_decay",),
    "betas": ("adam_beta1", "adam_beta2"),
    "eps": ("adam_epsilon",),
}
"""Keys of an optimizer, and the fields that are their values."""

NAMES = {
    "galore_adamw": "GaLoreAdamW",
    "galore_adamw_8bit": "GaLoreAdamW8bit",
    "galore_adafactor": "GaLoreAdafactor",
    "apollo_adamw": "ApolloAdamW",
}
"""Names that ``optim`` has for classes of this package."""

PLAIN = ("adamw_torch", "adamw_torch_fused")
"""Values of ``optim`` that are a default of some version, and ask for nothing."""


def parse_optim_args(given: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """``"rank=64, scale=0.10, projector=svd"`` as a dict of numbers, booleans and strings.

    Args:
        given: such text, a JSON object as text, or the dict that a config file holds, whose strings
            are read likewise (YAML's ``1e-3`` is one). None and ``""`` are no arguments.

    Raises:
        ValueError: a part is not ``key=value``, a key is given twice, or JSON is malformed.
        TypeError: it is neither text nor a dict.

    Example:
        >>> from lowrank_optim.integrations.transformers import parse_optim_args
        >>> parse_optim_args("rank=64, update_proj_gap=100, scale=0.10, proj_type=std")
        {'rank': 64, 'update_proj_gap': 100, 'scale': 0.1, 'proj_type': 'std'}
        >>> parse_optim_args('{"rank": 64}')
        {'rank': 64}
    """
    if given is None:
        return {}
    if isinstance(given, str):
        given = _json(given) if given.lstrip().startswith(("{", "[")) else _pairs(given)
    if not isinstance(given, Mapping):
        raise TypeError(
            "optim_args must be text of key=value pairs, a JSON object or a dict, got "
            f"{type(given).__name__}: {given!r}"
        )
    wrong = [key for key in given if not isinstance(key, str)]
    if wrong:
        raise TypeError(f"keys of optim_args must be strings, got {wrong[0]!r}")
    return {k: _literal(v) if isinstance(v, str) else v for k, v in given.items()}


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"optim_args is not the JSON object that it begins as: {error}") from None


def _pairs(text: str) -> dict[str, str]:
    out: dict[str, str] = {}
    for part in re.split(r",(?![^(\[]*[)\]])", text):
        if not part.strip():
            continue
        key, equals, value = (x.strip() for x in part.partition("="))
        if not equals or not key or not value:
            raise ValueError(f"optim_args must be key=value pairs, got {part.strip()!r}")
        if key in out:
            raise ValueError(f"optim_args gives {key} twice: {out[key]!r} and {value!r}")
        out[key] = value
    return out


def _literal(value: str) -> Any:
    known = {"true": True, "false": False, "none": None, "null": None}
    if value.lower() in known:
        return known[value.lower()]
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return value  # a name, such as that of a projector


def hyper_parameters(args: Any, method: type[LowRankOptimizer], options: Group) -> Group:
    """Keyword arguments of ``method``: fields of ``args``, its ``optim_args``, and ``options``.

    Args:
        args: the ``TrainingArguments``, as they are now.
        method: the optimizer class.
        options: keys that win over ``optim_args``.

    Raises:
        ValueError: ``optim_args`` cannot be read; or a field that is not at its default has no
            effect on ``method``, or says something else than an option.
    """
    accepted = inspect.signature(method.__init__).parameters
    given = {**canonical(parse_optim_args(args.optim_args)), **options}
    own: Group = {}
    if "relative_step" in accepted and not given.get("relative_step"):
        # its own step sizes would ignore the learning rate
        own.update(relative_step=False, scale_parameter=False)
    for key, fields in FIELDS.items():
        values = tuple(getattr(args, field) for field in fields)
        value = values if len(fields) > 1 else values[0]
        changed = _changed(args, fields)
        reason = _without_effect(key, accepted, given)
        if reason is not None:
            if changed:
                raise ValueError(
                    f"{_shown(changed)} of the arguments has no effect: {method.__name__} "
                    f"{reason}. Leave the default, {_shown(_defaults(args, changed))}"
                )
        elif key not in given:
            own[key] = value
        elif changed and _listed(given[key]) != _listed(value):
            raise ValueError(
                f"{_shown(changed)} of the arguments and {key}={given[key]!r} of the options or "
                "optim_args differ: give one of them"
            )
    return {**own, **given}


def _without_effect(key: str, accepted: Mapping[str, Any], given: Group) -> str | None:
    """Why a field is not the value of ``key``, if it is not."""
    if key == "lr" and given.get("relative_step"):
        return "has relative_step=True, which makes its own learning rate"
    # eps of Adafactor is another pair of numbers
    if key in ("betas", "eps") and not {"betas", key} <= accepted.keys():
        return f"takes no {key} of Adam's"
    return None


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _shown(fields: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in fields.items())


def _defaults(args: Any, names: Collection[str]) -> dict[str, Any]:
    return {f.name: f.default for f in dataclasses.fields(args) if f.name in names}


def _changed(args: Any, names: Collection[str]) -> dict[str, Any]:
    """Fields that are not at their defaults, which is all that can be known of who set them."""
    defaults = _defaults(args, names)
    return {n: getattr(args, n) for n in names if getattr(args, n) != defaults[n]}


def check_optim(args: Any, method: type[LowRankOptimizer], in_backward: str | None) -> None:
    """Raise if ``args.optim`` names a class of this package, and it is another one.

    Raises:
        ValueError: it does, or asks for layer-wise steps that ``in_backward`` does not.
    """
    asked = _optim(args)
    name = NAMES.get(asked.removesuffix("_layerwise"))
    if name is None:
        return
    if name != method.__name__:
        raise ValueError(
            f"optim={asked!r} of the arguments means {name}, and trainer_optimizer was given "
            f"{method.__name__}: give it {name}, or leave optim at its default"
        )
    if asked.endswith("_layerwise") and in_backward is None:
        raise ValueError(
            f"optim={asked!r} of the arguments steps inside backward, and in_backward is None: "
            "give trainer_optimizer in_backward='step', or leave optim at its default"
        )


def unused_optim(args: Any) -> str | None:
    """What ``args.optim`` asks for, if it is something that nobody does."""
    asked = _optim(args)
    known = asked.removesuffix("_layerwise") in NAMES
    return None if known or asked in PLAIN else asked


def _optim(args: Any) -> str:
    return str(getattr(args.optim, "value", args.optim))
