"""What a model of ``transformers`` is given to find what its forward and backward hold."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

ONE_LABEL = ("SequenceClassification", "ImageClassification")
"""In the names of classes: one label for each sequence or image."""

OTHER_LABELS = ("MultipleChoice", "NextSentencePrediction", "PreTraining", "MaskedImageModeling")
"""In the names of classes whose labels are of another form."""

POSITIONS = re.compile(r"(^|\.)(wpe|\w*position\w*)$")
"""Names of tables with a row for each place of a token."""


def model_of(config: Any, dtype: torch.dtype) -> nn.Module:
    """The model of a ``transformers`` configuration, on the default device.

    It is the class that ``architectures`` names; else the causal language model, and where there is
    none, a masked one, a classifier of images, a model of two sides, or the one without a head.

    Raises:
        ValueError: transformers has no model for it.
    """
    import transformers  # optional, and slow to import

    for name in getattr(config, "architectures", None) or ():
        named = getattr(transformers, name, None)
        if named is not None:
            return _made(named._from_config, config, dtype)
    for kind in ("CausalLM", "MaskedLM", "ImageClassification", "Seq2SeqLM", ""):
        auto = getattr(transformers, f"AutoModelFor{kind}" if kind else "AutoModel")
        if type(config) in auto._model_mapping:
            return _made(auto.from_config, config, dtype)
    raise ValueError(
        f"transformers {transformers.__version__} has no model for a {type(config).__name__}: give "
        "the model itself"
    )


def _made(make: Callable[..., nn.Module], config: Any, dtype: torch.dtype) -> nn.Module:
    return make(copy.deepcopy(config), dtype=dtype)


def innermost(model: nn.Module) -> Any:
    """The model of ``transformers`` in ``model``, which may be a wrapper such as PEFT's.

    Raises:
        ValueError: there is none.
    """
    for module in model.modules():
        if hasattr(module, "main_input_name") and hasattr(module, "set_attn_implementation"):
            return module
    raise ValueError(
        "tokens needs a transformers model, or the configuration of one, got a "
        f"{type(model).__name__}"
    )


def batch_of(model: nn.Module, shape: tuple[int, int]) -> dict[str, Tensor]:
    """Inputs and labels of ``(sequences, length)`` tokens: zeros, on the default device.

    Raises:
        ValueError: the model takes something else than tokens or images, or its images have
            another number of tokens.
    """
    inner = innermost(model)
    name, kind = inner.main_input_name, type(inner).__name__
    if name == "input_ids":
        _check_length(inner, shape[1])
        batch = {name: torch.zeros(shape, dtype=torch.long)}
    elif name == "pixel_values":
        batch = {name: _images(inner, shape)}
    else:
        raise ValueError(
            f"tokens is for models of text and images; {kind} takes {name}: leave tokens out, and "
            "measure activations in a real step"
        )
    if any(other in kind for other in OTHER_LABELS):
        raise ValueError(f"tokens: the labels of {kind} are not known. Leave tokens out")
    accepted = inspect.signature(inner.forward).parameters
    if "labels" in accepted:
        of_one = any(one in kind for one in ONE_LABEL)
        real = of_one and inner.config.num_labels == 1  # a regression
        dtype = torch.float32 if real else torch.long
        batch["labels"] = torch.zeros(shape[:1] if of_one else shape, dtype=dtype)
    elif "start_positions" in accepted:
        for key in ("start_positions", "end_positions"):
            batch[key] = torch.zeros(shape[:1], dtype=torch.long)
    return batch


def _check_length(model: nn.Module, length: int) -> None:
    """Raise for more tokens than there are places: without memory no look-up can fail."""
    for name, module in model.named_modules():
        places = getattr(module, "num_embeddings", None)
        if places is not None and POSITIONS.search(name) and places < length:
            raise ValueError(
                f"tokens: {type(model).__name__} has {places} places ({name}), got sequences of "
                f"{length}: give (sequences, length) with a length up to {places}"
            )


def _images(model: Any, shape: tuple[int, int]) -> Tensor:
    """As many as there are sequences, of the size that the model is made for."""
    config = model.config
    size, patch = (getattr(config, key, None) for key in ("image_size", "patch_size"))
    if not (isinstance(size, int) and isinstance(patch, int)):
        raise ValueError(
            f"tokens: the size of the images of {type(model).__name__} is not one number. Leave "
            "tokens out"
        )
    patches = (size // patch) ** 2
    known = {patches, patches + 1}  # with the token of the class, or without
    if shape[1] not in known:
        raise ValueError(
            f"tokens: an image of {size} by {size} is {patches + 1} tokens in "
            f"{type(model).__name__}, got {shape[1]}: give (images, {patches + 1})"
        )
    images = torch.zeros(shape[0], config.num_channels, size, size)
    return images.to(next(model.parameters()).dtype)


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The model's own loss; of a model without one, the mean of its first output in float32."""
    out = model(**batch)
    loss = getattr(out, "loss", None)
    if isinstance(loss, Tensor):
        return loss
    first: Tensor = out[0]
    return first.float().mean()
