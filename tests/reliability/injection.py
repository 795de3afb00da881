"""Out of memory before an operation of torch or of the package, and Ctrl-C before a line of it."""

from __future__ import annotations

import sys
from collections.abc import Hashable, Iterable
from pathlib import Path
from types import FrameType
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import lowrank_optim
from lowrank_optim.tensors.alive import Alive

PACKAGE = f"{Path(lowrank_optim.__file__).parent}/"


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


class Interrupted:
    """Counts lines of the package as they run, and lets somebody press Ctrl-C before one of them.

    A kernel that runs when it is pressed ends first: that is the line after it.

    Args:
        at: the number of the line; -1 for none.
    """

    def __init__(self, at: int = -1) -> None:
        self.at = at
        self.lines: list[tuple[str, int]] = []
        """Files and numbers, in the order in which they ran."""

    def __enter__(self) -> Self:
        self._before = sys.gettrace()
        sys.settrace(self._called)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _called(self, frame: FrameType, *_: Any) -> Any:
        return self._ran if frame.f_code.co_filename.startswith(PACKAGE) else None

    def _ran(self, frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            self.lines.append((frame.f_code.co_filename[len(PACKAGE) :], frame.f_lineno))
            if len(self.lines) - 1 == self.at:
                raise KeyboardInterrupt
        return self._ran


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
