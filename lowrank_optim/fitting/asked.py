"""What :func:`lowrank_optim.fit` is asked for, checked before anything is measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from lowrank_optim.backward.projecting import check_choices
from lowrank_optim.fitting.costs import Budget, Mode, Place
from lowrank_optim.fitting.spectra import check_calibrate
from lowrank_optim.groups.keys import METHODS
from lowrank_optim.groups.values import number, whole
from lowrank_optim.memory import GIB
from lowrank_optim.memory.autocast import check_autocast
from lowrank_optim.memory.checks import check_device, check_flag, check_loss, check_model
from lowrank_optim.memory.estimating import device_of
from lowrank_optim.methods import DCTAdamW, FrugalAdamW, GaLoreAdamW
from lowrank_optim.ops.devices import HOST_MEMORY
from lowrank_optim.optimizer import LowRankOptimizer
from lowrank_optim.rules.base import Slot
from lowrank_optim.sharding.parts import is_sharded
from lowrank_optim.stores import STORES

Named = tuple[type[LowRankOptimizer], dict[str, Any]]

OPTIMIZERS: tuple[Named, ...] = (
    (GaLoreAdamW, {}),
    (FrugalAdamW, {"projector": "columns"}),
    (DCTAdamW, {}),
)
"""In the order that the documentation recommends, each with the arguments that fit ranks.

Not Fira, which needs what GaLore needs, and whole gradients.
"""

MODES: tuple[Mode, ...] = (None, "project", "step")
PLACES: tuple[Place, ...] = (None, "cpu")

FOUND = {
    "rank": "fit finds ranks: least and multiple bound them",
    "density": "fit finds ranks: least and multiple bound them",
    "state_dtype": "give the formats to choose from in state_dtypes",
    "params": "fit takes the parameters of the model: target_modules selects those with a rank",
}
"""Arguments of an optimizer that are what is looked for."""


class Asked(NamedTuple):
    """Arguments with their defaults."""

    budget: Budget
    modes: tuple[Mode, ...]
    state_dtypes: tuple[str, ...]
    places: tuple[Place, ...]
    """Where moments may lie."""
    device: str
    """The type of the one to train on; ``"meta"`` is an accelerator."""
    energy: str
    multiple: int
    least: int
    accumulation_steps: int


def check_asked(
    *,
    model: Any,
    budget_gib: Any,
    host_gib: Any,
    tokens: Any,
    checkpointing: Any,
    loss: Any,
    loss_chunk: Any,
    autocast: Any,
    transients: Any,
    accumulation_steps: Any,
    in_backward: Any,
    state_dtypes: Any,
    state_devices: Any,
    calibrate: Any,
    energy: Any,
    multiple: Any,
    least: Any,
    coords_dtype: Any,
    dtype: Any,
    device: Any,
    options: Mapping[str, Any],
) -> Asked:
    """The arguments of :func:`lowrank_optim.fit`.

    Raises:
        NotImplementedError: the model is sharded.
        TypeError: one is of a wrong type.
        ValueError: one is out of range or would have no effect.
    """
    calibrated = calibrate is not None
    _check_model(model, dtype, calibrated)
    check_calibrate(calibrate)
    check_device(device)
    check_flag("transients", transients)
    positive = number(lambda x: x > 0, "a positive number")
    for name, value, allowed in (
        ("budget_gib", budget_gib, positive),
        ("host_gib", host_gib, number(lambda x: x > 0, positive.text, none=True)),
        ("accumulation_steps", accumulation_steps, whole(1)),
        ("multiple", multiple, whole(1)),
        ("least", least, whole(1, none=True)),
    ):
        if not allowed.holds(value):
            raise ValueError(f"{name} must be {allowed.text}, got {value!r}")
    least = multiple if least is None else least
    if least % multiple:
        raise ValueError(f"least must be a multiple of multiple={multiple}, got {least}")
    if tokens is None and checkpointing:
        raise ValueError("checkpointing has no effect without tokens, which count activations")
    check_loss(loss, tokens, loss_chunk)
    own = {dtype or torch.bfloat16}  # of a configuration
    if isinstance(model, nn.Module):
        own = {p.dtype for p in model.parameters()}
    check_autocast(autocast, tokens, own)
    if energy is not None and not calibrated:
        raise ValueError(f"energy={energy!r} has no effect without calibrate")
    if energy not in (None, "relative", "absolute"):
        raise ValueError(f"energy must be 'relative' or 'absolute', got {energy!r}")
    check_choices("micro", coords_dtype)
    modes = _modes(in_backward, accumulation_steps)
    if coords_dtype != "auto" and "project" not in modes:
        raise ValueError(f"coords_dtype={coords_dtype!r} has no effect without 'project'")
    _check_options(options)
    stores = _chosen("state_dtypes", state_dtypes, sorted(STORES, key=_bytes_of, reverse=True))
    kind = device_of(model, device) if isinstance(model, nn.Module) else str(device or "meta")
    kind = torch.device(kind).type
    places = _places(state_devices, kind, options)
    if host_gib is not None and "cpu" not in (*places, options.get("state_device")):
        raise ValueError(
            f"host_gib={host_gib} has no effect where moments stay on the device: leave it out, "
            "or let state_devices have 'cpu' and give the GPU to train on, such as device='cuda'"
        )
    host = math.inf if host_gib is None else float(host_gib) * GIB
    budget = Budget(float(budget_gib) * GIB, host)
    energy = energy or "absolute"
    return Asked(budget, modes, stores, places, kind, energy, multiple, least, accumulation_steps)


def named_optimizers(given: Sequence[Any] | None, options: Mapping[str, Any]) -> list[Named]:
    """Classes and arguments, those of all among them.

    Raises:
        TypeError: one is no class of this package, or no pair with a dict.
        ValueError: a name is not known, or nothing is given.
    """
    if given is None:
        return [(cls, {**own, **options}) for cls, own in OPTIMIZERS]
    if isinstance(given, str) or not isinstance(given, Sequence) or not given:
        raise ValueError(
            "optimizers must be a list of classes, names, or pairs of one and a dict of "
            f"arguments, got {given!r}"
        )
    return [_named(each, options) for each in given]


def _named(given: Any, options: Mapping[str, Any]) -> Named:
    cls, own = given if isinstance(given, tuple) and len(given) == 2 else (given, {})
    if isinstance(cls, str):
        if cls not in METHODS:
            raise ValueError(f"optimizers must be in {', '.join(METHODS)}, got {cls!r}")
        cls = METHODS[cls]
    if not (isinstance(cls, type) and issubclass(cls, LowRankOptimizer)):
        raise TypeError(f"optimizers must be classes of lowrank_optim, got {cls!r}")
    if not isinstance(own, Mapping):
        raise TypeError(f"arguments of {cls.__name__} must be a dict, got {own!r}")
    _check_options(own)
    own = {**dict(OPTIMIZERS).get(cls, {}), **own}
    both = own.keys() & options.keys()
    if both:
        raise ValueError(
            f"{', '.join(sorted(both))} is given for {cls.__name__} and for all: give it once"
        )
    return cls, {**own, **options}


def _check_model(model: Any, dtype: Any, calibrated: bool) -> None:
    check_model(model)
    is_module = isinstance(model, nn.Module)
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype, got {dtype!r}")
    if is_module and dtype is not None:
        raise ValueError("dtype has no effect on a module: it is for configurations")
    if not is_module and calibrated:
        raise ValueError("calibrate runs the model: give the module, not its configuration")
    if is_module and any(map(is_sharded, model.parameters())):
        raise NotImplementedError(
            "the model has DTensors: plan with the module before it is sharded; ranks and groups "
            "of the plan go with the sharded one"
        )


def _modes(given: Any, accumulation_steps: int) -> tuple[Mode, ...]:
    """The modes in their order; of several micro-batches without ``"step"``.

    Raises:
        ValueError: one is not known, or saves nothing.
    """
    if given is None:
        return MODES if accumulation_steps == 1 else MODES[:-1]
    given = (given,) if isinstance(given, str) else given
    modes = _chosen("in_backward", given, MODES)
    if "step" in modes and accumulation_steps > 1:
        raise ValueError(
            f"in_backward='step' with accumulation_steps={accumulation_steps} frees no gradient "
            "before the last micro-batch: take it out, or take one micro-batch"
        )
    return modes


def _places(given: Any, device: str, options: Mapping[str, Any]) -> tuple[Place, ...]:
    """Where moments may lie, the device first.

    Raises:
        ValueError: one is not known, would have no effect, or an option says it too.
    """
    both = device not in HOST_MEMORY
    if given is None:
        return PLACES if both else PLACES[:1]
    if "state_device" in options:
        raise ValueError(
            f"state_device={options['state_device']!r} and state_devices={given!r} both say where "
            "moments lie: give one"
        )
    found = _chosen("state_devices", given, PLACES)
    if "cpu" in found and not both:
        raise ValueError(
            "state_devices has 'cpu', which has no effect where the device is a CPU: its memory is "
            "the host's. Leave it out, or give the device to train on, such as device='cuda'"
        )
    return found


def _bytes_of(store: str) -> int:
    """What a format takes of a large moment: the widest gives up least."""
    state: dict[str, torch.Tensor] = {}
    like = torch.empty(0, device="meta")
    STORES[store].alloc(state, "m", Slot("m", signed=True), (1024, 1024), like)
    return sum(x.nbytes for x in state.values())


def _chosen(name: str, given: Any, allowed: Sequence[Any]) -> tuple[Any, ...]:
    if given is None:
        return tuple(allowed)
    listed = ", ".join(map(repr, allowed))
    if isinstance(given, str) or not isinstance(given, Sequence) or not given:
        raise ValueError(f"{name} must be a list of some of {listed}, got {given!r}")
    for each in given:
        if not any(each is x or (isinstance(each, str) and each == x) for x in allowed):
            raise ValueError(f"{name} must be a list of some of {listed}, got {each!r} in it")
    if len(set(given)) < len(given):
        raise ValueError(f"{name} has one of {listed} twice: {given!r}")
    return tuple(given)


def _check_options(options: Mapping[str, Any]) -> None:
    for key, why in FOUND.items():
        if key in options:
            raise ValueError(f"{key}={options[key]!r}: {why}")
