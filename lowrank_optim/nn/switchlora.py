r"""SwitchLoRA as a module: W0 frozen, A and B parameters, gradients for those two alone.

.. math::
    y = x W_0^T + s (x A^T) B^T + b

Backward makes no gradient of W0: its (m, n) product is never computed. A switch is done by
:class:`lowrank_optim.SwitchLoRAAdamW` on the groups that :func:`convert` returns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_optim.engine.draws import seeded
from lowrank_optim.groups import Group, lowrank_groups
from lowrank_optim.groups.names import uid_of
from lowrank_optim.groups.values import check_module
from lowrank_optim.nn.base import convertible, follow, is_conv1d
from lowrank_optim.ops.devices import plainly
from lowrank_optim.rules.base import compute_dtype
from lowrank_optim.subspaces.switched import Switched
from lowrank_optim.tensors.matrix import MatrixView, matrix_view


class SwitchLoRALinear(nn.Module):
    r"""A linear layer as :math:`y = W_0 x + s B A x + b`, trained by ``SwitchLoRAAdamW``.

    Made by :func:`lowrank_optim.nn.convert`.

    Args:
        layer: ``nn.Linear``, or GPT-2's ``Conv1D``, whose weight is stored (in, out). Its weight
            becomes ``weight``, which is W0 from now on and gets no gradient; its bias is shared.
        a: A ``(r, in)``.
        b: B ``(out, r)``.
        s: factor of B A.

    Example:
        >>> import torch
        >>> from lowrank_optim import SwitchLoRAAdamW
        >>> from lowrank_optim.nn import convert
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32))
        >>> optimizer = SwitchLoRAAdamW(convert(model, "switchlora", rank=4), lr=1e-2)
        >>> model(torch.randn(8, 64)).square().mean().backward()
        >>> model[0].lora_A.grad.shape, model[0].lora_B.grad.shape, model[0].weight.grad
        (torch.Size([4, 64]), torch.Size([32, 4]), None)

    References:
        Zhou et al. (2024), arXiv:2406.06564.
    """

    def __init__(self, layer: nn.Module, a: Tensor, b: Tensor, s: float) -> None:
        super().__init__()
        weight = layer.weight
        assert isinstance(weight, nn.Parameter)
        self.transposed = is_conv1d(layer)
        self.s = s
        self.lora_A = nn.Parameter(a.clone(memory_format=torch.contiguous_format))
        self.lora_B = nn.Parameter(b.clone(memory_format=torch.contiguous_format))
        self.weight = weight.requires_grad_(False)
        bias = layer.bias
        assert bias is None or isinstance(bias, nn.Parameter)
        self.bias = bias
        self._layer = [layer]  # kept for merge, and not a submodule
        self._add_(-s)

    @torch.no_grad()
    def _add_(self, factor: float) -> None:
        """``W0 <- W0 + factor B A``, in the precision of arithmetic and rounded once."""
        weight = self.weight.mT if self.transposed else self.weight
        wide = compute_dtype(weight.dtype)
        a, b = self.lora_A.to(wide), self.lora_B.to(wide)
        with plainly():
            weight.copy_(torch.addmm(weight.to(wide), b, a, alpha=factor))

    def forward(self, x: Tensor) -> Tensor:
        """``x (..., in)`` to ``(..., out)``."""
        weight = self.weight.mT if self.transposed else self.weight
        low = F.linear(F.linear(x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype))
        return F.linear(x, weight, self.bias) + self.s * low

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """The plain layer with W0 + s B A as its weight. This module must not be used after."""
        self._add_(self.s)
        layer = self._layer[0]
        layer.weight = self.weight.requires_grad_(True)
        layer.bias = self.bias
        return layer

    def extra_repr(self) -> str:
        """Sizes and rank."""
        rank, cols = self.lora_A.shape
        return f"in_features={cols}, out_features={len(self.lora_B)}, rank={rank}"


def convert(
    model: nn.Module,
    *,
    rank: int | float = 128,
    target_modules: str | Sequence[str] = "all-linear",
    scale: float = 1.0,
    seed: int = 0,
    **options: Any,
) -> list[Group]:
    r"""Replace linear layers by :class:`SwitchLoRALinear`; outputs stay what they were.

    A and B are drawn as published and W0 is the weight less s B A. They are the numbers that
    :class:`lowrank_optim.SwitchLoRAAdamW` would draw for the dense weights in the groups of
    :func:`lowrank_optim.lowrank_groups`, so both forms then follow the same trajectory.

    Args:
        model: changed in place.
        rank: number of directions, or a fraction of the smaller side.
        target_modules: as in :func:`lowrank_optim.lowrank_groups`; only linear layers are replaced,
            and other matrices that match are left dense, as are weights that are tied.
        scale: LoRA's α; s = α / r.
        seed: of the draws, and of the switches.
        **options: further group keys, such as ``interval=20``.

    Returns:
        Groups for ``SwitchLoRAAdamW``. ``factor_starts`` says where each triple (A, B, W0) begins.

    Raises:
        ValueError: nothing matches.

    Example:
        >>> import torch
        >>> from lowrank_optim import SwitchLoRAAdamW
        >>> from lowrank_optim.nn import switchlora
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32))
        >>> optimizer = SwitchLoRAAdamW(switchlora.convert(model, rank=4), lr=1e-2)
        >>> model(torch.randn(8, 64)).square().mean().backward()
        >>> optimizer.step()
        >>> model[0].weight.grad is None, tuple(model[0].lora_A.grad.shape)
        (True, (4, 64))
        >>> switchlora.merge(model)[0]
        Linear(in_features=64, out_features=32, bias=True)
    """
    groups = lowrank_groups(
        model, rank=rank, target_modules=target_modules, scale=scale, seed=seed, **options
    )
    owners = layers(model)
    out = [own for group in groups for own in _converted(group, owners)]
    if not any(g["factor_starts"] for g in out):
        raise ValueError(f"target_modules {target_modules!r} matches no linear layer")
    return out


def _converted(group: Group, owners: Mapping[int, Owner]) -> list[Group]:
    """A group again, its layers replaced: several where ``fan_in_fan_out`` changes between them."""
    turned: Group = {**group, "params": [], "param_names": [], "factor_starts": ()}
    split = [turned]
    for param, name in zip(group["params"], group["param_names"], strict=True):
        owner = owners.get(id(param)) if group.get("rank") is not None else None
        view = matrix_view(param.shape, group.get("proj_type", "std"))
        if owner is None or view is None:
            turned["params"].append(param)
            turned["param_names"].append(name)
            continue
        flag = is_conv1d(owner[2])
        if flag != turned.get("fan_in_fan_out", False):
            turned = {**group, "params": [], "param_names": [], "factor_starts": ()}
            turned["fan_in_fan_out"] = flag
            split.append(turned)
        space = Switched.from_group({"fan_in_fan_out": False, **turned}, view)
        drawn = _drawn(space, view, seeded(turned["seed"], uid_of(name), 0), param.is_meta)
        append_triple(turned, name, replace_layer(owner, space, drawn))
    return [g for g in split if g["params"]]


def _drawn(
    space: Switched, view: MatrixView, generator: torch.Generator, meta: bool
) -> list[Tensor]:
    """A and B transposed as the optimizer would start them."""
    state = space.init(view, torch.empty(view.shape, dtype=torch.float32, device="meta"))
    if meta:
        return [state["basis_A"], state["basis_B"]]
    pools = space.draw(view, generator)
    return [pool[held] for pool, held in zip(pools, state["host.held"], strict=True)]


Owner = tuple[nn.Module, str, nn.Module]
"""A module, the name of its child, and the child."""


def layers(model: nn.Module) -> dict[int, Owner]:
    """Linear layers by their weight, without those whose weight another module has too."""
    found: dict[int, Owner] = {}
    users: dict[int, int] = {}
    for module in model.modules():
        for param in module.parameters(recurse=False):
            users[id(param)] = users.get(id(param), 0) + 1
        for name, child in module.named_children():
            if convertible(child):
                found[id(child.weight)] = module, name, child
    return {i: owner for i, owner in found.items() if users.get(i) == 1}


def replace_layer(owner: Owner, space: Switched, factors: Sequence[Tensor]) -> SwitchLoRALinear:
    """Put a module of A and of B transposed in the place of a layer."""
    parent, name, layer = owner
    weight = layer.weight
    assert isinstance(weight, Tensor)
    a, b = (x.to(weight.device, compute_dtype(weight.dtype)) for x in factors)
    module = SwitchLoRALinear(layer, a, b.mT, space.s)
    follow(module, layer)
    setattr(parent, name, module)
    return module


def append_triple(group: Group, name: str, module: SwitchLoRALinear) -> None:
    """A triple at the end of a group."""
    stem = name.removesuffix("weight")
    group["factor_starts"] = (*group["factor_starts"], len(group["params"]))
    group["params"] += [module.lora_A, module.lora_B, module.weight]
    group["param_names"] += [f"{stem}lora_A", f"{stem}lora_B", name]


def merge(model: nn.Module) -> nn.Module:
    """Put plain layers back, with W0 + s B A as their weight: the same object as before.

    Returns:
        The model; a model that is itself a :class:`SwitchLoRALinear` becomes its plain layer.
    """
    check_module(model)
    if isinstance(model, SwitchLoRALinear):
        return model.merged()
    for name, child in list(model.named_children()):
        setattr(model, name, merge(child))
    return model
