"""Bytes that exist at once, found by following every storage from what makes it to its end."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves


def of_shape(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """What stands for a tensor whose shape alone matters: without memory on any device.

    Where the meta device stands for an accelerator, its tensors count as that one's.
    """
    return torch.empty((), dtype=dtype, device="meta").expand(tuple(shape))


class Alive(TorchDispatchMode):
    """Counts bytes of the storages that operations made and that still exist.

    A storage may change its size without an operation: FSDP2 empties those of gathered parameters,
    and fills them again.

    Args:
        device: type of the device whose storages count; those of others are the host's.
        sized: what is taken for a storage (default: its bytes).
        passing: bytes of the buffers that an operation has beside what it is given and makes
            (default: none).
    """

    def __init__(
        self,
        device: str = "cpu",
        sized: Callable[[int], int] = int,
        passing: Callable[[Any, Sequence[Any], Mapping[str, Any]], Sequence[int]] | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self._device = device
        self._sized = sized
        self._passing = passing
        self._sizes: dict[int, int] = {}
        """Of the storages that count."""
        self._left_out: set[int] = set()
        self._resize: list[Any] = []
        """What resized a storage before, once for each time that this was entered."""

    def __enter__(self) -> Alive:
        """Count from now on."""
        before = UntypedStorage.resize_
        self._resize.append(before)

        def resize_(storage: UntypedStorage, size: int) -> Any:
            out = before(storage, size)
            self._resized(storage)
            return out

        UntypedStorage.resize_ = resize_  # type: ignore[method-assign,assignment]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *raised: Any) -> None:
        """Count no more."""
        super().__exit__(*raised)  # type: ignore[no-untyped-call]
        UntypedStorage.resize_ = self._resize.pop()  # type: ignore[method-assign]

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
        if self._passing is not None:
            held = sum(map(self._sized, self._passing(func, args, kwargs or {})))
            self.most = max(self.most, self.now + held)
        return out

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """Not to be counted: there before."""
        for x in tensors:
            storage = x.untyped_storage()
            if storage._cdata not in self._left_out:
                self._left_out.add(storage._cdata)
                # another may get its place
                weakref.finalize(storage, self._left_out.discard, storage._cdata).atexit = False

    def hold(self, tensors: Sequence[Tensor]) -> None:
        """Count what is there before, from now on until it goes; what was counted is forgotten."""
        for x in tensors:
            self._count(x)
        self.most = self.now

    def _count(self, x: Tensor) -> None:
        if is_traceable_wrapper_subclass(x):
            return  # what it holds was counted as it was made
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self._sizes or key in self._left_out:
            return
        self._grow(storage)
        weakref.finalize(storage, self._gone, key).atexit = False

    def _resized(self, storage: UntypedStorage) -> None:
        if storage._cdata in self._sizes:
            self._grow(storage)

    def _grow(self, storage: UntypedStorage) -> None:
        """A storage has as many bytes from now on as it has now."""
        key, size = storage._cdata, self._sized(storage.nbytes())
        self.now += size - self._sizes.get(key, 0)
        self._sizes[key] = size
        self.most = max(self.most, self.now)

    def _gone(self, key: int) -> None:
        self.now -= self._sizes.pop(key)
