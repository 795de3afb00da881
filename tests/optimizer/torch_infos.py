"""An entry of torch's own test registry (``OptimizerInfo``) for every class of the package.

torch's registry imports the whole of its test suite, which takes four seconds: an ``outline`` says
the same without it, and with fewer inputs, for the default run.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch.optim import lr_scheduler as sched

from lowrank_optim import methods
from lowrank_optim.subspaces.base import PROJECTORS
from tests import cases

NOT_OF_RELEASE_ONE = ("maximize", "capturable", "state_device", "flatten", "stagger", "seed")
"""Keys that a state_dict of an older version may lack."""

SCHEDULERS = (
    [lambda opt: sched.StepLR(opt, gamma=0.9, step_size=10)],
    [
        lambda opt: sched.LinearLR(opt, start_factor=0.4, total_iters=4),
        lambda opt: sched.StepLR(opt, gamma=0.9, step_size=10),
        lambda opt: sched.ReduceLROnPlateau(opt),
    ],
    [lambda opt: sched.PolynomialLR(opt, power=0.9, total_iters=40)],
)


def inputs(name: str, device: Any) -> dict[str, dict[str, Any]]:
    """Keyword arguments by description: global options and those of the class, and pairs of them.

    A step that twenty steps on ten inputs show, with several refreshes among them.
    """
    cls = getattr(methods, name)
    base = {"lr": 1e-2, "rank": 3, "update_proj_gap": 4, "scale": 1.0}
    base = {**base, **cases.METHOD_ARGS.get(name, {})}
    options: dict[str, dict[str, Any]] = {
        "low rank": {},
        "maximize, weight_decay": {"maximize": True, "weight_decay": 0.1},
        "tensor lr": {"lr": torch.tensor(1e-2)},
        "clamped rank": {"rank": 128},
        "weight_decay": {"weight_decay": 0.1},
        "maximize": {"maximize": True},
        "bfloat16 moments": {"state_dtype": "bfloat16", "stagger": False},
    }
    if name.endswith("8bit"):
        options.pop("bfloat16 moments")
    if "Frugal" in name:
        # Blocks take a density. torch's problem has gradients of rank 1: what a basis leaves out is
        # rounding, whose signs are coins, each as large a step as a true one.
        base = {"projector": "svd", "free_rule": "sgd", **base}
        options["blocks"] = {"projector": "block", "rank": 0.5}
    if "LDAdam" in name:
        # Likewise: further directions of a power iteration would be of rounding.
        base["rank"] = 1
    if name in cases.projecting_names():
        kinds = {"columns", "svd", "random"} & PROJECTORS.keys()
        options |= {kind: {"projector": kind} for kind in sorted(kinds)}
    if torch.device(device).type == "cuda" and _captures(cls, base, device):
        options["capturable"] = {"capturable": True}
    chosen = {desc: {**base, **o} for desc, o in options.items()}
    return {d: {k: v for k, v in o.items() if k not in cls.unused} for d, o in chosen.items()}


def _captures(cls: Any, base: dict[str, Any], device: Any) -> bool:
    """Whether a graph can hold a step of a class, which says so when it is made."""
    known = {k: v for k, v in base.items() if k not in cls.unused}
    try:
        cls([torch.nn.Parameter(torch.ones(4, 6, device=device))], **known, capturable=True)
    except ValueError:
        return False
    return True


def errors(name: str, device: Any, dtype: torch.dtype) -> list[Any]:
    """Those of every optimizer of torch, and the values that its classes share with ours."""
    from torch.testing._internal.common_optimizers import (
        ErrorOptimizerInput,
        OptimizerInput,
        get_error_inputs_for_all_optims,
    )

    found = get_error_inputs_for_all_optims(device, dtype)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"lr": -1e-2}, "Invalid learning rate: -0.01"),
        ({"weight_decay": -1.0}, "Invalid weight_decay value: -1"),
        ({"rank": 0}, "rank"),
        ({"update_proj_gap": 0}, "update_proj_gap"),
    ]
    if "betas" in cases.RULES[rule(name)]:
        wrong += [
            ({"betas": (1.0, 0.0)}, "Invalid beta parameter at index 0: 1.0"),
            ({"betas": (0.9, torch.tensor(0.99))}, "beta"),
        ]
    if "eps" in cases.RULES[rule(name)]:
        wrong.append(({"eps": -1e-8}, "Invalid epsilon value: -1e-08"))
    if "momentum" in cases.RULES[rule(name)]:
        wrong.append(({"momentum": -0.5}, "Invalid momentum value: -0.5"))
    for kwargs, text in wrong:
        given = OptimizerInput([torch.nn.Parameter(torch.ones(4, 6))], kwargs, str(kwargs))
        found.append(ErrorOptimizerInput(given, error_type=ValueError, error_regex=text))
    return found


def rule(name: str) -> str:
    """The rule of a class, by the end of its name."""
    return next((r for r in cases.RULES if name.lower().removesuffix("8bit").endswith(r)), "adamw")


def _entry(name: str, make_input: Callable[..., Any], count: int | None) -> dict[str, Any]:
    def listed(device: Any, dtype: Any = None) -> list[Any]:
        return [make_input(None, o, d) for d, o in [*inputs(name, device).items()][:count]]

    return {
        "optim_cls": getattr(methods, name),
        "optim_inputs_func": listed,
        "scheduler_inputs": SCHEDULERS,
        "optim_error_inputs_func": lambda device, dtype: errors(name, device, dtype),
        "supported_impls": (),  # one implementation: the flags of torch's choose nothing
        "not_og_supported_flags": NOT_OF_RELEASE_ONE,
        "supports_complex": False,
        "has_capturable_arg": True,
    }


def info(name: str) -> Any:
    """The entry of torch's kind."""
    from torch.testing._internal.common_optimizers import OptimizerInfo, OptimizerInput

    return OptimizerInfo(**_entry(name, OptimizerInput, None))


def outline(name: str) -> Any:
    """The same with the first two inputs, without torch's registry."""

    def make_input(params: Any, kwargs: dict[str, Any], desc: str) -> Any:
        return SimpleNamespace(params=params, kwargs=kwargs, desc=desc)

    return SimpleNamespace(name=name, **_entry(name, make_input, 2))
