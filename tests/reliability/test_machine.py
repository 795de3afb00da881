"""Events in any order: what a run does not depend on must leave no trace in it.

The optimizer under test is saved, loaded, resumed elsewhere, refused edits and out of memory. Its
twin does nothing but step with the same gradients and the same edits. Both are the same to the bit
after every event.
"""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import nn

from lowrank_optim import LowRankOptimizer
from tests import cases
from tests.engine.snapshots import everything, same
from tests.reliability.injection import OutOfMemory

KINDS: list[tuple[str, dict[str, Any]]] = [
    ("GaLoreAdamW", {"projector": "svd", "on_refresh": "project"}),
    ("GaLoreAdamW8bit", {"projector": "columns", "stagger": True}),
    ("FiraAdamW", {"projector": "rsvd"}),
    ("FrugalAdamW", {"projector": "block", "block_order": "random"}),
    ("DCTAdamW", {"error_feedback": "float32"}),
    ("GaLoreAdafactor", {"projector": "svd", "on_refresh": "reset"}),
    ("SSTAdamW", {}),
    ("SwitchLoRAAdamW", {"interval": 4, "freeze_steps": 1}),
]
SHAPES = [(6, 9), (8, 5), (5,)]
REFUSED: list[tuple[str, Any]] = [
    ("rank", 2), ("state_dtype", "bfloat16"), ("lr", -1.0), ("update_proj_gap", 0), ("rnak", 3),
]  # fmt: skip


def params_of(optimizer: LowRankOptimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def weights(shapes: list[tuple[int, ...]], seed: int) -> list[nn.Parameter]:
    made = [cases.parameter(s, torch.float32, seed=seed + n) for n, s in enumerate(shapes)]
    return [nn.Parameter(x.detach().clone()) for x in made]


def copied(optimizer: LowRankOptimizer) -> LowRankOptimizer:
    new = copy.deepcopy(optimizer)
    for old, param in zip(params_of(optimizer), params_of(new), strict=True):
        param.grad = None if old.grad is None else old.grad.clone()
    return new


class Events(RuleBasedStateMachine):
    """An optimizer to which anything happens, and a twin that only steps."""

    @initialize(kind=st.sampled_from(KINDS))
    def make(self, kind: tuple[str, dict[str, Any]]) -> None:
        self.name, self.options = kind
        self.added = 0
        self.optimizer, self.twin = self.made(0), self.made(0)
        self.saved: tuple[bytes, LowRankOptimizer] | None = None
        self.frozen: set[int] = set()
        self.count = 0

    def made(self, added: int) -> LowRankOptimizer:
        params = weights(SHAPES, 1)
        rank = cases.rank_for(self.options.get("projector"), 3)
        groups = [{"params": params[:2], "rank": rank}, {"params": params[2:], "rank": None}]
        own: dict[str, Any] = {"weight_decay": 0.1, "lr": 0.05, **self.options}
        optimizer = cases.build(self.name, groups, **own)
        for n in range(added):
            optimizer.add_param_group(self.group(n))
        return optimizer

    def group(self, n: int) -> dict[str, Any]:
        rank = cases.rank_for(self.options.get("projector"), 3)
        return {"params": weights([(7, 6)], 50 + n), "rank": rank, "lr": 0.02}

    def both(self) -> tuple[LowRankOptimizer, LowRankOptimizer]:
        return self.optimizer, self.twin

    def set_grads(self) -> None:
        self.count += 1
        for optimizer in self.both():
            for n, param in enumerate(params_of(optimizer)):
                grad = cases.gradients(param.shape, 1, torch.float32, seed=100 * self.count + n)[0]
                param.grad = None if n in self.frozen else grad

    @rule(at=st.none() | st.floats(0, 0.999))
    def step(self, at: float | None) -> None:
        """Once in a while memory runs out, and the step is taken again."""
        self.set_grads()
        counting = OutOfMemory()
        with counting:
            self.twin.step()
        if at is not None:
            try:
                with OutOfMemory(int(at * len(counting.names))):
                    self.optimizer.step()
            except torch.OutOfMemoryError:
                self.optimizer.step()
        else:
            self.optimizer.step()

    @rule()
    def save(self) -> None:
        file = io.BytesIO()
        torch.save(
            [self.optimizer.state_dict(), [*map(torch.clone, params_of(self.optimizer))]], file
        )
        self.saved = file.getvalue(), copied(self.twin)

    def read(self) -> Any:
        assert self.saved is not None
        return torch.load(io.BytesIO(self.saved[0]), weights_only=True)

    def put(self, optimizer: LowRankOptimizer) -> None:
        state, params = self.read()
        for param, x in zip(params_of(optimizer), params, strict=True):
            param.data = x.detach().clone()
        optimizer.load_state_dict(state)
        assert self.saved is not None
        self.optimizer, self.twin = optimizer, copied(self.saved[1])
        for one in self.both():
            one.zero_grad()

    @precondition(lambda self: self.saved and len(self.saved[1].param_groups) == 2 + self.added)
    @rule()
    def load(self) -> None:
        """Into the optimizer that has gone on since."""
        self.put(self.optimizer)

    @precondition(lambda self: self.saved)
    @rule()
    def resume_elsewhere(self) -> None:
        """Into one that has not stepped."""
        assert self.saved is not None
        self.added = len(self.saved[1].param_groups) - 2
        self.put(self.made(self.added))

    @precondition(lambda self: self.saved)
    @rule(at=st.floats(0, 0.999))
    def load_in_vain(self, at: float) -> None:
        """Out of memory: nothing has happened."""
        state, _ = self.read()
        if len(state["param_groups"]) != len(self.optimizer.param_groups):
            return
        counting, other = OutOfMemory(), copied(self.twin)
        with counting:
            other.load_state_dict(state)
        if counting.names:
            with pytest.raises(torch.OutOfMemoryError), OutOfMemory(int(at * len(counting.names))):
                self.optimizer.load_state_dict(state)

    @precondition(lambda self: self.added < 2)
    @rule()
    def add_group(self) -> None:
        for optimizer in self.both():
            optimizer.add_param_group(self.group(self.added))
        self.added += 1

    @rule(n=st.integers(0, 2))
    def freeze_or_unfreeze(self, n: int) -> None:
        self.frozen ^= {n}

    @rule(key=st.sampled_from(["lr", "weight_decay"]), value=st.sampled_from([0.0, 0.01, 0.1]))
    def edit(self, key: str, value: float) -> None:
        for optimizer in self.both():
            optimizer.param_groups[0][key] = value

    @precondition(lambda self: self.optimizer.state and self.options.get("projector") == "svd")
    @rule(gap=st.integers(2, 5))
    def edit_gap(self, gap: int) -> None:
        for optimizer in self.both():
            optimizer.param_groups[0]["update_proj_gap"] = gap

    @precondition(lambda self: self.optimizer.state)
    @rule(edit=st.sampled_from(REFUSED))
    def edit_in_vain(self, edit: tuple[str, Any]) -> None:
        """Refused by the next step, and set back."""
        key, value = edit
        group = self.optimizer.param_groups[0]
        missing = key not in group
        old = group.get(key)
        if key == "update_proj_gap" and self.name in ("SSTAdamW", "SwitchLoRAAdamW"):
            return
        group[key] = value
        for param in params_of(self.optimizer):
            param.grad = torch.ones(param.shape)
        with pytest.raises((ValueError, TypeError)):
            self.optimizer.step()
        group[key] = old
        if missing:
            del group[key]
        for optimizer in self.both():
            optimizer.zero_grad()

    @invariant()
    def alike(self) -> None:
        if not hasattr(self, "optimizer"):
            return
        mine, theirs = map(everything, self.both())
        grads = {k for k in (*mine, *theirs) if k.endswith(".grad")}
        assert not {*same(mine, theirs)} - grads


Events.TestCase.settings = settings(
    max_examples=12, stateful_step_count=10, deadline=None, derandomize=True,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
TestEvents = Events.TestCase


class MoreEvents(Events):
    """The same, for longer."""


MoreEvents.TestCase.settings = settings(
    max_examples=600, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestMoreEvents = pytest.mark.slow(MoreEvents.TestCase)
