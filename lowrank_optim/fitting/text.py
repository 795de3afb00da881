"""The parts of a plan read from JSON, each checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lowrank_optim.groups.keys import METHODS
from lowrank_optim.memory import Estimate
from lowrank_optim.optimizer import LowRankOptimizer


def as_object(text: str) -> dict[str, Any]:
    """The object that a plan is in JSON.

    Raises:
        ValueError: it is none, or one of its keys is not of its kind.
    """
    try:
        given = json.loads(text)
    except ValueError as error:
        raise ValueError(f"a plan must be JSON, as Plan.to_json writes it: {error}") from error
    if not isinstance(given, dict):
        raise ValueError(f"a plan must be a JSON object, got {type(given).__name__}")
    for key in ("arguments", "ranks", "estimate", "dense", "frozen"):
        if not isinstance(given.get(key, {}), dict):
            raise ValueError(f"{key} of a plan must be an object, got {given[key]!r}")
    return given


def method_of(name: Any) -> type[LowRankOptimizer]:
    """The optimizer class of that name.

    Raises:
        ValueError: there is none.
    """
    if not isinstance(name, str) or name not in METHODS:
        raise ValueError(
            f"optimizer_class of a plan must be one of {', '.join(METHODS)}, got {name!r}"
        )
    return METHODS[name]


def estimate_of(given: Mapping[str, Any]) -> Estimate:
    """The estimate with these fields.

    Raises:
        ValueError: an estimate has others.
    """
    try:
        return Estimate(**given)
    except TypeError as error:
        raise ValueError(f"estimate of a plan: {error}; call fit() again") from error


def tupled(value: Any) -> Any:
    """Lists as tuples, at every depth: JSON has no tuples."""
    return tuple(map(tupled, value)) if isinstance(value, list) else value
