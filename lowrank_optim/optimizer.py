"""The optimizer: parameter groups become a plan, the plan is stepped, state stays plain tensors."""

from __future__ import annotations

import inspect
import logging
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from functools import cache, partial
from itertools import takewhile
from typing import Any, ClassVar, TypedDict

import torch
from torch import Tensor
from torch.optim import Optimizer

from lowrank_optim.checkpoints.counters import is_template, with_any_count
from lowrank_optim.checkpoints.load import (
    filled_in,
    holds_any_count,
    load_state_dict,
    makes_state,
    with_places,
)
from lowrank_optim.engine import answers, tracing, zero
from lowrank_optim.engine.blocks import advance, catch_up, placed
from lowrank_optim.engine.compiled import Traced
from lowrank_optim.engine.offload import Staging, settle_
from lowrank_optim.engine.plan import ParamPlan, State, Strategies, init_state, unit_of
from lowrank_optim.engine.planned import PlannedOptimizer
from lowrank_optim.engine.preflight import (
    Plan,
    check_edits,
    check_flattened,
    check_gradients,
    check_moved,
    check_named,
    check_overlap,
    check_owned,
    check_partitioned,
    check_replaced,
    moved,
    structure,
)
from lowrank_optim.engine.recording import (
    check_capturable,
    check_on_device,
    check_recorded,
    follow_,
)
from lowrank_optim.engine.sharded import ShardedStep, local_state
from lowrank_optim.engine.sharded.failures import is_alone, this_rank
from lowrank_optim.engine.sharded.refusals import check_supported
from lowrank_optim.engine.sharded.replicas import Replicas, refresh_alike
from lowrank_optim.engine.step import step_items
from lowrank_optim.engine.summary import Summary, summary_of
from lowrank_optim.engine.undo import Undo
from lowrank_optim.groups import Group, canonical, check, check_rank, notices
from lowrank_optim.groups.keys import (
    METHODS,
    PLACES,
    TORCH_FLAGS,
    check_known,
    projector_keys,
    refuse_apollo,
    remedy,
    without_torch_flags,
)
from lowrank_optim.groups.layers import layers_of, takes_turns
from lowrank_optim.groups.linear_maps import is_linear_map
from lowrank_optim.groups.names import uid_of
from lowrank_optim.groups.notices import param_name as _name
from lowrank_optim.ops.devices import recording
from lowrank_optim.residuals import Residual
from lowrank_optim.rules.base import Rule
from lowrank_optim.sharding.parts import is_sharded, part_of
from lowrank_optim.stores import STORES
from lowrank_optim.subspaces.base import PROJECTORS, Shared, Subspace, make_projector, view_for
from lowrank_optim.subspaces.block import Block, takes_blocks
from lowrank_optim.tensors.matrix import MatrixView
from lowrank_optim.tensors.projected_grad import ProjectedGrad

logger = logging.getLogger(__name__)

AGAIN = "step() again steps these alone, zero_grad() leaves them out"
RANKS_DIFFER = (
    "Other ranks may have taken all of it, or wait for this one: end the run, and go on from a "
    "checkpoint"
)
ALONE = (
    "a step of %s raised%s amid what ranks do together, and messages of another step would meet "
    f"those of that one. {RANKS_DIFFER}"
)
PARTLY = (
    "a step that raised may have stepped %s in part, and this one steps it whole: moments and "
    "decay of that batch may be in it twice. Load a checkpoint where that matters"
)


class Options(TypedDict, total=False):
    """Keyword arguments that every optimizer takes, and every parameter group may override."""

    rank: int | float
    """Directions kept, or a fraction of the projected dimension (default: 128)."""
    update_proj_gap: int
    """Steps between refreshes of a basis (default: 200)."""
    scale: float
    """Factor of the low-rank update (default: 0.25)."""
    proj_type: str
    """Side to project: std, reverse_std, left, right, full (default: "std", the smaller)."""
    projector: str
    """How a basis is found: a registered name (default: "rsvd")."""
    on_refresh: str
    """What moments do at a refresh: keep, reset, project (default: "keep")."""
    state_dtype: str
    """How moments are stored: float32, bfloat16, 8bit, 4bit (default: "float32")."""
    state_device: str | None
    """Where moments lie between steps: "cpu" is pinned host memory, None is beside the parameter
    (default: None)."""
    stochastic_rounding: bool
    """Round updates of bfloat16 weights without bias (default: False)."""
    stagger: bool
    """Spread refreshes over the gap; False refreshes all at 0, T, 2T (default: True)."""
    maximize: bool
    """Ascend (default: False)."""
    capturable: bool
    """Count steps on the device, so that a CUDA graph can hold one (default: False)."""
    flatten: bool
    """See a 3-d parameter as one matrix (out, rest), as of Conv1d, not as a batch, as of experts
    (default: False; :func:`lowrank_optim.lowrank_groups` sets it by module)."""
    seed: int
    """Of random bases and stochastic rounding (default: 0)."""


class ProjectorOptions(Options, total=False):
    """:class:`Options`, and what one ``projector`` reads: another refuses it."""

    oversample: int
    """Of ``"rsvd"``: columns of the search beyond the rank."""
    max_iterations: int
    """Of ``"rsvd"``: power iterations at most."""
    tolerance: float
    """Of ``"rsvd"``: part of the captured energy for which another iteration is not worth it."""
    random_from: int | float
    """Of ``"golore"``: the first step with random bases, or the part of ``total_steps`` before."""
    total_steps: int | None
    """Of ``"golore"``: steps of the run."""
    basis: str
    """Of ``"dct"``: ``"dct2"`` or ``"dct3"``."""
    transform: str
    """Of ``"dct"``: how the transform is computed."""
    ranking: str
    """Of ``"dct"`` and ``"hadamard"``: the norm by which directions are chosen."""
    layers: str | None
    """Of ``"block"``: a pattern whose matches are one block each."""
    active_layers: int
    """Of ``"block"``: blocks of ``layers`` that are active at once."""
    layer_weights: Any
    """Of ``"block"``: weights of the draws of ``layers``."""


DEFAULTS: Options = {
    "rank": 128,
    "update_proj_gap": 200,
    "scale": 0.25,
    "proj_type": "std",
    "projector": "rsvd",
    "on_refresh": "keep",
    "state_dtype": "float32",
    "state_device": None,
    "stochastic_rounding": False,
    "stagger": True,
    "maximize": False,
    "capturable": False,
    "flatten": False,
    "seed": 0,
}


def with_defaults(cls: type[LowRankOptimizer], options: Mapping[str, Any]) -> Group:
    """``options`` of a constructor completed, without torch's that have no effect here.

    What the projector reads is an option too, as it is a key of groups.

    Raises:
        TypeError: an option is not known.
        ValueError: an argument of torch asks for something that no optimizer here does.
    """
    name = cls.__name__
    refuse_apollo(options, cls.group_keys(), name, "the constructor")
    given = {**DEFAULTS, **without_torch_flags(options, name)}
    read = set() if "projector" in cls.unused else projector_keys(given["projector"])
    unknown = [key for key in given if key not in DEFAULTS and key not in read]
    if unknown:
        key, allowed = unknown[0], cls.group_keys() | read | TORCH_FLAGS.keys()
        raise TypeError(
            f"{name}() got an unexpected keyword argument {key!r}{remedy(key, allowed)}"
        )
    return given


class LowRankOptimizer(PlannedOptimizer):
    """Base of every method: a subclass says which rule and residual its groups mean.

    Args:
        params: parameters, named parameters, or groups of either, as in ``torch.optim``.
        defaults: one value for every group key; ``rank`` applies only where no group names one.
    """

    rule_class: ClassVar[type[Rule]]

    extra_keys: ClassVar[tuple[str, ...]] = ()
    """Group keys that it reads beside the arguments of its constructor."""
    unused: ClassVar[Mapping[str, str]] = {}
    """Arguments of every optimizer that mean nothing to this one, and why."""
    _discarding: Callable[[], None] | None = None
    """Called before gradients are zeroed: a batch is over, or will not be stepped."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not cls.__name__.startswith("_"):
            METHODS[cls.__name__] = cls

    @classmethod
    @cache  # signatures are slow to read, and making an optimizer reads every method's
    def group_keys(cls) -> frozenset[str]:
        """Keys of parameter groups that this class reads: arguments of it and of its rule."""
        # a wrapper that becomes a subclass, as Lightning's, has its own constructor before ours
        ours = next(
            c for c in cls.__mro__ if issubclass(c, LowRankOptimizer) and "__init__" in vars(c)
        )
        own = inspect.signature(ours.__init__).parameters.values()
        named = {x.name for x in own if x.kind is not x.VAR_KEYWORD}
        named |= {field.name for field in fields(cls.rule_class)}
        return frozenset((named | DEFAULTS.keys() | {*cls.extra_keys}) - {"self", "params"})

    def __init__(self, params: Iterable[Any], defaults: Group) -> None:
        defaults = {**canonical(defaults), "method": type(self).__name__}
        self._check(defaults)
        check_rank(defaults["rank"], "free_rule" in defaults)
        if isinstance(params, Tensor):
            super().__init__(params, defaults)  # torch's own error
        groups = self._entries(params, defaults)
        if any(isinstance(g, dict) and "rank" in canonical(g) for g in groups):
            defaults = {**defaults, "rank": None}
        self._plans: dict[int, Plan] = {}
        self._places: dict[Tensor, int] = {}
        self._matrices: dict[int, int] = {}
        self._shared = Shared()
        self._replicas = Replicas()
        self._staging = Staging()
        self._taken: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        """Who took a step that raised, by place: the gradient that it was, and its version."""
        self._partly: list[str] = []
        """Names of those that a step which raised may have left stepped in part."""
        self._alone = ""
        """Which rank raised alone amid what ranks do together, as a clause."""
        super().__init__(groups, defaults)
        self._traced = Traced(self)

    def _entries(self, params: Iterable[Any], defaults: Group) -> list[Any]:
        """What ``params`` yields; nothing is read before the hyper-parameters are checked."""
        return list(params)

    def _check(self, group: Group) -> None:
        """Raise for values that no step could use: of the constructor, or of a whole group.

        Raises:
            ValueError: one is out of range, or ``capturable`` does not go with others.
        """
        check(group)
        if group.get("capturable"):
            chosen = self._strategies(group)
            check_capturable(chosen, group, type(self).__name__, self.by_host(group))

    def _allowed(self, group: Group) -> set[str]:
        """Keys that a group may have: those that something reads."""
        projector = group.get("projector", self.defaults["projector"])
        return {*self.group_keys(), *self.defaults, *PLACES, *projector_keys(projector)}

    def residual(self, group: Group) -> Residual:
        """What happens outside the subspace, for parameters of ``group``."""
        raise NotImplementedError

    def subspace(self, group: Group, view: MatrixView) -> Subspace:
        """The coordinates that ``group`` asks for, of one of its matrices."""
        return make_projector(group, view)

    def by_host(self, group: Group) -> str | None:
        """Why every step of a group needs the host, as a clause; None if it does not."""
        return None

    def gap(self, group: Group) -> int:
        """Steps between refreshes in ``group``."""
        return int(group["update_proj_gap"])

    def __getstate__(self) -> dict[str, Any]:
        """As of torch, once accelerators have said which of their refreshes came about."""
        self._settle()
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore, with defaults for keys that groups of an older or another optimizer lack."""
        given = [self._matrices.get(id(g), 0) for g in self.__dict__.get("param_groups", ())]
        super().__setstate__(state)
        self._plans = {}
        self._places = self.__dict__.get("_places", {})
        self._matrices = {id(g): n for g, n in zip(self.param_groups, given, strict=False)}
        self._shared = Shared()
        self._replicas = Replicas()
        self._staging = Staging()
        self._taken, self._partly, self._alone = {}, [], ""
        self._traced = Traced(self, self.__dict__.get("_traced"))
        for group in self.param_groups:
            for key, value in self.defaults.items():
                if key != "differentiable":  # torch's own addition, not a group key of ours
                    group.setdefault(key, value)
            group.setdefault("targets", "auto")

    def add_param_group(self, param_group: Group) -> None:
        """Add a group; released keys are renamed, and keys and values checked.

        Raises:
            ValueError: a key is not known or has no effect here, a value is out of range, or a
                parameter is complex.
        """
        if not isinstance(param_group, dict):
            super().add_param_group(param_group)  # torch's own error
        name, place = type(self).__name__, f"group {len(self.param_groups)}"
        given = without_torch_flags(param_group, name)
        check_known(given, self._allowed(given), name, place)
        group = {**canonical(given), "method": name}
        self._check({**self.defaults, **group})
        asked = group.get("rank") is not None
        owner = zero.enclosing()
        if owner is not None:
            zero.check_whole(owner, {**self.defaults, **group})
            asked = asked and not zero.from_constructor(owner, group)
            if not self._places:
                zero.check_loads(owner, self)
            self._places.update(zero.places(owner))
        group.setdefault("targets", "all" if asked else "auto")
        super().add_param_group(group)
        for i, param in enumerate(group["params"]):
            if param.is_complex():
                self.param_groups.pop()
                raise ValueError(f"{name} does not support complex parameters: {_name(group, i)}")
        try:
            check_flattened(group)
            check_named(group)
            for i, param in enumerate(group["params"]):
                check_overlap(param, _name(group, i))
            if takes_blocks(group):
                self._items(self.param_groups[-1])
        except ValueError:  # as many blocks as their order cannot take
            self.param_groups.pop()
            raise
        self._matrices[id(self.param_groups[-1])] = sum(p.dim() >= 2 for p in group["params"])
        self._warn_clamped(group)

    def _warn_clamped(self, group: Group) -> None:
        """What a user may not expect of a group: said once, and of the defaults once in all."""
        told = self.__dict__.setdefault("_told", set())
        ranked = group.get("layers") is None
        texts = {
            "clamped": notices.clamped(group) if ranked else None,
            "vocabulary": notices.vocabulary(group, self._wants) if ranked else None,
            "covered": notices.covered(group, self._is_map) if ranked else None,
            "unused": notices.unused(group, type(self).__name__, self._unused()),
        }
        for kind, text in texts.items():
            if text is not None and (kind == "clamped" or kind not in told):
                told.add(kind)
                warnings.warn(text, stacklevel=notices.users_level())

    # ---------------------------------------------------------------- plan

    def _items(self, group: Group) -> list[ParamPlan]:
        """The group's parameters, viewed and with subspaces; made anew when a key changed.

        Raises:
            ValueError: the group was edited in a way that the state of its parameters, or anything,
                cannot follow.
            RuntimeError: a parameter changed its shape, dtype or device under its state, or was
                replaced.
        """
        now = structure(group)
        key = tuple(map(id, group["params"])), tuple(now.items())
        plan = self._plans.get(id(group))
        if plan is None or plan.key != key or any(map(moved, plan.items)):
            before = {} if plan is None else plan.structure
            was = [] if plan is None else plan.items
            self._check(group)
            check_flattened(group)
            chosen, method = self._strategies(group), type(self).__name__
            check_partitioned(group, self._matrices.get(id(group), 0), chosen, method)
            if plan is not None:
                added = {k: v for k, v in group.items() if k in now and k not in before}
                check_known(added, self._allowed(group), method, "an edited group")
                check_moved([item for item in was if item.param in self.state])
            items = self._planned(group)
            check_replaced(items, was, self.state)
            check_edits(items, was, self.state, chosen, before, now)
            for item in items:
                state = self.state.get(item.param, {})
                if before.get("capturable") != now["capturable"]:
                    follow_(state, item.param, chosen)
                edited = before.get("state_device") != now["state_device"]
                if edited and (before or chosen.offload):  # or others have put it there, unpinned
                    settle_(state, item, chosen)
            plan = self._plans[id(group)] = Plan(key, now, items)
        return plan.items

    def _planned(self, group: Group) -> list[ParamPlan]:
        """Items of a group as it is, whatever state there is."""
        items = list(self._plan(group))
        if group.get("layers") is None:
            return placed(items)
        return placed(items, *layers_of(group, self.param_groups))

    def _before(self, group: Group) -> list[Group]:
        """The groups that come before one; all of them, if it is not yet there."""
        return [*takewhile(lambda other: other is not group, self.param_groups)]

    def _plan(self, group: Group) -> Iterator[ParamPlan]:
        start = sum(len(other["params"]) for other in self._before(group))
        names = group.get("param_names")
        dense = []
        chosen = self._strategies(group)
        kinds: dict[Any, int] = {}
        for i, param in enumerate(group["params"]):
            view = view_for(group, param.shape) if self._wants(group, i) else None
            if view is None and param.dim() >= 2:
                dense.append(_name(group, i))
            subspace = None
            if view is not None:
                subspace = self.subspace(group, view).sharing(self._shared)
                _check_fit(_name(group, i), subspace, self.residual(group))
            kind = kinds.setdefault((view, subspace), len(kinds))
            shared = None if isinstance(subspace, Block) else view
            unit = 1
            if shared is not None and subspace is not None and is_sharded(param):
                unit = unit_of(shared, subspace, chosen)
            part = part_of(param, shared, _name(group, i), unit)
            uid = self._places.get(param, start + i) if names is None else uid_of(names[i])
            item = ParamPlan(param, _name(group, i), start + i, uid, view, subspace, kind, part)
            check_supported(item, chosen, type(self).__name__)
            yield item
        if dense and group["rank"] is not None:
            logger.info("dense in a group of rank %s: %s", group["rank"], ", ".join(dense))

    def _wants(self, group: Group, i: int) -> bool:
        """Whether a group asks for parameter ``i`` to be projected, if it is a matrix."""
        rank, param = group["rank"], group["params"][i]
        if rank is None or param.dim() < 2:
            return False
        if group.get("layers") is not None and not takes_turns(group, i):
            return False
        if group["targets"] == "all":
            return True
        view, projector = view_for(group, param.shape), PROJECTORS[group["projector"]]
        if view is None or (rank != 1.0 and projector.covers(rank, view)):
            return False  # a density of 1 is asked for
        return self._is_map(group, i)

    def _unused(self) -> dict[str, tuple[Any, str]]:
        """Keys without a meaning here, their defaults, and what has it."""
        own = {**DEFAULTS, **getattr(self, "preset", {})}
        return {key: (own[key], why) for key, why in self.unused.items()}

    def _is_map(self, group: Group, i: int) -> bool:
        """Whether parameter ``i`` is a linear map, as far as its name and shape tell."""
        names = group.get("param_names")
        shape = group["params"][i].shape
        flatten = group.get("flatten", False)  # of an older pickle
        return is_linear_map(None if names is None else names[i], shape, flatten)

    def _strategies(self, group: Group) -> Strategies:
        return Strategies(
            rule=self.rule_class.from_group(group),
            residual=self.residual(group),
            store=STORES[group["state_dtype"]],
            on_refresh=group["on_refresh"],
            gap=self.gap(group),
            stagger=group["stagger"],
            seed=group["seed"],
            rounding=group["stochastic_rounding"],
            maximize=group["maximize"],
            capturable=bool(group.get("capturable")),
            offload=group.get("state_device") == "cpu",
            lr_scale=group.get("proj_params_lr_scale", 1.0),
        )

    # ---------------------------------------------------------------- step

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. In a compiled graph it is one op, unless there is a closure or a hook.

        Args:
            closure: re-evaluates the model and returns the loss, with gradients enabled.

        Returns:
            The closure's loss, or None.
        """
        if torch.compiler.is_dynamo_compiling():
            if closure is None and self._traced.step():
                return None
            skip = getattr(torch._dynamo, "skip_frame", None)  # torch 2.6 has none: two breaks
            if skip is not None:
                skip("step() with a closure, hooks or tensor subclasses")
        return self._step_eagerly(closure)

    # one boundary for compilers: what a step does is decided by numbers on the host
    @torch._disable_dynamo  # type: ignore[attr-defined]
    @Optimizer.profile_hook_step  # within it, as hooks are host work too
    @torch.no_grad()
    def _step_eagerly(self, closure: Callable[[], Any] | None = None) -> Any:
        self._opt_called = True
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._forget_taken()
        first = not self.state
        with tracing.hosted():
            self._step_groups([self._checked(group) for group in self.param_groups])
        if first and makes_state():
            holds_any_count(self.state.values())
        return loss

    def _step_groups(self, work: list[tuple[Strategies, list[ParamPlan], list[ParamPlan]]]) -> None:
        if self._alone:
            raise RuntimeError(ALONE % (type(self).__name__, self._alone))
        recorded = recording()
        if recorded:
            check_recorded(self.param_groups, bool(self.state), type(self).__name__)
        self._introduce(any(ready for *_, ready in work))
        self._make_state()
        if self._partly:
            logger.warning(PARTLY, ", ".join(self._partly))
            self._partly = []
        undo = Undo(self._staging.wait)
        try:
            with (
                undo
            ):  # of all groups: a basis found with other ranks is of no use without its step
                if not recorded:  # as nothing is refreshed
                    self._with_other_ranks(work, undo)
                for group, (chosen, items, ready) in zip(self.param_groups, work, strict=True):
                    here = [item for item in ready if not item.sharded]
                    self._advance(items, here, chosen, undo)
                    self._step_items(here, group, chosen, undo)
                self._staging.wait()  # whoever reads the state next finds it there
        except BaseException as error:
            for _, items, _ in work:
                for item in items:
                    item.tried = -1  # the refreshes of this step are undone
            self._remember(undo.taken, work)
            count = sum(i.alone or i.subspace is not None for *_, ready in work for i in ready)
            error.add_note(
                f"{len(undo.taken)} of {count} parameters had taken this step of "
                f"{type(self).__name__}{this_rank()}; the others are as they were. "
                + (RANKS_DIFFER if self._alone else AGAIN)
            )
            self._partly = undo.partly
            if undo.partly:
                error.add_note(
                    f"but {', '.join(undo.partly)} may have been stepped in part: what is large, "
                    "or on an accelerator, is not copied before. Go on from a checkpoint where "
                    "that matters"
                )
            raise
        self._taken = {}

    def _remember(
        self, taken: Sequence[int], work: list[tuple[Strategies, list[ParamPlan], list[ParamPlan]]]
    ) -> None:
        """Note who took a step that raised, by the gradient: with it nobody takes it twice."""
        ready = {i.index: i.param.grad for *_, own in work for i in own if not i.sharded}
        for place in taken:
            grad = ready.get(place)
            if grad is not None:
                self._taken[place] = weakref.ref(grad), grad._version

    def _forget_taken(self) -> None:
        """Unless this is the step that raised, with the gradients of then, all take it."""
        params: list[Tensor] = [p for group in self.param_groups for p in group["params"]]
        for place, (ref, version) in self._taken.items():
            grad = params[place].grad if place < len(params) else None
            if grad is None or ref() is not grad or grad._version != version:
                self._taken = {}
                return

    def _with_other_ranks(
        self, work: list[tuple[Strategies, list[ParamPlan], list[ParamPlan]]], undo: Undo
    ) -> None:
        """What ranks do together: all of a step of DTensors, and the refreshes of replicas."""
        alike = {}
        if not self._places:  # of ZeroRedundancyOptimizer ranks have a part of them each
            alike = self._replicas.groups(lambda: [i for _, items, _ in work for i in items])
        if not alike and not any([i.sharded for _, items, _ in work for i in items]):
            return
        sharded, replicas = ShardedStep(self._staging), []
        for group, (chosen, items, ready) in zip(self.param_groups, work, strict=True):
            own = [i for i in items if i.sharded]
            own = [i for i in own if i.param.requires_grad or i.param.grad is not None]
            if own:
                states = [self._state_of(item, chosen) for item in own]
                sharded.add(own, states, chosen, group["lr"], group["weight_decay"], undo)
            if alike:
                replicas += [(item, self._state_of(item, chosen), chosen) for item in ready]
        try:
            sharded.run(undo)
            if alike:
                refresh_alike(replicas, alike, undo)
        except BaseException as error:
            self._alone = this_rank() if is_alone(error) else ""
            raise

    def _introduce(self, ready: bool) -> None:
        """Say before the first step what it will do, and of any, once, that it does nothing."""
        begun, told = bool(self.state), self.__dict__.setdefault("_told", set())
        if not ready:
            # inside backward, or before an error, they may have had one that is used by now
            if begun and (self._discarding is not None or self._taken or "idle" in told):
                return
            told.add("idle")
            warnings.warn(
                f"no parameter of this {type(self).__name__} has a gradient, and its step changes "
                "nothing: call backward() before it, and make the optimizer after what replaces "
                "the parameters of a model",
                stacklevel=notices.users_level(),
            )
        if begun or not ready:
            return
        found = summary_of(self)
        logger.info("%s", found)
        shortfall = found.shortfall()
        if shortfall is not None and any(g["rank"] is not None for g in self.param_groups):
            warnings.warn(shortfall, stacklevel=notices.users_level())

    def _checked(self, group: Group) -> tuple[Strategies, list[ParamPlan], list[ParamPlan]]:
        """What a group chose, its items, and those with a gradient that can be stepped.

        Raises:
            RuntimeError: a gradient, or a parameter, is not what a step can use, or the parameter
                belongs to no model any more.
            ValueError: the group was edited in a way that its state cannot follow.
        """
        items = self._items(group)
        chosen = self._strategies(group)
        ready = [item for item in items if item.param.grad is not None]
        ready = [item for item in ready if item.index not in self._taken]
        if len(ready) < len(items):  # at any step: its state may have been loaded
            check_owned([item.param for item in items if item.param.grad is None])
        check_gradients(ready, type(self).__name__)
        if chosen.capturable:
            check_on_device(ready)
        return chosen, items, ready

    def _advance(
        self, items: list[ParamPlan], ready: list[ParamPlan], chosen: Strategies, undo: Undo
    ) -> None:
        """Blocks of a group take turns before it steps."""
        if not any(isinstance(item.subspace, Block) for item in ready):
            return
        for item in ready:
            self._state_of(item, chosen)
        self._begin_blocks(items, undo)
        advance(items, self.state, chosen, self._taken)

    def _begin_blocks(self, items: list[ParamPlan], undo: Undo) -> None:
        for item in items:
            if isinstance(item.subspace, Block) and item.param in self.state:
                undo.begin(self.state[item.param])

    def _trains(self, param: Tensor) -> bool:
        """Whether a parameter is one that training changes, now or in its turn."""
        return param.requires_grad

    def _make_state(self) -> None:
        """Before the first step, the state of all that can be trained, with a gradient or not."""
        if self.state:
            return
        for group in self.param_groups:
            chosen = self._strategies(group)
            for item in self._items(group):
                if self._trains(item.param):
                    self._state_of(item, chosen)

    @torch.no_grad()
    def step_param(self, param: Tensor) -> None:
        """Step one parameter alone: what a step does to it, callable from inside backward.

        Raises:
            ValueError: the parameter is in no group.
            NotImplementedError: it lies on several ranks.
        """
        for group in self.param_groups:
            for item in self._items(group):
                if item.param is param:
                    if is_sharded(param):
                        raise NotImplementedError(
                            f"step_param does not support {item.name}, a DTensor: ranks step all "
                            "of an optimizer's together. Call step()"
                        )
                    if param.grad is not None:
                        self._step_alone(item, group)
                        self._staging.wait()
                    return
        raise ValueError("the parameter is in none of the optimizer's groups")

    def _step_alone(
        self,
        item: ParamPlan,
        group: Group,
        begins: bool | None = None,
        alike: Mapping[int, Any] | None = None,
    ) -> None:
        """One parameter with a gradient; what rests of its state may be on its way back then.

        Args:
            item: the parameter.
            group: its group.
            begins: as of ``engine.blocks.catch_up``.
            alike: ranks that step it at the same place among all that they exchange.
        """
        chosen = self._strategies(group)
        check_gradients([item], type(self).__name__)
        with tracing.hosted(), Undo(self._staging.wait) as undo:
            if isinstance(item.subspace, Block):
                self._state_of(item, chosen)
                items = self._items(group)
                self._begin_blocks(items, undo)
                catch_up(item, items, self.state, chosen, begins)
            if alike:
                refresh_alike([(item, self._state_of(item, chosen), chosen)], alike, undo)
            self._step_items([item], group, chosen, undo)

    def _step_shards(self, work: Sequence[tuple[Group, list[ParamPlan]]], begun: set[int]) -> None:
        """Some parameters that lie on several ranks, all of which have a gradient.

        Args:
            work: groups, and which of theirs.
            begun: ids of groups whose blocks have begun this step; those that do now are added.
        """
        with tracing.hosted(), Undo(self._staging.wait) as undo:
            sharded = ShardedStep(self._staging)
            for group, own in work:
                chosen = self._strategies(group)
                check_gradients(own, type(self).__name__)
                states = [self._state_of(item, chosen) for item in own]
                rest: list[tuple[ParamPlan, State]] | None = None
                if any(isinstance(item.subspace, Block) for item in own):
                    others = [i for i in self._items(group) if i.sharded and i not in own]
                    rest = [(i, self._state_of(i, chosen)) for i in others]
                begins = id(group) not in begun
                if rest is not None:
                    begun.add(id(group))
                sharded.add(
                    own, states, chosen, group["lr"], group["weight_decay"], undo, rest, begins
                )
            sharded.run(undo)

    def _state_of(self, item: ParamPlan, chosen: Strategies) -> State:
        state: State = self.state[item.param]
        if item.sharded:
            return local_state(item, self.state[item.param], chosen)
        if not state:
            state.update(init_state(item, chosen, item.param))
            if tracing.fake_mode() is not None:
                make = partial(init_state, item, chosen)
                state.update(tracing.real_entries(make, item.param))
            if isinstance(item.param.grad, ProjectedGrad):
                state.update(item.param.grad.fresh)  # now: else two bases of every matrix exist
        return state

    def _step_items(
        self, items: list[ParamPlan], group: Group, chosen: Strategies, undo: Undo
    ) -> None:
        state_of = partial(self._state_of, chosen=chosen)
        hyper = group["lr"], group["weight_decay"]
        step_items(items, state_of, chosen, *hyper, undo, self._staging)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in ``torch.optim``; within a compiled graph too, where gradients are let go of."""
        if torch.compiler.is_dynamo_compiling() and set_to_none:
            self._traced.free_gradients()
        else:
            self._taken = {}
            if self._discarding is not None:
                self._discarding()
            super().zero_grad(set_to_none)

    # ---------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """As of torch; where its loader fills it in, with all keys and numbers that it may need."""
        self._settle()
        state_dict = super().state_dict()
        if is_template():
            state_dict = with_any_count(state_dict)
        return with_places(self, state_dict) if filled_in(self) else state_dict

    def _settle(self) -> None:
        """Let what is under way arrive, and ask accelerators whether refreshes came about."""
        self._staging.wait()
        for state in self.state.values():
            answers.settle_(state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint: tensors keep their dtypes and are copied; all hooks run.

        Raises:
            ValueError: a shape, rank, method or name differs, or a value is one that no step could
                use, such as an index outside its matrix; the optimizer is left as it was.
        """
        load_state_dict(self, super().load_state_dict, state_dict)
        self._partly, self._alone = [], ""

    def projected_factor(self, group: Group) -> float:
        """What multiplies the learning rate of the projected part of ``group``."""
        return float(group["scale"] * group.get("proj_params_lr_scale", 1.0))

    def summary(self) -> Summary:
        """What is projected, how large the state is, and the learning rate of the projected part.

        The first step logs it, at ``INFO``.

        Example:
            >>> import torch
            >>> from lowrank_optim import GaLoreAdamW
            >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 8))
            >>> str(GaLoreAdamW(model.named_parameters(), lr=1e-2, rank=4).summary()).split("; ")
            ['GaLoreAdamW: 2 of 4 tensors projected, 98.5% of 4,680 parameters', 'state 5.72 KiB', \
'learning rate 0.01 (0.0025 of the projected part)']
        """
        return summary_of(self)

    def postponed_refreshes(self) -> dict[str, int]:
        """How often each matrix had a refresh postponed by a zero, NaN or Inf gradient.

        An accelerator is waited for.
        """
        self._settle()
        counts = {}
        for group in self.param_groups:
            for item in self._items(group):
                count = int(self.state.get(item.param, {}).get("postponed", 0))
                if count:
                    counts[item.name] = count
        return counts


LowRankOptimizer.step.hooked = True  # type: ignore[attr-defined]  # torch need not do it again
# nor need schedulers wrap it to see it called, in a file that compilers skip
LowRankOptimizer.step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]


def _check_fit(name: str, subspace: Subspace, residual: Residual) -> None:
    """Raise where no step is defined.

    Raises:
        ValueError: the subspace does not go with the residual.
    """
    reason = subspace.refuses(residual.wants)
    if reason is not None:
        raise ValueError(
            f"{type(residual).__name__} does not go with {type(subspace).__name__}, the subspace "
            f"of {name}: {reason}; take another of the two, or Drop"
        )
