"""Any optimizer of this package in ``transformers.Trainer``, through its own argument for it."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from lowrank_optim.groups import canonical, lowrank_groups
from lowrank_optim.in_backward import attach_in_backward
from lowrank_optim.methods import GaLoreAdamW
from lowrank_optim.optimizer import LowRankOptimizer


def parse_optim_args(text: str) -> dict[str, Any]:
    """``"rank=64, scale=0.10, projector=svd"`` as a dict of numbers, booleans and strings.

    Raises:
        ValueError: a part is not ``key=value``.

    Example:
        >>> from lowrank_optim.integrations.transformers import parse_optim_args
        >>> parse_optim_args("rank=64, update_proj_gap=100, scale=0.10, proj_type=std")
        {'rank': 64, 'update_proj_gap': 100, 'scale': 0.1, 'proj_type': 'std'}
    """
    out = {}
    for part in re.split(r",(?![^(\[]*[)\]])", text):
        if not part.strip():
            continue
        key, equals, value = (x.strip() for x in part.partition("="))
        if not equals or not key or not value:
            raise ValueError(f"optim_args must be key=value pairs, got {part.strip()!r}")
        out[key] = _literal(value)
    return out


def _literal(value: str) -> Any:
    known = {"true": True, "false": False, "none": None}
    if value.lower() in known:
        return known[value.lower()]
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value  # a name, such as that of a projector


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

    Learning rate, Adam's betas and eps, weight decay and the parameters without it are those of
    ``args``, as for ``optim="adamw_torch"``; its ``optim_args`` and ``optim_target_modules`` are
    read as for ``optim="galore_adamw"``. Checkpoints resume, layer-wise ones too.

    Args:
        args: the ``TrainingArguments``.
        method: the optimizer class (default: GaLoreAdamW).
        target_modules: see :func:`lowrank_optim.lowrank_groups` (default: those of ``args``, else
            ``"all-linear"``).
        overrides: see :func:`lowrank_optim.lowrank_groups`.
        in_backward: free gradients inside backward, see :func:`lowrank_optim.attach_in_backward`:
            what ``galore_adamw_layerwise`` means, with accumulation. ``max_grad_norm`` clips what
            the subspace sees (``"project"``) or each parameter alone (``"step"``).
        **options: of the optimizer; they win over ``args.optim_args``.

    Raises:
        ValueError: ``optim_args`` cannot be read.

    Example:
        >>> from transformers import TrainingArguments
        >>> from lowrank_optim.integrations.transformers import trainer_optimizer
        >>> args = TrainingArguments(optim_args="rank=64, scale=0.10", learning_rate=1e-2)
        >>> factory, kwargs = trainer_optimizer(args, update_proj_gap=100)
        >>> {k: kwargs["options"][k] for k in ("lr", "rank", "scale", "update_proj_gap")}
        {'lr': 0.01, 'rank': 64, 'scale': 0.1, 'update_proj_gap': 100}
    """
    accepted = inspect.signature(method.__init__).parameters
    own: dict[str, Any] = {"lr": args.learning_rate, "weight_decay": args.weight_decay}
    if "betas" in accepted:
        own["betas"] = (args.adam_beta1, args.adam_beta2)
        if "eps" in accepted:
            own["eps"] = args.adam_epsilon
    # its own step sizes would ignore the learning rate
    own.update({k: False for k in ("relative_step", "scale_parameter") if k in accepted})
    text = parse_optim_args(args.optim_args or "")
    chosen = target_modules or args.optim_target_modules or "all-linear"
    if isinstance(chosen, str) and chosen.replace("_", "-") == "all-linear":
        chosen = "all-linear"
    return TrainerOptimizer, {
        "method": method,
        "target_modules": chosen,
        "overrides": overrides,
        "in_backward": in_backward,
        "accumulation_steps": args.gradient_accumulation_steps,
        "max_norm": args.max_grad_norm,
        "options": {**own, **canonical(text), **canonical(options)},
    }


class TrainerOptimizer:
    """The factory that ``Trainer`` calls with the model; see :func:`trainer_optimizer`."""

    def __call__(
        self,
        model: nn.Module,
        *,
        method: type[LowRankOptimizer],
        target_modules: str | Sequence[str],
        overrides: Mapping[str, Mapping[str, Any]] | None,
        in_backward: Literal["project", "step"] | None,
        accumulation_steps: int,
        max_norm: float | None,
        options: Mapping[str, Any],
    ) -> LowRankOptimizer:
        """The optimizer of ``model``.

        Raises:
            NotImplementedError: ``in_backward`` with several processes, whose gradients are
                averaged only after the hooks have taken them.
        """
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if in_backward and distributed and torch.distributed.get_world_size() > 1:
            raise NotImplementedError("in_backward works in one process only")
        # FRUGAL's own default is a density
        share = 0.25 if "density" in inspect.signature(method.__init__).parameters else 128
        rank = options.get("rank", share)
        groups = lowrank_groups(
            model,
            rank=rank,
            target_modules=target_modules,
            overrides=overrides,
            no_decay=_undecayed(model),
        )
        optimizer = method(groups, **{k: v for k, v in options.items() if k != "rank"})
        if in_backward == "project":
            attach_in_backward(optimizer, "project")  # Trainer clips coordinates as it does p.grad
        elif in_backward == "step":
            attach_in_backward(
                optimizer,
                "step",
                accumulation_steps=accumulation_steps,
                max_norm=max_norm or None,
            )
        return optimizer


def _undecayed(model: nn.Module) -> list[str]:
    """Names of the parameters that ``Trainer`` does not decay: biases and norms."""
    from transformers import Trainer

    decayed = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    return [n for n, p in model.named_parameters() if p.requires_grad and n not in decayed]
