"""What takes gradients inside backward, whatever it does with them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Self

from torch import Tensor

from lowrank_optim.backward.parallel import MESSAGE, check_plain, in_ddp
from lowrank_optim.backward.projecting import items_of
from lowrank_optim.engine import tracing
from lowrank_optim.engine.plan import ParamPlan
from lowrank_optim.groups import Group
from lowrank_optim.optimizer import LowRankOptimizer

_ATTACHED = "_in_backward"


def attached_to(param: Tensor) -> Iterator[InBackward]:
    """What takes the gradient of a parameter inside backward, for whichever optimizer."""
    hooks = getattr(param, "_post_accumulate_grad_hooks", None) or {}
    for hook in list(hooks.values()):
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, InBackward):
            yield owner


class InBackward:
    """What :func:`attach_in_backward` returns. ``with`` removes it at the end.

    Parameters unfrozen or added later are taken up at the next step.
    """

    def __init__(self, optimizer: LowRankOptimizer, max_norm: float | None) -> None:
        if getattr(optimizer, _ATTACHED, None) is not None:
            raise RuntimeError("the optimizer works inside backward already: remove() that first")
        self.optimizer, self.max_norm = optimizer, max_norm
        self._in_closure = False
        self._checked = False
        self._plans: dict[Tensor, tuple[Group, list[ParamPlan], ParamPlan]] = {}
        self._check()
        for _, plan in items_of(optimizer):
            if list(attached_to(plan.param)):
                raise RuntimeError(
                    f"another optimizer takes the gradient of {plan.name} inside backward: "
                    "remove() the handle that attach_in_backward returned for it first"
                )
        self._hooks: dict[Tensor, Any] = {}
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        setattr(optimizer, _ATTACHED, self)
        self._hook_all()

    def remove(self) -> None:
        """Give every parameter its gradient back; a gradient already projected stays so."""
        for handle in (*self._handles, *self._hooks.values()):
            handle.remove()
        self._hooks, self._handles = {}, []
        if getattr(self.optimizer, _ATTACHED, None) is self:
            setattr(self.optimizer, _ATTACHED, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _hook_all(self) -> None:
        for group in self.optimizer.param_groups:
            for param in group["params"]:
                if param.requires_grad and param not in self._hooks:
                    hook = param.register_post_accumulate_grad_hook(self._hook)
                    self._hooks[param] = hook

    def _find(self, param: Tensor) -> tuple[Group, ParamPlan]:
        """The group and plan of a parameter, looked up again when groups were edited or loaded."""
        known = self._plans.get(param)
        if known is not None:
            group, plans, plan = known
            if any(g is group for g in self.optimizer.param_groups) and (
                self.optimizer._items(group) is plans
            ):
                return group, plan
        self._plans = {
            plan.param: (group, plans, plan)
            for group in self.optimizer.param_groups
            for plans in [self.optimizer._items(group)]
            for plan in plans
        }
        group, _, plan = self._plans[param]
        return group, plan

    def _before_step(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        check_plain(self.optimizer.param_groups)
        self._settle()
        # a closure that computes gradients is refused; Lightning passes one that does not
        return tuple(map(self._guarded, args)), {k: self._guarded(x) for k, x in kwargs.items()}

    def _guarded(self, x: Any) -> Any:
        """An argument of ``step``; a closure is watched while it runs."""
        if x is self.optimizer or not callable(x):
            return x

        def closure() -> Any:
            self._in_closure = True
            try:
                return x()
            finally:
                self._in_closure = False

        return closure

    def _hook(self, param: Tensor) -> None:
        if self._in_closure:
            raise RuntimeError(
                "step(closure) cannot compute gradients with attach_in_backward: call backward(), "
                "then step(); in Lightning, use manual optimization"
            )
        if not self._checked:
            check_plain(self.optimizer.param_groups)
            if in_ddp(self._hooks):
                raise RuntimeError(MESSAGE)
            self._checked = True
        with tracing.hosted():
            self._arrived(param)

    def _after_step(self, *_: Any) -> None:
        self._hook_all()

    def _check(self) -> None:
        """Raise if the optimizer cannot work this way."""

    def _settle(self) -> None:
        """What is left to do between the last backward and the step."""

    def _arrived(self, param: Tensor) -> None:
        """A gradient is complete for this backward."""
        raise NotImplementedError
