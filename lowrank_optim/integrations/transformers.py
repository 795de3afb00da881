"""Any optimizer of this package in ``transformers.Trainer``, through its own argument for it."""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from lowrank_optim.backward.attach import attach_in_backward
from lowrank_optim.backward.handle import attached_to
from lowrank_optim.groups import Group, canonical, lowrank_groups
from lowrank_optim.integrations.arguments import (
    check_optim,
    hyper_parameters,
    parse_optim_args,
    unused_optim,
)
from lowrank_optim.memory.checks import check_mode
from lowrank_optim.methods import GaLoreAdamW
from lowrank_optim.optimizer import LowRankOptimizer

__all__ = ["TrainerOptimizer", "parse_optim_args", "trainer_optimizer"]

MINIMUM = (5, 2)
"""The transformers whose Trainer hands its model to a factory of optimizers."""


def trainer_optimizer(
    args: Any,
    method: type[LowRankOptimizer] = GaLoreAdamW,
    *,
    target_modules: str | Sequence[str] | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    in_backward: Literal["project", "step"] | None = None,
    **options: Any,
) -> tuple[type[TrainerOptimizer], dict[str, Any]]:
    """What ``Trainer(optimizer_cls_and_kwargs=...)`` takes.

    Learning rate, Adam's betas and eps (betas of Lion too), weight decay and the parameters without
    it are those of ``args``, as for ``optim="adamw_torch"``; its ``optim_args`` and
    ``optim_target_modules`` are read as for ``optim="galore_adamw"``. They are read when Trainer
    makes the optimizer, so that each trial of ``hyperparameter_search`` has its own. Checkpoints
    resume, layer-wise ones too.

    Args:
        args: the ``TrainingArguments``, the same object that Trainer gets.
        method: the optimizer class (default: GaLoreAdamW).
        target_modules: see :func:`lowrank_optim.lowrank_groups` (default: those of ``args``, else
            ``"all-linear"``).
        overrides: see :func:`lowrank_optim.lowrank_groups`.
        in_backward: free gradients inside backward, see :func:`lowrank_optim.attach_in_backward`:
            what ``galore_adamw_layerwise`` means, with accumulation. ``max_grad_norm`` clips what
            the subspace sees (``"project"``) or each parameter alone (``"step"``), and
            ``grad_norm`` is logged of what the subspace sees, or of whole gradients before
            clipping (default: None).
        **options: of the optimizer; they win over ``args.optim_args``.

    Raises:
        ImportError: transformers is older than 5.2.
        TypeError: ``args`` or ``method`` is something else.
        ValueError: ``optim_args`` cannot be read, or what ``args`` says has no effect on this
            optimizer, or is not what the options say.

    Example:
        >>> import torch
        >>> from transformers import TrainingArguments
        >>> from lowrank_optim.integrations.transformers import trainer_optimizer
        >>> args = TrainingArguments(optim_args="rank=8, scale=0.10", learning_rate=1e-2)
        >>> factory, kwargs = trainer_optimizer(args, update_proj_gap=100)
        >>> args.learning_rate = 3e-3  # as a search does
        >>> optimizer = factory()(torch.nn.Sequential(torch.nn.Linear(64, 32)), **kwargs)
        >>> [optimizer.param_groups[0][k] for k in ("lr", "rank", "scale", "update_proj_gap")]
        [0.003, 8, 0.1, 100]
    """
    _check_version()
    kwargs = {
        "args": args,
        "method": method,
        "target_modules": target_modules,
        "overrides": overrides,
        "in_backward": in_backward,
        "options": canonical(options),
    }
    _check(args, method, in_backward)
    hyper_parameters(args, method, kwargs["options"])  # what is wrong now is said now
    return TrainerOptimizer, kwargs


class TrainerOptimizer:
    """The factory that ``Trainer`` calls with the model; see :func:`trainer_optimizer`."""

    def __call__(
        self,
        model: nn.Module,
        *,
        args: Any,
        method: type[LowRankOptimizer],
        target_modules: str | Sequence[str] | None,
        overrides: Mapping[str, Mapping[str, Any]] | None,
        in_backward: Literal["project", "step"] | None,
        options: Group,
    ) -> LowRankOptimizer:
        """The optimizer of ``model``, as ``args`` are now.

        Raises:
            NotImplementedError: ``in_backward`` with several processes, whose gradients are
                averaged only after the hooks have taken them.
            ValueError: as of :func:`trainer_optimizer`; a trial may have changed the arguments.
        """
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if in_backward and distributed and torch.distributed.get_world_size() > 1:
            raise NotImplementedError("in_backward works in one process only")
        _check(args, method, in_backward)
        keys = hyper_parameters(args, method, options)
        by_share = "density" in inspect.signature(method.__init__).parameters  # FRUGAL
        rank = keys.pop("rank", 0.25 if by_share else 128)
        size = {"density" if by_share and isinstance(rank, float) else "rank": rank}
        if target_modules is None:
            target_modules = args.optim_target_modules
        groups = lowrank_groups(
            model,
            **size,
            target_modules="all-linear" if target_modules is None else target_modules,
            overrides=overrides,
            no_decay=_undecayed(model),
        )
        optimizer = method(groups, **keys)
        for param in model.parameters():  # of an earlier Trainer of this model
            for handle in attached_to(param):
                handle.remove()
        unused = unused_optim(args)
        if unused:
            warnings.warn(
                f"optim={unused!r} of the arguments is not used: the optimizer is the "
                f"{method.__name__} of trainer_optimizer (leave optim at its default)",
                stacklevel=2,
            )
        if in_backward == "project":
            attach_in_backward(optimizer, "project")  # Trainer clips coordinates as it does p.grad
        elif in_backward == "step":
            attach_in_backward(
                optimizer,
                "step",
                accumulation_steps=args.gradient_accumulation_steps,
                # as Trainer reads it
                max_norm=args.max_grad_norm if args.max_grad_norm > 0 else None,
                keep_norms=True,
            )
        return optimizer


def _check_version() -> None:
    """Raise for a Trainer that would not call the factory.

    Raises:
        ImportError: transformers is too old.
    """
    import transformers

    version = tuple(int(x) for x in transformers.__version__.split(".")[:2])
    if version < MINIMUM:
        least = ".".join(map(str, MINIMUM))
        raise ImportError(
            f"trainer_optimizer needs transformers {least} or newer, whose Trainer hands its model "
            f"to the optimizer's factory, and {transformers.__version__} is installed: "
            f"pip install -U 'transformers>={least}', or give Trainer an optimizer made of "
            "lowrank_groups(model): Trainer(optimizers=(optimizer, None))"
        )


def _check(args: Any, method: Any, in_backward: Any) -> None:
    """Raise for what cannot work, or says two things.

    Raises:
        TypeError: ``args`` or ``method`` is something else.
        ValueError: a value is not known, or does not go with ``args``.
    """
    # not isinstance: notebooks reload transformers
    known = dataclasses.is_dataclass(args) and hasattr(args, "optim_target_modules")
    if not known:
        raise TypeError(f"args must be TrainingArguments, got {type(args).__qualname__}")
    if not (isinstance(method, type) and issubclass(method, LowRankOptimizer)):
        raise TypeError(
            f"method must be an optimizer class of lowrank_optim, such as GaLoreAdamW, got {method}"
        )
    check_mode(in_backward)
    if in_backward == "step" and args.fp16:
        raise ValueError(
            "in_backward='step' applies gradients before the loss scale of fp16=True is taken "
            "out of them: use bf16=True, or in_backward='project'"
        )
    check_optim(args, method, in_backward)


def _undecayed(model: nn.Module) -> list[str]:
    """Names of the parameters that ``Trainer`` does not decay: biases and norms."""
    from transformers import Trainer

    decayed = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    return [n for n, p in model.named_parameters() if p.requires_grad and n not in decayed]
