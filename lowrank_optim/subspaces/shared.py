"""What all matrices of an optimizer have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


class Shared:
    """What all matrices of an optimizer have in common: rebuilt when it is needed, never saved."""

    def __init__(self) -> None:
        self._held: dict[Any, tuple[Any, ...]] = {}

    def get(self, key: Any, make: Callable[[], Any]) -> Any:
        """What is kept under ``key``: a tuple, tensors among it; made at the first call."""
        if key not in self._held:
            self._held[key] = make()
        return self._held[key]

    def tensors(self) -> list[Tensor]:
        """All that is held."""
        return [x for parts in self._held.values() for x in parts if isinstance(x, Tensor)]
