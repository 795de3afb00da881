"""The methods of the study, each as data: how it is made of a model, and where its rate is sought.

One rate serves all parameters of a run, so ``scale`` is 1 where a paper has less. APOLLO's, the
square of its factor, is m/r, at which its steps are of the size of AdamW's. Every optimizer
gets the same groups: what is not a matrix of attention or MLP is dense.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from benchmarks.lora import LoRALinear, convert
from benchmarks.study.sizes import Size
from lowrank_optim import (
    ApolloAdamW,
    BAdamW,
    DCTAdamW,
    FiraAdamW,
    FrugalAdamW,
    GaLoreAdamW,
    GaLoreAdamW8bit,
    LDAdamW,
    LisaAdamW,
    SSTAdamW,
    SwitchLoRAAdamW,
    lowrank_groups,
)
from lowrank_optim import nn as layers

Groups = list[dict[str, Any]]


@dataclass(frozen=True)
class Made:
    """An optimizer, and what is done after each step, with its number."""

    optimizer: Optimizer
    after: Callable[[int], None] = lambda step: None


@dataclass(frozen=True)
class Case:
    """One line of a table: a method with its options."""

    name: str
    method: str
    """A key of :data:`METHODS`."""
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """How an optimizer is made."""

    make: Callable[..., Made]
    """``make(model, lr, size, **options)``."""
    grid: tuple[float, ...]
    """Rates at which the search begins. It goes on while the best is at an end."""


def groups_of(model: nn.Module, rank: int | float, **keys: Any) -> Groups:
    """Matrices with a rank, and the rest dense."""
    return list(lowrank_groups(model, rank=rank, **keys))


def _torch(cls: Callable[..., Optimizer], **fixed: Any) -> Callable[..., Made]:
    def make(model: nn.Module, lr: float, size: Size, **options: Any) -> Made:
        betas = {} if cls is torch.optim.SGD else {"betas": size.betas, "weight_decay": 0.0}
        return Made(cls(model.parameters(), lr=lr, **betas, **fixed, **options))

    return make


def _frozen(model: nn.Module, lr: float, size: Size) -> Made:
    """AdamW of embedding and norms, with every matrix at a rate of 0."""
    groups = groups_of(model, size.rank)
    for group in groups:
        group["lr"] = 0.0 if "rank" in group else lr
    return Made(torch.optim.AdamW(groups, lr=lr, betas=size.betas, weight_decay=0.0))


def _ours(cls: Callable[..., Optimizer], **fixed: Any) -> Callable[..., Made]:
    def make(
        model: nn.Module, lr: float, size: Size, *, rank: int | float | None = None, **options: Any
    ) -> Made:
        r = size.rank if rank is None else rank
        own: dict[Any, dict[str, Any]] = {
            ApolloAdamW: {"update_proj_gap": size.gap, "scale": size.shape.hidden / r},
            SSTAdamW: {"steps_per_iteration": size.gap, "warmup_steps": size.gap // 10},
            SwitchLoRAAdamW: {"total_steps": size.steps},
        }
        chosen = {**own.get(cls, {"update_proj_gap": size.gap}), **fixed, **options}
        groups = groups_of(model, r)
        return Made(cls(groups, lr=lr, betas=size.betas, weight_decay=0.0, **chosen))

    return make


def _turns(cls: Callable[..., Optimizer], **fixed: Any) -> Callable[..., Made]:
    """Whole layers of all parameters, in an order of the run's seed, and many turns for each."""

    def make(model: nn.Module, lr: float, size: Size, **options: Any) -> Made:
        chosen = {"betas": size.betas, "weight_decay": 0.0, "update_proj_gap": size.gap // 5}
        chosen |= {"seed": drawn_seed(), **fixed, **options}
        return Made(cls(model.named_parameters(), lr=lr, **chosen))

    return make


def drawn_seed() -> int:
    """One for each seed of the study, whose generator it is drawn from."""
    return int(torch.randint(2**31 - 1, ()))


def _lora(
    model: nn.Module, lr: float, size: Size, *, rank: int | None = None, restarts: int = 0
) -> Made:
    """W frozen and factors of it trained; ``restarts`` merges of them into W, as ReLoRA has."""
    convert(model, size.rank if rank is None else rank)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=lr, betas=size.betas, weight_decay=0.0)
    if not restarts:
        return Made(optimizer)
    every = size.steps // (restarts + 1)

    def after(step: int) -> None:
        if step % every == 0 and step < every * (restarts + 1):
            restart(model, optimizer)

    return Made(optimizer, after)


@torch.no_grad()
def restart(model: nn.Module, optimizer: Optimizer) -> None:
    """Factors are added to W, drawn again, and their moments forgotten."""
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.weight.copy_(module.merged())
            module.lora_B.zero_()
            nn.init.kaiming_uniform_(module.lora_A, a=5**0.5)
            for factor in (module.lora_A, module.lora_B):
                optimizer.state.pop(factor, None)


def _golore(
    model: nn.Module, lr: float, size: Size, *, rank: int | None = None, **options: Any
) -> Made:
    """Exact bases for 80 % of the steps and random ones then, with moments that follow them."""
    own = {"projector": "golore", "random_from": 0.8, "total_steps": size.steps}
    groups = groups_of(model, size.rank if rank is None else rank, **own)
    chosen = {"scale": 1.0, "update_proj_gap": size.gap, "on_refresh": "project", **options}
    return Made(GaLoreAdamW(groups, lr=lr, betas=size.betas, weight_decay=0.0, **chosen))


def _from_start(kind: str, own: Callable[[int], dict[str, Any]]) -> Callable[..., Made]:
    """Every matrix as layers of ``kind``, with the options that ``own`` has for a rank."""

    def make(
        model: nn.Module, lr: float, size: Size, *, rank: int | None = None, **options: Any
    ) -> Made:
        r = size.rank if rank is None else rank
        layers.convert(model, kind, rank=r, **{**own(r), **options})
        params = [p for p in model.parameters() if p.requires_grad]
        return Made(torch.optim.AdamW(params, lr=lr, betas=size.betas, weight_decay=0.0))

    return make


def _sltrain(rank: int) -> dict[str, Any]:
    """3 % of the entries, and factors times the published 1/4."""
    return {"density": 0.03, "scale": rank / 4, "seed": drawn_seed()}


def _lost(rank: int) -> dict[str, Any]:
    """3 % of the columns, and the activation that the paper has between the factors."""
    return {"density": 0.03, "gamma": 0.9, "activation": "silu"}


def _adamw8bit(model: nn.Module, lr: float, size: Size) -> Made:
    """AdamW of bitsandbytes, every tensor of at least 4,096 entries in 8 bits."""
    from bitsandbytes.optim import AdamW8bit

    return Made(AdamW8bit(model.parameters(), lr=lr, betas=size.betas, weight_decay=0.0))


ADAM = (1e-3, 3e-3, 1e-2)
FACTORS = (3e-3, 1e-2, 3e-2)
STEPS = (1e-2, 3e-2, 1e-1)

METHODS: dict[str, Method] = {
    "adamw": Method(_torch(torch.optim.AdamW), ADAM),
    "sgd": Method(_torch(torch.optim.SGD, momentum=0.9), (0.1, 0.3, 1.0)),
    "frozen": Method(_frozen, STEPS),
    "adamw8bit": Method(_adamw8bit, ADAM),
    "galore": Method(_ours(GaLoreAdamW, scale=1.0), FACTORS),
    "golore": Method(_golore, FACTORS),
    "galore8bit": Method(_ours(GaLoreAdamW8bit, scale=1.0), FACTORS),
    "fira": Method(_ours(FiraAdamW, scale=1.0), FACTORS),
    "frugal": Method(_ours(FrugalAdamW), ADAM),
    "dct": Method(_ours(DCTAdamW, update_proj_gap=1), FACTORS),
    "apollo": Method(_ours(ApolloAdamW), STEPS),
    "ldadam": Method(_ours(LDAdamW, update_proj_gap=1), FACTORS),
    "lisa": Method(_turns(LisaAdamW), FACTORS),
    "badam": Method(_turns(BAdamW), FACTORS),
    "sst": Method(_ours(SSTAdamW, factors="active"), FACTORS),
    "switchlora": Method(_ours(SwitchLoRAAdamW), FACTORS),
    "lora": Method(_lora, ADAM),
    "sltrain": Method(_from_start("sltrain", _sltrain), FACTORS),
    "lost": Method(_from_start("lost", _lost), FACTORS),
}
