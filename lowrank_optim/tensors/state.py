"""The state of one parameter."""

from __future__ import annotations

from collections.abc import MutableMapping

from torch import Tensor

State = MutableMapping[str, Tensor]
"""What ``optimizer.state`` has of one parameter, each tensor by its name."""
