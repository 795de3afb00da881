"""What is run sharded: named cases, and rows in which every two values of two factors meet."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from tests.pairwise import Row
from tests.sharded.training import GAP, Case, make_optimizer

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "galore adamw": ("GaLoreAdamW", {}),
    "galore lion": ("GaLoreLion", {}),
    "galore sgd": ("GaLoreSGD", {"momentum": 0.9}),
    "fira": ("FiraAdamW", {}),
    "fira matrix": ("FiraAdamW", {"scaling": "matrix"}),
    "fira paper": ("FiraAdamW", {"alpha_mode": "paper", "limiter": None}),
    "apollo": ("ApolloAdamW", {}),
    "apollo mini": ("ApolloAdamW", {"scale_type": "tensor", "rank": 1, "scale": 128.0}),
    "frugal sign": ("FrugalAdamW", {"free_rule": "sign"}),
    "frugal sgd": ("FrugalAdamW", {"free_rule": "sgd", "free_lr_scale": 0.5}),
    "frugal lion": ("FrugalLion", {}),
    "frugal momentum": ("FrugalSGD", {"momentum": 0.9, "proj_params_lr_scale": 0.5}),
    "dct": ("DCTAdamW", {}),
    "dct memory": ("DCTAdamW", {"error_feedback": "float32"}),
}
"""Every rule with every residual; at a gap of one step where that is the class's default."""

SST: dict[str, Any] = {"factors": "active", "steps_per_iteration": GAP, "warmup_steps": 2}
SWITCH: dict[str, Any] = {"interval": 2, "freeze_steps": 1, "rank": 0.5}
FACTORED: dict[str, tuple[str, dict[str, Any]]] = {
    "sst": ("SSTAdamW", SST),
    "switchlora": ("SwitchLoRAAdamW", SWITCH),
}
"""Methods whose coordinates are of factors of the weight: they have no projector, and no side."""

FOLLOWING: dict[str, tuple[str, dict[str, Any]]] = {
    "ldadam": ("LDAdamW", {}),
    "ldadam bare": ("LDAdamW", {"error_feedback": None}),
}
"""Methods with a basis of their own, and one transport: they have no projector."""

_NAMED: dict[str, tuple[str, dict[str, Any]]] = {
    "svd": ("galore adamw", {"projector": "svd", "rank": 3}),
    "rsvd": ("galore adamw", {"projector": "rsvd", "on_refresh": "project"}),
    "random": ("galore adamw", {"projector": "random", "on_refresh": "reset"}),
    "golore": ("galore adamw", {"projector": "golore", "random_from": 3, "rank": 3}),
    "dct": ("galore adamw", {"projector": "dct", "on_refresh": "project"}),
    "hadamard": ("galore adamw", {"projector": "hadamard"}),
    "columns": ("galore adamw", {"projector": "columns", "on_refresh": "project"}),
    "rows": ("galore adamw", {"projector": "rows", "on_refresh": "reset"}),
    "block": ("galore adamw", {"projector": "block", "density": 0.5}),
    "svd at once": ("galore adamw", {"projector": "svd", "stagger": False, "maximize": True}),
    "svd full": ("galore adamw", {"projector": "svd", "proj_type": "full"}),
    "rsvd full": ("galore sgd", {"proj_type": "full", "on_refresh": "project"}),
    "random full": ("galore lion", {"projector": "random", "proj_type": "full"}),
    "dct full": ("fira", {"projector": "dct", "proj_type": "full", "on_refresh": "project"}),
    "svd left": ("galore lion", {"projector": "svd", "proj_type": "left"}),
    "rsvd right": ("galore sgd", {"proj_type": "right", "on_refresh": "project"}),
    "svd larger side": ("galore adamw", {"projector": "svd", "proj_type": "reverse_std"}),
    "fira svd": ("fira", {"projector": "svd"}),
    "fira rsvd": ("fira matrix", {"on_refresh": "reset"}),
    "fira paper": ("fira paper", {"projector": "random", "seed": 2}),
    "fira columns": ("fira", {"projector": "columns"}),
    "apollo": ("apollo", {}),
    "apollo mini": ("apollo mini", {"maximize": True}),
    "apollo svd": ("apollo", {"projector": "svd", "on_refresh": "project"}),
    "frugal block": ("frugal sign", {}),
    "frugal block in turn": ("frugal sgd", {"block_order": "ascending"}),
    "frugal columns": ("frugal sign", {"projector": "columns"}),
    "frugal rows": ("frugal sgd", {"projector": "rows", "on_refresh": "project"}),
    "frugal svd": ("frugal sign", {"projector": "svd"}),
    "frugal lion": ("frugal lion", {"projector": "columns", "on_refresh": "keep"}),
    "frugal momentum": ("frugal momentum", {"projector": "svd", "on_refresh": "keep"}),
    "dct each step": ("dct", {}),
    "dct memory": ("dct memory", {}),
    "dct memory now and then": ("dct memory", {"update_proj_gap": GAP}),
    "dct as released": ("dct", {"ranking": "l1", "basis": "dct3", "on_refresh": "keep"}),
    "hadamard memory": ("dct memory", {"projector": "hadamard", "update_proj_gap": 2}),
    "sst": ("sst", {}),
    "sst by the rule": ("sst", {"enhanced": False, "sampling": "uniform", "maximize": True}),
    "sst flip": ("sst", {"negative": "flip", "s_lr_scale": 30.0, "on_refresh": "project"}),
    "sst larger side": ("sst", {"proj_type": "reverse_std", "rank": 2, "stagger": False}),
    "switchlora": ("switchlora", {}),
    "switchlora at random": (
        "switchlora",
        {"order": "random", "freeze_step_counter": False, "seed": 3},
    ),
    "switchlora of weights": (
        "switchlora",
        {"decay_on": "weight", "pool_device": "param", "fan_in_fan_out": True},
    ),
    "switchlora restarts": ("switchlora", {"restart_every": 2, "weight_decay": 0.1}),
    "switchlora larger side": ("switchlora", {"proj_type": "reverse_std", "rank": 2}),
    "ldadam": ("ldadam", {}),
    "ldadam bare": ("ldadam bare", {"proj_type": "right"}),
    "ldadam in 8 bits": ("ldadam", {"error_feedback": "8bit", "maximize": True}),
    "ldadam now and then": ("ldadam", {"update_proj_gap": GAP, "proj_type": "reverse_std"}),
    "ldadam full": ("ldadam", {"proj_type": "full"}),
}


def case_of(method: str, options: Mapping[str, Any], **of: Any) -> Case:
    """A method with some options; a density where the class or the projector takes one.

    Between singular vectors of both sides a gradient is diagonal: what Adam makes of the zeros
    beside it depends on rounding, unless eps is above that.
    """
    cls, own = {**METHODS, **FACTORED, **FOLLOWING}[method]
    own = {**own, **options}
    density = own.pop("density", None)
    projector = own.get("projector", "block" if cls.startswith("Frugal") else None)
    if density is not None or projector in ("block", "columns", "rows"):
        key = "density" if cls.startswith("Frugal") else "rank"
        own[key] = density or 0.5
    diagonal = own.get("proj_type") == "full" and projector in ("svd", "rsvd", None)
    if diagonal and cls.endswith("AdamW"):
        own["eps"] = 1e-3
    return Case(cls, own, **of)


SHORT = ("wide", "tall", "few", "experts")
"""Shapes of the default runs: split on either side, by less than a row, and by experts."""

NAMED = {name: case_of(*chosen) for name, chosen in _NAMED.items()}
BY_SHAPE: dict[str, Any] = {"layers": r"^blocks\.\d+\.[a-z]+|^[a-z]+", "active_layers": 3}
NAMED |= {
    "lisa": Case("LisaAdamW", {**BY_SHAPE, "block_order": "ascending"}),
    "badam": Case("BAdamW", {**BY_SHAPE, "on_refresh": "keep"}),
}
"""Each promise by name."""

WITH_BLOCKS = ("some blocks", "a few more", "no block", "small")
"""Blocks that edges of shards cross, blocks of rows, one block of whole rows, and none."""

OF_FACTORS = ("some blocks", "no block", "two sides", "small")
OF_MEANS = ("some blocks", "a few more", "no block", "long", "small")

_EIGHT: dict[str, Case] = {
    "galore": Case("GaLoreAdamW8bit", {"on_refresh": "project"}),
    # a direction is rounded to float32: where it goes the other way a weight is 2**-24 of lr away
    "galore svd": Case("GaLoreAdamW8bit", {"projector": "svd", "on_refresh": "reset", "lr": 1e-3}),
    "galore columns": Case(
        "GaLoreAdamW8bit", {"projector": "columns", "rank": 0.5, "on_refresh": "project"}
    ),
    "galore larger side": Case("GaLoreAdamW8bit", {"proj_type": "reverse_std", "rank": 30}),
    "galore dct": Case("GaLoreAdamW8bit", {"projector": "dct", "maximize": True}),
    "galore lion": Case("GaLoreLion", {"state_dtype": "8bit", "projector": "random"}),
    "galore sgd": Case("GaLoreSGD", {"state_dtype": "8bit", "momentum": 0.9}),
    "fira": Case("FiraAdamW8bit", {"projector": "random"}),
    "apollo": Case("ApolloAdamW8bit"),
    "frugal rows": Case("FrugalAdamW8bit", {"projector": "rows", "density": 0.5}),
    "frugal columns": Case(
        "FrugalLion", {"state_dtype": "8bit", "projector": "columns", "density": 0.5}
    ),
    "dct": Case("DCTAdamW8bit"),
    "dct memory": Case("DCTAdamW8bit", {"error_feedback": "float32", "update_proj_gap": GAP}),
    # a coordinate near zero is divided by eps: with 1e-8 rounding in the 16th digit is 1e-9 of W
    "dct memory 8bit": Case("DCTAdamW8bit", {"error_feedback": "8bit", "eps": 1e-4}),
    "dct memory 4bit": Case("DCTAdamW8bit", {"error_feedback": "4bit"}),
    "ldadam": Case("LDAdamW8bit"),
    "ldadam memory 4bit": Case("LDAdamW8bit", {"error_feedback": "4bit", "update_proj_gap": GAP}),
}
_OF_FACTORS: dict[str, tuple[str, dict[str, Any]]] = {
    "sst": ("SSTAdamW8bit", {**SST, "lr": 1e-3, "eps": 1e-3, "rank": 0.95}),
    "sst larger side": (
        "SSTAdamW8bit",
        {**SST, "lr": 1e-3, "proj_type": "reverse_std", "rank": 7, "on_refresh": "project"},
    ),
    "switchlora": ("SwitchLoRAAdamW8bit", {**SWITCH, "rank": 0.95, "interval": 2}),
    "switchlora restarts": (
        "SwitchLoRAAdamW8bit",
        {**SWITCH, "restart_every": 4, "fan_in_fan_out": True},
    ),
    "switchlora larger side": (
        "SwitchLoRAAdamW8bit",
        {**SWITCH, "proj_type": "reverse_std", "rank": 7, "pool_device": "param"},
    ),
}
"""Of the two factors one is on every rank: of "two sides" its moments are enough entries."""

_ADAFACTOR: dict[str, Any] = {"state_dtype": "8bit", "clip_threshold": 0.7}
_MEANS: dict[str, Case] = {
    "adafactor": Case(
        "GaLoreAdafactor", {**_ADAFACTOR, "beta1": 0.9, "on_refresh": "project", "rank": 0.5}
    ),
    "adafactor means": Case(
        "GaLoreAdafactor", {**_ADAFACTOR, "projector": "dct", "scale_parameter": True, "rank": 0.5}
    ),
    "adafactor rows": Case(
        "GaLoreAdafactor",
        {**_ADAFACTOR, "projector": "rows", "beta1": 0.9, "on_refresh": "project", "rank": 0.5},
    ),
}
"""Of "long" the means of columns are in 8 bits too, and without ``beta1`` nothing else is."""

EIGHT = {
    **{name: replace(case, only=WITH_BLOCKS, steps=5) for name, case in _EIGHT.items()},
    **{
        # after the first step of new moments a direction is a sign, of entries near zero too; and
        # beside codes it is rounded to float32, otherwise where factors differ in a last bit
        name: Case(cls, {"eps": 1e-4, **options}, only=OF_FACTORS, steps=7, near=1e-8)
        for name, (cls, options) in _OF_FACTORS.items()
    },
    **{name: replace(case, only=OF_MEANS, steps=5) for name, case in _MEANS.items()},
}
"""Moments in 8 bits, of which some are."""


def in_4_bits(case: Case) -> Case:
    """The same in 4 bits."""
    options = {**case.options, "state_dtype": "4bit"}
    return replace(case, cls=case.cls.removesuffix("8bit"), options=options)


NOT_POSED = ("galore svd", *_MEANS)
"""Of "odd row", which is almost square: singular values that are close, and a rank of means that is
more than its gradients have."""
FOUR = {
    name: in_4_bits(
        replace(case, only=(*case.only, "odd", *(() if name in NOT_POSED else ("odd row",))))
    )
    for name, case in EIGHT.items()
}
FOUR["galore larger side"].options["rank"] = 34  # of "odd row" moments are enough entries

BLOCKS = Case("FrugalAdamW8bit", {"density": 0.5}, only=("some blocks", "table", "four blocks"))
"""By rows that blocks lie within: whole tensors, of which some have moments at a time."""

LAYERS = {
    "lisa": replace(BLOCKS, cls="LisaAdamW8bit", options={**BY_SHAPE, "active_layers": 2}),
    "badam": replace(BLOCKS, cls="BAdamW8bit", options={**BY_SHAPE, "active_layers": 2}),
}
"""The same of whole layers."""

FACTORS: dict[str, Sequence[Any]] = {
    "method": tuple(METHODS),
    "projector": ("svd", "rsvd", "random", "dct", "hadamard", "columns", "rows", "block"),
    "proj_type": ("std", "reverse_std", "left", "right", "full"),
    "on_refresh": ("keep", "reset", "project"),
    "gap": (1, 2, 4),
    "how": ("fsdp", "fsdp columns", "0", "1", "r"),
    "only": (
        ("wide", "experts"),
        ("tall", "conv"),
        ("square", "few"),
        ("large", "narrow", "experts pair"),
    ),
    "stagger": (True, False),
}
"""Class and residual, basis, side, transport, cadence, placement, shapes."""


def to_case(row: Row) -> Case:
    chosen = dict(zip(FACTORS, row, strict=True))
    method, gap, how, only = (chosen.pop(key) for key in ("method", "gap", "how", "only"))
    of: dict[str, Any] = {"how": how, "only": only, "steps": 8}
    if how in ("0", "1", "r"):
        of |= {"how": "tensors", "places": (how,)}
    if chosen["projector"] == "block":
        chosen["seed"] = 9  # its draws change within these steps
    return case_of(method, {**chosen, "update_proj_gap": gap}, **of)


def is_defined(row: Row) -> bool:
    """Whether one process would run it, and rounding not decide it.

    Lion takes signs of coordinates, and those between singular vectors of both sides are zero.
    """
    chosen = dict(zip(FACTORS, row, strict=True))
    diagonal = chosen["proj_type"] == "full" and chosen["projector"] in ("svd", "rsvd")
    if diagonal and "Lion" in METHODS[chosen["method"]][0]:
        return False
    if chosen["method"].startswith("fira") and chosen["projector"] == "block":
        return False  # refused of what is sharded
    if chosen["method"].startswith("apollo") and chosen["projector"] == "random":
        return chosen["on_refresh"] != "project"  # refused: one draw has nothing of the last
    return goes_with(chosen["method"], chosen["projector"])


@functools.cache
def goes_with(method: str, projector: str) -> bool:
    """Whether one process would run it: some residuals refuse some projectors."""
    weight = torch.nn.Parameter(torch.randn(6, 6, dtype=torch.float64))
    weight.grad = torch.randn(6, 6, dtype=torch.float64)
    try:
        make_optimizer(case_of(method, {"projector": projector}), [("weight", weight)]).step()
    except ValueError:
        return False
    return True
