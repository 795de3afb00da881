"""State of optimizers that need not be installed to be estimated."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class AdamW8bitLayout(Optimizer):
    """The state of ``bitsandbytes.optim.AdamW8bit``, for estimates only: its step changes nothing.

    One byte per element and moment, a float32 scale for each block of 256, and two maps of 256
    float32 shared by all parameters; both moments of a tensor under 4096 elements are float32. Read
    from ``Optimizer2State.init_state`` of bitsandbytes 0.50.
    """

    BLOCK = 256
    MIN_SIZE = 4096

    def __init__(self, params: Iterable[Any]) -> None:
        super().__init__(params, {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Make the state of every parameter that has a gradient."""
        maps: dict[str, Tensor] = {}
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None or self.state[param]:
                    continue
                state, small = self.state[param], param.numel() < self.MIN_SIZE
                for n in "12":
                    dtype = torch.float32 if small else torch.uint8
                    state[f"state{n}"] = torch.empty_like(param, dtype=dtype)
                    if not small:
                        blocks = -(-param.numel() // self.BLOCK)
                        empty = torch.empty(256, dtype=torch.float32, device=param.device)
                        state[f"qmap{n}"] = maps.setdefault(f"qmap{n}", empty)
                        state[f"absmax{n}"] = torch.empty(
                            blocks, dtype=torch.float32, device=param.device
                        )


LAYOUTS: dict[str, type[Optimizer]] = {"adamw-8bit": AdamW8bitLayout}
"""State layouts of optimizers that need not be installed to be estimated."""
