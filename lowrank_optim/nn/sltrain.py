r"""SLTrain: a weight that is the sum of a low-rank product and a sparse matrix.

.. math::
    W = s B A + S, \qquad S = \sum_{k} v_k \, e_{i_k} e_{j_k}^T

The places of S are drawn once, uniformly, and stay; A, B and v are trained.

References:
    Han et al. (2024), arXiv:2406.02214.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lowrank_optim.groups import Group
from lowrank_optim.nn.from_start import FromStart, check_positive, register_layer, uniform
from lowrank_optim.rules.base import compute_dtype


def _dense(
    a: Tensor, b: Tensor, values: Tensor, index: Tensor, s: float, dtype: torch.dtype
) -> Tensor:
    """``s B A + S`` in ``dtype``."""
    weight = (b.to(dtype) @ a.to(dtype)).mul_(s)
    weight.view(-1).index_add_(0, index, values.to(dtype))
    return weight


class _Product(torch.autograd.Function):
    """``x -> W x + b``, of which backward keeps the parts and not the weight.

    Of N tokens: ``dB = s dY^T (x A^T)``, ``dA = s (dY B)^T x``, ``dv = (dY^T x)`` at the places
    of S, ``dx = dY W`` with W made anew. One matrix of the size of the weight lives at a time.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        values: Tensor,
        index: Tensor,
        bias: Tensor | None,
        s: float,
    ) -> Tensor:
        ctx.save_for_backward(x, a, b, values, index)
        ctx.s, ctx.bias_dtype = s, None if bias is None else bias.dtype
        bias = None if bias is None else bias.to(x.dtype)
        return F.linear(x, _dense(a, b, values, index, s, x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, values, index = ctx.saved_tensors
        of_x, of_a, of_b, of_values, _, of_bias, _ = ctx.needs_input_grad
        tokens, rows = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        grad_a = grad_b = grad_values = grad_x = grad_bias = None
        if of_b:
            grad_b = (rows.mT @ (tokens @ a.to(x.dtype).mT)).mul_(ctx.s).to(b.dtype)
        if of_a:
            grad_a = ((rows @ b.to(x.dtype)).mT @ tokens).mul_(ctx.s).to(a.dtype)
        if of_values:
            grad_values = (rows.mT @ tokens).view(-1).index_select(0, index).to(values.dtype)
        if of_x:
            grad_x = grad @ _dense(a, b, values, index, ctx.s, x.dtype)
        if of_bias:
            grad_bias = rows.sum(0).to(ctx.bias_dtype)
        return grad_x, grad_a, grad_b, grad_values, None, grad_bias, None


@register_layer
class SLTrainLinear(FromStart):
    r"""A linear layer as :math:`y = (s B A + S) x + b`, for any optimizer.

    ``a (r, in)`` and ``values``, the share ``density`` of all entries, start uniform in
    :math:`\pm 1 / \sqrt{in}`, and ``b (out, r)`` at zero; ``index`` has the places of ``values`` in
    the flattened weight, ascending. All are in the dtype of the weight, whose values are not kept:
    the layer is for training from the start. ``s`` is ``scale`` over r. Made by
    :func:`lowrank_optim.nn.convert`.

    Example:
        >>> import torch
        >>> from lowrank_optim import GaLoreAdamW
        >>> from lowrank_optim.nn import convert, merge
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32))
        >>> groups = convert(model, "sltrain", rank=4, density=0.05)
        >>> model
        Sequential(
          (0): SLTrainLinear(in_features=64, out_features=32, bias=True, rank=4, sparse=102)
        )
        >>> optimizer = GaLoreAdamW(groups, lr=3e-3, weight_decay=0.0)
        >>> model(torch.randn(8, 64)).square().mean().backward()
        >>> optimizer.step()
        >>> merge(model)[0]
        Linear(in_features=64, out_features=32, bias=True)

    References:
        Han et al. (2024), arXiv:2406.02214.
    """

    method = "sltrain"
    options: ClassVar[Group] = {"density": 0.03, "scale": 16.0, "seed": 0}
    s: float

    @classmethod
    def check_options(cls, options: Group) -> None:
        """As of every layer; ``scale`` is positive."""
        super().check_options(options)
        check_positive("scale", options["scale"], float("inf"))

    @classmethod
    def begin(cls, layer: nn.Module, rank: int, options: Group, draws: torch.Generator) -> Self:
        """Drawn as published, by a generator of the seed and the layer's name."""
        self = cls(layer)
        like = layer.weight
        assert isinstance(like, Tensor)
        rows, cols = self.out_features, self.in_features
        self.s = float(options["scale"]) / rank
        bound = cols**-0.5  # Kaiming's with a = sqrt(5)
        a = uniform((rank, cols), bound, draws, like)
        count = max(1, int(options["density"] * rows * cols))
        values = uniform((count,), bound, draws, like)
        if like.is_meta:
            index = torch.empty(count, device="meta", dtype=torch.int64)
        else:
            index = torch.randperm(rows * cols, generator=draws)[:count].sort().values
        self._hold(a, torch.zeros(rows, rank, device=a.device), values, index, like)
        return self

    def places(self) -> int:
        """Entries of the weight."""
        return self.out_features * self.in_features

    def settings(self) -> dict[str, float]:
        """The factor of B A."""
        return {"scale / rank": self.s}

    def product(self) -> Tensor:
        """``s B A + S``, in the precision of arithmetic."""
        wide = compute_dtype(self.a.dtype)
        return _dense(self.a, self.b, self.values, self.index, self.s, wide)

    def forward(self, x: Tensor) -> Tensor:
        """``x (..., in)`` to ``(..., out)``."""
        output: Tensor = _Product.apply(  # type: ignore[no-untyped-call]
            self._input(x), self.a, self.b, self.values, self.index, self.bias, self.s
        )
        return output
