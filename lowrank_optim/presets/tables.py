"""What presets are made of: rows of tables, and the arguments that many have."""

from __future__ import annotations

from typing import Any

from lowrank_optim.groups.values import check

Arguments = dict[str, Any]


def one(table: Any, key: Any, what: str) -> Any:
    """``table[key]``, or an error that says what there is."""
    for name in table:
        if type(key) is type(name) and _plain(key) == _plain(name):
            return table[name] if isinstance(table, dict) else name
    known = ", ".join(map(repr, table))
    raise ValueError(f"no published {what} {key!r}; there are {known}")


def _plain(key: Any) -> Any:
    """Without case and hyphens."""
    return key.lower().replace("-", "") if isinstance(key, str) else key


def adamw(lr: float, weight_decay: float = 0.0, eps: float = 1e-8, **other: Any) -> Arguments:
    """AdamW's with torch's betas, and others."""
    found: Arguments = {"lr": lr, "betas": (0.9, 0.999), "eps": eps, "weight_decay": weight_decay}
    return found | other


def galore(lr: float, rank: int, gap: int, scale: float, **other: Any) -> Arguments:
    """Those of GaLore's release, which Fira's and APOLLO's began as, and others."""
    found = adamw(lr, eps=1e-6, rank=rank, update_proj_gap=gap, scale=scale)
    found |= {"proj_type": "std", "projector": "svd", "stagger": False, "on_refresh": "keep"}
    return found | other


def golore(total_steps: int, **other: Any) -> Arguments:
    """Singular vectors for the first 80 % of the steps and random bases then, and others.

    Raises:
        ValueError: ``total_steps`` is no number of steps.
    """
    late: Arguments = {"projector": "golore", "random_from": 0.8, "total_steps": total_steps}
    check(late)
    return late | {"proj_type": "std", "stagger": False, "on_refresh": "project"} | other
