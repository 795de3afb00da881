"""A step that a CUDA graph holds: what it may be, and where its counters are.

A graph replays kernels with the numbers that they were recorded with. What changes from step to
step must therefore be on the device: counters, bias corrections, and learning rates that a
scheduler edits in place. The decision to refresh is the host's, and no refresh is recorded.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor

from lowrank_optim.engine.plan import ParamPlan, State, Strategies
from lowrank_optim.engine.state import RECORDED
from lowrank_optim.groups import notices
from lowrank_optim.groups.values import Group
from lowrank_optim.ops.devices import on_accelerator
from lowrank_optim.subspaces.block import takes_blocks


def check_capturable(chosen: Strategies, group: Group, method: str, by_host: str | None) -> None:
    """Raise where a number of the host that changes from step to step is part of the arithmetic.

    Args:
        chosen: what a group with ``capturable=True`` chose.
        group: that group.
        method: the optimizer's name.
        by_host: why every step needs the host, as a clause; None if it does not.

    Raises:
        ValueError: with the reason, and what to use in its place.
    """
    why = by_host or chosen.rule.host_steps
    if chosen.offload:
        why = why or (
            "state_device='cpu' copies moments to and from host memory in every step: pass None"
        )
    if takes_blocks(group):
        why = why or (
            "what takes turns gives the memory of moments back when blocks switch, and a graph "
            "would go on writing to it: pass projector='columns'"
        )
    if why:
        raise ValueError(f"{method}: capturable=True is not possible: {why}")


def check_recorded(groups: Iterable[Group], has_state: bool, method: str) -> None:
    """Raise for a step that is being captured and could not be replayed.

    Raises:
        RuntimeError: a group is not capturable, a learning rate is a tensor of the host, or there
            has been no step yet.
    """
    for group in groups:
        lr = group["lr"]
        if not group["capturable"]:
            raise RuntimeError(  # in torch's words
                f"Attempting CUDA graph capture of step() for an instance of {method} but "
                "param_groups' capturable is False."
            )
        if isinstance(lr, Tensor) and not on_accelerator(lr):
            raise RuntimeError(
                f"{method}: lr is a tensor on {lr.device}, which a graph would read once: make it "
                "on the device of the parameters"
            )
        if lr is not None and not isinstance(lr, Tensor):  # None: Adafactor's own
            warnings.warn(
                f"the learning rate of {method} is a number, and every replay of this graph will "
                f"use {lr}: pass lr=torch.tensor({lr}, device=...) and change it in place, as "
                "schedulers of torch do",
                stacklevel=notices.users_level(),
            )
    if not has_state:
        raise RuntimeError(
            f"{method} has no state yet, and a graph that is captured now would have no bases: "
            "take a step() before the capture, and one whenever a refresh is due"
        )


def check_on_device(items: Iterable[ParamPlan]) -> None:
    """Raise for capturable parameters that no graph could step.

    Raises:
        AssertionError: one is on the host, in torch's words.
        NotImplementedError: it lies on several ranks.
    """
    for item in items:
        if item.sharded:
            raise NotImplementedError(
                f"capturable=True does not support {item.name}, a DTensor: ranks agree on the host "
                "in every step. Pass capturable=False"
            )
        if not on_accelerator(item.param):
            raise AssertionError(
                "If capturable=True, params and state_steps must be on supported devices: "
                f"{item.name} is on {item.param.device}."
            )


def follow_(state: State, param: Tensor, chosen: Strategies) -> None:
    """Counters go where their group wants them, after its ``capturable`` was edited."""
    for key in RECORDED:
        if key in state:
            device = param.device if chosen.capturable else torch.device("cpu")
            state[key] = state[key].to(device)
