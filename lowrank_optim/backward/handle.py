"""What takes gradients inside backward, whatever it does with them."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

from lowrank_optim.backward.averaging import Averaging
from lowrank_optim.backward.parallel import MESSAGE, check_hooked, check_plain, in_ddp, late_ranks
from lowrank_optim.backward.projecting import Plans, items_of
from lowrank_optim.engine import tracing
from lowrank_optim.engine.plan import ParamPlan
from lowrank_optim.groups import Group, notices
from lowrank_optim.optimizer import LowRankOptimizer
from lowrank_optim.sharding.collectives import Form, form

_ATTACHED = "_in_backward"
GONE = (
    "the optimizer that attach_in_backward was given is gone: nothing steps these parameters, and "
    "their gradients stay in p.grad. Keep a reference to the optimizer, or remove() the handle "
    "before it goes"
)
LATE = (
    "attach_in_backward was called without a process_group before there were other processes, and "
    "averages nothing with them: dist.group.WORLD is None until init_process_group, so call that "
    "first"
)


def attached_to(param: Tensor) -> Iterator[InBackward]:
    """What takes the gradient of a parameter inside backward, for whichever optimizer."""
    for hook in list(_hooks_of(param).values()):
        owner = hook.owner() if isinstance(hook, _Hook) else None
        if owner is not None:
            yield owner


def _hooks_of(param: Tensor) -> dict[int, Any]:
    found: dict[int, Any] = getattr(param, "_post_accumulate_grad_hooks", None) or {}
    return found


def _forget_gone(param: Tensor) -> None:
    """Remove what is left of optimizers that are gone."""
    for number, hook in list(_hooks_of(param).items()):
        if isinstance(hook, _Hook) and hook.owner() is None:
            del _hooks_of(param)[number]


class _Hook:
    """What a parameter calls when its gradient is complete.

    torch keeps it where no garbage collector sees it: if it held what it is of, which holds the
    optimizer and so the parameter, the memory of all of them would never be free again.
    """

    def __init__(self, owner: InBackward) -> None:
        self.owner = weakref.ref(owner)

    def __call__(self, param: Tensor) -> None:
        owner = self.owner()
        if owner is not None:
            owner._hook(param)
            return
        _forget_gone(param)
        warnings.warn(GONE, stacklevel=notices.users_level())


class InBackward:
    """What :func:`attach_in_backward` returns. ``with`` removes it at the end.

    Parameters unfrozen or added later are taken up at the next step. Those that are taken out of
    the groups are let go of: their gradients are whole, and nothing steps them.

    A gradient goes through three places. :meth:`_arrived`: this rank's is complete for one
    backward. :meth:`_averaged`: it is that of the step, over all ranks. :meth:`_settle`: what is
    left to do in ``step()``.
    """

    averages_at_once = False
    """Whether an average is wanted as soon as its message has arrived, or all at the end."""

    def __init__(
        self,
        optimizer: LowRankOptimizer,
        max_norm: float | None,
        process_group: dist.ProcessGroup | None = None,
        accumulation_steps: int = 1,
    ) -> None:
        if getattr(optimizer, _ATTACHED, None) is not None:
            raise RuntimeError("the optimizer works inside backward already: remove() that first")
        if any(group["capturable"] for group in optimizer.param_groups):
            raise ValueError(
                "attach_in_backward does not go with capturable=True: its hooks ask the host, "
                "which no graph records. Pass capturable=False"
            )
        self.optimizer, self.max_norm = optimizer, max_norm
        self._in_closure = False
        self._checked = False
        self._plans = Plans(optimizer)
        self._check()
        for _, plan in items_of(optimizer):
            _forget_gone(plan.param)
            for owner in attached_to(plan.param):
                owner._let_go()
            if list(attached_to(plan.param)):
                raise RuntimeError(
                    f"another optimizer takes the gradient of {plan.name} inside backward: "
                    "remove() the handle that attach_in_backward returned for it first"
                )
        self._alone = not dist.is_available() or not dist.is_initialized()
        """Whether there was nobody to average with when this was made."""
        self._ranks: Averaging | None = None
        if process_group is not None:
            self._ranks = Averaging(
                optimizer,
                process_group,
                accumulation_steps,
                form_of=self._in_form,
                forms_of=self._forms,
                averaged=self._averaged,
                at_once=self.averages_at_once,
            )
        self._hooks: dict[Tensor, Any] = {}
        self.check_new: Callable[[], None] = lambda: None
        """Raises if parameters that came later do not go with the arguments."""
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        setattr(optimizer, _ATTACHED, self)
        optimizer._discarding = self._discard
        self._hook_all()

    def remove(self) -> None:
        """Give every parameter its gradient back; a gradient already projected stays so."""
        for handle in (*self._handles, *self._hooks.values()):
            handle.remove()
        self._hooks, self._handles = {}, []
        if self._ranks is not None:
            self._ranks.remove()
            self._ranks = None
        if getattr(self.optimizer, _ATTACHED, None) is self:
            setattr(self.optimizer, _ATTACHED, None)
            self.optimizer._discarding = None

    @property
    def whole_shards(self) -> tuple[str, ...]:
        """Names of DTensors that ``mode="project"`` never projects, as it sends nothing.

        Each rank would need others for the coordinates of what it has: the matrix is split along
        its projected side, or projected on both.
        """
        return ()

    def no_sync(self) -> AbstractContextManager[None]:
        """Backwards within add up on this rank, as those of DistributedDataParallel's ``no_sync``.

        The next backward outside averages what they left together with its own. Without a
        ``process_group`` there is nothing to put off.

        Example:
            >>> import torch
            >>> from lowrank_optim import GaLoreAdamW, attach_in_backward
            >>> model = torch.nn.Linear(64, 32)
            >>> optimizer = GaLoreAdamW(model.named_parameters(), lr=1e-2, rank=4)
            >>> handle = attach_in_backward(optimizer)  # with process_group=dist.group.WORLD
            >>> with handle.no_sync():
            ...     (model(torch.randn(8, 64)).square().mean() / 2).backward()
            >>> (model(torch.randn(8, 64)).square().mean() / 2).backward()
            >>> optimizer.step()
        """
        return nullcontext() if self._ranks is None else self._ranks.no_sync()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _hook_all(self) -> None:
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        new = [p for p in params if p.requires_grad and p not in self._hooks]
        if new:
            self.check_new()
        hook = _Hook(self)
        for param in new:
            self._hooks[param] = param.register_post_accumulate_grad_hook(hook)

    def _let_go(self) -> None:
        """Take the hooks of parameters that are in no group any more."""
        here = {p for group in self.optimizer.param_groups for p in group["params"]}
        for param in [p for p in self._hooks if p not in here]:
            self._hooks.pop(param).remove()
            self._forget(param)

    def _forget(self, param: Tensor) -> None:
        """Nothing of a parameter's gradient is this handle's any more."""

    def _find(self, param: Tensor) -> tuple[Group, ParamPlan]:
        found = self._plans.find(param)
        assert found is not None
        return found

    def _before_step(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        check_hooked(self.optimizer.param_groups, self._hooks)
        self._let_go()
        with tracing.hosted():
            if self._ranks is not None:
                check_plain(self.optimizer.param_groups)
                self._ranks.share()
                self._ranks.check_averaged()
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
        if self._plans.find(param) is None:
            self._let_go()
            return
        if self._in_closure:
            raise RuntimeError(
                "step(closure) cannot compute gradients with attach_in_backward: call backward(), "
                "then step(); in Lightning, use manual optimization"
            )
        if not self._checked:
            if self._ranks is not None:
                check_plain(self.optimizer.param_groups)
            if in_ddp(self._hooks):
                raise RuntimeError(MESSAGE)
            if self._ranks is None and self._alone and late_ranks():
                warnings.warn(LATE, stacklevel=notices.users_level())
            self._checked = True
        with tracing.hosted():
            self._arrived(param)
            if self._ranks is not None:
                with torch.no_grad():
                    self._ranks.arrived(param)

    def _after_step(self, *_: Any) -> None:
        self._hook_all()

    def _check(self) -> None:
        """Raise if the optimizer cannot work this way."""

    def _settle(self) -> None:
        """What is left to do between the last backward and the step."""

    def _discard(self) -> None:
        """``zero_grad()``: what backwards have left since the last step is not to be applied."""
        if self._ranks is not None:
            self._ranks.discard()

    def _arrived(self, param: Tensor) -> None:
        """A gradient is complete for this backward, on this rank; autograd may have made none."""
        raise NotImplementedError

    def _averaged(self, param: Tensor) -> None:
        """A gradient is that of the step: averaged over the ranks after the last backward."""

    def _in_form(self, param: Tensor) -> None:
        """Bring a gradient into the form in which it is kept, whether it arrived or lay there."""

    def _forms(self, param: Tensor) -> Sequence[Form]:
        """Shapes and dtypes of that form."""
        return [form(param)]
