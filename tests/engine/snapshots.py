"""Copies of all that a step may change, and what differs between two."""

from __future__ import annotations

from torch import Tensor

from lowrank_optim import LowRankOptimizer


def everything(optimizer: LowRankOptimizer) -> dict[str, Tensor]:
    """A copy of every parameter, gradient and entry of the state, pools' unread rows aside."""
    found: dict[str, Tensor] = {}
    for i, param in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        found[f"{i}"] = param
        if param.grad is not None and not param.grad.is_sparse:
            found[f"{i}.grad"] = param.grad
        for key, value in optimizer.state.get(param, {}).items():
            if "pool_" not in key:  # what is there of a vector in use nobody reads
                found[f"{i}.{key}"] = value
    return {key: value.detach().clone() for key, value in found.items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """Names of what differs."""
    return sorted(a.keys() ^ b.keys()) + [
        key for key in a.keys() & b.keys() if not a[key].equal(b[key])
    ]
