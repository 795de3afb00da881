"""The optimizers that sections run: ours by name, and peers where they are installed."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from benchmarks.timing import peer
from lowrank_optim import LowRankOptimizer, methods

GAPS = ("update_proj_gap", "steps_per_iteration", "interval")
"""What a class calls the steps between two moves of its subspace."""
OWN: dict[str, dict[str, Any]] = {
    # a step size of its own would make ``lr`` meaningless
    "GaLoreAdafactor": {"relative_step": False, "scale_parameter": False},
    "SSTAdamW": {"factors": "active"},
    "SSTAdamW8bit": {"factors": "active"},
    # no slot rests after it moved, so that some can move at every step
    "SwitchLoRAAdamW": {"freeze_steps": 0},
    "SwitchLoRAAdamW8bit": {"freeze_steps": 0},
}
"""What a class gets besides ``lr``, ``rank`` and its gap."""
LR = 1e-9
"""Too small to move the weights that all share."""


def gap_of(cls: type[LowRankOptimizer]) -> str:
    """The name of a class's gap."""
    return next((name for name in GAPS[1:] if name in inspect.signature(cls).parameters), GAPS[0])


def ours(
    name: str, params: Sequence[Tensor], rank: int, gap: int, **options: Any
) -> LowRankOptimizer:
    """A class of the package on these matrices, all bases found in one step."""
    cls = getattr(methods, name)
    chosen: dict[str, Any] = {gap_of(cls): gap, **OWN.get(name, {}), **options}
    if gap_of(cls) == GAPS[0]:
        chosen.setdefault("stagger", False)
    made: LowRankOptimizer = cls(params, lr=LR, rank=rank, **chosen)
    return made


Make = Callable[[Sequence[Tensor], int, int], Optimizer]


def _grouped(params: Sequence[Tensor], rank: int, gap: int, **own: Any) -> list[dict[str, Any]]:
    return [{"params": params, "rank": rank, "update_proj_gap": gap, "scale": 0.25, **own}]


PEERS: dict[tuple[str, str], dict[str, Any] | None] = {
    ("bitsandbytes.optim", "AdamW8bit"): None,
    ("bitsandbytes.optim", "PagedAdamW8bit"): None,
    ("torchao.optim", "AdamW8bit"): None,
    ("galore_torch", "GaLoreAdamW"): {"proj_type": "std"},
    ("galore_torch", "GaLoreAdamW8bit"): {"proj_type": "std"},
    ("fira", "FiraAdamW"): {"proj_type": "std", "alpha": 0.25},
    ("pytorch_optimizer", "GaLore"): {"projection_type": "std"},
    ("pytorch_optimizer", "Fira"): {"projection_type": "std"},
    ("apollo_torch", "APOLLOAdamW"): {
        "proj_type": "std",
        "proj": "random",
        "scale_type": "channel",
    },
}
"""Module and class, and what its low-rank group has besides; None: all of it dense."""


COMPILED = {"torchao AdamW8bit"}
"""Peers by their labels that are compiled by torch.compile."""


def peers() -> tuple[dict[str, Make], list[str]]:
    """Those that are installed, and a sentence on each that is not."""
    found: dict[str, Make] = {}
    missing = []
    for (module, name), own in PEERS.items():
        cls, label = peer(module, name), f"{module.partition('.')[0]} {name}"
        if cls is None:
            missing.append(f"{label} is not installed: not compared.")
        else:
            found[label] = _made(cls, own)
    return found, missing


def _made(cls: Any, own: dict[str, Any] | None) -> Make:
    def make(params: Sequence[Tensor], rank: int, gap: int) -> Optimizer:
        given = params if own is None else _grouped(params, rank, gap, **own)
        known = inspect.signature(cls).parameters
        quiet = {"no_deprecation_warning": True} if "no_deprecation_warning" in known else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made: Optimizer = cls(given, lr=LR, **quiet)
        return made

    return make


def is_low_rank(label: str) -> bool:
    """Whether a peer of :func:`peers` finds bases."""
    return any(
        own is not None and label == f"{module.partition('.')[0]} {name}"
        for (module, name), own in PEERS.items()
    )
