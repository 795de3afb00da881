"""What a run of :mod:`benchmarks.pretrain` depends on."""

from __future__ import annotations

from dataclasses import dataclass


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
