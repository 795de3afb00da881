"""A gradient kept as its coordinates in a subspace, where ``param.grad`` is expected."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext

Coords = dict[str, Tensor]
Add = Callable[["ProjectedGrad", Tensor, float], None]
aten = torch.ops.aten
WHOLE = (
    "{} needs a whole gradient, and this one is kept in its subspace by "
    "attach_in_backward(mode='project'). Scale it in place (mul_, div_), add to it (add_), zero "
    "it, or take its norm; for anything else remove() the handle"
)


class _Untraced:
    """A method that is not there while a compiler traces.

    A model that is compiled again between two micro-batches, for another length say, has such
    gradients. The compiler copies each as a tensor of its shape, which is all that it needs; one
    that can be taken apart it takes apart, by the symbolic shapes of the parameter, and fails.
    """

    def __init__(self, method: Callable[..., Any]) -> None:
        self.method = method

    def __get__(self, grad: Any, kind: Any = None) -> Any:
        if TracingContext.try_get() is not None:
            raise AttributeError("not while a compiler traces")
        return self.method.__get__(grad, kind)


class ProjectedGrad(Tensor):
    r"""``param.grad`` of which only :math:`R = P^T G` exists.

    Its shape, dtype and device are the parameter's, its memory that of R. What a training loop does
    with gradients, it does to R: autograd adds a whole gradient to it, ``clip_grad_norm_`` takes
    its norm (that of :math:`P R`, as P is orthonormal) and scales it, ``GradScaler`` unscales it
    and looks for infinities, ``zero_grad`` empties it. Any other operation is an error. Norms are
    of at least float32; a factor rounds R to nearest where R is bfloat16, as torch does gradients.

    Args:
        like: the parameter.
        coords: R, one entry per coordinate.
        plus_: adds a multiple of one more whole gradient to R, in the same basis.
    """

    coords: Coords
    plus_: Add
    count: int
    """Gradients added to the first one."""
    fresh: dict[str, Tensor]
    """State that a step will put in place: a first basis, until then not part of the run."""
    empty: bool
    """Zeroed: the next gradient may go to another basis."""
    spill: Tensor | None
    """A whole gradient that came when empty."""
    outdated: bool
    """Found in a basis that a load has replaced."""

    @staticmethod
    def __new__(cls, like: Tensor, coords: Coords, plus_: Add) -> ProjectedGrad:
        """A tensor of the parameter's shape and dtype without memory of its own."""
        return Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=like.device
        )

    def __init__(self, like: Tensor, coords: Coords, plus_: Add) -> None:
        self.coords, self.plus_ = coords, plus_
        self.fresh, self.empty, self.spill, self.count = {}, False, None, 0
        self.outdated = False

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        """Shape of the gradient and of its coordinates."""
        shapes = {name: tuple(x.shape) for name, x in self.coords.items()}
        return f"ProjectedGrad({tuple(self.shape)}, coords={shapes})"

    def __reduce_ex__(self, proto: Any) -> Any:
        """Nothing that a file could hold: its basis is of the optimizer's next step.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "a gradient that is kept in its subspace by attach_in_backward(mode='project') cannot "
            "be saved: save the run after zero_grad(), and a resumed run begins with a whole batch"
        )

    @_Untraced
    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        """What tools that count memory look at: the coordinates."""
        self.__dict__.update({f"_{name}": x for name, x in self.coords.items()})
        return [f"_{name}" for name in self.coords], (
            self.plus_,
            self.fresh,
            self.dtype,
            self.count,
        )

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], context: Any, size: Any, stride: Any
    ) -> ProjectedGrad:
        """The inverse of :meth:`__tensor_flatten__`."""
        plus_, fresh, dtype, count = context
        device = next(iter(inner.values())).device
        like = torch.empty_strided(size, stride, dtype=dtype, device=device)
        out = ProjectedGrad(like, {k[1:]: x for k, x in inner.items()}, plus_)
        out.fresh, out.count = fresh, count
        return out

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """The operations of a training loop, on the coordinates."""
        handler = HANDLERS.get(func.overloadpacket)
        if handler is None:
            raise NotImplementedError(WHOLE.format(func))
        return handler(func, *args, **(kwargs or {}))

    def copied(self) -> ProjectedGrad:
        """Another with its own coordinates."""
        out = ProjectedGrad(self, {k: x.clone() for k, x in self.coords.items()}, self.plus_)
        out.fresh, out.empty, out.spill = self.fresh, self.empty, self.spill
        out.count, out.outdated = self.count, self.outdated
        return out

    def accumulate_(self, grad: Tensor, alpha: float = 1) -> ProjectedGrad:
        """Add ``alpha`` times a whole gradient; if empty, keep it whole for its hook to decide."""
        if self.empty:
            self.spill, self.empty = grad if alpha == 1 else grad * alpha, False
            return self
        self.count += 1
        self.plus_(self, grad, alpha)
        return self


def projection(grad: Tensor | None) -> ProjectedGrad | None:
    """The coordinates that a gradient consists of; of a DTensor, those that are here."""
    own = getattr(grad, "_local_tensor", grad)
    return own if isinstance(own, ProjectedGrad) else None


def _each(func: Any, grad: ProjectedGrad, *args: Any, **kwargs: Any) -> Any:
    """An operation linear in the gradient, in place."""
    for x in grad.coords.values():
        func(x, *args, **kwargs)
    return grad


def _zero_(func: Any, grad: ProjectedGrad) -> ProjectedGrad:
    grad.empty, grad.fresh = True, {}
    return _each(func, grad)  # type: ignore[no-any-return]


def _add_(func: Any, grad: ProjectedGrad, other: Tensor, *, alpha: float = 1) -> Any:
    return grad.accumulate_(other, alpha)


def _add(func: Any, grad: Tensor, other: Tensor, *, alpha: float = 1) -> Any:
    if not isinstance(grad, ProjectedGrad):
        grad, other = other, grad
    assert isinstance(grad, ProjectedGrad)
    return grad.copied().accumulate_(other, alpha)


def _norm(
    func: Any,
    grad: ProjectedGrad,
    order: Any = 2,
    *args: Any,
    dtype: torch.dtype | None = None,
    **kwargs: Any,
) -> Tensor:
    norms = [
        func(x, order, *args, dtype=dtype or torch.promote_types(x.dtype, torch.float32), **kwargs)
        for x in grad.coords.values()
    ]
    norm: Tensor = norms[0]
    return norm if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms), order)


def _norms(func: Any, grads: Sequence[Tensor], order: Any = 2, dtype: Any = None) -> list[Tensor]:
    def norm(grad: Tensor) -> Tensor:
        if isinstance(grad, ProjectedGrad):
            return _norm(torch.linalg.vector_norm, grad, order, dtype=dtype)
        return torch.linalg.vector_norm(grad, order, dtype=dtype)  # type: ignore[no-any-return]

    return [norm(grad) for grad in grads]


def _whole(grads: Sequence[Tensor]) -> list[Tensor]:
    """The tensors behind a list of gradients, whole or projected."""
    return [
        x
        for grad in grads
        for x in (grad.coords.values() if isinstance(grad, ProjectedGrad) else [grad])
    ]


def _listed(func: Any, grads: Sequence[Tensor], *args: Any, **kwargs: Any) -> None:
    """A foreach operation in place, with the same arguments for all."""
    func(_whole(grads), *args, **kwargs)


def _view(func: Any, grad: ProjectedGrad, size: Sequence[int]) -> ProjectedGrad:
    """``DTensor.to_local()`` hands out a view of the shape that there is."""
    if tuple(size) == tuple(grad.shape):
        out = ProjectedGrad(grad, grad.coords, grad.plus_)
        out.fresh, out.empty, out.count = grad.fresh, grad.empty, grad.count
        return out
    raise NotImplementedError(f"{tuple(size)} of {WHOLE.format(func)}")


def _zeroed(func: Any, grads: Sequence[Tensor]) -> None:
    for grad in grads:
        grad.zero_()


def _unscale_(func: Any, grads: Sequence[Tensor], found_inf: Tensor, inv_scale: Tensor) -> None:
    """``GradScaler``: the coordinates are not finite where the gradient is not."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for x in _whole(grads):
        if x.dtype == torch.bfloat16:  # which the kernel for CUDA does not take
            wide = x.float()
            func([wide], found_inf, inv_scale)
            x.copy_(wide)
        else:
            by_dtype.setdefault(x.dtype, []).append(x)
    for same in by_dtype.values():
        func(same, found_inf, inv_scale)


HANDLERS: dict[Any, Callable[..., Any]] = {
    aten.add_: _add_,
    aten.add: _add,
    aten.mul_: _each,
    aten.div_: _each,
    aten.zero_: _zero_,
    aten.linalg_vector_norm: _norm,
    aten.detach: lambda func, grad: grad,
    aten.view: _view,
    aten.clone: lambda func, grad, **kwargs: grad.copied(),
    aten._foreach_zero_: _zeroed,
    aten._foreach_mul_: _listed,
    aten._foreach_norm: _norms,
    aten._amp_foreach_non_finite_check_and_unscale_: _unscale_,
}
"""Operation to what it does to coordinates."""
