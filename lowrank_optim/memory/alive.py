"""Bytes that exist at once, found by following every storage from what makes it to its end."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from lowrank_optim.memory.blocks import Sized, sized_on


class Alive(TorchDispatchMode):
    """Counts bytes of the storages that operations made and that still exist.

    Args:
        device: type of the device whose storages count; those of others are the host's.
        sized: what is taken for a storage (default: its bytes).
    """

    def __init__(self, device: str = "cpu", sized: Sized | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self._device = device
        self._sized = sized or sized_on("cpu")
        self._known: set[int] = set()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing here is compiled, and to tell torch so costs more than an operation

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation and count what it made."""
        if any(hasattr(kind, "__tensor_flatten__") for kind in types):
            return NotImplemented  # it does so itself, by operations that come here
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.device.type == self._device:
                self._count(x)
        return out

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """Not to be counted: there before, and to the end."""
        self._known.update(x.untyped_storage()._cdata for x in tensors)

    def hold(self, tensors: Sequence[Tensor]) -> None:
        """Count what is there before, from now on until it goes; what was counted is forgotten."""
        for x in tensors:
            self._count(x)
        self.most = self.now

    def _count(self, x: Tensor) -> None:
        if is_traceable_wrapper_subclass(x):
            return  # what it holds was counted as it was made
        storage = x.untyped_storage()
        key, size = storage._cdata, self._sized(storage.nbytes())
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, key, size).atexit = False

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
