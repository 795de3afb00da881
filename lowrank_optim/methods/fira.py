r"""Fira: GaLore, with what the subspace does not see added back, scaled and limited.

.. math::
    W \leftarrow (1 - \eta \lambda) W - \eta c_t (\alpha P N + S), \qquad
    S_j = \varphi_j (G_j - \alpha P R_j), \quad \varphi_j = |N_j| / |R_j|

with N Adam's direction of :math:`R = P^T G` before its bias correction :math:`c_t`, and S scaled
down wherever its norm would grow by more than 1 % in a step.

Differs from the release (fira 1.0.2) as GaLore's classes differ from galore-torch, and: the limiter
has no memory of a residual of zero; square matrices and ``proj_type="full"`` work; the residual is
never stored.

References:
    Chen et al. (2024), arXiv:2410.01623, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Literal, Unpack

from torch import Tensor

from lowrank_optim.groups import Group
from lowrank_optim.groups.options import Options, ProjectorOptions, with_defaults
from lowrank_optim.optimizer import LowRankOptimizer
from lowrank_optim.residuals import Residual, Scaled
from lowrank_optim.rules import AdamW, Rule


class FiraAdamW(LowRankOptimizer):
    r"""AdamW in the subspace, and outside it the gradient at the scale of AdamW's direction.

    .. math::
        W \leftarrow (1 - \eta\lambda) W - \eta c_t (\alpha P N + S), \quad
        S_j = \varphi_j (G_j - \alpha P R_j)

    The state is GaLore's and one float32 scalar per matrix.

    Args:
        params: as in :class:`lowrank_optim.GaLoreAdamW`; the key ``alpha`` of released groups is
            ``scale``.
        lr: learning rate η, a float or a 0-d tensor (default: 1e-3).
        betas: decay of the two moments (default: (0.9, 0.999)).
        eps: ε (default: 1e-8).
        weight_decay: decoupled decay λ, applied first (default: 1e-2).
        alpha_mode: where α = ``scale`` acts. ``"release"``: on P N, and on what is taken out of the
            gradient, so that at α = 0.25 the residual's step is four times the paper's; all
            published scripts ran this. ``"paper"``: on the whole update, ``α (P N + S)`` with
            ``S_j = φ_j (G_j - P R_j)`` (default: "release").
        scaling: ``"column"``, one φ for each column of the free dimension, or ``"matrix"``, one for
            the matrix. Coordinates of both sides (``proj_type="full"``) have no columns of the
            matrix: they get one for the matrix (default: "column").
        limiter: largest growth γ >= 1 of ``|S|`` from one step to the next, the first and any after
            a residual of zero excepted; None is no limit (default: 1.01).
        **options: see :class:`~lowrank_optim.optimizer.ProjectorOptions`; each may be set per
            group.

    Raises:
        ValueError: a hyper-parameter is out of range.

    Example:
        >>> import torch
        >>> from lowrank_optim import FiraAdamW
        >>> weight = torch.nn.Parameter(torch.zeros(8, 16))
        >>> optimizer = FiraAdamW([weight], lr=1e-2, rank=2, weight_decay=0.0)
        >>> weight.grad = torch.randn(8, 16)
        >>> optimizer.step()
        >>> int(torch.linalg.matrix_rank(weight))  # GaLore's step has rank 2
        8

    Differs from the release: eps stands after bias correction and decay comes first, as in
    ``torch.optim``; a residual of zero does not lock the limiter. From the paper: the limiter looks
    at S before bias correction, in both modes, as released.

    References:
        Chen et al. (2024), arXiv:2410.01623, algorithm 1.
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
        alpha_mode: Literal["release", "paper"] = "release",
        scaling: Literal["column", "matrix"] = "column",
        limiter: float | None = 1.01,
        **options: Unpack[ProjectorOptions],
    ) -> None:
        own: Group = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        own |= {"alpha_mode": alpha_mode, "scaling": scaling, "limiter": limiter}
        super().__init__(params, {**own, **with_defaults(type(self), {**self.preset, **options})})

    def residual(self, group: Group) -> Residual:
        """What the subspace does not see comes back scaled."""
        return Scaled(
            columns=group["scaling"] == "column",
            limiter=group["limiter"],
            paper=group["alpha_mode"] == "paper",
        )


class FiraAdamW8bit(FiraAdamW):
    r""":class:`FiraAdamW` with its moments in 8 bits: ``state_dtype="8bit"`` is the default.

    The arguments are those of :class:`FiraAdamW`, and the layout that of
    :class:`lowrank_optim.GaLoreAdamW8bit`; the limiter's scalar stays float32. No release has it.

    Example:
        >>> import torch
        >>> from lowrank_optim import FiraAdamW8bit
        >>> weight = torch.nn.Parameter(torch.zeros(64, 1024))
        >>> optimizer = FiraAdamW8bit([weight], rank=4)
        >>> weight.grad = torch.randn(64, 1024)
        >>> optimizer.step()
        >>> optimizer.state[weight]["low.exp_avg"].dtype
        torch.uint8

    References:
        Dettmers et al. (2021), arXiv:2110.02861.
    """

    preset: ClassVar[Options] = {"state_dtype": "8bit"}
