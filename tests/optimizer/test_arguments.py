"""Every argument of every class and of the functions around them: wrong values, one table.

The rows are matched with the signatures: an argument without a row fails, whoever adds it.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lowrank_optim import LowRankOptimizer, lowrank_groups, memory, methods, presets
from lowrank_optim.groups import keys
from lowrank_optim.groups.keys import known_keys, projector_keys
from lowrank_optim.groups.options import DEFAULTS, Options, ProjectorOptions
from lowrank_optim.groups.values import CHOICES, FLAGS
from lowrank_optim.nn import convert, merge
from lowrank_optim.subspaces.base import PROJECTORS

CLASSES = {name: getattr(methods, name) for name in methods.__all__}
NAN, INF, TENSOR = math.nan, math.inf, torch.tensor(0.5)
NO_NUMBERS: tuple[Any, ...] = (NAN, INF, -INF, "1e-3", None, True, [0.1], {}, object(), 1j)
NO_INTS: tuple[Any, ...] = (NAN, INF, 2.0, "200", True, [1], torch.tensor(3), object())
NO_NAMES: tuple[Any, ...] = ("unheard of", 7, True, ["svd"], np.array(["a", "b"]), b"svd")

Row = tuple[tuple[Any, ...], str]
"""Values that must be refused, and a pattern of what the message says is allowed."""


def _numbers(*more: Any, text: str = "finite number of at least 0", none: bool = False) -> Row:
    values = [x for x in (*NO_NUMBERS, TENSOR, *more) if not (none and x is None)]
    return tuple(values), text


def _ints(least: int, text: str = "", none: bool = False) -> Row:
    text = text or ("a positive int" if least == 1 else f"an int of at least {least}")
    values = [*NO_INTS, least - 1, -7, *([] if none else [None])]
    return tuple(values), text


TABLE: dict[str, Row] = {
    "lr": ((*NO_NUMBERS, -1, torch.tensor([0.1, 0.2]), torch.tensor(NAN)),
           "at least 0|Tensor lr must be 1-element"),
    "betas": (([0.9], (0.9, 1.0), (-0.1, 0.9), (NAN, 0.9), ("0.9", 0.9), "ab", 0.9, None,
               (0.9, True), (0.9, TENSOR), np.array([0.9, 0.9]), {0.8, 0.9}),
              r"must be a pair|must be a number in \[0, 1\)"),
    "eps": _numbers(-1e-8),
    "weight_decay": _numbers(-0.1),
    "momentum": _numbers(-0.1),
    "dampening": _numbers(text="a finite number"),
    "clip_threshold": _numbers(0.0, -1.0, text="a finite number above 0"),
    "decay_rate": _numbers(0.8, text="a finite number of at most 0"),
    "beta1": _numbers(1.0, -0.1, text=r"None or a number in \[0, 1\)", none=True),
    "rho": _numbers(1.0, -0.1, text=r"a number in \[0, 1\)"),
    "rank": ((0, -4, 1.5, 2.0, NAN, INF, "64", True, [4], torch.tensor(4), {}, 1j),
             r"a positive int or a fraction in \(0, 1\)"),
    "update_proj_gap": _ints(1),
    "scale": _numbers(-0.25),
    "seed": ((-1, True, 0.5, 2**63, "0", None, [0], torch.tensor(0)),
             r"an int from 0 to 2\*\*63 - 1"),
    "limiter": _numbers(0.9, text="None or a finite number of at least 1", none=True),
    "density": ((*(x for x in NO_NUMBERS if x is not None), -0.1, 1.5, TENSOR),
                r"must be in \[0, 1\]"),
    "free_lr_scale": _numbers(-1),
    "proj_params_lr_scale": _numbers(-1),
    "steps_per_iteration": _ints(1),
    "iterations_per_round": _ints(1, "None or a positive int", none=True),
    "warmup_steps": _ints(0),
    "vector_lr_scale": _numbers(-1),
    "s_lr_scale": _numbers(-1),
    "interval": _ints(1),
    "total_steps": _ints(1, "None or a positive int", none=True),
    "descent_ratio": _numbers(0.0, 1.5, text=r"a number in \(0, 1\]"),
    "freeze_steps": _ints(0),
    "restart_every": _ints(1, "None or a positive int", none=True),
    "random_from": ((-1, 1.5, -0.5, True, NAN, "0.5", None, [0]), "a step of at least 0"),
    "active_layers": _ints(1),
    "layers": ((0, True, "(", ["layers"], NAN), "None or a regular expression"),
    "layer_weights": ((3, "ab", [], [0.0], [-1.0], [2.0, -1.0], [NAN], True),
                      "None or a list of numbers"),
    "oversample": _ints(0),
    "max_iterations": _ints(1),
    "tolerance": _numbers(-1),
    **{key: ((0, 1, "false", None, [], torch.tensor(True)), "True or False") for key in FLAGS},
    **{
        key: (NO_NAMES + (() if None in names else (None,)),
              "must be one of " + ", ".join(re.escape(repr(n)) for n in names))
        for key, names in CHOICES.items()
    },
}  # fmt: skip
"""Group keys. A numpy scalar is the number of Python that it holds."""


@pytest.fixture(autouse=True)
def package_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Classes that other tests made in this process are registered too."""
    monkeypatch.setattr(keys, "METHODS", CLASSES)


def weight() -> nn.Parameter:
    return nn.Parameter(torch.ones(12, 10))


def group_keys(cls: type[LowRankOptimizer]) -> set[str]:
    """The arguments of a constructor, from its signature, and the options that all take."""
    own = inspect.signature(cls).parameters
    return {*own, *DEFAULTS} - {"params", "options"}


def refused(call: Callable[[], Any], value: Any, allowed: str) -> None:
    """Raises a ValueError that holds what was given and what is allowed."""
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert re.search(allowed, message), message
    given = [value, *(value if isinstance(value, tuple | list) else ())]
    given += [tuple(value.shape)] if isinstance(value, torch.Tensor) else []
    assert any(repr(x) in message or f"{x}" in message for x in given), message
    assert caught.traceback[-1].path.name in ("values.py", "keys.py", "optimizer.py"), message


def test_the_table_has_a_row_for_every_argument_of_every_class() -> None:
    for name, cls in CLASSES.items():
        assert group_keys(cls) - TABLE.keys() == set(), f"{name}: add rows to TABLE"
    assert known_keys() - TABLE.keys() == {"form", "shapes", "indices", "density"} - TABLE.keys()


def rows() -> list[Any]:
    """Every key of every class; one that several have is slow with three of four of them."""
    seen: Counter[str] = Counter()
    found = []
    for name, cls in CLASSES.items():
        for key in sorted(group_keys(cls)):
            marks = pytest.mark.slow if seen[key] % 4 else ()
            found.append(pytest.param(name, key, id=f"{name}-{key}", marks=marks))
            seen[key] += 1
    return found


@pytest.mark.parametrize(("name", "key"), rows())
def test_every_argument(name: str, key: str) -> None:
    cls = CLASSES[name]
    values, allowed = TABLE[key]
    if name == "GaLoreAdafactor" and key == "eps":
        values, allowed = (1e-8, (1e-30,), (NAN, 0.1), (1e-30, -1.0), "ab", None), "pair of finite"
    if name == "GaLoreAdafactor" and key in (
        "lr",
        "relative_step",
    ):  # it has step sizes of its own by default
        values = tuple(x for x in values if x is not None)
    if "Frugal" in name and key == "rank":
        allowed += r"|projector='block' takes a density"
    low = {"rank": 0.5 if "Frugal" in name else 4}
    for value in values:
        refused(lambda v=value: cls([weight()], **{key: v}), value, allowed)
        if key == "density":
            own: dict[str, Any] = {"params": [weight()], key: value}
        else:
            own = {"params": [weight()], **low, key: value}
        refused(lambda g=own: cls([g]), value, allowed)


@pytest.mark.parametrize("key", sorted(set(TABLE) & (known_keys() | {"density"}) - {"eps"}))
def test_every_key_in_lowrank_groups(key: str) -> None:
    """As an option and in an override: of the groups that it makes, not of those trained later."""
    model = nn.Sequential(nn.Linear(12, 10))
    values, allowed = TABLE[key]
    for value in values:
        if value is None and key == "lr":
            continue
        refused(lambda v=value: lowrank_groups(model, **{key: v}), value, allowed)
        override = {"0.weight": {key: value}}
        refused(lambda o=override: lowrank_groups(model, rank=2, overrides=o), value, allowed)


NUMPY: dict[str, Any] = {
    "lr": np.float32(0.5), "weight_decay": np.float64(0.5), "scale": np.float16(0.5),
    "rank": np.int64(3), "update_proj_gap": np.int32(4), "seed": np.uint8(5),
    "maximize": np.bool_(True), "betas": (np.float64(0.5), np.float64(0.75)),
    "eps": np.array(0.5),
}  # fmt: skip


@pytest.mark.parametrize("key", NUMPY)
def test_numpy_scalars_are_the_numbers_that_they_hold(key: str) -> None:
    for group in (
        methods.GaLoreAdamW([weight()], **{key: NUMPY[key]}).param_groups[0],
        methods.GaLoreAdamW([{"params": [weight()], key: NUMPY[key]}]).param_groups[0],
    ):
        found = group[key]
        assert found == NUMPY[key]
        assert all(
            type(x) in (int, float, bool) for x in (found if isinstance(found, tuple) else [found])
        )


def test_whole_numbers_are_numbers_up_to_63_bits() -> None:
    """As a LoRA's alpha is written; torch cannot take a larger one."""
    most = 2**63 - 1
    (group,) = methods.GaLoreAdamW([weight()], rank=4, scale=most, seed=most).param_groups
    assert group["scale"] == group["seed"] == most
    for value in (2**63, -(2**63)):
        with pytest.raises(ValueError, match="scale must be a finite number of at least 0"):
            methods.GaLoreAdamW([weight()], rank=4, scale=value)


def test_a_tensor_lr_is_kept_as_it_is() -> None:
    lr = torch.tensor(0.5)
    assert methods.GaLoreAdamW([weight()], lr=lr).param_groups[0]["lr"] is lr


# ------------------------------------------------------------------ functions around them


def layer() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 10))


Wrong = list[tuple[Any, type[Exception], str]]
estimate = functools.partial(memory.estimate, layer(), methods.GaLoreAdamW)

FUNCTIONS: dict[str, tuple[Callable[..., Any], dict[str, Wrong]]] = {
    "lowrank_groups": (
        functools.partial(lowrank_groups),
        {
            "model": [(x, TypeError, r"model must be a torch\.nn\.Module, got")
                      for x in (None, [weight()], "llama", weight())],
            "rank": [(x, ValueError, "a positive int or a fraction")
                     for x in (0, True, "64", 2.0, NAN)],
            "target_modules": [
                (7, TypeError, "a pattern or a list of them, got 7"),
                (None, TypeError, "a pattern or a list of them, got None"),
                ([1], TypeError, r"a pattern or a list of them, got \[1\]"),
                ([], ValueError, r"target_modules=\[\] names nothing: give patterns"),
                ("(", ValueError, r"'\(' is not a regular expression"),
                ("q_proj", ValueError, "'q_proj' matches no trainable matrix"),
            ],
            "overrides": [
                ([("0", {})], ValueError, "a dict of patterns and dicts of group keys"),
                ({"0": 4}, ValueError, r"dicts of group keys, .* got \{'0': 4\}"),
                ({1: {}}, ValueError, r"got \{1: \{\}\}"),
                ({"0": {"rnak": 4}}, ValueError, "did you mean 'rank'"),
                ({"0": {"params": []}}, ValueError, "unknown group key 'params'"),
            ],
            "no_decay": [(7, ValueError, "a pattern or a list of patterns, got 7"),
                         (["("], ValueError, "is not a regular expression")],
        },
    ),
    "memory.estimate": (
        functools.partial(memory.estimate),
        {
            "model": [(x, TypeError, "nn.Module or a configuration of transformers, got")
                      for x in (None, "llama", [weight()])],
            "optimizer_class": [
                ("adam", ValueError, r"a class or .*'adamw-8bit'.*'adam'"),
                (None, TypeError, "optimizer_class must be a class of optimizers or .*got None"),
                (nn.Linear, TypeError, "optimizer_class must be a class of optimizers or .*Linear"),
            ],
            "groups": [([], TypeError, r"groups must be a function of the model, got \[\]")],
            "in_backward": [(x, ValueError, "None, 'project' or 'step', got")
                            for x in ("all", True, 1)],
            "accumulation_steps": [(x, ValueError, "accumulation_steps must be a positive int, got")
                                   for x in (0, 1.5, "2", True, None)],
            "device": [(x, ValueError, "device must be None or one of torch's.*got")
                       for x in ("gpu", 1.5, [])],
            "tokens": [(x, ValueError, "tokens must be None, a positive int or a pair of them, got")
                       for x in (0, -1, "512", (1, 2, 3), (0, 4), 1.5, True)],
            "checkpointing": [(x, ValueError, "checkpointing must be True or False, got")
                              for x in (1, "no", None)],
            "loss": [*((x, ValueError, "must be one of 'transformers', 'chunked', 'fused', got")
                       for x in ("liger", 1, None, ["fused"])),
                     ("fused", ValueError, "loss='fused' has no effect without tokens")],
            "loss_chunk": [*((x, ValueError, "loss_chunk must be .*got")
                             for x in (0, -1, 1.5, "64", True)),
                           (64, ValueError, "loss_chunk=64 has no effect on loss='transformers'")],
            "autocast": [*((x, ValueError, "None or one of 'bfloat16', 'float16', got")
                           for x in ("float32", torch.bfloat16, True)),
                         ("bfloat16", ValueError, "autocast='bfloat16' has no effect without")],
            "world_size": [(x, ValueError, "world_size must be a number of ranks, 1 or more, got")
                           for x in (0, -1, 1.5, "2", True)],
            "shard": [(print, ValueError, "shard=.* has no effect without world_size")],
            "transients": [(x, ValueError, "transients must be True or False, got")
                           for x in (1, "no", None)],
            "dtype": [(x, TypeError, "dtype must be a torch.dtype, got")
                      for x in ("bfloat16", None, float)],
            "first_basis": [(x, ValueError, "first_basis must be 'micro' or 'boundary', got")
                            for x in (1, "last", None)],
            "coords_dtype": [(x, ValueError, "must be 'auto', 'float32' or 'bfloat16', got")
                             for x in ("float16", torch.bfloat16, None)],
        },
    ),
    "nn.convert": (
        functools.partial(convert),
        {
            "model": [(x, TypeError, r"model must be a torch\.nn\.Module, got")
                      for x in (None, [weight()])],
            "method": [(x, ValueError, "method must be one of 'sst', 'switchlora', 'lost', .*got")
                       for x in ("lora", None, 3, ["sst"])],
            "rank": [(x, ValueError, "a positive int or a fraction") for x in (0, True, "64", 2.0)],
            "target_modules": [(7, TypeError, "a pattern or a list of them, got 7")],
        },
    ),
    "nn.merge": (
        merge, {"model": [(x, TypeError, r"model must be a torch\.nn\.Module, got")
                          for x in (None, [weight()])]},
    ),
    **{
        f"presets.{name}": (
            getattr(presets, name),
            {"size": [(x, ValueError, "no published size .*; there are '60m', '130m'")
                      for x in ("2b", 60, None, ["60m"], {})]},
        )
        for name in ("galore_pretrain", "fira_pretrain", "frugal_pretrain")
    },
    "presets.apollo_pretrain": (
        presets.apollo_pretrain,
        {"size": [(x, ValueError, "no published size .*; there are '60m', '1b'")
                  for x in ("2b", 60, None, ["60m"], {})],
         "mini": [(x, ValueError, "no published value of mini .*; there are False, True")
                  for x in ("yes", 1, None, [True])]},
    ),
    "presets.ldadam_pretrain": (
        presets.ldadam_pretrain,
        {"size": [(x, ValueError, "no published size .*; there are '350m'")
                  for x in ("60m", 350, None, ["350m"])],
         "error_feedback": [(x, ValueError, "no published value of error_feedback .*; there are")
                            for x in ("8bit", 1, None)]},
    ),
    **{
        f"presets.{name}": (
            getattr(presets, name),
            {"model": [(x, ValueError, "no published model .*; there are 'llama2-7b'")
                       for x in ("7b", 7, None, ["llama2-7b"])]},
        )
        for name in ("lisa_finetune", "badam_finetune")
    },
    "presets.sltrain_pretrain": (
        presets.sltrain_pretrain,
        {"size": [(x, ValueError, "no published size .*; there are '60m', '130m'")
                  for x in ("2b", 60, None, ["60m"], {})]},
    ),
    "presets.lost_pretrain": (
        presets.lost_pretrain,
        {"size": [(x, ValueError, "no published size .*; there are '130m'")
                  for x in ("60m", 130, None, ["130m"])]},
    ),
    "presets.switchlora_pretrain": (
        presets.switchlora_pretrain,
        {"size": [(x, ValueError, "no published size .*; there are '350m', '1.3b'")
                  for x in ("60m", 350, None, ["350m"])]},
    ),
    "presets.sst_pretrain": (
        presets.sst_pretrain,
        {"model": [(x, ValueError, "no published model .*; there are 'opt-125m', ")
                   for x in ("125m", 125, None, ["opt-125m"])]},
    ),
    "presets.dct_release": (presets.dct_release, {}),
    "presets.golore_pretrain": (
        presets.golore_pretrain,
        {"size": [(x, ValueError, "no published size .*; there are '60m'")
                  for x in ("2b", 60, None, ["60m"])],
         "total_steps": [(x, ValueError, "total_steps must be .*got") for x in (0, -1, 1e4, "9")]},
    ),
    "presets.golore_glue": (
        presets.golore_glue,
        {"task": [(x, ValueError, "no published task .*; there are 'mrpc'")
                  for x in ("cola", 1, None, ["mrpc"])],
         "total_steps": [(x, ValueError, "total_steps must be .*got") for x in (0, -1, 1e4, "9")]},
    ),
    **{
        f"presets.{name}": (
            getattr(presets, name),
            {"task": [(x, ValueError, "no published task .*; there are 'cola', ")
                      for x in ("wnli", 1, None, ["cola"])],
             "rank": [(x, ValueError, "no published rank .*; there are ")
                      for x in (5, "4", None, [4], True)]},
        )
        for name in ("galore_glue", "frugal_glue")
    },
}  # fmt: skip
"""Functions, and wrong values of each of their arguments."""

FINE: dict[str, dict[str, Any]] = {
    "lowrank_groups": {"model": layer(), "rank": 2},
    "memory.estimate": {"model": layer(), "optimizer_class": methods.GaLoreAdamW},
    "nn.convert": {"model": layer(), "method": "sst", "rank": 2},
    "presets.apollo_pretrain": {"size": "60m"},
    "presets.ldadam_pretrain": {"size": "350m"},
    "presets.golore_pretrain": {"size": "60m"},
    "presets.golore_glue": {"task": "mrpc", "total_steps": 10},
    "presets.galore_glue": {"task": "cola"},
    "presets.frugal_glue": {"task": "cola"},
}
"""Arguments that each needs beside."""


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_argument_of_a_function(name: str) -> None:
    function, wrong = FUNCTIONS[name]
    named = {
        p.name for p in inspect.signature(function).parameters.values() if p.kind != p.VAR_KEYWORD
    }
    assert wrong.keys() == named, f"{name}: add rows to FUNCTIONS"
    for key, cases in wrong.items():
        for value, kind, message in cases:
            with pytest.raises(kind, match=message) as caught:
                function(**{**FINE.get(name, {}), key: value})
            shown = getattr(type(value), "__name__", "") if key == "model" else repr(value)
            assert shown in str(caught.value) or str(caught.value).count("'") >= 2, caught.value


@pytest.mark.parametrize("method", ["sst", "switchlora"])
def test_convert_checks_its_options(method: str) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'rnak'; did you mean 'rank'"):
        convert(layer(), method, rnak=3)
    with pytest.raises(ValueError, match="seed must be an int from 0"):
        convert(layer(), method, rank=2, seed=-1)


def test_estimate_passes_options_to_the_class() -> None:
    with pytest.raises(TypeError, match=r"GaLoreAdamW\(\) got .*'rnak'; did you mean 'rank'"):
        memory.estimate(layer(), methods.GaLoreAdamW, rnak=3)


@pytest.mark.parametrize("name", ["GaLoreAdamW", "FrugalSGD", "DCTAdamW"])
def test_what_a_projector_reads_may_be_said_to_the_constructor(name: str) -> None:
    """Where there are no groups to say it in; it does what a group that says it does."""
    said = {"projector": "golore", "random_from": 0.5, "total_steps": 4}
    torch.manual_seed(0)
    grads, found = torch.randn(6, 5, 7), []
    for grouped in (False, True):
        param = torch.nn.Parameter(torch.zeros(5, 7))
        group = {"params": [param], **(said if grouped else {})}
        chosen = {"lr": 0.1, "rank": 2, "update_proj_gap": 1, **({} if grouped else said)}
        if grouped:
            group["rank"] = chosen.pop("rank")
        optimizer = getattr(methods, name)([group], **chosen)
        for grad in grads:
            param.grad = grad.clone()
            optimizer.step()
        found.append(param.detach())
    assert torch.equal(*found)


def test_type_checkers_know_what_projectors_read() -> None:
    """``block_order`` is an argument of FRUGAL's own."""
    ours = [name for name, cls in PROJECTORS.items() if cls.__module__.startswith("lowrank_optim.")]
    read = set[str]().union(*map(projector_keys, ours))
    known = ProjectorOptions.__annotations__.keys() | {"block_order"}
    assert read - DEFAULTS.keys() == known - Options.__annotations__.keys()


@pytest.mark.parametrize("name", ["GaLoreAdamW", "LDAdamW", "SSTAdamW", "LisaAdamW"])
def test_what_no_projector_of_it_reads_is_refused(name: str) -> None:
    """By another projector, or by one that the method has no use for."""
    said: dict[str, Any] = {} if name == "GaLoreAdamW" else {"projector": "golore"}
    with pytest.raises(TypeError, match="'random_from': projector='golore' reads 'random_from'"):
        getattr(methods, name)([weight()], random_from=3, **said)


def test_all_public_presets_are_here() -> None:
    public = {n for n, f in vars(presets).items() if inspect.isfunction(f) and n[0] != "_"}
    assert {n.removeprefix("presets.") for n in FUNCTIONS if n.startswith("presets.")} == public
