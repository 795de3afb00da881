r"""SwitchLoRA: low-rank factors whose vectors are exchanged, a few each step, with pools of others.

.. math::
    W = W_0 + s B A, \qquad g_A = s B^T G, \quad g_B = s G A^T, \qquad
    A', B' = \mathrm{AdamW}(A, g_A), \mathrm{AdamW}(B, g_B), \qquad
    W \leftarrow W + s (B' A' - B A)

References:
    Zhou et al. (2024), arXiv:2406.06564.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor

from lowrank_optim.checkpoints.loaders import makes_state
from lowrank_optim.engine.bucket import Bucket, bucketed
from lowrank_optim.engine.plan import ParamPlan, State, Strategies
from lowrank_optim.engine.preflight import check_factor_rank
from lowrank_optim.engine.sharded.layer_owner import FirstRank
from lowrank_optim.engine.sharded.layers import (
    gathered_layers,
    keep_,
    placed_as,
    spans,
)
from lowrank_optim.engine.sharded.refusals import check_layer
from lowrank_optim.engine.state import init_state
from lowrank_optim.engine.step import step_buckets
from lowrank_optim.engine.stepped import Checked
from lowrank_optim.engine.undo import Undo
from lowrank_optim.groups import Group
from lowrank_optim.groups.names import uid_of
from lowrank_optim.groups.options import Options, with_defaults
from lowrank_optim.groups.values import rate_of
from lowrank_optim.ops import Noise
from lowrank_optim.optimizer import LowRankOptimizer
from lowrank_optim.residuals import Drop, Residual
from lowrank_optim.rules import AdamW, Rule
from lowrank_optim.sharding.parts import is_sharded, local
from lowrank_optim.sharding.regions import noise_of
from lowrank_optim.subspaces.base import Subspace
from lowrank_optim.subspaces.factored import SwitchedFactors
from lowrank_optim.subspaces.switched import Switched
from lowrank_optim.tensors.matrix import MatrixView, matrix_view


@dataclass(eq=False, slots=True, kw_only=True)
class FactorItem(ParamPlan):
    """A factor pair of a module: ``param`` is A, and the state is kept under it."""

    alone: ClassVar[bool] = False

    b: Tensor
    base: Tensor
    """W0, frozen."""

    @property
    def key(self) -> tuple[Any, ...]:
        """Of what a step reads: A, W0 and where they lie."""
        mesh = getattr(self.param, "device_mesh", None)
        own = self.param.dtype, self.base.dtype, self.param.device, self.view, self.subspace
        return *own, mesh


@dataclass(eq=False, slots=True, kw_only=True)
class FrozenItem(ParamPlan):
    """W0 as a step sees it: ``param`` is what is here of it."""

    base: Tensor

    def noise(self, seed: int | Tensor) -> Noise:
        """By the place of each entry in all of W0."""
        return noise_of(self.base, seed)


@dataclass(eq=False, slots=True)
class PartItem(ParamPlan):
    """B or W0 of a pair: stepped and kept with its A."""

    alone: ClassVar[bool] = False


class SwitchLoRAAdamW(LowRankOptimizer):
    r"""AdamW on two factors of every weight, whose vectors are switched: trains at full rank.

    .. math::
        W = W_0 + s B A, \quad W \leftarrow W + s (B' A' - B A), \quad s = \alpha / r

    The weight stays dense and W0 is implicit. Each step about ``r / interval`` rows of A, and as
    many columns of B, are exchanged with vectors of pools of min(m, n) candidates; a switch touches
    optimizer state alone, so W is the same to the bit. The counterpart of a switched vector starts
    its moments again and is frozen for ``freeze_steps`` steps.

    Args:
        params: parameters, named parameters, or groups of either, as in
            :class:`lowrank_optim.GaLoreAdamW`; also the groups of
            :func:`lowrank_optim.nn.convert`.
        lr: learning rate (default: 1e-3). It acts on the factors, where entries of W move by about
            ``lr sqrt(2) std / sqrt(r)``: published 2e-2, with dense parameters in the same group.
        betas: decay of the two moments (default: (0.9, 0.999)).
        eps: ε (default: 1e-8).
        weight_decay: decoupled decay (default: 0.0). By default it acts on A and B, as LoRA's
            does: it draws W towards the implicit W0, not towards zero. Frozen vectors do not decay.
        interval: steps in which every slot is switched once, at first; at least twice
            ``freeze_steps`` (default: 40).
        total_steps: of the run; the frequency then falls. None keeps it (default: None).
        descent_ratio: part of the run after which it is 0.3 of the first (default: 0.1).
        descent: ``"exponential"`` or ``"Z"``, a sigmoid (default: "exponential").
        freeze_steps: steps that the counterpart of a switched vector is frozen (default: 5).
        freeze_step_counter: pause its step too, so that its first update is as any first one;
            False lets it run, as released: .52, .68, .78, … of the step (default: True).
        order: of candidates: ``"fifo"`` or ``"random"`` (default: "fifo").
        pool_device: ``"cpu"`` (pinned where there is a GPU) or ``"param"`` (default: "cpu").
        decay_on: ``"factors"`` or ``"weight"``, which is decoupled decay of W (default: "factors").
        fan_in_fan_out: weights are stored (in, out), as in GPT-2's Conv1D (default: False).
        restart_every: every so many steps B A is refactorised into balanced factors, which leaves
            W as it is, and all moments start again (default: None, never).
        **options: see :class:`lowrank_optim.optimizer.Options`; ``scale`` is LoRA's α, and is 1 by
            default as in the release, so that s = 1 / r. No side is projected, no basis searched
            and nothing carried over: ``proj_type``, ``projector``, ``update_proj_gap``, ``stagger``
            and ``on_refresh`` mean nothing here.

    Raises:
        ValueError: a hyper-parameter is out of range.

    Example:
        >>> import torch
        >>> from lowrank_optim import SwitchLoRAAdamW
        >>> model = torch.nn.Linear(64, 32)
        >>> optimizer = SwitchLoRAAdamW(model.named_parameters(), lr=1e-2, rank=4)
        >>> model(torch.randn(8, 64)).square().mean().backward()
        >>> optimizer.step()
        >>> state = optimizer.state[model.weight]
        >>> tuple(state["basis_A"].shape), tuple(state["host.pool_A"].shape)
        ((4, 64), (32, 64))

    Differs from the release: a dense weight instead of W0, A and B, which in bfloat16 does not
    drift under switches; the paused counter; frozen vectors do not decay; never more switches than
    vectors that are free; draws from a seeded generator of its own; candidates in the factors'
    precision. ``rank=1`` never switches, nor does a rank that reaches min(m, n): plain LoRA.

    References:
        Zhou et al. (2024), arXiv:2406.06564; for ``restart_every`` arXiv:2505.22922.
    """

    rule_class: ClassVar[type[Rule]] = AdamW
    preset: ClassVar[Options] = {"scale": 1.0}
    """Defaults that differ from those of other methods."""
    unused: ClassVar[Mapping[str, str]] = {
        "proj_type": "both sides have a factor",
        "projector": "no basis is searched",
        "update_proj_gap": "interval says when vectors are switched",
        "stagger": "every step may switch",
        "on_refresh": "a switched vector starts its moments again",
    }

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        interval: int = 40,
        total_steps: int | None = None,
        descent_ratio: float = 0.1,
        descent: str = "exponential",
        freeze_steps: int = 5,
        freeze_step_counter: bool = True,
        order: str = "fifo",
        pool_device: str = "cpu",
        decay_on: str = "factors",
        fan_in_fan_out: bool = False,
        restart_every: int | None = None,
        **options: Unpack[Options],
    ) -> None:
        own: Group = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        own |= {"interval": interval, "total_steps": total_steps, "descent_ratio": descent_ratio}
        own |= {"descent": descent, "freeze_steps": freeze_steps, "order": order}
        own |= {"freeze_step_counter": freeze_step_counter, "pool_device": pool_device}
        own |= {"decay_on": decay_on, "fan_in_fan_out": fan_in_fan_out}
        own |= {"restart_every": restart_every, "factor_starts": ()}
        super().__init__(params, {**own, **with_defaults(type(self), {**self.preset, **options})})

    def _check(self, group: Group) -> None:
        super()._check(group)
        check_switching(group)

    def state_dict(self) -> dict[str, Any]:
        """As of torch, once the pools in host memory have all that the device sent them."""
        params = (p for group in self.param_groups for p in group["params"])
        for device in {p.device for p in params if p.is_cuda}:  # not the current one alone
            torch.cuda.synchronize(device)
        return super().state_dict()

    def projected_factor(self, group: Group) -> float:
        """Factors take the learning rate as it is."""
        return 1.0

    def by_host(self, group: Group) -> str:
        """The schedule, and which vectors are frozen."""
        return "every step may switch vectors, which the host decides"

    def residual(self, group: Group) -> Residual:
        """Only A and B are trained."""
        return Drop()

    def subspace(self, group: Group, view: MatrixView) -> Subspace:
        """Factors of the weight."""
        return Switched.from_group(group, view)

    def _strategies(self, group: Group) -> Strategies:
        """Every step may switch; every row counts its own steps."""
        chosen = super()._strategies(group)
        return replace(chosen, gap=1, stagger=False, on_refresh="keep", aged=True)

    # ---------------------------------------------------------------- modules

    def _plan(self, group: Group) -> Iterator[ParamPlan]:
        """A triple (A, B, W0) of a module draws what the one weight would that it stands for.

        That has the name of W0; where there are no names, a triple counts as one parameter.
        """
        params, starts, parts = group["params"], set(group["factor_starts"]), 0
        for i in starts:
            name = group["param_names"][i] if "param_names" in group else f"parameter {i}"
            instead = "a group without convert()"
            check_layer(name, params[i : i + 3], type(self).__name__, instead)
        extra = 2 * sum(len(other.get("factor_starts", ())) for other in self._before(group))
        names, uid = group.get("param_names"), 0
        for i, item in enumerate(super()._plan(group)):
            if parts:
                parts -= 1
                yield PartItem(item.param, item.name, item.index, uid, None, None)
                continue
            uid = item.uid if names is not None else item.uid - extra
            if i in starts:
                b, base = params[i + 1 : i + 3]
                view = matrix_view(base.shape, group["proj_type"])
                assert view is not None
                check_factor_rank(group, item.name, item.param, SwitchedFactors, view)
                sub = SwitchedFactors.from_group(group, view).sharing(self._shared)
                uid = uid if names is None else uid_of(names[i + 2])
                place = item.name, item.index, uid
                yield FactorItem(item.param, *place, view, sub, b=b, base=base)
                parts, extra = 2, extra + 2
            else:
                yield replace(item, uid=uid)

    def _state_of(self, item: ParamPlan, chosen: Strategies) -> State:
        if isinstance(item, PartItem):
            return {}
        if isinstance(item, FactorItem) and is_sharded(item.param) and not self.state[item.param]:
            # whole on every rank, as the factors are while they are stepped
            self.state[item.param].update(init_state(item, chosen, local(item.param)))
        return super()._state_of(item, chosen)

    def _checked(self, group: Group) -> Checked:
        """As of every method; a factor has a gradient if its counterpart has one.

        Raises:
            RuntimeError: a gradient is not what a step can use.
            ValueError: the group was edited in a way that its state cannot follow.
        """
        checked = super()._checked(group)
        for item in checked.ready:
            if isinstance(item, FactorItem) and item.b.grad is None:
                raise RuntimeError(f"{item.name} has a gradient and its counterpart has none")
        return checked

    def _step_items(
        self, items: list[ParamPlan], group: Group, chosen: Strategies, undo: Undo
    ) -> None:
        own = [item for item in items if isinstance(item, FactorItem)]
        rest = [item for item in items if not isinstance(item, FactorItem | PartItem)]
        super()._step_items(rest, group, chosen, undo)
        if own and not int(self._state_of(own[0], chosen)["step"]) and makes_state():
            return  # or the factors that were loaded would be drawn anew
        lr, weight_decay = rate_of(group), group["weight_decay"]
        here: list[Bucket] = []
        for chunk in bucketed(own, chosen):
            factors = _factors(chunk)
            pairs = [self._as_weight(x, own, chosen) for x, own in zip(chunk, factors, strict=True)]
            plans, states = zip(*pairs, strict=True)
            bucket = Bucket(plans, states, chosen, lr, weight_decay, undo)
            if not is_sharded(chunk[0].param):
                here.append(bucket)
                continue
            step_buckets([bucket], self._staging)
            for x, (a, b, *_) in zip(chunk, factors, strict=True):
                keep_(x.param, a)
                keep_(x.b, b)
        step_buckets(here, self._staging)

    def _as_weight(
        self, item: FactorItem, own: Sequence[Tensor], chosen: Strategies
    ) -> tuple[ParamPlan, State]:
        """A triple as the weight W0 and a state that holds factors and gradients too."""
        a, b, grad_a, grad_b = own
        factors = {"basis_A": a, "basis_B": b.mT}
        grads = {"grad_A": grad_a, "grad_B": grad_b.mT}
        weight, subspace = local(item.base.detach()), item.subspace
        if is_sharded(item.param):
            assert isinstance(subspace, SwitchedFactors) and item.view is not None
            # outputs are dimension 0 as stored, but of weights that are stored (in, out)
            first, second = spans(item.base)
            turned = subspace.flip != item.view.flip
            inputs, outputs = (first, second) if turned else (second, first)
            first_rank = FirstRank(item.param)
            subspace = replace(subspace, inputs=inputs, outputs=outputs, first=first_rank)
        # a stand-in for a gradient of W, which is never made: its values are not read
        weight.grad = weight.detach()
        place = item.name, item.index, item.uid
        whole = FrozenItem(weight, *place, item.view, subspace, base=item.base)
        return whole, {**self._state_of(item, chosen), **factors, **grads}


def _factors(items: Sequence[FactorItem]) -> list[list[Tensor]]:
    """A, B and their gradients, of each layer; whole, where ranks have parts of them."""
    found = []
    for item in items:
        assert item.param.grad is not None and item.b.grad is not None
        found.append([item.param.detach(), item.b.detach(), item.param.grad, item.b.grad])
    if not is_sharded(items[0].param):
        return found
    factors = [own[:2] for own in found]
    grads = [[placed_as(g, p) for g, p in zip(own[2:], own[:2], strict=True)] for own in found]
    return gathered_layers(factors, grads)


class SwitchLoRAAdamW8bit(SwitchLoRAAdamW):
    r""":class:`SwitchLoRAAdamW` with its moments in 8 bits: ``state_dtype="8bit"`` by default.

    The arguments are those of :class:`SwitchLoRAAdamW`. A switch writes the codes of zero into the
    rows that start again; no other code changes.

    Example:
        >>> import torch
        >>> from lowrank_optim import SwitchLoRAAdamW8bit
        >>> weight = torch.nn.Parameter(torch.zeros(64, 1024))
        >>> optimizer = SwitchLoRAAdamW8bit([weight], rank=4)
        >>> weight.grad = torch.randn(64, 1024)
        >>> optimizer.step()
        >>> optimizer.state[weight]["A.exp_avg"].dtype
        torch.uint8

    References:
        Dettmers et al. (2021), arXiv:2110.02861.
    """

    preset: ClassVar[Options] = {"scale": 1.0, "state_dtype": "8bit"}


def check_switching(group: Group) -> None:
    """Raise for values that no schedule could use together.

    Raises:
        ValueError: one is out of range.
    """
    if group["interval"] < 2 * group["freeze_steps"]:
        raise ValueError(
            f"interval must be at least twice freeze_steps={group['freeze_steps']}, "
            f"got {group['interval']}: more slots would be frozen than there are"
        )
    if group["factor_starts"] and not group["freeze_steps"]:
        raise ValueError(
            "modules need freeze_steps of at least 1, got 0: their gradients are older than a "
            "switch, and that of a switched vector's counterpart must not be used"
        )
    if group.get("rank") is not None and not group["scale"] > 0:
        raise ValueError(f"scale must be positive, got {group['scale']}: W would never move")
