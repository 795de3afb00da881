"""SLTrain (arXiv:2406.02214) and LOST (arXiv:2508.02668): layers, and how they begin."""

from __future__ import annotations

import torch
from torch import Tensor


def sltrain_weight(a: Tensor, b: Tensor, values: Tensor, index: Tensor, alpha: float) -> Tensor:
    """W = (alpha / r) B A + S, entry by entry of S."""
    out, width = b.shape[0], a.shape[1]
    weight = (alpha / a.shape[0]) * (b @ a)
    sparse = [torch.zeros((), dtype=a.dtype) for _ in range(out * width)]
    for value, place in zip(values, index.tolist(), strict=True):
        sparse[place] = sparse[place] + value
    return weight + torch.stack(sparse).reshape(out, width)


def sltrain(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y = W x + b."""
    y = x @ weight.mT
    return y if bias is None else y + bias


def lost_beginning(weight: Tensor, rank: int, columns: int) -> tuple[Tensor, Tensor, list[int]]:
    """A and B of the leading singular vectors, and the columns that the others fill most."""
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    b, a = u[:, :rank] * s[:rank] ** 0.5, s[:rank, None] ** 0.5 * vh[:rank]
    rest = torch.zeros_like(weight)
    for k in range(rank, len(s)):
        rest = rest + s[k] * torch.outer(u[:, k], vh[k])
    norms = [float((rest[:, j] ** 2).sum() ** 0.5) for j in range(weight.shape[1])]
    order = sorted(range(weight.shape[1]), key=lambda j: -norms[j])
    return a, b, sorted(order[:columns])


def lost(
    x: Tensor, a: Tensor, b: Tensor, values: Tensor, columns: list[int], gamma: float, silu: bool
) -> Tensor:
    """y = gamma B phi(A x) + (1 - gamma) W_s x_I."""
    h = x @ a.mT
    if silu:
        h = h / (1 + torch.exp(-h))
    return gamma * (h @ b.mT) + (1 - gamma) * (x[..., columns] @ values.mT)
