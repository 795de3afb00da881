"""What a run of the demo depends on, and what it measured."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Settings:
    """Everything that a run depends on besides the method and the text."""

    hidden: int = 256
    mlp: int = 688
    layers: int = 6
    heads: int = 4
    steps: int = 200
    batch: int = 8
    context: int = 128
    rank: int = 64
    gap: int = 50
    """Steps between refreshes of a basis: a quarter of the run, as 200 would be of a longer one."""
    warmup: float = 0.1
    floor: float = 0.1
    """The cosine ends at this fraction of the peak learning rate."""
    dense_lr: float = 1e-2
    """Peak learning rate of embedding, head and norms, dense under every method."""
    validate_every: int = 28
    validation_windows: int = 64
    seed: int = 0


@dataclass
class Run:
    """What one training run measured."""

    method: str
    seed: int
    lr: float
    parameters: int
    train_loss: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    """Steps taken, and nats per held-out token."""
    bits_per_byte: float = math.nan
    state: dict[str, int] = field(default_factory=dict)
    """Bytes by storage: basis, moments, other; total, on the device and with adapters if any."""
    optimizer_ms: float = math.nan
    """Median of one ``optimizer.step()``."""
    model_ms: float = math.nan
    """Median of one forward and backward pass."""
    seconds: float = math.nan

    @property
    def final_loss(self) -> float:
        """Validation loss after the last step."""
        return self.validation[-1][1]
