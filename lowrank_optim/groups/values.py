"""Values of group keys: what each may be, and errors that say so."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Sequence
from numbers import Real
from typing import Any, NamedTuple

from torch import Tensor, nn

from lowrank_optim.ops.cosine import BASES, RANKINGS
from lowrank_optim.residuals.error_feedback import FORMATS
from lowrank_optim.stores import STORES
from lowrank_optim.subspaces.base import PROJECTORS
from lowrank_optim.subspaces.block import BLOCK_ORDERS
from lowrank_optim.subspaces.dct import TRANSFORMS
from lowrank_optim.subspaces.factors import SAMPLING
from lowrank_optim.tensors.matrix import PROJ_TYPES
from lowrank_optim.transports import TRANSPORTS

Group = dict[str, Any]
"""A parameter group, as a torch optimizer keeps it: ``params``, and settings by their names."""

FREE_RULES = {"sign": "sign_sgd", "sgd": "sgd", "none": "no"}
"""What moves the part of a gradient that has no state, and FRUGAL's names for it."""

CHOICES: dict[str, Collection[str | None]] = {
    "proj_type": PROJ_TYPES,
    "projector": PROJECTORS,
    "on_refresh": TRANSPORTS,
    "block_order": BLOCK_ORDERS,
    "free_rule": FREE_RULES,
    "state_dtype": STORES,
    "state_device": (None, "cpu"),
    "alpha_mode": ("release", "paper"),
    "scaling": ("column", "matrix"),
    "scale_type": ("channel", "tensor"),
    "proj": ("random", "svd"),
    "basis": BASES,
    "ranking": RANKINGS,
    "transform": TRANSFORMS,
    "error_feedback": FORMATS,
    "sampling": SAMPLING,
    "factors": ("exact", "active"),
    "factor_dtype": ("float32", "bfloat16"),
    "negative": ("clamp", "flip"),
    "descent": ("exponential", "Z"),
    "order": ("fifo", "random"),
    "pool_device": ("cpu", "param"),
    "decay_on": ("factors", "weight"),
    "outside": ("always", "turns"),
    "targets": ("auto", "all", "modules"),
}
"""Keys whose value is a name, and the names; registries grow."""

FLAGS = (
    "stagger", "stochastic_rounding", "maximize", "capturable", "flatten", "slot_bias_correction",
    "enhanced", "offload_inactive", "freeze_step_counter", "fan_in_fan_out", "nesterov",
    "scale_parameter", "relative_step", "warmup_init", "disable_nl", "scale_front",
)  # fmt: skip
"""Keys that are True or False."""


class Allowed(NamedTuple):
    """What the value of a key may be."""

    holds: Callable[[Any], bool]
    text: str
    """As in "must be ..."."""


def whole(least: int, none: bool = False) -> Allowed:
    """An int of at least ``least``."""

    def holds(value: Any) -> bool:
        if value is None:
            return none
        return isinstance(value, int) and not isinstance(value, bool) and value >= least

    text = "a positive int" if least == 1 else f"an int of at least {least}"
    return Allowed(holds, f"None or {text}" if none else text)


def number(test: Callable[[Any], bool], text: str, none: bool = False) -> Allowed:
    """A finite number of Python that passes ``test``."""

    def holds(value: Any) -> bool:
        if value is None:
            return none
        return _number(value) and math.isfinite(value) and test(value)

    return Allowed(holds, f"None or {text}" if none else text)


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


_NOT_NEGATIVE = number(lambda x: x >= 0, "a finite number of at least 0")

VALUES: dict[str, Allowed] = {
    "update_proj_gap": whole(1),
    "steps_per_iteration": whole(1),
    "iterations_per_round": whole(1, none=True),
    "warmup_steps": whole(0),
    "interval": whole(1),
    "freeze_steps": whole(0),
    "total_steps": whole(1, none=True),
    "restart_every": whole(1, none=True),
    "active_layers": whole(1),
    "random_from": Allowed(
        lambda x: whole(0).holds(x) or (isinstance(x, float) and 0 <= x <= 1),
        "a step of at least 0, or a float in [0, 1] that is a part of total_steps",
    ),
    "oversample": whole(0),
    "max_iterations": whole(1),
    "tolerance": _NOT_NEGATIVE,
    "scale": _NOT_NEGATIVE,
    "free_lr_scale": _NOT_NEGATIVE,
    "proj_params_lr_scale": _NOT_NEGATIVE,
    "vector_lr_scale": _NOT_NEGATIVE,
    "s_lr_scale": _NOT_NEGATIVE,
    "rho": number(lambda x: 0 <= x < 1, "a number in [0, 1)"),
    "limiter": number(lambda x: x >= 1, "a finite number of at least 1", none=True),
    "descent_ratio": number(lambda x: 0 < x <= 1, "a number in (0, 1]"),
    "dampening": number(lambda x: True, "a finite number"),
    "clip_threshold": number(lambda x: x > 0, "a finite number above 0"),
    "decay_rate": number(lambda x: x <= 0, "a finite number of at most 0"),
    "beta1": number(lambda x: 0 <= x < 1, "a number in [0, 1)", none=True),
    # -1 means "any" in many command lines, and here it would be one seed as good as another
    "seed": Allowed(
        lambda x: isinstance(x, int) and not isinstance(x, bool) and 0 <= x < 2**63,
        "an int from 0 to 2**63 - 1",
    ),
    "layers": Allowed(
        lambda x: x is None or (isinstance(x, str) and _compiles(x)),
        "None or a regular expression, such as r'layers\\.\\d+\\.'",
    ),
    "layer_weights": Allowed(
        lambda x: (
            x is None
            or (isinstance(x, list | tuple) and all(map(_NOT_NEGATIVE.holds, x)) and any(x))
        ),
        "None or a list of numbers of at least 0, not all of them 0",
    ),
    **{
        key: Allowed(lambda x: isinstance(x, bool), "True or False")  # bool("false") is True
        for key in FLAGS
    },
}
"""Keys with a range of their own."""

TORCH_WORDS = {
    "lr": "Invalid learning rate: {}",
    "eps": "Invalid epsilon value: {}",
    "weight_decay": "Invalid weight_decay value: {}",
    "momentum": "Invalid momentum value: {}",
}
"""How torch's own optimizers begin the message about a key that they have too."""


def _number(value: Any) -> bool:
    """Whether ``value`` is a number of Python; a config file's ``"1e-3"`` is not.

    No whole number of 64 bits and more is one: torch cannot take it.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    return not isinstance(value, int) or abs(value) < 2**63


def _same(value: Any, name: str | None) -> bool:
    return isinstance(value, str) and value == name


def shown(value: Any) -> str:
    """``value`` for a message: as torch prints numbers and tensors, strings with their quotes."""
    return repr(value) if isinstance(value, str) else f"{value}"


def density(value: Any) -> float | None:
    """The fraction that a rank is, of everything: 0 and 1 are allowed.

    Raises:
        ValueError: it is not in [0, 1].
    """
    if value is None:
        return None
    if not (_number(value) and 0 <= value <= 1):
        raise ValueError(f"density must be in [0, 1], got {shown(value)}")
    return float(value)


def check_module(model: object) -> None:
    """Raise unless ``model`` is a module.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def check_rank(rank: Any, closed: bool = False) -> None:
    """Raise unless ``rank`` is a positive int or a fraction in (0, 1).

    Args:
        rank: of a group.
        closed: whether it may be a density, for which 0 and 1 mean something.

    Raises:
        ValueError: it is neither.
    """
    if closed and isinstance(rank, float) and rank in (0.0, 1.0):
        return
    if not whole(1).holds(rank) and not (isinstance(rank, float) and 0 < rank < 1):
        whole_or_none = isinstance(rank, float) and rank in (0.0, 1.0)
        whose = "; FRUGAL alone takes a density of 0 or 1" if whole_or_none else ""
        raise ValueError(
            f"rank must be a positive int or a fraction in (0, 1), got {shown(rank)}{whose}"
        )


def check(group: Group, closed: bool = False) -> None:
    """Raise for values no step could use, in torch's words where torch has them.

    Args:
        group: the keys to look at.
        closed: whether a rank may be a density of 0 or 1; so it may in any group of FRUGAL.

    Raises:
        ValueError: a hyper-parameter is out of range.
    """
    check_rule(group)
    if group.get("rank") is not None:
        check_rank(group["rank"], closed or "free_rule" in group)
    for key, allowed in VALUES.items():
        if key in group and not allowed.holds(group[key]):
            raise ValueError(f"{key} must be {allowed.text}, got {shown(group[key])}")
    for key, names in CHOICES.items():
        if key in group and not any(group[key] is x or _same(group[key], x) for x in names):
            listed = ", ".join(repr(name) for name in names)
            raise ValueError(f"{key} must be one of {listed}, got {group[key]!r}")
    _check_pairs(group)


def _check_pairs(group: Group) -> None:
    """Values that do not go together.

    Raises:
        ValueError: two of them do not.
    """
    rank = group.get("rank")
    if group.get("projector") == "block" and rank is not None and not isinstance(rank, float):
        raise ValueError(
            f"projector='block' takes a density (or a fraction as its rank), got rank={rank}"
        )
    if group.get("projector") == "block" and group.get("error_feedback") is not None:
        raise ValueError(
            "error_feedback does not go with projector='block': a block uses all or nothing"
        )
    if group.get("layer_weights") is not None and group.get("block_order", "random") != "random":
        raise ValueError(
            f"layer_weights has no effect with block_order={group['block_order']!r}, which draws "
            "nothing by weight: take 'random', or leave one of them out"
        )
    since = group.get("random_from")
    if isinstance(since, float) and group.get("total_steps") is None:
        raise ValueError(
            f"random_from={since} is a part of total_steps, which is not given: give the steps of "
            "the run as total_steps, or the first step with random bases as an int"
        )
    if group.get("warmup_init") and not group.get("relative_step", True):
        raise ValueError(
            "warmup_init=True has no effect with relative_step=False, which takes lr as it is: "
            "drop one of them"
        )


def check_rule(group: Group) -> None:
    """The hyper-parameters that torch's optimizers have too, in torch's words.

    Raises:
        ValueError: one is out of range.
    """
    lr = group.get("lr", 0.0)
    if lr is None and "relative_step" in group:  # Adafactor may have step sizes of its own
        lr = 0.0
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"Tensor lr must be 1-element; got one of shape {tuple(lr.shape)}")
        lr = lr.item() if not lr.is_meta else 0.0
    if not _NOT_NEGATIVE.holds(lr):
        raise _torch_error("lr", group["lr"], "a finite number or a 1-element tensor, at least 0")
    betas = group.get("betas", (0.0, 0.0))
    if not isinstance(betas, Sequence) or isinstance(betas, str) or len(betas) != 2:
        raise ValueError(f"betas must be a pair, got {betas!r}")
    for i, beta in enumerate(betas):
        if not (_number(beta) and 0 <= beta < 1):
            raise ValueError(
                f"Invalid beta parameter at index {i}: {shown(beta)}; it must be a number in [0, 1)"
            )
    for key in ("weight_decay", "momentum"):
        if not _NOT_NEGATIVE.holds(group.get(key, 0.0)):
            raise _torch_error(key, group[key], _NOT_NEGATIVE.text)
    _check_eps(group)
    if group.get("nesterov") is True and (group["momentum"] <= 0 or group["dampening"] != 0):
        raise ValueError("Nesterov momentum requires a momentum and zero dampening")


def rate_of(group: Group) -> Any:
    """The learning rate as steps take it: of a tensor ``(1,)``, which torch takes too, ``()``.

    Its dimension would be one of what it multiplies: a parameter of no dimension, or its flags.
    """
    lr = group["lr"]
    return lr.reshape(()) if isinstance(lr, Tensor) and lr.dim() else lr


def _check_eps(group: Group) -> None:
    """A number; of Adafactor a pair of them.

    Raises:
        ValueError: it is something else.
    """
    if "eps" not in group:
        return
    eps = group["eps"]
    pair = isinstance(eps, list | tuple) and len(eps) == 2 and all(map(_NOT_NEGATIVE.holds, eps))
    wants_pair = "decay_rate" in group
    fine = pair if wants_pair else _NOT_NEGATIVE.holds(eps)
    if not fine and not (pair and "method" not in group):  # a group for any optimizer has none
        text = "a pair of finite numbers of at least 0" if wants_pair else _NOT_NEGATIVE.text
        raise _torch_error("eps", eps, text)


def _torch_error(key: str, value: Any, allowed: str) -> ValueError:
    return ValueError(f"{TORCH_WORDS[key].format(shown(value))}; it must be {allowed}")
