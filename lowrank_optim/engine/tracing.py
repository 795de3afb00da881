"""A step of tensors without data: under torch's ``FakeTensorMode``, or on the meta device.

A step reads its counters and draws indices on the host, and asks a few questions of values. Under
:func:`hosted` counters and draws are real tensors, and questions about values that do not exist get
the answer of a healthy run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from lowrank_optim.engine import forms
from lowrank_optim.tensors.surroundings import undisturbed

aten = torch.ops.aten
_DRAWS = (aten.exponential_, aten.normal_, aten.uniform_)
_WRITES = (aten.addmm_, aten.clamp_, aten.copysign_)
"""In place and without memory of their own; what torch has for the meta device takes a millisecond
each."""


def fake_mode() -> FakeTensorMode | None:
    """The ``FakeTensorMode`` that is active, if one is."""
    mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    return mode if isinstance(mode, FakeTensorMode) else None


@contextmanager
def hosted() -> Iterator[None]:
    """What a step runs under; where tensors have data no more than :func:`undisturbed`."""
    mode = fake_mode()
    with undisturbed(), nullcontext() if mode is None else _Hosted(mode):
        yield


def on_meta() -> AbstractContextManager[Any]:
    """The same for tensors of the meta device, which cost a fraction of fake ones."""
    return _Hosted(None)


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

    def __init__(self, mode: FakeTensorMode | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fakes = mode
        self.answers: MutableMapping[Tensor, int] = WeakTensorKeyDictionary()
        """Of a healthy run, by what is asked; 1 and True where nothing else is known."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing here is compiled, and to tell torch so costs more than an operation

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if any(hasattr(kind, "__tensor_flatten__") for kind in types):
            return NotImplemented  # what a DTensor or coordinates do for themselves comes here
        kwargs = kwargs or {}
        given = list(_tensors((*args, *kwargs.values())))
        fakes = [x for x in given if self._is_fake(x)]
        if func is aten._local_scalar_dense.default and fakes:
            (asked,) = fakes
            kind = bool if asked.dtype == torch.bool else float
            return kind(self.answers.get(asked, 1))
        if not fakes and self.fakes is None:
            if func is aten.randn.generator:  # nobody looks at large draws of real numbers
                return torch.empty(*args, **{k: x for k, x in kwargs.items() if k != "generator"})
            return forms.run(func, args, kwargs)
        if func.overloadpacket in _WRITES and self.fakes is None:
            return args[0]
        if not fakes and _on_host(given, args, kwargs):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func.overloadpacket in _DRAWS and fakes:
            return args[0]  # in place; torch has no rule for one with a generator
        if func is aten.nonzero.default and fakes:  # as if all were
            return args[0].new_empty((args[0].numel(), args[0].dim()), dtype=torch.int64)
        if len(fakes) < len(given) or (given and not fakes):
            args, kwargs = tree_map_only(Tensor, self._faked, (args, kwargs))
        out = forms.run(func, args, kwargs) if self.fakes is None else func(*args, **kwargs)
        if func.overloadpacket is aten.any:  # of what failed
            self.answers[out] = 0
        elif func is aten.sum.default and args[0].dtype == torch.bool:  # of what is fine
            self.answers[out] = args[0].numel()
        return out

    def _is_fake(self, x: Tensor) -> bool:
        return x.is_meta if self.fakes is None else isinstance(x, FakeTensor)

    def _faked(self, x: Tensor) -> Tensor:
        if self._is_fake(x):
            return x
        return x.to("meta") if self.fakes is None else self.fakes.from_tensor(x)


def _tensors(given: Iterable[Any]) -> Iterator[Tensor]:
    """Those among arguments of an operation, which are values and lists of them."""
    for x in given:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, list | tuple):
            yield from _tensors(x)


def _on_host(given: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operation without fake tensors is one of counters, seeds and drawn indices."""
    device = kwargs.get("device")
    if device is not None and torch.device(device).type != "cpu":
        return False
    if given:
        return True
    drawn = kwargs.get("generator") is not None
    return drawn or (bool(args) and isinstance(args[0], list | tuple) and not args[0])
