"""What FSDP2 gathers and reduces in forward and backward, beside no activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class _Through(torch.autograd.Function):
    """Uses parameters, and makes a gradient of each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *params: Tensor) -> Tensor:
        """``x``."""
        ctx.save_for_backward(*params)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """That of ``x``, and whole ones of the parameters."""
        need = zip(ctx.saved_tensors, ctx.needs_input_grad[1:], strict=True)
        return grads[0], *(torch.empty_like(p) if asked else None for p, asked in need)


def without_activations(model: nn.Module) -> Callable[[], Tensor]:
    """What runs a sharded model as FSDP2 sees it: each unit gathers, uses and frees its parameters.

    Forward of each module that was given to ``fully_shard`` becomes a walk through those within it,
    with its own parameters before or behind them as they are registered.
    """
    from torch.distributed.fsdp import FSDPModule

    def walk(module: nn.Module) -> None:
        steps: list[nn.Module | list[tuple[nn.Module, str]]] = []

        def collect(at: nn.Module) -> None:
            for name, _ in at.named_parameters(recurse=False):
                if not (steps and isinstance(steps[-1], list)):
                    steps.append([])
                own = steps[-1]
                assert isinstance(own, list)
                own.append((at, name))
            for child in at.children():
                if isinstance(child, FSDPModule):
                    steps.append(child)
                    walk(child)
                else:
                    collect(child)

        def forward(x: Tensor) -> Tensor:
            for step in steps:
                if isinstance(step, nn.Module):
                    x = step(x)
                else:
                    own = [getattr(at, name) for at, name in step]
                    x = _Through.apply(x, *own)  # type: ignore[no-untyped-call]
            return x

        collect(module)
        module.forward = forward

    walk(model)

    def run() -> Tensor:
        out: Tensor = model(torch.zeros(1, requires_grad=True))
        return out.sum()

    return run
