r"""APOLLO: whole gradients, scaled by what AdamW would do to a random sketch of them.

.. math::
    R = P^T G, \quad N = \frac{m(R)}{\sqrt{v(R)} + \epsilon}, \quad
    S_j = \alpha \frac{|N_j|}{|R_j|} G_j, \qquad
    W \leftarrow (1 - \eta \lambda) W - \eta c_t S

with P drawn anew every ``update_proj_gap`` steps, :math:`c_t` Adam's bias correction, and S scaled
down wherever its norm would grow by more than 1 % in a step. Coordinates are measured and move
nothing: it is Fira's residual of the whole gradient, with no step in the subspace.

References:
    Zhu et al. (2025), arXiv:2412.05270, algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, ClassVar, Literal, Unpack

from torch import Tensor

from lowrank_optim.groups import Group, check
from lowrank_optim.groups.options import Options, ProjectorOptions, with_defaults
from lowrank_optim.optimizer import LowRankOptimizer
from lowrank_optim.residuals import Residual, Scaled
from lowrank_optim.rules import AdamW, Rule
from lowrank_optim.subspaces.base import PROJECTORS, Subspace, make_projector
from lowrank_optim.subspaces.projector import Projector
from lowrank_optim.subspaces.random import Gaussian
from lowrank_optim.tensors.matrix import MatrixView


class ApolloAdamW(LowRankOptimizer):
    r"""The gradient, each channel at the scale of AdamW's direction of a random projection of it.

    .. math::
        W \leftarrow (1 - \eta\lambda) W - \eta c_t \alpha\, G \,\mathrm{diag}(s), \quad
        s_j = |N_j| / |R_j|, \quad R = P^T G, \quad P_{ik} \sim \mathcal{N}(0, 1/r)

    APOLLO-Mini is ``rank=1, scale_type="tensor", scale=128``. The state is that of GaLore and one
    float32 scalar per matrix.

    Args:
        params: as in :class:`lowrank_optim.GaLoreAdamW`; groups that were written for APOLLO, with
            ``proj``, ``scale_type``, ``scale_front`` and ``disable_nl``, are read as they are.
        lr: learning rate η, a float or a 0-d tensor (default: 1e-3).
        betas: decay of the two moments (default: (0.9, 0.999)).
        eps: ε (default: 1e-8).
        weight_decay: decoupled decay λ, applied first (default: 1e-2).
        scale_type: "channel", one factor s for each column of the free dimension, or "tensor", one
            for the matrix. Coordinates of both sides (``proj_type="full"``) have no columns of the
            matrix: they get one for the matrix (default: "channel").
        limiter: largest growth γ >= 1 of ``|S|`` from one step to the next, the first and any after
            a gradient of zero excepted; None is no limit (default: 1.01).
        **options: see :class:`~lowrank_optim.optimizer.ProjectorOptions`; each may be set per
            group. Here ``scale=1.0``, the square of α, as released groups have it: 128 is α = 11.3.
            By default ``projector="random"``, normal entries of variance 1/r, which keep the norm
            of a column on average; "svd" and every other basis is orthonormal, as elsewhere.

    Raises:
        ValueError: a hyper-parameter is out of range; the projector is a set of entries or blocks;
            or moments are to follow a random projection (``on_refresh="project"``).

    Example:
        >>> import torch
        >>> from lowrank_optim import ApolloAdamW
        >>> weight = torch.nn.Parameter(torch.zeros(8, 16))
        >>> optimizer = ApolloAdamW([weight], lr=1e-2, rank=1, scale_type="tensor", scale=128)
        >>> weight.grad = torch.randn(8, 16)
        >>> optimizer.step()
        >>> cosine = torch.cosine_similarity(weight.flatten(), weight.grad.flatten(), 0)
        >>> round(cosine.item(), 4)  # a step along the gradient
        -1.0

    Differs from the paper: eps stands after bias correction and decay comes first, as in
    ``torch.optim``; the correction is a factor of the step, behind the limiter, as released; P is
    kept, as released, and not drawn again at every step; a gradient of zero locks no limiter.

    References:
        Zhu et al. (2025), arXiv:2412.05270, algorithm 1.
    """

    rule_class: ClassVar[type[Rule]] = AdamW
    extra_keys: ClassVar[tuple[str, ...]] = ("proj", "disable_nl", "scale_front")
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
        scale_type: Literal["channel", "tensor"] = "channel",
        limiter: float | None = 1.01,
        **options: Unpack[ProjectorOptions],
    ) -> None:
        own: Group = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        own |= {"scale_type": scale_type, "limiter": limiter}
        common: Options = {"scale": 1.0, "projector": "random"}
        given = _ours({**own, **options})
        chosen: Any = {k: given.pop(k) for k in [*given] if k not in own}
        chosen = with_defaults(type(self), {**common, **self.preset, **chosen})
        super().__init__(params, {**given, **chosen})

    def add_param_group(self, param_group: Group) -> None:
        """Add a group; keys of APOLLO's package are read as ours.

        Raises:
            ValueError: a value is out of range, or a released key and ours differ.
        """
        ours = _ours(param_group) if isinstance(param_group, dict) else param_group
        super().add_param_group(ours)

    def residual(self, group: Group) -> Residual:
        """All of the gradient comes back scaled."""
        return Scaled(
            columns=group["scale_type"] == "channel",
            limiter=group["limiter"],
            gain=self.projected_factor(group),
        )

    def subspace(self, group: Group, view: MatrixView) -> Subspace:
        """Coordinates that are measured, and move nothing."""
        still = {**group, "scale": 0.0}
        if group["projector"] == "random":
            return Gaussian.from_group(still, view)
        return make_projector(still, view)

    def projected_factor(self, group: Group) -> float:
        """α, the root of ``scale``."""
        return math.sqrt(group["scale"])

    def _check(self, group: Group) -> None:
        super()._check(group)
        name = group["projector"]
        if not issubclass(PROJECTORS[name], Projector):
            bases = ", ".join(
                repr(k) for k, cls in PROJECTORS.items() if issubclass(cls, Projector)
            )
            raise ValueError(
                f"{type(self).__name__} measures coordinates in a basis, and projector={name!r} "
                f"has none: take one of {bases}"
            )
        if name == "random" and group["on_refresh"] == "project":
            raise ValueError(
                "on_refresh='project' does not go with projector='random' of "
                f"{type(self).__name__}: one draw has nothing of the last. Take 'keep' (published) "
                "or 'reset', or an orthonormal basis such as projector='svd'"
            )


def _ours(given: Group) -> Group:
    """A copy of a group in which APOLLO's names are ours.

    ``scale_front`` means nothing: the limiter looks at a ratio of norms, and α is in both.

    Raises:
        ValueError: a value is out of range, or ``proj`` and ``projector`` differ.
    """
    check({k: v for k, v in given.items() if k in ApolloAdamW.extra_keys})
    found = {k: v for k, v in given.items() if k not in ApolloAdamW.extra_keys}
    if "proj" in given and found.setdefault("projector", given["proj"]) != given["proj"]:
        raise ValueError(
            f"projector={found['projector']!r} and its alias proj={given['proj']!r} differ"
        )
    if given.get("disable_nl"):
        found["limiter"] = None
    return found


class ApolloAdamW8bit(ApolloAdamW):
    r""":class:`ApolloAdamW` with its moments in 8 bits: ``state_dtype="8bit"`` is the default.

    The arguments are those of :class:`ApolloAdamW`, and the layout that of
    :class:`lowrank_optim.GaLoreAdamW8bit`; the limiter's scalar stays float32.

    Example:
        >>> import torch
        >>> from lowrank_optim import ApolloAdamW8bit
        >>> weight = torch.nn.Parameter(torch.zeros(64, 1024))
        >>> optimizer = ApolloAdamW8bit([weight], rank=4)
        >>> weight.grad = torch.randn(64, 1024)
        >>> optimizer.step()
        >>> optimizer.state[weight]["low.exp_avg"].dtype
        torch.uint8

    References:
        Dettmers et al. (2021), arXiv:2110.02861.
    """

    preset: ClassVar[Options] = {"state_dtype": "8bit"}
