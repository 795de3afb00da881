"""A step inside a compiled graph: one op that the compiler does not look into.

What a step does is decided by numbers on the host: counters in the state, learning rates, seeds.
Traced, each would be a guard and a compilation of its own. So a graph holds one op instead, which
runs the step as it is, uncompiled, and says to the compiler that parameters change and no more.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import optimizer as torch_optimizer

from lowrank_optim.engine.stepped import SteppedOptimizer
from lowrank_optim.groups import Group

_SCHEMA = "(str optimizer, Tensor(a!)[] params, Tensor[] grads, int[] which, bool grad_mode) -> ()"
_NAME = "lowrank_optim::step_"
_PLAIN = (Tensor, Parameter)

_numbers = itertools.count()
_optimizers: weakref.WeakValueDictionary[str, SteppedOptimizer] = weakref.WeakValueDictionary()
"""Optimizers by the name that stands for them in a graph, where an object cannot be."""


class Traced:
    """What a compiler reads of an optimizer while it traces a step: parameters, gradients, hooks.

    Read from the optimizer itself, every value of its groups would be guarded, the learning rate
    too, and each change of one compiled again.
    """

    def __init__(self, optimizer: SteppedOptimizer, before: Traced | None = None) -> None:
        # a string, as compilers turn numbers that differ between two calls into variables
        self.name: str = str(next(_numbers)) if before is None else before.name
        self.groups = optimizer.param_groups
        self.hooks = (
            optimizer._optimizer_step_pre_hooks,
            optimizer._optimizer_step_post_hooks,
            torch_optimizer._global_optimizer_pre_hooks,
            torch_optimizer._global_optimizer_post_hooks,
        )
        _optimizers[self.name] = optimizer

    def step(self) -> bool:
        """Put a step into the graph, if what it changes is known: not with hooks or subclasses.

        All parameters are said to change, as a step may write those without gradient too: W0 of
        SwitchLoRA, the inactive factors of SST.
        """
        if any([len(hooks) > 0 for hooks in self.hooks]):
            return False
        params: list[Tensor] = []
        grads: list[Tensor] = []
        which: list[int] = []
        for group in self.groups:
            for param in group["params"]:
                if type(param) not in _PLAIN:
                    return False
                if param.grad is not None:
                    if type(param.grad) is not Tensor:
                        return False
                    which.append(len(params))
                    grads.append(param.grad)
                params.append(param)
        grad_mode = torch.is_grad_enabled()
        with torch.no_grad():  # else compilers give copies of the parameters
            torch.ops.lowrank_optim.step_(self.name, params, grads, which, grad_mode)
        return True

    def free_gradients(self) -> None:
        """Set every gradient to None, at the end of the graph."""
        for group in self.groups:
            for param in group["params"]:
                param.grad = None


def _parameters(groups: list[Group]) -> list[Tensor]:
    return [param for group in groups for param in group["params"]]


def _run(
    name: str,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    which: Sequence[int],
    grad_mode: bool,
) -> None:
    """The step of an optimizer on these values of its parameters and of their gradients.

    Args:
        name: of the optimizer.
        params: the memory that its parameters are in now, in their order.
        grads: of some of them.
        which: places of those.
        grad_mode: what an error must restore, as graphs switch it without a ``finally``.

    Raises:
        RuntimeError: the optimizer is gone, or has other parameters than the graph.
    """
    try:
        _step(name, params, dict(zip(which, grads, strict=True)))
    except BaseException:
        torch.set_grad_enabled(grad_mode)
        raise


def _step(name: str, params: Sequence[Tensor], given: dict[int, Tensor]) -> None:
    optimizer = _optimizers.get(name)
    if optimizer is None:
        raise RuntimeError("the optimizer of this compiled step does not exist any more")
    traced, own = _parameters(optimizer._traced.groups), _parameters(optimizer.param_groups)
    optimizer._traced.groups = optimizer.param_groups
    if len(own) != len(traced) or any([a is not b for a, b in zip(own, traced, strict=True)]):
        raise RuntimeError(
            "param_groups was replaced by a list of other parameters, which a compiled step cannot "
            "see: from the next call on it steps those"
        )
    with _standing_in(own, params, [given.get(i) for i in range(len(own))]):
        optimizer._step_eagerly()


@contextmanager
def _standing_in(
    own: Sequence[Tensor], values: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> Iterator[None]:
    """Let parameters be at the memory of ``values``, with these gradients.

    A graph may hold a copy of a parameter, its old value being still wanted, and gradients that
    ``param.grad`` gets only at its end.
    """
    kept: list[tuple[Tensor, Tensor | None, Tensor | None]] = []
    try:
        for param, value, grad in zip(own, values, grads, strict=True):
            elsewhere = value.data_ptr() != param.data_ptr()
            if elsewhere or param.grad is not grad:
                kept.append((param, param.data if elsewhere else None, param.grad))
                if elsewhere:
                    param.data = value
                param.grad = grad
        yield
    finally:
        for param, data, held in kept:
            if data is not None:
                param.data = data
            param.grad = held


def _fake(*_: Any) -> None:
    """Nothing is returned."""


# a graph of an accelerator would replay the numbers of the step that it was captured at
_TAGS = [tag for tag in [getattr(torch.Tag, "cudagraph_unsafe", None)] if tag is not None]
torch.library.define(_NAME, _SCHEMA, tags=_TAGS)
torch.library.impl(_NAME, "CompositeExplicitAutograd")(_run)
torch.library.register_fake(_NAME)(_fake)
