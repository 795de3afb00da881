r"""FRUGAL: a part of every gradient moves by a rule with state, the rest by one without.

.. math::
    W \leftarrow (1 - \eta \lambda) W - \eta s \left( P\,\mathrm{rule}(R)
        + \rho\,\phi(G - P R) \right), \qquad R = P^T G

:math:`\phi` is the sign, the identity or zero (``free_rule``), :math:`\rho` is ``free_lr_scale``
and s ``proj_params_lr_scale``, which leaves the decay alone. The part with state is drawn anew
every ``update_proj_gap`` steps, and its moments start from zero (``on_refresh``). The classes
differ in the rule alone.

References:
    Zmushko et al. (2025), arXiv:2411.07837, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Literal, Unpack

from torch import Tensor

from lowrank_optim.groups import Group, canonical
from lowrank_optim.groups.options import Options, ProjectorOptions, with_defaults
from lowrank_optim.optimizer import LowRankOptimizer
from lowrank_optim.residuals import Drop, Free, Residual
from lowrank_optim.rules import SGD, AdamW, Lion, Rule

KINDS: dict[str, Literal["sign", "raw"] | None] = {"sign": "sign", "sgd": "raw", "none": None}
"""The term that each free rule is."""


class _Frugal(LowRankOptimizer):
    preset: ClassVar[Options] = {}
    """Defaults of a subclass that differ."""
    default_rank: ClassVar[int | float] = 0.25

    def __init__(
        self, params: Iterable[Any], own: Group, density: float | None, options: ProjectorOptions
    ) -> None:
        if density is not None and "rank" in options:
            raise ValueError(f"density={density} and rank={options['rank']} are both given")
        common: ProjectorOptions = {
            "rank": self.default_rank,
            "scale": 1.0,
            "projector": "block",
            "on_refresh": "reset",
            **self.preset,
            **options,
        }
        defaults = {**own, **with_defaults(type(self), common)}
        if density is not None:
            defaults["rank"] = canonical({"density": density})["rank"]
        super().__init__(params, defaults)

    def _entries(self, params: Iterable[Any], defaults: Group) -> list[Any]:
        return [_with_rank(entry, defaults["rank"]) for entry in params]

    def residual(self, group: Group) -> Residual:
        """What has no state moves by the free rule."""
        kind, gain = KINDS[group["free_rule"]], group["free_lr_scale"]
        return Free(kind, float(gain)) if kind and gain else Drop()


def _with_rank(entry: Any, rank: Any) -> Any:
    """The release's projected group, which takes its density from the constructor."""
    if isinstance(entry, dict) and entry.get("is_proj_params") and "rank" not in canonical(entry):
        return {**entry, "rank": rank}
    return entry


class FrugalAdamW(_Frugal):
    r"""AdamW on a part of every gradient, signs of the rest: a drop-in for ``torch.optim.AdamW``.

    .. math::
        W \leftarrow (1 - \eta \lambda) W - \eta s \left( P\,\mathrm{adam}(R)
            + \rho\,\phi(G - P R) \right), \quad R = P^T G

    :math:`\phi` is the sign, the identity or zero (``free_rule``), :math:`\rho` is
    ``free_lr_scale`` and s ``proj_params_lr_scale``. P picks the part that has moments, which is
    drawn anew every ``update_proj_gap`` steps.

    Args:
        params: parameters, named parameters, or groups of either. ``density`` (or ``rank``) below
            applies only where no group names one; a group without is then ``torch.optim.AdamW``.
            With names, embeddings, output heads, norms and biases stay dense by default, as they
            do in the release at every density.
        lr: learning rate η, a float or a 0-d tensor (default: 1e-3).
        betas: decay of the two moments (default: (0.9, 0.999)).
        eps: ε (default: 1e-8).
        weight_decay: decoupled decay λ, of all weights alike (default: 1e-2).
        density: share of the state-full part, in [0, 1]: of the tensors (``projector="block"``),
            columns, rows, entries, or directions. 0: nothing keeps moments. ``rank`` may be given
            in its place, but for blocks (default: 0.25).
        free_rule: what moves the rest: ``"sign"``, ``"sgd"``, ``"none"`` (default: "sign").
        free_lr_scale: factor of its learning rate (default: 1.0).
        proj_params_lr_scale: factor of the learning rate of both parts of a projected parameter,
            not of its decay (default: 1.0).
        block_order: the turns of blocks: ``"random"``, ``"ascending"``, ``"descending"``,
            ``"mirror"`` (default: "random"; published runs: "descending").
        **options: see :class:`~lowrank_optim.optimizer.ProjectorOptions`; each may be set per
            group. Defaults that differ: ``projector="block"`` (``"columns"``, ``"rows"``,
            ``"randk"`` and every other registered one), ``scale=1.0``, ``on_refresh="reset"``.
            Blocks of a group switch together: ``stagger`` does not apply to them.

    Raises:
        ValueError: a hyper-parameter is out of range, ``density`` and ``rank`` are both given, or
            ``"mirror"`` is asked for an odd number of blocks.

    Example:
        >>> import torch
        >>> from lowrank_optim import FrugalAdamW
        >>> weight = torch.nn.Parameter(torch.zeros(8, 16))
        >>> optimizer = FrugalAdamW([weight], lr=0.1, density=0.25, projector="columns")
        >>> weight.grad = torch.randn(8, 16)
        >>> optimizer.step()
        >>> optimizer.state[weight]["low.exp_avg"].shape  # of 4 columns; all 16 have moved
        torch.Size([4, 8])
        >>> bool((weight.abs() > 0.09).all())
        True

    Differs from the release: what is random depends on (seed, parameter, step) alone; ``randk``
    keeps no indices; sets of indices are sorted, so that ``on_refresh="project"`` carries moments
    of rows, columns and entries that stay; where a dense basis leaves nothing out, no sign is taken
    of the rounding; blocks follow a clock of their group, not the steps of its first tensor; decay
    is decoupled in every class.

    References:
        Zmushko et al. (2025), arXiv:2411.07837, algorithm 1.
    """

    rule_class: ClassVar[type[Rule]] = AdamW

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        density: float | None = None,
        free_rule: str = "sign",
        free_lr_scale: float = 1.0,
        proj_params_lr_scale: float = 1.0,
        block_order: str = "random",
        **options: Unpack[ProjectorOptions],
    ) -> None:
        own: Group = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        own |= {"free_rule": free_rule, "free_lr_scale": free_lr_scale}
        own |= {"proj_params_lr_scale": proj_params_lr_scale, "block_order": block_order}
        super().__init__(params, own, density, options)


class FrugalAdamW8bit(FrugalAdamW):
    """:class:`FrugalAdamW` with its moments in 8 bits: ``state_dtype="8bit"`` is the default.

    Example:
        >>> import torch
        >>> from lowrank_optim import FrugalAdamW8bit
        >>> weight = torch.nn.Parameter(torch.zeros(64, 256))
        >>> optimizer = FrugalAdamW8bit([weight], density=0.5, projector="rows")
        >>> weight.grad = torch.randn(64, 256)
        >>> optimizer.step()
        >>> optimizer.state[weight]["low.exp_avg"].dtype
        torch.uint8

    References:
        Dettmers et al. (2021), arXiv:2110.02861.
    """

    preset: ClassVar[Options] = {"state_dtype": "8bit"}


class FrugalLion(_Frugal):
    r"""Lion on a part of every gradient, signs of the rest.

    .. math::
        N = \mathrm{sign}(\beta_1 m + (1 - \beta_1) R), \quad
        m \leftarrow \beta_2 m + (1 - \beta_2) R

    in the place of :class:`FrugalAdamW`'s :math:`\mathrm{adam}(R)`.

    Args:
        params: as in :class:`FrugalAdamW`; groups without a density or rank are Lion.
        lr: learning rate (default: 1e-4).
        betas: interpolation of the sign, and decay of the momentum (default: (0.9, 0.99)).
        weight_decay: decoupled decay (default: 0.0).
        density: as in :class:`FrugalAdamW`, and so are all that follow (default: 0.25).
        free_rule: default: "sign".
        free_lr_scale: default: 1.0.
        proj_params_lr_scale: default: 1.0.
        block_order: default: "random".
        **options: see :class:`~lowrank_optim.optimizer.ProjectorOptions`.

    Raises:
        ValueError: as in :class:`FrugalAdamW`.

    Example:
        >>> import torch
        >>> from lowrank_optim import FrugalLion
        >>> weight = torch.nn.Parameter(torch.zeros(8, 4))
        >>> optimizer = FrugalLion([weight], lr=0.5, projector="rows")
        >>> weight.grad = torch.randn(8, 4)
        >>> optimizer.step()  # Lion's first step is a sign too
        >>> torch.equal(weight, -0.5 * weight.grad.sign())
        True

    References:
        Chen et al. (2023), arXiv:2302.06675; Zmushko et al. (2025), arXiv:2411.07837.
    """

    rule_class: ClassVar[type[Rule]] = Lion

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        density: float | None = None,
        free_rule: str = "sign",
        free_lr_scale: float = 1.0,
        proj_params_lr_scale: float = 1.0,
        block_order: str = "random",
        **options: Unpack[ProjectorOptions],
    ) -> None:
        own: Group = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
        own |= {"free_rule": free_rule, "free_lr_scale": free_lr_scale}
        own |= {"proj_params_lr_scale": proj_params_lr_scale, "block_order": block_order}
        super().__init__(params, own, density, options)


class FrugalSGD(_Frugal):
    r"""SGD with momentum on a part of every gradient, signs (or SGD) of the rest.

    .. math::
        m \leftarrow \mu m + (1 - d) R

    in the place of :class:`FrugalAdamW`'s :math:`\mathrm{adam}(R)`, with d the dampening.

    The theory of the paper is about this one, with ``free_rule="sgd"``.

    Args:
        params: as in :class:`FrugalAdamW`; groups without a density or rank are SGD.
        lr: learning rate (default: 1e-3).
        momentum: factor μ of the moving sum, which starts at the first gradient (default: 0.0).
        weight_decay: decoupled decay (default: 0.0); ``torch.optim.SGD`` couples it.
        dampening: as in ``torch.optim.SGD`` (default: 0.0).
        nesterov: look ahead along the momentum (default: False).
        density: as in :class:`FrugalAdamW`, and so are all that follow (default: 0.25).
        free_rule: default: "sign".
        free_lr_scale: default: 1.0.
        proj_params_lr_scale: default: 1.0.
        block_order: default: "random".
        **options: see :class:`~lowrank_optim.optimizer.ProjectorOptions`.

    Raises:
        ValueError: as in :class:`FrugalAdamW`.

    Example:
        >>> import torch
        >>> from lowrank_optim import FrugalSGD
        >>> weight = torch.nn.Parameter(torch.full((8, 4), 10.0))
        >>> options = {"projector": "rows", "density": 1.0}
        >>> optimizer = FrugalSGD([weight], lr=1.0, momentum=0.9, **options)
        >>> weight.grad = torch.ones(8, 4)
        >>> optimizer.step()
        >>> weight[0, 0].item()
        9.0

    Differs from the release: momentum starts at the first gradient, and not at the weights, by
    which the example would end at 0.

    References:
        Zmushko et al. (2025), arXiv:2411.07837.
    """

    rule_class: ClassVar[type[Rule]] = SGD

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        dampening: float = 0.0,
        nesterov: bool = False,
        *,
        density: float | None = None,
        free_rule: str = "sign",
        free_lr_scale: float = 1.0,
        proj_params_lr_scale: float = 1.0,
        block_order: str = "random",
        **options: Unpack[ProjectorOptions],
    ) -> None:
        own: Group = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        own |= {"dampening": dampening, "nesterov": nesterov}
        own |= {"free_rule": free_rule, "free_lr_scale": free_lr_scale}
        own |= {"proj_params_lr_scale": proj_params_lr_scale, "block_order": block_order}
        super().__init__(params, own, density, options)
