"""The model that ``--model`` names."""

from __future__ import annotations

import importlib
import json
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowrank_optim.cli.errors import Refused, nearest
from lowrank_optim.memory.inputs import model_of
from lowrank_optim.memory.models import MODELS, Config
from lowrank_optim.memory.shapes import FAMILIES, on_meta

NEEDED = ("hidden_size", "num_hidden_layers", "vocab_size")
"""Without these transformers takes a size of its own, in silence."""


def load(
    given: str,
    dtype: torch.dtype | None,
    runs: bool,
    device: str = "meta",
    *,
    with_values: bool = False,
) -> nn.Module:
    """The model, on the meta device or on one where it is to run, or as a function makes it.

    Args:
        given: a name, a configuration's file or folder, or ``module.path:function``.
        dtype: of a model that is made from a configuration (default: bfloat16).
        runs: whether it has to run, which takes ``transformers``.
        device: where it is made (default: the meta device).
        with_values: whether it has to have values: of a function alone, on the device of its own.

    Raises:
        Refused: there is none, nothing can be trained of it, or it has no values.
    """
    names = {name.lower(): name for name in MODELS}
    path, (module, colon, function) = Path(given), given.rpartition(":")
    own = not (given.lower() in names or path.exists()) and bool(colon)
    if own and dtype is not None:
        raise Refused("--dtype has no effect on a model of your own: give it the dtype there")
    if with_values and not own:
        raise Refused(
            f"--calibrate runs the model, and {given!r} has no values: give --model "
            "module.path:function, which makes or loads it"
        )
    dtype = dtype or torch.bfloat16
    if given.lower() in names:
        config = MODELS[names[given.lower()]].config
        model = _made(_configured(config), dtype, given, device) if runs else on_meta(config, dtype)
    elif path.exists():
        model = _made(_configured(_read(path)), dtype, given, device)
    elif own:
        model = _called(module, function, dtype, device, with_values)
    else:
        hint = nearest(given, MODELS) or "."
        raise Refused(
            f"--model {given!r} is no known model, file or folder{hint} --help lists the names; or "
            "give a config.json, its folder or module.path:function"
        )
    _check(model, given)
    return model


def _check(model: nn.Module, given: str) -> None:
    """Raise for a model that nothing can be trained of.

    Raises:
        Refused: it has no parameters, none that trains, or one without elements.
    """
    kind, params = f"--model {given!r}: {type(model).__name__}", dict(model.named_parameters())
    if not params:
        raise Refused(f"{kind} has no parameters")
    if not any(p.requires_grad for p in params.values()):
        raise Refused(f"{kind} has no parameter to train: requires_grad is False for all")
    for name, param in params.items():
        if param.numel() == 0:
            raise Refused(f"{kind} has a parameter without elements: {name}, {tuple(param.shape)}")


def _read(path: Path) -> Config:
    """The fields of a configuration's file.

    Raises:
        Refused: there is no file, it is no JSON object, or it does not say what sizes rest on.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Refused(f"--model: {file} cannot be read as JSON: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise Refused(f"--model: {file} is no configuration of transformers: it has no model_type")
    return config


def _configured(config: Config) -> Any:
    """The configuration as ``transformers`` has it.

    Raises:
        Refused: it is not installed, does not know the model type, or a field is missing or wrong.
    """
    try:
        from transformers import CONFIG_MAPPING
        from transformers.utils import logging
    except ImportError as error:
        raise Refused(
            "a configuration, or activations (--tokens), need transformers: "
            "pip install 'lowrank-optim[transformers]'"
        ) from error
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    kind = config["model_type"]
    if kind not in CONFIG_MAPPING:
        raise Refused(f"transformers knows no model_type {kind!r}{nearest(kind, CONFIG_MAPPING)}")
    found: type[Any] = CONFIG_MAPPING[kind]
    family = FAMILIES.get(kind)
    aliases = dict(getattr(found, "attribute_map", None) or {})
    needed = [aliases.get(key, key) for key in NEEDED if not getattr(found, "sub_configs", None)]
    if family is not None:
        needed = [aliases.get(key, key) for key in family.fields]
    own = {*config, *(aliases.get(key, key) for key in config)}
    missing = [key for key in needed if key not in own and (family or hasattr(found, key))]
    if missing:
        raise Refused(f"the configuration of a {kind} model does not say {', '.join(missing)}")
    try:
        return found.from_dict(config)
    except Exception as error:  # its checks raise classes of their own
        raise Refused(f"the configuration of a {kind} model is refused: {error}") from error


def _made(config: Any, dtype: torch.dtype, given: str, device: str) -> nn.Module:
    try:
        with torch.device(device), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Initializing zero-element")  # refused later
            return model_of(config, dtype)
    except torch.OutOfMemoryError:
        raise  # of a device: an answer, and no fault of the configuration's
    except Exception as error:  # anything that a model's class may raise of a wrong field
        raise Refused(f"--model {given!r}: no model can be made from it: {error}") from error


def imported(option: str, given: str) -> Callable[..., Any]:
    """The function that ``module.path:function`` names.

    Raises:
        Refused: there is none.
    """
    module, colon, function = given.rpartition(":")
    if not (module and colon and function):
        raise Refused(f"{option} must be module.path:function, got {given!r}")
    if os.getcwd() not in sys.path:  # a console command has its own folder there
        sys.path.insert(0, os.getcwd())
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    except Exception as error:  # code of the user's
        raise Refused(f"{option} {given}: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise Refused(f"{option} {given} is no function but a {type(found).__name__}")
    return found


def _called(
    module: str, function: str, dtype: torch.dtype, device: str, with_values: bool
) -> nn.Module:
    """What a function returns that is called with ``device`` as the default one.

    Where values are asked for it takes the device of its own.

    Raises:
        Refused: there is no such function, it raises, or it returns something else.
    """
    given = f"--model {module}:{function}"
    called = imported("--model", f"{module}:{function}")
    try:
        with nullcontext() if with_values else torch.device(device):
            found = called()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # code of the user's
        raise Refused(f"{given}: {type(error).__name__}: {error}") from error
    if with_values and not isinstance(found, nn.Module):
        raise Refused(f"{given} must return an nn.Module for --calibrate, which runs it")
    if hasattr(found, "to_dict") and not isinstance(found, nn.Module):
        return _made(found, dtype, f"{module}:{function}", device)
    if not isinstance(found, nn.Module):
        kind = type(found).__name__
        raise Refused(f"{given} must return an nn.Module or a configuration, got {kind}")
    return found
