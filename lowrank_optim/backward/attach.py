"""Gradients projected, or stepped, and freed as soon as backward has made them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal, Self

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from lowrank_optim.backward.parallel import MESSAGE, in_ddp
from lowrank_optim.backward.projecting import (
    COORDS_DTYPES,
    FIRST_BASES,
    check_projecting,
    first_projected,
    items_of,
    projected,
    unborn,
)
from lowrank_optim.backward.stepped_grad import SteppedGrad
from lowrank_optim.engine import tracing
from lowrank_optim.engine.plan import ParamPlan
from lowrank_optim.engine.refresh import basis_due, refresh_
from lowrank_optim.groups import Group
from lowrank_optim.optimizer import LowRankOptimizer
from lowrank_optim.subspaces.block import Block
from lowrank_optim.tensors.projected_grad import ProjectedGrad

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
        self._plan: dict[Tensor, tuple[Group, list[ParamPlan], ParamPlan]] = {}
        self._check()
        for _, item in items_of(optimizer):
            if list(attached_to(item.param)):
                raise RuntimeError(
                    f"another optimizer takes the gradient of {item.name} inside backward: "
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
        """The group and item of a parameter, looked up again when groups were edited or loaded."""
        known = self._plan.get(param)
        if known is not None:
            group, items, item = known
            if any(g is group for g in self.optimizer.param_groups) and (
                self.optimizer._items(group) is items
            ):
                return group, item
        self._plan = {
            item.param: (group, items, item)
            for group in self.optimizer.param_groups
            for items in [self.optimizer._items(group)]
            for item in items
        }
        group, _, item = self._plan[param]
        return group, item

    def _before_step(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
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


class _Projecting(InBackward):
    """Each gradient becomes its coordinates; a step starts from them."""

    def __init__(
        self,
        optimizer: LowRankOptimizer,
        max_norm: float | None,
        first_basis: str,
        coords_dtype: str,
    ) -> None:
        self.first_basis, self.coords_dtype = first_basis, coords_dtype
        super().__init__(optimizer, max_norm)

    def _check(self) -> None:
        check_projecting(self.optimizer)

    @torch.no_grad()
    def _arrived(self, param: Tensor) -> None:
        grad = param.grad
        if isinstance(grad, ProjectedGrad):
            if grad.spill is None:
                return
            grad = param.grad = grad.spill  # it was zeroed in place: start again
        assert grad is not None
        group, item = self._find(param)
        if item.subspace is None or not item.alone or grad.is_sparse:
            return
        chosen = self.optimizer._strategies(group)
        state = self.optimizer.state.get(param) or unborn()
        first = int(state["refresh_step"]) < 0
        if first and self.first_basis == "micro":
            param.grad = first_projected(item, state, grad, chosen, self.coords_dtype)
        elif not basis_due(item, state, chosen):
            param.grad = projected(item, state, grad, chosen, self.coords_dtype)

    @torch.no_grad()
    def _settle(self) -> None:
        """Clip by the norm of what will be applied: bases that are due are refreshed before."""
        if self.max_norm is None:
            return
        self.optimizer._make_state()
        for group, item in items_of(self.optimizer):
            grad = item.param.grad
            if item.subspace is None or not item.alone:
                continue
            if grad is None or isinstance(grad, ProjectedGrad):
                continue
            assert item.view is not None
            chosen = self.optimizer._strategies(group)
            state = self.optimizer._state_of(item, chosen)
            if basis_due(item, state, chosen):
                refresh_(item, state, item.view.of(grad), int(state["step"]), chosen)
            item.param.grad = projected(item, state, grad, chosen, self.coords_dtype)
        clip_grad_norm_([item.param for _, item in items_of(self.optimizer)], self.max_norm)

    def remove(self) -> None:
        """As of every mode; nothing empty is left behind, which would keep later gradients out."""
        for param in self._hooks:
            if isinstance(param.grad, ProjectedGrad) and param.grad.empty:
                param.grad = None
        super().remove()


class _Stepping(InBackward):
    """Each parameter is stepped, and its gradient freed, in the last backward before a step."""

    def __init__(
        self,
        optimizer: LowRankOptimizer,
        max_norm: float | None,
        accumulation_steps: int,
        keep_norms: bool,
    ) -> None:
        self.accumulation_steps, self.keep_norms = accumulation_steps, keep_norms
        self._seen: dict[Tensor, int] = {}
        self._begun: set[int] = set()
        super().__init__(optimizer, max_norm)
        # else a scaler finds no gradient, and says so in words that do not help
        optimizer._step_supports_amp_scaling = True  # type: ignore[attr-defined]
        if max_norm is not None:
            warnings.warn(
                f"mode='step' clips the gradient of each parameter to norm {max_norm}, not their "
                "global norm, which is known only when all of them exist",
                stacklevel=4,
            )

    @torch.no_grad()
    def _arrived(self, param: Tensor) -> None:
        seen = self._seen[param] = self._seen.get(param, 0) + 1
        if seen < self.accumulation_steps:
            return
        if seen > self.accumulation_steps:
            raise RuntimeError(
                f"a gradient arrived {seen} times before optimizer.step(), and its parameter was "
                f"stepped at accumulation_steps={self.accumulation_steps}; a parameter that two "
                "checkpointed segments share needs use_reentrant=False"
            )
        self._step(param, self.keep_norms)

    def _step(self, param: Tensor, keep_norm: bool = False) -> None:
        """Step and free, unless it must wait for its siblings."""
        group, item = self._find(param)
        if not item.alone:
            return
        self.optimizer._make_state()
        norm = None
        if self.max_norm is not None:
            norm = clip_grad_norm_([param], self.max_norm)
        elif keep_norm:
            assert param.grad is not None
            norm = torch.linalg.vector_norm(param.grad)
        begins = isinstance(item.subspace, Block) and id(group) not in self._begun
        self._begun |= {id(group)} if begins else set()
        self.optimizer._step_alone(item, group, begins)
        param.grad = SteppedGrad(param, norm) if keep_norm and norm is not None else None

    def _forget_norms(self) -> None:
        for param in self._hooks:
            if isinstance(param.grad, SteppedGrad):
                param.grad = None

    @torch.no_grad()
    def _settle(self) -> None:
        """Parameters that some backward did not reach are stepped now.

        Raises:
            RuntimeError: a ``GradScaler`` steps: gradients were applied with its factor in them;
            or somebody wrote the gradient of a parameter that has been stepped.
        """
        if hasattr(self.optimizer, "grad_scale"):
            for name in ("grad_scale", "found_inf"):  # the scaler's, which cannot clean up now
                delattr(self.optimizer, name)
            raise RuntimeError(
                "the loss was scaled by a GradScaler, and mode='step' has applied its gradients as "
                "they were, inside backward: start again with mode='project', or in bfloat16"
            )
        self._forget_norms()
        for param in self._hooks:
            if param.grad is not None:
                if (
                    self._seen.get(param, 0) >= self.accumulation_steps
                    and self._find(param)[1].alone
                ):
                    raise RuntimeError(f"a gradient is back after its step: {MESSAGE}")
                self._step(param)
        if self.max_norm is not None:
            for param in self._hooks:
                if param.grad is not None:
                    clip_grad_norm_([param], self.max_norm)

    def _after_step(self, *_: Any) -> None:
        self._seen, self._begun = {}, set()
        super()._after_step()

    def remove(self) -> None:
        """As of every mode."""
        self._forget_norms()
        vars(self.optimizer).pop("_step_supports_amp_scaling", None)
        super().remove()


ARGUMENTS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "mode": (lambda x: x in ("project", "step"), "'project' or 'step'"),
    "accumulation_steps": (lambda x: type(x) is int and x > 0, "a positive int"),
    "max_norm": (
        lambda x: x is None or (isinstance(x, int | float) and not isinstance(x, bool) and x > 0),
        "None or a positive number",
    ),
    "first_basis": (lambda x: x in FIRST_BASES, "'micro' or 'boundary'"),
    "coords_dtype": (lambda x: x in COORDS_DTYPES, "'auto', 'float32' or 'bfloat16'"),
    "keep_norms": (lambda x: isinstance(x, bool), "True or False"),
}
"""Arguments of :func:`attach_in_backward`: what each may be, as a test and in words."""


def _unwrapped(optimizer: Any) -> LowRankOptimizer:
    """The optimizer, or the one inside a wrapper, such as accelerate's and Lightning's.

    Raises:
        TypeError: it is not one of this package.
    """
    inner, kinds = optimizer, [type(optimizer)]
    while isinstance(getattr(inner, "optimizer", None), Optimizer):  # Lightning's has both types
        inner = inner.optimizer
        kinds.append(type(inner))
    if not (isinstance(optimizer, Optimizer) and isinstance(inner, LowRankOptimizer)):
        named = [f"{kind.__module__}.{kind.__qualname__}" for kind in kinds]
        got = repr(optimizer) if isinstance(optimizer, type) else " of a ".join(named)
        raise TypeError(
            "attach_in_backward takes an optimizer of lowrank_optim, such as GaLoreAdamW, or one "
            f"that accelerate or Lightning wrapped, got {got}"
        )
    return inner


def attach_in_backward(
    optimizer: LowRankOptimizer,
    mode: Literal["project", "step"] = "project",
    *,
    accumulation_steps: int = 1,
    max_norm: float | None = None,
    first_basis: Literal["micro", "boundary"] = "micro",
    keep_norms: bool = False,
    coords_dtype: Literal["auto", "float32", "bfloat16"] = "auto",
) -> InBackward:
    r"""Free every gradient inside backward, so that whole gradients never coexist.

    ``mode="project"`` replaces each gradient by its coordinates :math:`R = P^T G` as soon as it is
    complete, and further micro-batches add theirs. Projection is linear, so the step equals that of
    the un-split batch. A matrix whose basis is due keeps its whole gradient until the step, which
    refreshes on the sum; staggering keeps these few. The training loop stays as it is:
    ``step()``, ``zero_grad()``, schedulers, ``GradScaler``, and ``clip_grad_norm_``, to which the
    gradient of a matrix is that of its subspace. Parameters without a subspace keep ``p.grad``.

    ``mode="step"`` steps each parameter and frees its gradient during the last of
    ``accumulation_steps`` backwards, for every method. ``optimizer.step()`` is still called: it
    steps what a backward did not reach. Not for scaled losses: use bfloat16, or ``"project"``.

    State and checkpoints are those of the optimizer without it.

    Not for ``DistributedDataParallel``: it averages gradients after these hooks, and keeps them all
    in its buckets. Train the module itself on every rank instead. For ``"step"``, average in a hook
    on each parameter that is registered before; for ``"project"``, with ``first_basis="boundary"``,
    before ``step()``, where ``p.grad.coords`` is all there is to send of a matrix
    (``docs/guides/inside_backward.md``).

    Args:
        optimizer: any optimizer of this package, also as accelerate or Lightning wrapped it.
        mode: ``"project"`` or ``"step"``.
        accumulation_steps: calls of ``backward()`` before a step. ``mode="project"`` takes any
            number without being told.
        max_norm: ``mode="project"`` clips by the global norm of what will be applied, in
            ``step()``: of coordinates, and of gradients that have none. ``mode="step"`` clips each
            parameter alone, and warns that it does.
        first_basis: where the very first basis of ``mode="project"`` comes from: ``"micro"``, the
            first micro-batch, or ``"boundary"``, the accumulated gradient, which is exact and keeps
            whole gradients during the first step.
        coords_dtype: what ``mode="project"`` keeps coordinates in. ``"auto"``: bfloat16 where they
            come in bfloat16, as products with gradients of bfloat16 do, so that one micro-batch
            loses nothing; else float32, or wider as the weights. ``"float32"`` and ``"bfloat16"``:
            all of them. Micro-batches are added in float32, and rounded into bfloat16 without bias
            by a seed of parameter, step and micro-batch, so a resumed run is the same.
        keep_norms: ``mode="step"`` leaves in ``p.grad`` the norm that the gradient had, without
            memory, until ``step()``: ``clip_grad_norm_`` then returns the true global norm, and
            scales nothing that has been stepped. ``mode="project"`` needs no telling: its norms are
            those of coordinates (default: False).

    Returns:
        A handle with ``remove()``, and a context manager.

    Raises:
        TypeError: the optimizer is not one of this package.
        ValueError: an argument is out of range, or ``mode="project"`` and the method uses what its
            subspace does not see.
        RuntimeError: the optimizer, or another one of its parameters, works inside backward
            already; later, ``step(closure)`` runs
            backward in its closure, or the first backward is that of ``DistributedDataParallel``.

    Example:
        >>> import torch
        >>> from lowrank_optim import GaLoreAdamW, attach_in_backward
        >>> model = torch.nn.Linear(64, 32)
        >>> optimizer = GaLoreAdamW(model.named_parameters(), lr=1e-2, rank=4)
        >>> with attach_in_backward(optimizer, max_norm=1.0):
        ...     for x in torch.randn(2, 8, 64):
        ...         (model(x).square().mean() / 2).backward()
        ...     print(model.weight.grad)
        ...     optimizer.step()
        ProjectedGrad((32, 64), coords={'low': (4, 64)})
    """
    given = {
        "mode": mode,
        "accumulation_steps": accumulation_steps,
        "max_norm": max_norm,
        "first_basis": first_basis,
        "keep_norms": keep_norms,
        "coords_dtype": coords_dtype,
    }
    optimizer = _unwrapped(optimizer)
    for name, (allowed, words) in ARGUMENTS.items():
        if not allowed(given[name]):
            raise ValueError(f"{name} must be {words}, got {given[name]!r}")
    if mode == "project":
        return _Projecting(optimizer, max_norm, first_basis, coords_dtype)
    return _Stepping(optimizer, max_norm, accumulation_steps, keep_norms)
