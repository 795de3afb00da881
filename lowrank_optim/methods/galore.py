r"""GaLore: gradients projected on their leading singular vectors.

.. math::
    R = P^T G, \qquad N = \mathrm{rule}(R), \qquad
    W \leftarrow (1 - \eta \lambda) W - \eta \alpha P N

with P refreshed every ``update_proj_gap`` steps. The four classes differ in the rule alone.

References:
    Zhao et al. (2024), arXiv:2403.03507, algorithm 2.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Unpack

from torch import Tensor

from lowrank_optim.engine.plan import Strategies
from lowrank_optim.groups import Group
from lowrank_optim.groups.options import Options, ProjectorOptions, with_defaults
from lowrank_optim.optimizer import LowRankOptimizer
from lowrank_optim.residuals import Drop, Residual
from lowrank_optim.rules import SGD, Adafactor, AdamW, Lion, Rule


class _GaLore(LowRankOptimizer):
    def residual(self, group: Group) -> Residual:
        """GaLore drops what the subspace does not see."""
        return Drop()


class GaLoreAdamW(_GaLore):
    r"""AdamW on the projected gradient: a drop-in for ``torch.optim.AdamW``.

    .. math::
        R = P^T G, \quad W \leftarrow (1 - \eta\lambda) W
            - \eta\alpha P \frac{\hat m(R)}{\sqrt{\hat v(R)} + \epsilon}

    G is ``(m, n)`` with m the projected side, P ``(m, r)`` and R ``(r, n)``; the two moments have
    the shape of R.

    Args:
        params: parameters, named parameters, or groups of either. ``rank`` below applies only
            where no group names one; a group without it is then ``torch.optim.AdamW``, bit for bit
            its single-tensor path. With names, embeddings, output heads, norms and biases stay
            dense by default.
        lr: learning rate η, a float or a 0-d tensor (default: 1e-3).
        betas: decay of the two moments (default: (0.9, 0.999)).
        eps: ε (default: 1e-8).
        weight_decay: decoupled decay λ, applied first (default: 1e-2).
        **options: see :class:`~lowrank_optim.optimizer.ProjectorOptions`; each may be set per
            group.

    Raises:
        ValueError: a hyper-parameter is out of range.

    Example:
        >>> import torch
        >>> from lowrank_optim import GaLoreAdamW
        >>> model = torch.nn.Linear(64, 32)
        >>> optimizer = GaLoreAdamW(model.named_parameters(), lr=1e-2, rank=4)
        >>> model(torch.randn(8, 64)).square().mean().backward()
        >>> optimizer.step()
        >>> {k: tuple(v.shape) for k, v in optimizer.state[model.weight].items()}["basis"]
        (32, 4)

    Differs from the release (galore-torch 1.0): eps stands after bias correction and decay comes
    first, as in ``torch.optim``; moments are float32 also under bfloat16 parameters; the basis is
    found by a warm randomised SVD (``projector="svd"``: exactly), with its signs aligned; refreshes
    are staggered (``stagger=False``: all at steps 0, T, 2T, …); the state is plain tensors.

    References:
        Zhao et al. (2024), arXiv:2403.03507, algorithm 2.
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
        **options: Unpack[ProjectorOptions],
    ) -> None:
        own = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**own, **with_defaults(type(self), {**self.preset, **options})})


class GaLoreAdamW8bit(GaLoreAdamW):
    r""":class:`GaLoreAdamW` with its moments in 8 bits: ``state_dtype="8bit"`` is the default.

    Each moment is a byte per element and a float32 scale for each block of up to 256; moments of
    fewer than 4096 elements stay float32. The arguments are those of :class:`GaLoreAdamW`, and
    ``state_dtype`` may be set per group.

    A positive second moment never takes the code of 0, as it does in bitsandbytes on CUDA: the next
    step would divide by eps alone (docs/kernels.md has figures).

    Example:
        >>> import torch
        >>> from lowrank_optim import GaLoreAdamW8bit
        >>> weight = torch.nn.Parameter(torch.zeros(64, 1024))
        >>> optimizer = GaLoreAdamW8bit([weight], rank=4)
        >>> weight.grad = torch.randn(64, 1024)
        >>> optimizer.step()
        >>> state = optimizer.state[weight]
        >>> state["low.exp_avg"].dtype, tuple(state["low.exp_avg_scale"].shape)
        (torch.uint8, (16,))

    Differs from the release (galore-torch 1.0): gradients keep their shape, decay comes first, a
    step counts once, and small moments train.

    References:
        Dettmers et al. (2021), arXiv:2110.02861.
    """

    preset: ClassVar[Options] = {"state_dtype": "8bit"}


class GaLoreLion(_GaLore):
    r"""Lion on the projected gradient: :math:`N = \mathrm{sign}(\beta_1 m + (1-\beta_1) R)`.

    Args:
        params: as in :class:`GaLoreAdamW`; groups without a rank are Lion.
        lr: learning rate (default: 1e-4).
        betas: interpolation of the sign, and decay of the momentum (default: (0.9, 0.99)).
        weight_decay: decoupled decay (default: 1e-2).
        **options: see :class:`~lowrank_optim.optimizer.ProjectorOptions`.

    Raises:
        ValueError: a hyper-parameter is out of range.

    Example:
        >>> import torch
        >>> from lowrank_optim import GaLoreLion
        >>> weight = torch.nn.Parameter(torch.ones(8, 4))
        >>> optimizer = GaLoreLion([weight], rank=2, weight_decay=0.0)
        >>> weight.grad = torch.randn(8, 4)
        >>> optimizer.step()
        >>> round((weight - 1).norm().item() / (1e-4 * 0.25), 1)  # sqrt(rank * 8): all signs
        4.0

    References:
        Chen et al. (2023), arXiv:2302.06675; no GaLore release has it.
    """

    rule_class: ClassVar[type[Rule]] = Lion

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 1e-2,
        **options: Unpack[ProjectorOptions],
    ) -> None:
        own = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
        super().__init__(params, {**own, **with_defaults(type(self), options)})


class GaLoreSGD(_GaLore):
    r"""SGD with momentum on the projected gradient.

    .. math::
        m \leftarrow \mu m + (1 - d) P^T G, \quad
        W \leftarrow (1 - \eta\lambda) W - \eta\alpha P m

    d is the dampening, which the first step leaves out. At full rank and with no refresh under
    carried momentum it is SGD exactly: the rule is linear, so an orthonormal change of coordinates
    does not change it.

    Args:
        params: as in :class:`GaLoreAdamW`; groups without a rank are SGD.
        lr: learning rate (default: 1e-3).
        momentum: factor μ of the moving sum (default: 0.0).
        weight_decay: decoupled decay (default: 0.0); ``torch.optim.SGD`` couples it.
        dampening: as in ``torch.optim.SGD`` (default: 0.0).
        nesterov: look ahead along the momentum (default: False).
        **options: see :class:`~lowrank_optim.optimizer.ProjectorOptions`.

    Raises:
        ValueError: a hyper-parameter is out of range.

    Example:
        >>> import torch
        >>> from lowrank_optim import GaLoreSGD
        >>> weight = torch.nn.Parameter(torch.zeros(4, 4))
        >>> optimizer = GaLoreSGD([{"params": [weight], "rank": 4, "scale": 1.0}], lr=1.0)
        >>> weight.grad = torch.eye(4)
        >>> optimizer.step()
        >>> torch.allclose(weight, -torch.eye(4), atol=1e-6)
        True

    References:
        Zhao et al. (2024), arXiv:2403.03507; no GaLore release has it.
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
        **options: Unpack[ProjectorOptions],
    ) -> None:
        own = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        own |= {"dampening": dampening, "nesterov": nesterov}
        super().__init__(params, {**own, **with_defaults(type(self), options)})


class GaLoreAdafactor(_GaLore):
    r"""Adafactor on the projected gradient: the second moment is kept as two vectors.

    .. math::
        N = R / \sqrt V, \quad V_{ij} = u_i v_j / \mathrm{mean}(u), \quad R = P^T G

    u are means of the squares of R over rows, v those over columns, both moving.

    Args:
        params: as in :class:`GaLoreAdamW`; groups without a rank are Adafactor.
        lr: learning rate, a float or a 0-d tensor; None for step sizes of its own,
            ``relative_step`` (default: None).
        eps: added to the square, and floor of the parameter scale (default: (1e-30, 1e-3)).
        clip_threshold: RMS to which a direction is clipped (default: 1.0).
        decay_rate: the second moment decays by ``1 - t**decay_rate`` (default: -0.8).
        beta1: decay of a first moment; None keeps none (default: None).
        weight_decay: decoupled decay (default: 0.0).
        scale_parameter: multiply the learning rate by the weights' RMS (default: True).
        relative_step: learning rate ``min(1e-2, 1/sqrt(t))``, in place of ``lr`` (default: None,
            which is whether there is no ``lr``).
        warmup_init: ``min(1e-6 t, 1/sqrt(t))`` instead (default: False).
        **options: see :class:`~lowrank_optim.optimizer.ProjectorOptions`.

    Raises:
        ValueError: a hyper-parameter is out of range, or would have no effect: ``lr`` beside
            ``relative_step=True``, ``warmup_init`` without it. A group may name either, too.

    Example:
        >>> import torch
        >>> from lowrank_optim import GaLoreAdafactor
        >>> weight = torch.nn.Parameter(torch.ones(8, 4))
        >>> optimizer = GaLoreAdafactor([weight], rank=2)
        >>> weight.grad = torch.ones(8, 4)
        >>> optimizer.step()
        >>> sorted(k for k in optimizer.state[weight] if k.startswith("low"))
        ['low.exp_avg_sq_col', 'low.exp_avg_sq_row']

    Differs from the release: the first moment averages directions, not directions times the
    learning rate, so that a scheduler acts at once; an ``lr`` alone is obeyed, where the release
    asks for ``relative_step=False`` beside it.

    References:
        Shazeer and Stern (2018), arXiv:1804.04235.
    """

    rule_class: ClassVar[type[Rule]] = Adafactor

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor | None = None,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        beta1: float | None = None,
        weight_decay: float = 0.0,
        scale_parameter: bool = True,
        relative_step: bool | None = None,
        warmup_init: bool = False,
        **options: Unpack[ProjectorOptions],
    ) -> None:
        own: Group = {
            "lr": lr,
            "eps": eps,
            "clip_threshold": clip_threshold,
            "decay_rate": decay_rate,
        }
        own |= {"beta1": beta1, "weight_decay": weight_decay, "warmup_init": warmup_init}
        own |= {"scale_parameter": scale_parameter}
        own["relative_step"] = lr is None if relative_step is None else relative_step
        super().__init__(params, {**own, **with_defaults(type(self), options)})

    def add_param_group(self, param_group: Group) -> None:
        """Add a group; an ``lr`` of its own is obeyed.

        Raises:
            ValueError: a value is out of range, or has no effect.
        """
        if isinstance(param_group, dict) and param_group.get("relative_step") is None:
            own = {k: v for k, v in param_group.items() if k != "relative_step"}
            param_group = {**own, "relative_step": own["lr"] is None} if "lr" in own else own
        super().add_param_group(param_group)

    def _group_of_checkpoint(self, group: Group) -> Group:
        """As of every method; groups of older checkpoints had an ``lr`` that nothing read."""
        return {**group, "lr": None} if group.get("relative_step") else group

    def _check(self, group: Group) -> None:
        super()._check(group)
        _check_step_size(group)

    def _strategies(self, group: Group) -> Strategies:
        _check_step_size(group)  # lr may be edited at any time
        return super()._strategies(group)


def _check_step_size(group: Group) -> None:
    """Raise unless a group has a learning rate or step sizes of its own, and not both.

    Raises:
        ValueError: it has both, or neither.
    """
    lr, relative = group["lr"], group["relative_step"]
    if lr is None and not relative:
        raise ValueError(
            "relative_step=False needs a learning rate, got lr=None: give one, such as lr=1e-3"
        )
    loading = isinstance(lr, float) and lr == 0  # a loader's first step
    if relative and lr is not None and not loading:
        raise ValueError(
            f"lr={lr} has no effect with relative_step=True, whose step sizes are its own: leave "
            "one of them out"
        )
