"""accelerate's FSDP2 on CPUs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import pytest

accelerate = pytest.importorskip("accelerate")


@contextlib.contextmanager
def fsdp() -> Iterator[None]:
    """Grant FSDP to CPUs, as accelerate itself does to devices alone.

    All that comes after that choice is its own code.
    """
    from accelerate.state import AcceleratorState, DistributedType, GradientState, PartialState

    before, made = dict(os.environ), AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        made(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.distributed_type = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = init
    try:
        yield
    finally:
        AcceleratorState.__init__ = made
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        os.environ.clear()
        os.environ.update(before)
