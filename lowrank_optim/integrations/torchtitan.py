"""Optimizers of this package by name in torchtitan's configs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch.optim import Optimizer

from lowrank_optim.groups import Group
from lowrank_optim.groups.keys import METHODS
from lowrank_optim.optimizer import LowRankOptimizer

__all__ = ["with_lowrank"]


def with_lowrank(container: type | None = None) -> Any:
    """A container of torchtitan that knows the optimizers of this package by name too.

    A ``ParamGroupConfig`` may then say ``optimizer_name="GaLoreAdamW"``. A ``rank`` among its
    ``optimizer_kwargs`` projects every matrix that its pattern matches; one in
    ``optimizer_factory_kwargs_by_name`` projects the linear maps among them, and leaves embeddings,
    heads, norms and biases dense. ``implementation`` is for the other optimizers, and has no
    effect on these.

    Args:
        container: the class, or a subclass of yours (default: torchtitan's
            ``OptimizersContainer``).

    Returns:
        A subclass, whose ``Config`` is what a trainer's config takes as ``optimizer``.

    Raises:
        TypeError: the class does not look optimizers up by name, as torchtitan's did not before
            ``ParamGroupConfig``: make the optimizer in a ``build_optimizers_fn`` of your own there.
        ImportError: no class is given, and torchtitan is not installed.

    Example:
        >>> from lowrank_optim.integrations.torchtitan import with_lowrank
        >>> with_lowrank(dict)
        Traceback (most recent call last):
        ...
        TypeError: dict has no _resolve_optimizer_factory, by which torchtitan finds optimizers...
    """
    base: Any = container
    if base is None:
        from torchtitan.components.optimizer import OptimizersContainer

        base = OptimizersContainer
    if not hasattr(base, "_resolve_optimizer_factory"):
        raise TypeError(
            f"{base.__name__} has no _resolve_optimizer_factory, by which torchtitan finds "
            "optimizers: give its OptimizersContainer, or with an older torchtitan make "
            "OptimizersContainer(model_parts, GaLoreAdamW, options) in a build_optimizers_fn"
        )

    class LowRankContainer(base):  # type: ignore[misc]
        @dataclass(kw_only=True, slots=True)
        class Config(base.Config):  # type: ignore[misc]
            """As of torchtitan."""

        @staticmethod
        def _resolve_optimizer_factory(name: str) -> Callable[..., Optimizer]:
            if name in METHODS:
                return partial(_made, METHODS[name])
            theirs: Callable[..., Optimizer] = base._resolve_optimizer_factory(name)
            return theirs

    LowRankContainer.__doc__ = base.__doc__
    return LowRankContainer


def _made(
    method: type[LowRankOptimizer], groups: Iterable[Group], **options: Any
) -> LowRankOptimizer:
    """The optimizer, without the flags by which all groups say how torch is to step them."""
    own = [{k: v for k, v in g.items() if k not in ("fused", "foreach")} for g in groups]
    make: Callable[..., LowRankOptimizer] = method
    return make(own, **options)
