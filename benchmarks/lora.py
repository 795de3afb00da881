"""Plain LoRA: a frozen dense weight and two trained factors, the baseline of comparisons."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LoRALinear(nn.Module):
    """``y = x W^T + (alpha / r) x A^T B^T + b`` with W and b as in ``linear``; B starts at zero."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float | None = None) -> None:
        super().__init__()
        like = linear.weight
        self.rank, self.alpha = rank, rank if alpha is None else alpha
        self.weight = nn.Parameter(like.detach().clone(), requires_grad=False)
        self.bias = linear.bias
        self.lora_A = nn.Parameter(torch.empty(rank, linear.in_features).to(like))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank).to(like))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """Two small products beside the frozen one."""
        low = F.linear(F.linear(x, self.lora_A), self.lora_B)
        return F.linear(x, self.weight, self.bias) + low * (self.alpha / self.rank)

    def merged(self) -> Tensor:
        """``W + (alpha / r) B A``: the weight of a plain layer that computes the same."""
        return self.weight + (self.alpha / self.rank) * self.lora_B @ self.lora_A


def convert(model: nn.Module, rank: int, skip: tuple[str, ...] = ()) -> nn.Module:
    """Replace every ``nn.Linear`` whose name has no part of ``skip`` in it; the rest trains on."""
    for name, child in list(model.named_children()):
        if isinstance(child, nn.Linear) and not any(s in name for s in skip):
            setattr(model, name, LoRALinear(child, min(rank, *child.weight.shape)))
        else:
            convert(child, rank, skip)
    return model
