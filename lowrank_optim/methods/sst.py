"""Sparse Spectral Training: the singular values of W, and a few of its singular vectors at a time.

References:
    Zhao et al. (2024), arXiv:2405.15481.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Unpack

from torch import Tensor

from lowrank_optim.engine import answers
from lowrank_optim.engine.bucket import Bucket, bucketed
from lowrank_optim.engine.plan import ParamPlan, State, Strategies
from lowrank_optim.engine.preflight import check_factor_rank
from lowrank_optim.engine.schedule import phase, refresh_due
from lowrank_optim.engine.sharded.failures import recall
from lowrank_optim.engine.sharded.layer_owner import due_layer, refresh_by_owners
from lowrank_optim.engine.sharded.layers import (
    gathered_layers,
    keep_,
    placed_as,
    with_copies,
)
from lowrank_optim.engine.sharded.refusals import check_layer
from lowrank_optim.engine.sharded.replicas import refresh_layers
from lowrank_optim.engine.state import init_state
from lowrank_optim.engine.step import step_buckets
from lowrank_optim.engine.stepped import Checked
from lowrank_optim.engine.undo import Undo
from lowrank_optim.groups import Group
from lowrank_optim.groups.options import Options, with_defaults
from lowrank_optim.groups.values import rate_of
from lowrank_optim.ops.devices import recording
from lowrank_optim.optimizer import LowRankOptimizer
from lowrank_optim.residuals import Drop, Residual
from lowrank_optim.rules import AdamW, Rule
from lowrank_optim.sharding.parts import is_sharded, local
from lowrank_optim.subspaces.base import Subspace
from lowrank_optim.subspaces.spectral import Spectral
from lowrank_optim.subspaces.spectral_module import GRADIENTS, FactorView, SpectralModule
from lowrank_optim.tensors.matrix import MatrixView, matrix_view

NEVER = 2**62
"""A gap that no run reaches."""


@dataclass(eq=False, slots=True)
class Layer(ParamPlan):
    """A layer of factors, or one of its other parameters, which are stepped with the first."""

    alone: ClassVar[bool] = False

    members: Sequence[Tensor] = ()

    def named(self) -> State:
        """Factors, as the subspace names them."""
        members = with_copies(self.members)
        return dict(zip(Spectral.keys, (x.detach() for x in members), strict=True))

    def gradients(self) -> State:
        """Those of the factors in use, as far as there are any."""
        pairs = zip(GRADIENTS, self.members, strict=False)
        return {key: x.grad for key, x in pairs if x.grad is not None}

    def whole(self, state: State) -> ParamPlan:
        """What stands for a layer that ranks have parts of, where its factors are in ``state``."""
        param = state["basis_u"]
        param.grad = state.get("grad_u")
        plan = self.name, self.index, self.uid, self.view, self.subspace, self.kind
        return ParamPlan(param, *plan)


class SSTAdamW(LowRankOptimizer):
    r"""AdamW on the spectral factors of each weight, which stays an ordinary dense parameter.

    .. math::
        W = U \mathrm{diag}(s) V^T, \qquad
        u_i \leftarrow \mathrm{unit}(u_i - \eta N(G v_i)), \quad
        v_i \leftarrow \mathrm{unit}(v_i - \eta N(G^T u_i)) \quad (i \in S), \qquad
        s \leftarrow \max(s - \eta N(\mathrm{diag}(U^T G V)), 0)

    N is AdamW's direction, and S the r pairs in use.

    An iteration trains r pairs of singular vectors, drawn anew every ``steps_per_iteration`` steps:
    the moments and their bias correction then start again, and the learning rate warms up over
    ``warmup_steps``. That factor is computed from the steps since the draw and never written into
    the group, so schedulers see none of it. A round is ``iterations_per_round`` iterations, and
    begins with a factorisation of W.

    Two forms. ``factors="exact"`` trains all singular values at every step, as published. It keeps
    all factors: for an (m, n) weight with k = min(m, n) that is ``k (m + n) + k`` elements beside
    moments of ``2 (r (m + n) + k)``, more than dense AdamW needs for a square weight. What is not
    in use may be kept in bfloat16 (``factor_dtype``) or in host memory (``offload_inactive``).
    ``factors="active"`` keeps the r triplets in use alone, ``3 r (m + n) + 3 r`` in all, and is an
    approximation: singular values that were not drawn stay as they are for the iteration, and W is
    factored at the beginning of each iteration, not of each round.

    Args:
        params: as in :class:`~lowrank_optim.GaLoreAdamW`; groups without a rank are AdamW. Groups
            that :func:`lowrank_optim.nn.convert` made are stepped in their modules.
        lr: learning rate η (default: 1e-3). Adam turns a vector of m entries by about
            ``lr sqrt(m)`` radians a step.
        betas: decay of the two moments (default: (0.9, 0.999)).
        eps: ε (default: 1e-8).
        weight_decay: decoupled decay λ (default: 1e-2): of W, which is that of s.
        steps_per_iteration: steps between draws (default: 200).
        iterations_per_round: draws between factorisations; None for ``ceil(k / r)``, as many as it
            takes to see every vector once (default: None). Unused with ``factors="active"``.
        warmup_steps: steps over which the learning rate rises after a draw (default: 20).
        sampling: ``"mixed"``, ``"multinomial"``, ``"uniform"``, ``"sequential"`` or ``"topr"``, see
            :func:`lowrank_optim.subspaces.factors.sample` (default: "mixed"). Draws depend on seed,
            parameter and step alone: every rank, and a resumed run, draws the same.
        enhanced: leave the factor :math:`s_i` out of the gradients of vectors (default: True).
            Adam divides most of it out again.
        factors: ``"exact"`` or ``"active"`` (default: "exact").
        factor_dtype: of vectors not in use, ``"float32"`` or ``"bfloat16"`` (default: "float32").
        offload_inactive: keep them in host memory (default: False).
        negative: what happens below zero: ``"clamp"`` a singular value to 0, as published, or
            ``"flip"`` its sign into u, which keeps W (default: "clamp").
        vector_lr_scale: factor of the learning rate of vectors (default: 1.0).
        s_lr_scale: factor of the learning rate of singular values (default: 1.0).
        **options: see :class:`lowrank_optim.optimizer.Options`; each may be set per group.
            ``on_refresh`` is "reset" by default. ``update_proj_gap``, ``scale`` and ``projector``
            have no meaning here, and ``proj_type`` only for a fractional rank.

    Raises:
        ValueError: a hyper-parameter is out of range.

    Example:
        >>> import torch
        >>> from lowrank_optim import SSTAdamW
        >>> weight = torch.nn.Parameter(torch.randn(64, 32))
        >>> optimizer = SSTAdamW([weight], rank=4, factors="active")
        >>> weight.grad = torch.randn(64, 32)
        >>> optimizer.step()
        >>> tuple(optimizer.state[weight]["basis_u"].shape)  # rows, and the smaller side first
        (4, 32)

    Differs from the paper: W stays authoritative (each round factors the weight itself); null
    vectors are kept over a factorisation; refreshes of a model are spread over the iteration
    (``stagger=False``: all at once, as published), which cuts the first iteration of each weight
    but the first short.

    References:
        Zhao et al. (2024), arXiv:2405.15481.
    """

    rule_class: ClassVar[type[Rule]] = AdamW
    preset: ClassVar[Options] = {"on_refresh": "reset"}
    """Defaults of a subclass that differ."""
    extra_keys: ClassVar[tuple[str, ...]] = ("form", "shapes", "indices")
    unused: ClassVar[Mapping[str, str]] = {
        "update_proj_gap": "steps_per_iteration is the gap",
        "scale": "lr, vector_lr_scale and s_lr_scale set the step",
        "projector": "the factors are those of the weight",
    }

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        steps_per_iteration: int = 200,
        iterations_per_round: int | None = None,
        warmup_steps: int = 20,
        sampling: str = "mixed",
        enhanced: bool = True,
        factors: str = "exact",
        factor_dtype: str = "float32",
        offload_inactive: bool = False,
        negative: str = "clamp",
        vector_lr_scale: float = 1.0,
        s_lr_scale: float = 1.0,
        **options: Unpack[Options],
    ) -> None:
        own: Group = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        own |= {"steps_per_iteration": steps_per_iteration, "warmup_steps": warmup_steps}
        own |= {"iterations_per_round": iterations_per_round, "sampling": sampling}
        own |= {"enhanced": enhanced, "factors": factors, "factor_dtype": factor_dtype}
        own |= {"offload_inactive": offload_inactive, "negative": negative}
        own |= {"vector_lr_scale": vector_lr_scale, "s_lr_scale": s_lr_scale}
        super().__init__(params, {**own, **with_defaults(type(self), {**self.preset, **options})})

    def projected_factor(self, group: Group) -> float:
        """Factors take the learning rate as it is."""
        return 1.0

    def residual(self, group: Group) -> Residual:
        """All of the gradient that the factors do not see is dropped."""
        return Drop()

    def by_host(self, group: Group) -> str | None:
        """Signs of vectors that the host holds."""
        if group["offload_inactive"] and group["negative"] == "flip":
            return "offload_inactive=True with negative='flip' turns vectors around on the host"
        return None

    def gap(self, group: Group) -> int:
        """An iteration."""
        return int(group["steps_per_iteration"])

    def subspace(self, group: Group, view: MatrixView) -> Subspace:
        """The spectral factors of one weight."""
        return Spectral.from_group(group, view)

    # ---------------------------------------------------------------- factors in modules

    def _plan(self, group: Group) -> Iterator[ParamPlan]:
        """Items of weights; of a layer of factors, one for all of its members.

        Both draw what their weights would in the dense form: ``indices`` has the ``uid`` of each.
        """
        if group.get("form") is None:
            for n, item in enumerate(super()._plan(group)):
                item.uid = group["indices"][n] if "indices" in group else item.uid
                yield item
            return
        size, kinds = len(Spectral.keys), dict[Any, int]()
        index = sum(len(other["params"]) for other in self._before(group))
        for n, shape in enumerate(group["shapes"]):
            members = group["params"][n * size : (n + 1) * size]
            names = group["param_names"][n * size : (n + 1) * size]
            check_layer(names[0], members, type(self).__name__, "factors='active'")
            uid, at = group["indices"][n * size], index + n * size
            view = matrix_view(shape, group["proj_type"])
            assert view is not None
            check_factor_rank(group, names[0], members[0], SpectralModule, view)
            subspace = SpectralModule.from_group(group, view)
            kind = kinds.setdefault((view, subspace), len(kinds))
            yield Layer(
                members[0], names[0], at, uid, FactorView(*view), subspace, kind, members=members
            )
            for k in range(1, size):
                yield Layer(members[k], names[k], at + k, uid, None, None)

    def _state_of(self, item: ParamPlan, chosen: Strategies) -> State:
        """The state of a layer is that of its weight: the optimizer's part and the module's."""
        if not isinstance(item, Layer):
            return super()._state_of(item, chosen)
        if item.subspace is None:  # not the first of its layer
            return {}
        return {**self._kept(item, chosen), **item.named(), **item.gradients()}

    def _kept(self, item: Layer, chosen: Strategies) -> State:
        """The optimizer's part, whole on every rank."""
        if is_sharded(item.param) and not self.state[item.param]:
            self.state[item.param].update(init_state(item, chosen, local(item.param)))
        return super()._state_of(item, chosen)

    def _checked(self, group: Group) -> Checked:
        """As of every method; a layer has a gradient of all factors in use, or of none.

        Raises:
            RuntimeError: a gradient is not what a step can use.
            ValueError: the group was edited in a way that its state cannot follow.
        """
        checked = super()._checked(group)
        for item in checked.ready:
            if isinstance(item, Layer) and item.subspace is not None:
                missing = {*GRADIENTS} - {*item.gradients()}
                if missing:
                    raise RuntimeError(
                        f"{item.name} has a gradient, and of its layer there is no "
                        f"{' and no '.join(sorted(missing))}: freeze all of a layer, or nothing"
                    )
        return checked

    def _step_items(
        self, items: list[ParamPlan], group: Group, chosen: Strategies, undo: Undo
    ) -> None:
        """A layer's gradients are those of the vectors in use: it draws others after the step."""
        if group.get("form") is None:
            super()._step_items(items, group, chosen, undo)
            return
        leaders = [x for x in items if isinstance(x, Layer) and x.subspace is not None]
        recall(item.param for item in leaders)
        here = [item for item in leaders if not is_sharded(item.param)]
        for item in leaders if not (chosen.capturable and recording()) else ():
            answers.settle_(self._kept(item, chosen))  # the learning rate depends on it
        stepping = replace(chosen, gap=NEVER, stagger=False)
        super()._step_items(list[ParamPlan](here), group, stepping, undo)
        due = [item for item in here if self._is_due(item, chosen)]
        refresh_layers([(x, self._state_of(x, chosen)) for x in due], chosen, self._replicas)
        meshes: dict[Any, list[Layer]] = {}
        for item in leaders:
            if is_sharded(item.param):
                meshes.setdefault(item.param.device_mesh, []).append(item)  # type: ignore[attr-defined]
        for own in meshes.values():
            self._step_gathered(own, group, stepping, undo)
            due = [item for item in own if self._is_due(item, chosen)]
            refresh_by_owners(
                [due_layer(x, self._kept(x, chosen), dict(x.named()), chosen, x.whole) for x in due]
            )

    def _is_due(self, item: Layer, chosen: Strategies) -> bool:
        if chosen.capturable and recording():
            return False
        state = self._kept(item, chosen)
        step, last = int(state["step"]), int(state["refresh_step"])
        return refresh_due(step, last, chosen.gap, phase(item, chosen))

    def _step_gathered(
        self, items: Sequence[Layer], group: Group, chosen: Strategies, undo: Undo
    ) -> None:
        """Layers that ranks have parts of: what is in use is gathered, and each keeps its part."""
        hyper = rate_of(group), group["weight_decay"]
        for chunk in bucketed(items, chosen):
            assert isinstance(chunk[0].subspace, SpectralModule)
            wholes = _gathered(chunk, chunk[0].subspace.stepped_keys)
            pairs = list(zip(chunk, wholes, strict=True))
            states = [{**self._kept(x, chosen), **own} for x, own in pairs]
            plans = [x.whole(state) for x, state in zip(chunk, states, strict=True)]
            step_buckets([Bucket(plans, states, chosen, *hyper, undo)], self._staging)
            for x, own in pairs:
                for key, factor in x.named().items():
                    if key in own and key != "basis_order":
                        keep_(factor, own[key])


def _gathered(items: Sequence[Layer], keys: Sequence[str]) -> list[State]:
    """Factors under ``keys``, and gradients, of each layer: the whole of them, on every rank."""
    factors = [[x.named()[key] for key in keys] for x in items]
    grads = [
        [placed_as(g, p) for g, p in zip(x.gradients().values(), x.members, strict=False)]
        for x in items
    ]
    names = *keys, *GRADIENTS
    return [dict(zip(names, own, strict=True)) for own in gathered_layers(factors, grads)]


class SSTAdamW8bit(SSTAdamW):
    """:class:`SSTAdamW` with its moments in 8 bits: ``state_dtype="8bit"`` is the default.

    The arguments are those of :class:`SSTAdamW`. Factors stay float32: their rounding would be
    rounding of the weights.

    Example:
        >>> import torch
        >>> from lowrank_optim import SSTAdamW8bit
        >>> weight = torch.nn.Parameter(torch.randn(64, 1024))
        >>> optimizer = SSTAdamW8bit([weight], rank=4)
        >>> weight.grad = torch.randn(64, 1024)
        >>> optimizer.step()
        >>> optimizer.state[weight]["v.exp_avg"].dtype
        torch.uint8

    References:
        Dettmers et al. (2021), arXiv:2110.02861.
    """

    preset: ClassVar[Options] = {**SSTAdamW.preset, "state_dtype": "8bit"}
