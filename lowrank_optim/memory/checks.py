"""What may be given to :func:`lowrank_optim.memory.estimate`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lowrank_optim.groups.values import whole
from lowrank_optim.memory.layouts import LAYOUTS
from lowrank_optim.memory.losses import LOSSES
from lowrank_optim.sharding.parts import is_sharded


def check(
    model: Any,
    groups: Any,
    in_backward: Any,
    accumulation_steps: Any,
    tokens: Any,
    dtype: Any,
) -> None:
    """The arguments of :func:`estimate`, but for the class of the optimizer.

    Raises:
        TypeError: one is of a wrong type.
        ValueError: one is out of range.
    """
    check_model(model)
    if groups is not None and not callable(groups):
        raise TypeError(f"groups must be a function of the model, got {groups!r}")
    check_mode(in_backward)
    if not _positive(accumulation_steps):
        raise ValueError(f"accumulation_steps must be a positive int, got {accumulation_steps!r}")
    pair = isinstance(tokens, tuple | list) and len(tokens) == 2 and all(map(_positive, tokens))
    if tokens is not None and not (_positive(tokens) or pair):
        raise ValueError(f"tokens must be None, a positive int or a pair of them, got {tokens!r}")
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype, got {dtype!r}")


def check_model(model: Any) -> None:
    """Raise unless a model is a module, or a configuration that one is built from.

    Raises:
        TypeError: it is neither.
    """
    if not isinstance(model, nn.Module) and not hasattr(model, "to_dict"):
        kind = type(model).__name__
        raise TypeError(
            f"model must be an nn.Module or a configuration of transformers, got {kind}"
        )


def check_mode(in_backward: Any) -> None:
    """Raise unless a mode is one of in-backward stepping, or None.

    Raises:
        ValueError: it is not.
    """
    known = isinstance(in_backward, str) and in_backward in ("project", "step")
    if in_backward is not None and not known:
        raise ValueError(f"in_backward must be None, 'project' or 'step', got {in_backward!r}")


def check_flag(name: str, value: Any) -> None:
    """Raise unless an argument is True or False.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")


def check_loss(loss: Any, tokens: Any, chunk: Any = None) -> None:
    """Raise unless a loss, and its chunk, are among those known and would have an effect.

    Raises:
        ValueError: it is not, or would have none.
    """
    if not (isinstance(loss, str) and loss in LOSSES):
        raise ValueError(f"loss must be one of {', '.join(map(repr, LOSSES))}, got {loss!r}")
    if tokens is None and loss != LOSSES[0]:
        raise ValueError(f"loss={loss!r} has no effect without tokens, which count activations")
    allowed = whole(1, none=True)
    if not allowed.holds(chunk):
        raise ValueError(f"loss_chunk must be {allowed.text}, got {chunk!r}")
    if chunk is not None and loss != "chunked":
        raise ValueError(
            f"loss_chunk={chunk} has no effect on loss={loss!r}: it is the tokens of which "
            "loss='chunked' has logits at once"
        )


def check_sharded(model: Any, in_backward: Any, tokens: Any) -> None:
    """Raise for what is not known of one rank of several.

    Raises:
        NotImplementedError: the model is sharded, and gradients or activations are asked for that
            depend on when its layers are gathered.
    """
    if not isinstance(model, nn.Module) or not any(map(is_sharded, model.parameters())):
        return
    if in_backward is not None:
        raise NotImplementedError(
            f"in_backward={in_backward!r} of a model of DTensors: what lives of gradients then is "
            "not known without a run. Leave in_backward out, which is an upper bound, as FSDP2 "
            "frees whole gradients itself"
        )
    if tokens is not None:
        raise NotImplementedError(
            "tokens of a model of DTensors: what is gathered at once depends on how it is sharded. "
            "Give the model as it was before fully_shard, with world_size, or leave tokens out"
        )


def check_device(device: Any) -> None:
    """Raise unless torch knows a device of this name.

    Raises:
        ValueError: it does not.
    """
    try:
        torch.device("meta" if device is None else device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"device must be None or one of torch's, such as 'cuda' or 'cpu', got {device!r}"
        ) from error


def _positive(value: Any) -> bool:
    return whole(1).holds(value)


def class_of(given: Any) -> type[Optimizer]:
    """The class of an optimizer, or of a layout by its name.

    Raises:
        TypeError: it is neither.
        ValueError: there is no layout of that name.
    """
    if isinstance(given, str):
        if given not in LAYOUTS:
            raise ValueError(f"optimizer_class must be a class or in {[*LAYOUTS]}, got {given!r}")
        return LAYOUTS[given]
    if not (isinstance(given, type) and issubclass(given, Optimizer)):
        raise TypeError(
            f"optimizer_class must be a class of optimizers or in {[*LAYOUTS]}, got {given!r}"
        )
    return given
