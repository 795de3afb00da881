"""Which backward is running, and whether the one before it came to its end."""

from __future__ import annotations

import weakref

import torch


class _Token:
    """Held by autograd alone, until a backward is over, however it ends."""


class Runs:
    """Backwards, seen from hooks within them.

    One that raises calls nothing of ours. What autograd was to call at its end dies with it.
    """

    def __init__(self) -> None:
        self._task = -1
        self._open: list[weakref.ref[_Token]] = []
        """Of those that have not ended: several where one runs inside another."""

    def begin(self) -> bool:
        """Look at the backward that is running; True if it is new, and one before it raised."""
        task = torch._C._current_graph_task_id()
        if task == self._task:
            return False
        self._task = task
        failed = any(ref() is None for ref in self._open)
        token = _Token()
        ref = weakref.ref(token)

        def ended(_: _Token = token) -> None:
            self._open = [other for other in self._open if other is not ref]

        torch.autograd.Variable._execution_engine.queue_callback(ended)
        self._open.append(ref)
        return failed

    def forget(self) -> None:
        """What raised has been dealt with."""
        self._open = [ref for ref in self._open if ref() is not None]
