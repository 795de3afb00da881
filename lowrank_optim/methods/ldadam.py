r"""LDAdam: a basis that follows the gradient at every step, and loses nothing of it.

.. math::
    A = G + E, \quad P = \mathrm{qr}(B B^T P_{old}), \quad
    B = \rho P_{old} \hat m + (1 - \rho) A, \qquad
    W \leftarrow (1 - \eta\lambda) W - \eta P\, \mathrm{adam}(P^T A)

Moments turn with the basis, and what they lose of the momentum joins the error E beside what a step
does not use of the gradient.

References:
    Robert et al. (2024), arXiv:2410.16103.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Unpack

from torch import Tensor

from lowrank_optim.groups import Group
from lowrank_optim.groups.options import Options, with_defaults
from lowrank_optim.optimizer import LowRankOptimizer
from lowrank_optim.residuals import Drop, ErrorFeedback, Residual
from lowrank_optim.rules import AdamW, Rule
from lowrank_optim.subspaces.base import Subspace
from lowrank_optim.subspaces.power import PowerIteration
from lowrank_optim.tensors.matrix import MatrixView


class LDAdamW(LowRankOptimizer):
    r"""AdamW in a subspace that takes one step of a power iteration before each of its own.

    .. math::
        E \leftarrow A - P P^T A
            + \frac{\beta_1}{1 - \beta_1} (P_{old} m_{old} - P P^T P_{old} m_{old})

    with :math:`A = G + E`. The moments of :math:`P^T A` turn with the basis: the first by
    :math:`C = P^T P_{old}`, the second as the variance about the first.

    Args:
        params: parameters, named parameters, or groups of either, as in
            :class:`lowrank_optim.GaLoreAdamW`.
        lr: learning rate η, a float or a 0-d tensor (default: 1e-3).
        betas: decay of the two moments (default: (0.908, 0.99)).
        eps: ε (default: 1e-8).
        weight_decay: decoupled decay λ, applied first (default: 1e-2).
        rho: share ρ of the momentum in what a basis follows (default: 0.908).
        error_feedback: keep what a step does not use, in "float32", "bfloat16", "8bit" or "4bit": a
            memory of the size of the weights. None drops it (default: "float32").
        **options: see :class:`lowrank_optim.optimizer.Options`; here ``update_proj_gap=1``,
            ``scale=1.0`` and ``on_refresh="project"``, which is the only one. ``projector`` has no
            meaning.

    Raises:
        ValueError: a hyper-parameter is out of range, or ``on_refresh`` is another one.

    Example:
        >>> import torch
        >>> from lowrank_optim import LDAdamW
        >>> weight = torch.nn.Parameter(torch.zeros(8, 16))
        >>> optimizer = LDAdamW([weight], lr=1e-2, rank=2, weight_decay=0.0)
        >>> weight.grad = torch.randn(8, 16)
        >>> optimizer.step()
        >>> state = optimizer.state[weight]
        >>> used = state["basis"] @ state["basis"].T @ weight.grad
        >>> torch.allclose(used + state["error"].T, weight.grad, atol=1e-5)
        True

    Differs from the release (LDAdam, f3c5daf): the error is a memory of its own, and not the
    gradient's storage, so that ``model.zero_grad()``, clipping and loss scaling leave it alone; it
    is saved; experts and convolutions are projected.

    References:
        Robert et al. (2024), arXiv:2410.16103.
    """

    rule_class: ClassVar[type[Rule]] = AdamW
    unused: ClassVar[Mapping[str, str]] = {"projector": "a power iteration follows the gradient"}
    preset: ClassVar[Options] = {}
    """Defaults of a subclass that differ."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.908, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        rho: float = 0.908,
        error_feedback: str | None = "float32",
        **options: Unpack[Options],
    ) -> None:
        own: Group = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        own |= {"rho": rho, "error_feedback": error_feedback}
        common: Options = {"update_proj_gap": 1, "scale": 1.0, "on_refresh": "project"}
        super().__init__(
            params, {**own, **with_defaults(type(self), {**common, **self.preset, **options})}
        )

    def residual(self, group: Group) -> Residual:
        """Kept for the next step, with what the momentum lost; or dropped."""
        if group["error_feedback"] is None:
            return Drop()
        beta1 = float(group["betas"][0])
        return ErrorFeedback(group["error_feedback"], group["maximize"], beta1 / (1 - beta1))

    def subspace(self, group: Group, view: MatrixView) -> Subspace:
        """The basis that follows."""
        return PowerIteration.from_group(group, view)

    def _check(self, group: Group) -> None:
        super()._check(group)
        if group["on_refresh"] != "project":
            raise ValueError(
                f"on_refresh of {type(self).__name__} must be 'project', got "
                f"{group['on_refresh']!r}: the basis moves at every step, and moments follow it. "
                "Leave it out, or take GaLoreAdamW"
            )


class LDAdamW8bit(LDAdamW):
    r""":class:`LDAdamW` with its moments in 8 bits: ``state_dtype="8bit"`` is the default.

    They are decoded and encoded at every refresh, which is every step, beside the step itself. The
    error is kept as ``error_feedback`` says.

    Example:
        >>> import torch
        >>> from lowrank_optim import LDAdamW8bit
        >>> weight = torch.nn.Parameter(torch.zeros(64, 1024))
        >>> optimizer = LDAdamW8bit([weight], rank=4, error_feedback="8bit")
        >>> weight.grad = torch.randn(64, 1024)
        >>> optimizer.step()
        >>> state = optimizer.state[weight]
        >>> state["low.exp_avg"].dtype, state["error"].dtype
        (torch.uint8, torch.uint8)

    References:
        Dettmers et al. (2021), arXiv:2110.02861.
    """

    preset: ClassVar[Options] = {"state_dtype": "8bit"}
