"""What an op is about to write: its versions count when a kernel begins, not when it has ended.

Autograd goes by them, so that a backward that has saved what is written raises; and so does who
puts a step back, as Python hears of Ctrl-C when the kernel has ended and before anything else.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from torch import Tensor
from torch.autograd.graph import increment_version

Lists = Sequence[Sequence[Tensor]]


class _Pending(threading.local):
    lists: Lists = ()


_pending = _Pending()


def announce(lists: Lists) -> Lists:
    """Say what an op of this thread will write; returns what was to be written around it."""
    before, _pending.lists = _pending.lists, lists
    return before


def begin() -> None:
    """Count that as written, once; a kernel that counts nothing itself calls it when it starts."""
    lists, _pending.lists = _pending.lists, ()
    for tensors in lists:
        increment_version(tensors)
