"""The sizes of the study: a model, its batches, and the ranks that go with it."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.bytes_task import Shape


@dataclass(frozen=True)
class Size:
    """Everything that a run depends on besides the method, its rate, the seed and the text."""

    shape: Shape
    steps: int
    rank: int
    """Of every method in comparisons at equal rank."""
    small_rank: int
    """Of the LoRA that full-rank training must be ahead of."""
    gap: int
    """Steps between refreshes of a basis."""
    warmup: float = 0.1
    floor: float = 0.1
    """The cosine ends at this fraction of the peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    validate_every: int = 50
    windows: int = 128
    """Of held-out text, after every ``validate_every`` steps and at the end."""


SIZES: dict[str, Size] = {
    "small": Size(
        Shape(hidden=64, mlp=172, layers=2, heads=4, batch=16, context=64),
        steps=300,
        rank=16,
        small_rank=2,
        gap=50,
    ),
    "base": Size(Shape(), steps=600, rank=32, small_rank=4, gap=100),
}
"""Matrices are 0.10 M and 0.79 M parameters. Both pass :mod:`benchmarks.study.acceptance` or are no
test-bed: the command runs it first."""
