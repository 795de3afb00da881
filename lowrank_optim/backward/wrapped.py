"""The optimizer of this package inside those that frameworks wrap around it."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from lowrank_optim.optimizer import LowRankOptimizer


def unwrapped(optimizer: Any, who: str = "attach_in_backward") -> LowRankOptimizer:
    """The optimizer, or the one inside a wrapper, such as accelerate's and Lightning's.

    Raises:
        TypeError: it is not one of this package.
    """
    inner, kinds = optimizer, [type(optimizer)]
    while isinstance(getattr(inner, "optimizer", None), Optimizer):  # Lightning's has both types
        inner = inner.optimizer
        kinds.append(type(inner))
    if not (isinstance(optimizer, Optimizer) and isinstance(inner, LowRankOptimizer)):
        named = [f"{kind.__module__}.{kind.__qualname__}" for kind in kinds]
        got = repr(optimizer) if isinstance(optimizer, type) else " of a ".join(named)
        raise TypeError(
            f"{who} takes an optimizer of lowrank_optim, such as GaLoreAdamW, or one "
            f"that accelerate or Lightning wrapped, got {got}"
        )
    return inner
