"""What a CUDA graph does with a step, on the CPU: kernels and their very tensors, again and again.

    with captured(optimizer) as graph:
        optimizer.step()      # nothing has changed afterwards, as on a stream that captures
    graph.replay()            # the same kernels on the same memory

A number of the host is part of what is recorded, and a value that is read is an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.counting import FREE
from lowrank_optim.ops import devices
from tests.engine.watch import Watch


class Graph(TorchDispatchMode):
    """Kernels in their order, with the tensors that they read and wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        # a view is a place in memory, and what is not filled has no values
        if not func.is_view and func.overloadpacket not in FREE:
            self.calls.append((func, args, kwargs, _tensors(out)))
        return out

    @torch.no_grad()
    def replay(self) -> None:
        """Run them again; results go where they were."""
        for func, args, kwargs, outs in self.calls:
            for old, new in zip(outs, _tensors(func(*args, **kwargs)), strict=True):
                if new is not old:
                    old.copy_(new)


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


@contextmanager
def captured(optimizer: Optimizer) -> Iterator[Graph]:
    """Record what is done inside; the optimizer's parameters and state are as before then.

    Raises:
        AssertionError: the host would have had to wait for a value.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    kept = [*params, *_tensors([dict(optimizer.state[p]) for p in params])]
    before = [x.detach().clone() for x in kept]
    graph = Graph()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "_capturing", lambda: True)
        with Watch(optimizer) as seen, graph:
            yield graph
    assert not seen.looks, seen.looks
    now = _tensors([dict(optimizer.state[p]) for p in params])
    assert all(a is b for a, b in zip(now, kept[len(params) :], strict=True)), "replaced, not kept"
    with torch.no_grad():
        for x, old in zip(kept, before, strict=True):
            x.copy_(old)
