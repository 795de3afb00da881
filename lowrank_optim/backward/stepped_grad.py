"""What is left of a gradient that has been applied: its norm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
WHOLE = (
    "{} needs a gradient, and this one was applied and freed inside backward by "
    "attach_in_backward(mode='step', keep_norms=True): only its norm is left"
)


class SteppedGrad(Tensor):
    """``param.grad`` after its parameter was stepped inside backward: a norm, and no elements.

    It has the parameter's shape, dtype and device, and no memory. ``clip_grad_norm_`` counts its
    norm in the global one, and has nothing of it to scale. Any other operation is an error.

    Args:
        like: the parameter.
        norm: the 2-norm that its gradient had, a scalar tensor.
    """

    grad_norm: Tensor

    @staticmethod
    def __new__(cls, like: Tensor, norm: Tensor) -> SteppedGrad:
        """A tensor of the parameter's shape and dtype without memory of its own."""
        return Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=like.device
        )

    def __init__(self, like: Tensor, norm: Tensor) -> None:
        self.grad_norm = norm

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        """Shape and norm."""
        return f"SteppedGrad({tuple(self.shape)}, norm={self.grad_norm.item():.4g})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """The operations of ``clip_grad_norm_``, and what else comes before ``step()``."""
        handler = HANDLERS.get(func.overloadpacket)
        if handler is None:
            raise NotImplementedError(WHOLE.format(func))
        return handler(func, *args, **(kwargs or {}))


def _norm(func: Any, grad: Tensor, order: Any = 2, *_: Any, **kwargs: Any) -> Tensor:
    if not isinstance(grad, SteppedGrad):
        return torch.linalg.vector_norm(grad, order, **kwargs)  # type: ignore[no-any-return]
    if order != 2:
        raise NotImplementedError(
            f"the {order}-norm of a gradient that was applied inside backward is not known: "
            "attach_in_backward(mode='step', keep_norms=True) keeps the 2-norm"
        )
    return grad.grad_norm.to(kwargs.get("dtype") or grad.grad_norm.dtype, copy=True)


def _norms(func: Any, grads: Sequence[Tensor], order: Any = 2, dtype: Any = None) -> list[Tensor]:
    return [_norm(func, grad, order, dtype=dtype) for grad in grads]


def _others(func: Any, grads: Sequence[Tensor], *args: Any, **kwargs: Any) -> None:
    """A foreach operation in place, on the gradients that are there."""
    there = [grad for grad in grads if not isinstance(grad, SteppedGrad)]
    if there:
        func(there, *args, **kwargs)


def _again(func: Any, grad: Tensor, *_: Any, **__: Any) -> Tensor:
    raise RuntimeError(
        "a gradient arrived before optimizer.step() whose parameter was stepped already, inside "
        "backward: count every backward in accumulation_steps; a parameter that two checkpointed "
        "segments share needs use_reentrant=False"
    )


def _same(func: Any, grad: Tensor, *_: Any, **__: Any) -> Tensor:
    return grad


def _view(func: Any, grad: SteppedGrad, size: Sequence[int]) -> SteppedGrad:
    """What a DTensor makes of the part that is here."""
    if tuple(size) == tuple(grad.shape):
        return SteppedGrad(grad, grad.grad_norm)
    raise NotImplementedError(f"{tuple(size)} of {WHOLE.format(func)}")


HANDLERS: dict[Any, Callable[..., Any]] = {
    aten.linalg_vector_norm: _norm,
    aten._foreach_norm: _norms,
    aten.mul_: _same,
    aten._foreach_mul_: _others,
    aten.add_: _again,
    # a scaler is what step() refuses, in words that help
    aten._amp_foreach_non_finite_check_and_unscale_: _others,
    aten.detach: _same,
    aten.view: _view,
}
"""Operation to what it does to a norm."""
