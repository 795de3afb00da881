"""DCT-AdamW: a fixed cosine basis of which each step takes the r vectors it needs.

No factorisation, no basis per matrix: a new subspace every step for one fast transform.

References:
    Modoranu et al. (2025), arXiv:2505.17967.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, ClassVar, Unpack

from torch import Tensor

from lowrank_optim.engine.plan import Strategies
from lowrank_optim.groups import Group
from lowrank_optim.groups.options import Options, with_defaults
from lowrank_optim.optimizer import LowRankOptimizer
from lowrank_optim.residuals import Drop, Residual
from lowrank_optim.residuals.error_feedback import ErrorFeedback
from lowrank_optim.rules import AdamW, Rule


class DCTAdamW(LowRankOptimizer):
    r"""AdamW on the r largest cosine coefficients of the gradient.

    .. math::
        S = Q^T (G + E), \quad I = \mathrm{top}_r \|S_{j,:}\|, \quad R = S_I, \quad
        W \leftarrow (1 - \eta\lambda) W - \eta\alpha\, Q_I\, \mathrm{adam}(R)

    Q has the cosines of the DCT-II, one basis for each width. E is what was left out before, and 0
    without ``error_feedback``. A matrix keeps r indices and moments ``(r, n)``.

    Moments belong to indices: where an index stays from one refresh to the next its moments go
    with it, exactly, and a new one starts from zero with a bias correction of its own.

    Args:
        params: parameters, named parameters, or groups of either, as in
            :class:`lowrank_optim.GaLoreAdamW`.
        lr: learning rate η, a float or a 0-d tensor (default: 1e-3).
        betas: decay of the two moments (default: (0.9, 0.999)).
        eps: ε (default: 1e-8).
        weight_decay: decoupled decay λ, applied first (default: 1e-2).
        basis: "dct2", the cosines, or "dct3", the columns of their matrix (default: "dct2").
        ranking: norm of a row of coefficients by which it is chosen, "l2" (no other r capture
            more) or "l1" (default: "l2").
        transform: "matmul", "fft", or "auto", whichever costs less (default: "auto").
        error_feedback: keep what a step does not use and add it to the next gradient, in
            "float32", "bfloat16", "8bit" or "4bit": a memory of the size of the weights (default:
            None).
        slot_bias_correction: correct the bias of each row of the moments by its own age. With the
            global step a row that comes in late starts 3.2 times too large and peaks at 6.6 times
            (default: True).
        **options: see :class:`lowrank_optim.optimizer.Options`; here ``update_proj_gap=1``,
            ``scale=1.0``, ``projector="dct"`` and ``on_refresh="project"`` by default.

    Raises:
        ValueError: a hyper-parameter is out of range.

    Example:
        >>> import torch
        >>> from lowrank_optim import DCTAdamW
        >>> weight = torch.nn.Parameter(torch.zeros(64, 32))
        >>> optimizer = DCTAdamW([weight], lr=1e-2, rank=4, weight_decay=0.0)
        >>> t = torch.linspace(0, 3.14159, 65)[:-1:2] + 3.14159 / 64
        >>> weight.grad = torch.outer(torch.ones(64), torch.cos(5 * t))
        >>> optimizer.step()
        >>> 5 in optimizer.state[weight]["basis_index"].tolist()
        True

    Differs from the release (ISTA-DASLab-Optimizers 1.1): every width has a basis of its own, both
    evaluation modes use the same one, indices are sorted, moments are permuted (there: by default
    left in place, and permuted into their own input), quantised memories use all their levels,
    eps stands where torch has it, gradients are left as they were, and the state can be saved. Its
    settings: ``basis="dct3", ranking="l1", on_refresh="keep", slot_bias_correction=False``.

    References:
        Modoranu et al. (2025), arXiv:2505.17967.
    """

    rule_class: ClassVar[type[Rule]] = AdamW
    preset: ClassVar[Options] = {}
    """Defaults of a subclass that differ."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        basis: str = "dct2",
        ranking: str = "l2",
        transform: str = "auto",
        error_feedback: str | None = None,
        slot_bias_correction: bool = True,
        **options: Unpack[Options],
    ) -> None:
        own: Group = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        own |= {"basis": basis, "ranking": ranking, "transform": transform}
        own |= {"error_feedback": error_feedback, "slot_bias_correction": slot_bias_correction}
        common: Options = {"update_proj_gap": 1, "scale": 1.0, "projector": "dct"}
        common["on_refresh"] = "project"
        super().__init__(
            params, {**own, **with_defaults(type(self), {**common, **self.preset, **options})}
        )

    def residual(self, group: Group) -> Residual:
        """Dropped, or kept for the next step."""
        if group["error_feedback"] is None:
            return Drop()
        return ErrorFeedback(group["error_feedback"], group["maximize"])

    def _strategies(self, group: Group) -> Strategies:
        return replace(super()._strategies(group), aged=group["slot_bias_correction"])


class DCTAdamW8bit(DCTAdamW):
    r""":class:`DCTAdamW` with its moments in 8 bits: ``state_dtype="8bit"`` is the default.

    Rows of 256 and more move at a refresh as codes and scales, without a rounding.

    Example:
        >>> import torch
        >>> from lowrank_optim import DCTAdamW8bit
        >>> weight = torch.nn.Parameter(torch.zeros(64, 1024))
        >>> optimizer = DCTAdamW8bit([weight], rank=4)
        >>> weight.grad = torch.randn(64, 1024)
        >>> optimizer.step()
        >>> optimizer.state[weight]["low.exp_avg"].dtype
        torch.uint8

    References:
        Dettmers et al. (2021), arXiv:2110.02861.
    """

    preset: ClassVar[Options] = {"state_dtype": "8bit"}
