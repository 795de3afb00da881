"""Out of memory on purpose, before an operation of torch or of the package, each in its turn."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


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
