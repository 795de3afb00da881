"""Out of memory on purpose, before an operation of torch or of the package, each in its turn."""

from __future__ import annotations

import sys
from collections.abc import Hashable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank_optim.tensors.alive import Alive


class OutOfMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations, and raises before one of them.

    Args:
        at: the number of the one that fails; -1 for none.
    """

    def __init__(self, at: int = -1) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.at = at
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "profiler":  # marks of time: they ask for no memory
            return func(*args, **(kwargs or {}))
        self.names.append(str(func))
        if len(self.names) - 1 == self.at:
            raise torch.OutOfMemoryError(f"before {func}")
        return func(*args, **(kwargs or {}))


class Places(OutOfMemory):
    """Says of each operation where it is asked for: the lines of the package, and its name."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[Hashable] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if len(self.names) > len(self.places):
            frame, lines = sys._getframe(1), []
            while frame is not None:
                if frame.f_globals.get("__name__", "").startswith("lowrank_optim"):
                    lines.append((frame.f_code, frame.f_lineno))
                frame = frame.f_back
            self.places.append((str(func), *lines))
        return out


class Limited(Alive):
    """A device that has so many bytes for what operations make; none is taken away in place.

    Args:
        size: its bytes beside those of what is there already.
        there: what is.
    """

    def __init__(self, size: int, there: Iterable[Tensor]) -> None:
        super().__init__()
        self.size = size
        self.leave_out(there)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        before = self.now
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if self.now > max(self.size, before):  # what takes no memory runs whatever is left
            raise torch.OutOfMemoryError(f"no room for what {func} returns")
        return out
