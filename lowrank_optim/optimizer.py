"""The optimizer as torch knows one: groups, steps, gradients, and state that is plain tensors."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from lowrank_optim.checkpoints.counters import is_template, with_any_count
from lowrank_optim.checkpoints.load import load_state_dict
from lowrank_optim.checkpoints.loaders import filled_in, holds_any_count, makes_state, with_places
from lowrank_optim.engine import tracing, zero
from lowrank_optim.engine.compiled import Traced
from lowrank_optim.engine.preflight import check_given
from lowrank_optim.engine.recording import check_capturable, check_recorded
from lowrank_optim.engine.stepped import SteppedOptimizer
from lowrank_optim.engine.summary import Summary, introduce, summary_of
from lowrank_optim.groups import Group, canonical, check, check_rank, notices
from lowrank_optim.groups.keys import (
    METHODS,
    PLACES,
    check_known,
    projector_keys,
    without_torch_flags,
)
from lowrank_optim.groups.options import DEFAULTS, Options, ProjectorOptions, with_defaults
from lowrank_optim.ops.devices import recording
from lowrank_optim.sharding.parts import is_sharded
from lowrank_optim.subspaces.block import takes_blocks

__all__ = ["DEFAULTS", "LowRankOptimizer", "Options", "ProjectorOptions", "with_defaults"]


class LowRankOptimizer(SteppedOptimizer):
    """Base of every method: a subclass says which rule and residual its groups mean.

    It has what all methods share: parameter groups, ``step()``, checkpoints and ``summary()``. To
    train, make one of its subclasses, such as :class:`lowrank_optim.GaLoreAdamW`.

    Args:
        params: parameters, named parameters, or groups of either, as in ``torch.optim``.
        defaults: one value for every group key; ``rank`` applies only where no group names one.

    Raises:
        ValueError: a hyper-parameter is out of range, or a group holds a key that nothing reads.

    Example:
        >>> import torch
        >>> from lowrank_optim import GaLoreAdamW, LowRankOptimizer
        >>> optimizer = GaLoreAdamW([torch.nn.Parameter(torch.zeros(8, 16))], rank=2)
        >>> isinstance(optimizer, LowRankOptimizer), isinstance(optimizer, torch.optim.Optimizer)
        (True, True)
    """

    extra_keys: ClassVar[tuple[str, ...]] = ()
    """Group keys that it reads beside the arguments of its constructor."""
    unused: ClassVar[Mapping[str, str]] = {}
    """Arguments of every optimizer that mean nothing to this one, and why."""
    default_rank: ClassVar[int | float] = DEFAULTS["rank"]
    """What the constructor takes for a rank where none is given."""
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
        own = [canonical(g) for g in groups if isinstance(g, dict)]
        named = [g["rank"] for g in own if "rank" in g]
        if named:
            if "rank" not in self.unused and defaults["rank"] not in (self.default_rank, *named):
                text = notices.unheard(defaults["rank"], named, type(self).__name__)
                warnings.warn(text, stacklevel=notices.users_level())
            defaults = {**defaults, "rank": None}
        self._told: set[str] = set()
        """Kinds of warnings that are given once, and were."""
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

    def by_host(self, group: Group) -> str | None:
        """Why every step of a group needs the host, as a clause; None if it does not."""
        return None

    def __getstate__(self) -> dict[str, Any]:
        """As of torch, once accelerators have said which of their refreshes came about."""
        self._settle()
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore, with defaults for keys that groups of an older or another optimizer lack."""
        super().__setstate__(state)
        self._told = self.__dict__.get("_told", set())
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
        try:
            check_given(group, name)
            if takes_blocks(group):
                self._items(self.param_groups[-1])
        except ValueError:  # as many blocks as their order cannot take
            self.param_groups.pop()
            raise
        self._matrices[id(self.param_groups[-1])] = sum(p.dim() >= 2 for p in group["params"])
        notices.warn_of(group, self._told, name, self._wants, self._is_map, self._unused())

    def _unused(self) -> dict[str, tuple[Any, str]]:
        """Keys without a meaning here, their defaults, and what has it."""
        own = {**DEFAULTS, **getattr(self, "preset", {})}
        return {key: (own[key], why) for key, why in self.unused.items()}

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
        self._retry.forget_unless([p for group in self.param_groups for p in group["params"]])
        first = not self.state
        with tracing.hosted():
            work = [self._checked(group) for group in self.param_groups]
            if recording():
                check_recorded(self.param_groups, bool(self.state), type(self).__name__)
            self._introduce(any(group.ready for group in work))
            self._step_groups(work)
        if first and makes_state():
            holds_any_count(self.state.values())
        return loss

    def _introduce(self, ready: bool) -> None:
        """Say before the first step what it will do, and of any, once, that it does nothing."""
        begun = bool(self.state)
        if ready:
            if not begun:
                introduce(self)
            return
        # inside backward, or before an error, they may have had one that is used by now
        if begun and (self._discarding is not None or self._retry.taken or "idle" in self._told):
            return
        self._told.add("idle")
        warnings.warn(
            f"no parameter of this {type(self).__name__} has a gradient, and its step changes "
            "nothing: call backward() before it, and make the optimizer after what replaces "
            "the parameters of a model",
            stacklevel=notices.users_level(),
        )

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

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in ``torch.optim``; within a compiled graph too, where gradients are let go of."""
        if torch.compiler.is_dynamo_compiling() and set_to_none:
            self._traced.free_gradients()
        else:
            self._retry.forget()
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

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint: tensors keep their dtypes and are copied; all hooks run.

        Raises:
            ValueError: a shape, rank, method or name differs, or a value is one that no step could
                use, such as an index outside its matrix; the optimizer is left as it was.
        """
        load_state_dict(self, super().load_state_dict, state_dict)

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
