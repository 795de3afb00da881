r"""LOST: the leading singular vectors as factors, and whole columns for what they leave.

.. math::
    y = \gamma B \phi(A x) + (1 - \gamma) W_s x_I

With the singular value decomposition of the initial weight, A and B are its leading r parts, I are
the columns in which the rest is largest, and :math:`W_s` starts as those columns of the weight.

References:
    Li et al. (2025), arXiv:2508.02668.
"""

from __future__ import annotations

from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_optim.groups import Group
from lowrank_optim.nn.from_start import FromStart, check_positive, register_layer
from lowrank_optim.rules.base import compute_dtype

ACTIVATIONS = (None, "silu")


@register_layer
class LOSTLinear(FromStart):
    r"""A linear layer as :math:`y = \gamma B \phi(A x) + (1 - \gamma) W_s x_I + b`.

    Of the weight :math:`U \Sigma V^T` that was there, ``b (out, r)`` starts as
    :math:`U_r \Sigma_r^{1/2}` and ``a (r, in)`` as :math:`\Sigma_r^{1/2} V_r^T`. ``index`` are the
    share ``density`` of the columns whose norm is largest in :math:`W - U_r \Sigma_r V_r^T`, and
    ``values (out, k)`` starts as those columns of W, not of that difference. Outputs are not those
    of W: the layer is for training from the start. Made by :func:`lowrank_optim.nn.convert`, for
    any optimizer.

    Differs from the paper, as far as its reviews and summaries quote it (neither its full text nor
    its code was read): there :math:`\phi` is SiLU, ``activation="silu"`` here. By default there is
    none, so that the layer is a linear map and merges into one. How the singular values are divided
    between ``a`` and ``b``, and the default of ``density``, are this package's choice.

    Example:
        >>> import torch
        >>> from lowrank_optim import GaLoreAdamW
        >>> from lowrank_optim.nn import convert
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32))
        >>> groups = convert(model, "lost", rank=4, density=0.05, activation="silu")
        >>> model
        Sequential(
          (0): LOSTLinear(in_features=64, out_features=32, bias=True, rank=4, sparse=96)
        )
        >>> optimizer = GaLoreAdamW(groups, lr=3e-3, weight_decay=0.0)

    References:
        Li et al. (2025), arXiv:2508.02668.
    """

    method = "lost"
    options: ClassVar[Group] = {"density": 0.03, "gamma": 0.9, "activation": None}
    gamma: float
    activation: str | None

    @classmethod
    def check_options(cls, options: Group) -> None:
        """As of every layer; γ leaves something of both parts."""
        super().check_options(options)
        check_positive("gamma", options["gamma"], 1.0)
        if options["gamma"] == 1.0:
            raise ValueError("gamma must be below 1, which leaves nothing of the sparse part")
        if options["activation"] not in ACTIVATIONS:
            raise ValueError(f"activation must be None or 'silu', got {options['activation']!r}")

    @classmethod
    def begin(cls, layer: nn.Module, rank: int, options: Group, draws: torch.Generator) -> Self:
        """From the singular value decomposition of the weight; nothing is drawn."""
        self = cls(layer)
        like = layer.weight
        assert isinstance(like, Tensor)
        self.gamma, self.activation = float(options["gamma"]), options["activation"]
        with torch.no_grad():
            weight = (like.mT if self.conv1d else like).to(compute_dtype(like.dtype))
            u, values, vh = torch.linalg.svd(weight, full_matrices=False)
            root = values[:rank].sqrt()
            # of orthonormal columns of U, the norms are those of the rest's coefficients
            rest = (values[rank:, None] * vh[rank:]).norm(dim=0)
            count = max(1, int(options["density"] * self.in_features))
            index = rest.topk(count).indices.sort().values
            b, a = u[:, :rank] * root, root[:, None] * vh[:rank]
            self._hold(a, b, weight.index_select(1, index), index, like)
        return self

    def places(self) -> int:
        """Columns of the weight."""
        return self.in_features

    def settings(self) -> dict[str, float]:
        """γ, and which activation."""
        return {"gamma": self.gamma, "activation": float(ACTIVATIONS.index(self.activation))}

    def check_merge(self) -> None:
        """Raise with an activation between the factors.

        Raises:
            ValueError: there is one.
        """
        if self.activation is not None:
            raise ValueError(
                f"activation={self.activation!r} between the factors makes this layer no linear "
                "map, so that no weight does the same: keep the layer, or convert with "
                "activation=None"
            )

    def product(self) -> Tensor:
        """``γ B A``, and ``(1 - γ) W_s`` added to its columns."""
        self.check_merge()
        wide = compute_dtype(self.a.dtype)
        weight = (self.b.to(wide) @ self.a.to(wide)).mul_(self.gamma)
        return weight.index_add_(1, self.index, self.values.to(wide), alpha=1 - self.gamma)

    def forward(self, x: Tensor) -> Tensor:
        """``x (..., in)`` to ``(..., out)``."""
        x = self._input(x)
        low = F.linear(x, self.a.to(x.dtype))
        if self.activation is not None:
            low = F.silu(low)
        low = F.linear(low, self.b.to(x.dtype))
        sparse = F.linear(x.index_select(-1, self.index), self.values.to(x.dtype))
        y = self.gamma * low + (1 - self.gamma) * sparse
        return y if self.bias is None else y + self.bias.to(x.dtype)
