"""The matrices that steps are timed on, and the two steps that everything is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import LLAMA_SHAPES
from benchmarks.timing import Work
from lowrank_optim import GaLoreAdamW, LowRankOptimizer
from lowrank_optim.tensors.matrix import matrix_view

NEVER = 10**6
"""A gap that no benchmark reaches the end of: a step costs the same whatever the basis is."""
OURS = "GaLoreAdamW"


def linear_shapes(hidden: int, mlp: int) -> list[tuple[int, int]]:
    """Of the seven matrices of a layer."""
    return [(hidden, hidden)] * 4 + [(mlp, hidden)] * 2 + [(hidden, mlp)]


def dense_shapes(hidden: int, layers: int, vocab: int) -> list[tuple[int, ...]]:
    """Of what no method projects: embedding and head, two norms of each layer and the last."""
    return [(vocab, hidden)] * 2 + [(hidden,)] * (2 * layers + 1)


def linear_weights(model: str, layers: int, dtype: torch.dtype) -> list[torch.nn.Parameter]:
    """The seven matrices of each of ``layers`` layers, with gradients."""
    hidden, mlp, *_ = LLAMA_SHAPES[model]
    return weights(linear_shapes(hidden, mlp) * layers, dtype)


def weights(
    shapes: Sequence[tuple[int, ...]],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> list[torch.nn.Parameter]:
    """Parameters of these shapes, with gradients."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(shape: tuple[int, ...], size: float) -> Tensor:
        return (size * torch.randn(shape, generator=generator, device=device)).to(dtype)

    params = []
    for shape in shapes:
        param = torch.nn.Parameter(normal(shape, 0.02))
        param.grad = normal(shape, 1e-3)
        params.append(param)
    return params


def gemm_floor(params: Sequence[Tensor], rank: int) -> Work:
    """``P^T G`` and ``W <- c W - P N`` of every matrix, outputs preallocated, layouts as stored."""
    projects: list[tuple[Tensor, Tensor, Tensor]] = []
    applies: list[tuple[Tensor, Tensor, Tensor]] = []
    for param in params:
        view = matrix_view(param.shape)
        assert view is not None and param.grad is not None
        basis = torch.randn(view.m, rank, device=param.device).to(param.dtype)
        low = torch.empty(rank, view.n, dtype=param.dtype, device=param.device)
        projects.append((basis.mT, view.of(param.grad), low))
        applies.append((view.of(param.data), basis, low))

    def run() -> None:
        for basis, grad, low in projects:
            torch.mm(basis, grad, out=low)
        for weight, basis, low in applies:
            weight.addmm_(basis, low, beta=0.999, alpha=-1e-9)

    return run


def galore(
    params: Sequence[Tensor], rank: int, cls: type[LowRankOptimizer] = GaLoreAdamW, **options: Any
) -> LowRankOptimizer:
    """Ours, with steps too small to move the weights that the variants share."""
    options = {"update_proj_gap": NEVER, "projector": "random", **options}
    return cls(params, lr=1e-9, rank=rank, **options)  # type: ignore[arg-type]
