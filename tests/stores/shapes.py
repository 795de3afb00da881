"""Shapes of moments that are kept in blocks."""

from __future__ import annotations

SHAPES = {
    "whole blocks": (64, 512),
    "tails": (33, 300),
    "short rows": (70, 100),
    "convolution": (40, 30, 3, 3),
    "experts": (3, 40, 70),
    "vector": (5001,),
}
"""Of at least 4096 elements, cut into blocks in every way that there is."""
