"""Counters that a reader of files fills in: 2^24 + 1 is no float32."""

from __future__ import annotations

import math
import sys
from traceback import walk_stack
from typing import Any

import torch
from torch import Tensor

from lowrank_optim.engine.state import counts
from lowrank_optim.tensors.values import COUNTER_MAX

READERS = "torch.distributed.checkpoint"


def is_template() -> bool:
    """Whether ``torch.distributed.checkpoint`` asks for a state, to save it or to fill it in."""
    callers = walk_stack(sys._getframe(1))
    return any(str(x.f_globals.get("__name__")).startswith(READERS) for x, _ in callers)


def with_any_count(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state dict whose counters are float64, copies: what is filled in may be any number.

    Numbers that float32 can count on from are in float32 again once they are loaded.
    """
    state = {
        i: {k: x.double() if isinstance(x, Tensor) and counts(k, x) else x for k, x in own.items()}
        for i, own in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


def dtype_of(key: str, kept: Tensor, saved: Tensor) -> torch.dtype:
    """The dtype of an entry: float64 of a number beyond what a float32 counter tells apart.

    Raises:
        ValueError: a float32 counter beyond 2^24, which no run has: it has been rounded.
    """
    if not counts(key, kept) or not COUNTER_MAX < float(saved) < math.inf:
        return kept.dtype
    if saved.dtype == torch.float32 and float(saved) > 2**24:
        raise ValueError(
            f"{key} holds {float(saved):.0f} in float32, which has no number beside it: the reader "
            "of the file has rounded it. Let it fill in the optimizer itself, or what "
            "get_optimizer_state_dict(model, optimizer) returns"
        )
    return torch.float64
