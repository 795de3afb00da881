"""What stands for the parameters of a model, without memory, and an optimizer over it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lowrank_optim.memory.reporting import storage_bytes
from lowrank_optim.optimizer import LowRankOptimizer
from lowrank_optim.sharding.parts import local

Make = Callable[[Mapping[int, nn.Parameter]], Optimizer]
"""Makes an optimizer over what stands for the parameters, by their ids."""


def maker(
    module: nn.Module,
    optimizer_class: type[Optimizer],
    groups: Callable[[nn.Module], Iterable[Any]] | None,
    options: Mapping[str, Any],
) -> Make:
    """What makes the optimizer over tensors that stand for the parameters, by their ids."""
    entries = list(module.named_parameters() if groups is None else groups(module))

    def make(places: Mapping[int, nn.Parameter]) -> Optimizer:
        return optimizer_class([_over(entry, places) for entry in entries], **options)

    return make


def with_state(params: Sequence[Tensor], make: Make) -> tuple[list[nn.Parameter], Optimizer]:
    """What stands for the parameters on the meta device, and an optimizer with its state."""
    twins, optimizer = over_twins(params, make)
    _make_state(optimizer)
    return twins, optimizer


def over_twins(params: Sequence[Tensor], make: Make) -> tuple[list[nn.Parameter], Optimizer]:
    """The same before there is a state."""
    twins = [_meta_twin(p) for p in params]
    return twins, make({id(p): twin for p, twin in zip(params, twins, strict=True)})


def _meta_twin(param: Tensor) -> nn.Parameter:
    return nn.Parameter(torch.empty_like(param, device="meta"), requires_grad=param.requires_grad)


def _over(entry: Any, twins: Mapping[int, nn.Parameter]) -> Any:
    """A parameter, named parameter or group with the twins in place of the parameters."""
    if isinstance(entry, dict):
        params = entry["params"]
        params = [params] if isinstance(params, Tensor) else params
        return {**entry, "params": [_over(p, twins) for p in params]}
    if isinstance(entry, tuple):
        return entry[0], twins[id(entry[1])]
    return twins[id(entry)]


def _make_state(optimizer: Optimizer) -> None:
    """What a first step allocates. Ours needs no step, which would branch on values."""
    if isinstance(optimizer, LowRankOptimizer):
        for group in optimizer.param_groups:
            chosen = optimizer._strategies(group)
            for item in optimizer._items(group):
                if optimizer._trains(item.param):
                    optimizer._state_of(item, chosen)
                    if item.subspace is not None and item.view is not None:
                        item.subspace.prepare(item.view, item.param)
        return
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.empty_like(param) if param.requires_grad else None
    optimizer.step()


def weight_bytes(params: Sequence[Tensor]) -> int:
    """Of parameters, tied ones once; of a DTensor what is here."""
    return storage_bytes(map(local, params))
