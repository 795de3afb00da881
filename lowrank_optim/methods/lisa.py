r"""LISA and BAdam: AdamW on a few whole layers at a time, all others frozen.

.. math::
    W_\ell \leftarrow (1 - \eta \lambda) W_\ell - \eta N_\ell \quad \text{for } \ell \in A_k,
    \qquad k = \lfloor t / K \rfloor

with N AdamW's direction, whose moments and steps begin anew with each turn of K steps. LISA draws
the layers of A at random and trains embedding and head all the time; BAdam has one layer in A, and
embedding and head are layers as well. Both are written from the equations alone.

References:
    Pan et al. (2024), arXiv:2403.17919, algorithm 1; Luo et al. (2024), arXiv:2404.02827,
    algorithm 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Unpack

import torch.distributed as dist
from torch import Tensor

from lowrank_optim.engine import tracing
from lowrank_optim.engine.blocks import turned_
from lowrank_optim.engine.plan import ParamPlan, Strategies
from lowrank_optim.engine.stepped import Checked
from lowrank_optim.groups import Group
from lowrank_optim.groups.layers import LAYERS, takes_turns
from lowrank_optim.groups.options import Options, with_defaults
from lowrank_optim.optimizer import LowRankOptimizer
from lowrank_optim.residuals import Drop, Residual
from lowrank_optim.rules import AdamW, Rule
from lowrank_optim.subspaces.base import Subspace
from lowrank_optim.subspaces.block import Block
from lowrank_optim.tensors.matrix import MatrixView

IDLE = "_idle_layer"
"""Mark of a parameter that lost ``requires_grad`` to its turn, and not to its user."""


class _Layers(LowRankOptimizer):
    preset: ClassVar[Options] = {}
    """Defaults that differ."""
    unused: ClassVar[dict[str, str]] = {
        "rank": "active_layers says how many layers are active",
        "scale": "an active layer takes AdamW's step",
        "projector": "layers are trained whole",
        "proj_type": "layers are trained whole",
        "stagger": "layers switch together",
    }

    def __init__(self, params: Iterable[Any], own: Group, options: Options) -> None:
        common: Options = {"on_refresh": "reset", **self.preset, **options}
        super().__init__(params, {**own, **with_defaults(type(self), common)})
        self._check_layers()
        self._take_turns()

    def _check_layers(self) -> None:
        """Raise where nothing would take turns.

        Raises:
            ValueError: the pattern finds a layer in no name.
        """
        groups = [g for g in self.param_groups if g["rank"] is not None]
        if any(self._wants(g, i) for g in groups for i in range(len(g["params"]))):
            return
        names = [n for g in groups for n in g.get("param_names") or ()]
        if names:
            raise ValueError(
                f"layers={groups[0]['layers']!r} finds a layer in none of the {len(names)} names, "
                f"such as {names[0]!r}: give the expression that does, or outside='turns' for "
                "turns by module"
            )

    def residual(self, group: Group) -> Residual:
        """What is idle stays as it is."""
        return Drop()

    def subspace(self, group: Group, view: MatrixView) -> Subspace:
        """All of a tensor, or nothing."""
        return replace(Block.from_group(group, view), frozen=True)

    def _check(self, group: Group) -> None:
        super()._check(group)
        name = type(self).__name__
        if group["layers"] is None:
            raise ValueError(
                f"layers must be a regular expression in {name}, got None: it says which part of "
                f"a parameter's name is its layer's, as the default {LAYERS!r} does"
            )

    def add_param_group(self, param_group: Group) -> None:
        """Add a group, before the first step: layers of all groups take turns together.

        Raises:
            ValueError: a key or a value is wrong.
            RuntimeError: there has been a step, so that turns would change.
        """
        if getattr(self, "state", None):
            raise RuntimeError(
                f"{type(self).__name__} has taken a step, and a group that is added now would "
                "change whose turn it is: add all groups before the first step"
            )
        super().add_param_group(param_group)
        self._plans.clear()
        if "_traced" in vars(self):
            self._take_turns()

    def _wants(self, group: Group, i: int) -> bool:
        """Whatever is in a layer, vectors too; of BAdam, all."""
        return group["rank"] is not None and takes_turns(group, i)

    # ---------------------------------------------------------------- turns

    def _trains(self, param: Tensor) -> bool:
        """Whether it is trained in its turn: what its user has frozen is not."""
        return param.requires_grad or hasattr(param, IDLE)

    def _groups(self) -> Iterator[tuple[list[ParamPlan], Strategies]]:
        for group in self.param_groups:
            yield self._items(group), self._strategies(group)

    def _take_turns(self) -> None:
        """Let the parameters of the next step ask for gradients, and no others.

        Where several processes train, all do: wrappers look at ``requires_grad`` once.
        """
        groups = list(self._groups())
        with tracing.hosted():  # which layers begin may be drawn, and a fake draw says nothing
            active = turned_(groups, self.state)
        every = [item for items, _ in groups for item in items]
        blocks = [item for item in every if isinstance(item.subspace, Block)]
        for item in every:
            if item.subspace is None:  # it may have been another optimizer's
                _wake(item.param)
        together = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        for item, turn in zip(blocks, active, strict=True):
            if turn or together or item.sharded:
                _wake(item.param)
            elif item.param.requires_grad:
                setattr(item.param, IDLE, True)
                item.param.requires_grad_(False)

    def _step_groups(self, work: Sequence[Checked]) -> None:
        super()._step_groups(work)
        self._take_turns()

    def release(self) -> None:
        """Give back ``requires_grad`` to all idle layers, until the next step.

        Before a parameter is frozen or thawed by hand, a model is copied, or another optimizer
        takes over.

        Example:
            >>> import torch
            >>> from lowrank_optim import BAdamW
            >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
            >>> optimizer = BAdamW(model.named_parameters(), block_order="ascending")
            >>> [p.requires_grad for p in model.parameters()]
            [True, True, False, False]
            >>> optimizer.release()
            >>> all(p.requires_grad for p in model.parameters())
            True
        """
        for group in self.param_groups:
            for param in group["params"]:
                _wake(param)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As of every method; the layers whose turn it is ask for gradients."""
        super().load_state_dict(state_dict)
        self._take_turns()

    def __getstate__(self) -> dict[str, Any]:
        """As of torch, and which parameters are idle: copies of tensors lose their marks."""
        idle = [p for g in self.param_groups for p in g["params"] if hasattr(p, IDLE)]
        return {**super().__getstate__(), "_idle": idle}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore, and mark the idle."""
        for param in state.pop("_idle", ()):
            setattr(param, IDLE, True)
        super().__setstate__(state)


def _wake(param: Tensor) -> None:
    """Give back what its turn has taken from a parameter."""
    if hasattr(param, IDLE):
        delattr(param, IDLE)
        param.requires_grad_(True)


class LisaAdamW(_Layers):
    r"""AdamW on embedding, head, and a few layers that are drawn anew every K steps.

    .. math::
        W_\ell \leftarrow (1 - \eta \lambda) W_\ell - \eta N_\ell \quad
        \text{for } \ell \in A_k, \qquad k = \lfloor t / K \rfloor

    N is AdamW's direction, whose moments and steps begin anew with each turn of K steps. Layers
    that are not in A have no moments, no gradient and no update.

    Args:
        params: named parameters, or groups of them (``model.named_parameters()``): names say which
            parameters are a layer. Without names every matrix is a layer of its own.
        lr: learning rate η, a float or a 0-d tensor (default: 1e-3).
        betas: decay of the two moments (default: (0.9, 0.999)).
        eps: ε (default: 1e-8).
        weight_decay: decoupled decay λ, of what is active (default: 1e-2).
        active_layers: how many layers are active, γ; more than there are is all (default: 2).
        layers: regular expression; a name up to its end is a layer's (default: ``layers.0.``,
            ``layer.0.``, ``h.0.``, ``blocks.0.`` and the like).
        layer_weights: how likely each layer is in a draw, in the order of their numbers; None is
            all alike, as published (default: None).
        block_order: ``"random"``, ``"shuffled"``, ``"ascending"``, ``"descending"``, ``"mirror"``
            (default: "random").
        outside: what is in no layer trains ``"always"``, or takes ``"turns"`` by module (default:
            "always").
        **options: see :class:`lowrank_optim.optimizer.Options`. ``update_proj_gap`` is K (default:
            20). ``on_refresh="reset"`` starts the moments of every layer again at a turn; with
            ``"keep"`` those of a layer that is drawn twice running go on (default: "reset").
            ``rank``, ``scale``, ``projector``, ``proj_type`` and ``stagger`` mean nothing here.

    Raises:
        ValueError: a hyper-parameter is out of range, or means nothing here.

    Example:
        >>> import torch
        >>> from lowrank_optim import LisaAdamW
        >>> layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(5))
        >>> model = torch.nn.ModuleDict({"layers": layers, "head": torch.nn.Linear(4, 2)})
        >>> optimizer = LisaAdamW(model.named_parameters(), lr=1e-4)
        >>> sum(p.requires_grad for p in layers.parameters())  # two layers, bias and weight
        4

    The paper does not say what becomes of moments. Here idle layers have none, and a layer that is
    drawn twice running starts again (``on_refresh="keep"``: goes on).

    References:
        Pan et al. (2024), arXiv:2403.17919, algorithm 1.
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
        active_layers: int = 2,
        layers: str = LAYERS,
        layer_weights: Sequence[float] | None = None,
        block_order: str = "random",
        outside: str = "always",
        **options: Unpack[Options],
    ) -> None:
        own: Group = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        own |= {"active_layers": active_layers, "layers": layers, "layer_weights": layer_weights}
        own |= {"block_order": block_order, "outside": outside}
        gap: Options = {"update_proj_gap": 20}
        super().__init__(params, own, {**gap, **options})


class LisaAdamW8bit(LisaAdamW):
    """:class:`LisaAdamW` with its moments in 8 bits: ``state_dtype="8bit"`` is the default.

    Example:
        >>> import torch
        >>> from lowrank_optim import LisaAdamW8bit
        >>> model = torch.nn.ModuleDict({"layers": torch.nn.Sequential(torch.nn.Linear(64, 64))})
        >>> optimizer = LisaAdamW8bit(model.named_parameters())
        >>> model["layers"](torch.ones(1, 64)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.state[model["layers"][0].weight]["exp_avg"].dtype
        torch.uint8

    References:
        Dettmers et al. (2021), arXiv:2110.02861.
    """

    preset: ClassVar[Options] = {"state_dtype": "8bit"}


class BAdamW(_Layers):
    r"""AdamW on one layer for K steps, then on the next: block coordinate descent.

    .. math::
        W_\ell \leftarrow (1 - \eta \lambda) W_\ell - \eta N_\ell \quad
        \text{for } \ell \in A_k, \qquad k = \lfloor t / K \rfloor

    N is AdamW's direction, whose moments and steps begin anew with each turn of K steps. Layers
    that are not in A have no moments, no gradient and no update.

    Embedding and head are layers too, so that backward ends at the layer whose turn it is.

    Args:
        params: as in :class:`LisaAdamW`.
        lr: learning rate η, a float or a 0-d tensor (default: 1e-3).
        betas: decay of the two moments (default: (0.9, 0.999)).
        eps: ε (default: 1e-8).
        weight_decay: decoupled decay λ, of what is active (default: 1e-2).
        active_layers: how many are active (default: 1).
        layers: as in :class:`LisaAdamW`.
        layer_weights: as in :class:`LisaAdamW`, with ``block_order="random"`` (default: None).
        block_order: as in :class:`LisaAdamW` (default: "shuffled": every layer once, in an order
            that is drawn anew each time).
        outside: as in :class:`LisaAdamW` (default: "turns").
        **options: see :class:`lowrank_optim.optimizer.Options`. ``update_proj_gap`` is K (default:
            100); the others are as in :class:`LisaAdamW`.

    Raises:
        ValueError: a hyper-parameter is out of range, or means nothing here.

    Example:
        >>> import torch
        >>> from lowrank_optim import BAdamW
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
        >>> optimizer = BAdamW(model.named_parameters(), block_order="descending")
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> model[0].weight.grad is None  # backward has ended before it
        True

    Differs from the paper: the active layer has no float32 copy; for bfloat16 weights take
    ``stochastic_rounding=True``.

    References:
        Luo et al. (2024), arXiv:2404.02827, algorithm 1.
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
        active_layers: int = 1,
        layers: str = LAYERS,
        layer_weights: Sequence[float] | None = None,
        block_order: str = "shuffled",
        outside: str = "turns",
        **options: Unpack[Options],
    ) -> None:
        own: Group = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        own |= {"active_layers": active_layers, "layers": layers, "layer_weights": layer_weights}
        own |= {"block_order": block_order, "outside": outside}
        gap: Options = {"update_proj_gap": 100}
        super().__init__(params, own, {**gap, **options})


class BAdamW8bit(BAdamW):
    """:class:`BAdamW` with its moments in 8 bits: ``state_dtype="8bit"`` is the default.

    Example:
        >>> import torch
        >>> from lowrank_optim import BAdamW8bit
        >>> model = torch.nn.Linear(64, 64)
        >>> optimizer = BAdamW8bit(model.named_parameters())
        >>> model(torch.ones(1, 64)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.state[model.weight]["exp_avg"].dtype
        torch.uint8

    References:
        Dettmers et al. (2021), arXiv:2110.02861.
    """

    preset: ClassVar[Options] = {"state_dtype": "8bit"}
