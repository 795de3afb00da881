"""A step of tensors without data, under torch's ``FakeTensorMode``: what tools of memory trace.

A step reads its counters and draws indices on the host, and asks a few questions of values. Under
:func:`hosted` counters and draws are real tensors, and questions about values that do not exist get
the answer of a healthy run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, MutableMapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

aten = torch.ops.aten
_DRAWS = (aten.exponential_, aten.normal_, aten.uniform_)


def fake_mode() -> FakeTensorMode | None:
    """The ``FakeTensorMode`` that is active, if one is."""
    mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    return mode if isinstance(mode, FakeTensorMode) else None


def hosted() -> AbstractContextManager[Any]:
    """What a step runs under; nothing where tensors have data."""
    mode = fake_mode()
    return nullcontext() if mode is None else _Hosted(mode)


def real_entries(
    make: Callable[[Tensor], MutableMapping[str, Tensor]], like: Tensor
) -> dict[str, Tensor]:
    """Entries of a state that are on the host whatever the device, and need data: counters, draws.

    Args:
        make: makes the state on the device of a tensor.
        like: a fake tensor.
    """
    with unset_fake_temporarily():
        made = make(torch.empty(like.shape, dtype=like.dtype, device="meta"))
    return {key: value for key, value in made.items() if not value.is_meta}


class _Hosted(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs an operation on real tensors alone for real, and answers questions about fake ones."""

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fakes = mode
        self.answers: MutableMapping[Tensor, int] = WeakTensorKeyDictionary()
        """Of a healthy run, by what is asked; 1 and True where nothing else is known."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        given = [x for x in _leaves((args, kwargs)) if isinstance(x, Tensor)]
        fakes = [x for x in given if isinstance(x, FakeTensor)]
        if func is aten._local_scalar_dense.default and fakes:
            (asked,) = fakes
            kind = bool if asked.dtype == torch.bool else float
            return kind(self.answers.get(asked, 1))
        if not fakes and _on_host(given, args, kwargs):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func.overloadpacket in _DRAWS and fakes:
            return args[0]  # in place; torch has no rule for one with a generator
        if func is aten.nonzero.default and fakes:  # as if all were
            return args[0].new_empty((args[0].numel(), args[0].dim()), dtype=torch.int64)
        if len(fakes) < len(given) or (given and not fakes):
            args, kwargs = tree_map_only(Tensor, self._faked, (args, kwargs))
        out = func(*args, **kwargs)
        if func.overloadpacket is aten.any:  # of what failed
            self.answers[out] = 0
        elif func is aten.sum.default and args[0].dtype == torch.bool:  # of what is fine
            self.answers[out] = args[0].numel()
        return out

    def _faked(self, x: Tensor) -> Tensor:
        return x if isinstance(x, FakeTensor) else self.fakes.from_tensor(x)


def _leaves(tree: Any) -> Iterable[Any]:
    return torch.utils._pytree.tree_leaves(tree)


def _on_host(given: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operation without fake tensors is one of counters, seeds and drawn indices."""
    device = kwargs.get("device")
    if device is not None and torch.device(device).type != "cpu":
        return False
    if given:
        return True
    drawn = kwargs.get("generator") is not None
    return drawn or (bool(args) and isinstance(args[0], list | tuple) and not args[0])
