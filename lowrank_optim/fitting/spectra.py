"""Spectra of gradients: how much energy so many directions of each matrix capture."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_optim.memory.inputs import loss_of
from lowrank_optim.rules.base import compute_dtype
from lowrank_optim.tensors.matrix import MatrixView

Calibrate = Callable[[nn.Module], Any] | Iterable[Any]
"""Losses or micro-batches, or a function of the model that yields them."""


def check_calibrate(calibrate: Any) -> None:
    """Raise, before minutes are spent, for what is neither a function of the model nor iterable.

    Raises:
        TypeError: it is something else, or cannot be called so.
    """
    fine = calibrate is None or isinstance(calibrate, Iterable)
    if callable(calibrate):
        try:
            inspect.signature(calibrate).bind(None)
            fine = True
        except TypeError:
            fine = False
        except ValueError:  # it has no signature that Python knows
            fine = True
    if not fine:
        raise TypeError(
            "calibrate must be a function of the model that yields losses, such as def "
            f"losses(model), or an iterable of micro-batches, got {calibrate!r}"
        )


def spectra(
    model: nn.Module, views: Mapping[str, MatrixView], calibrate: Calibrate
) -> dict[str, list[float]]:
    """Squared singular values of each gradient, descending, added up over micro-batches.

    Every gradient is freed inside backward once its spectrum is known, so that no two of them
    coexist. Gradients that were there are put back.

    Args:
        model: whose parameters have values.
        views: matrices by the names of their parameters.
        calibrate: see :data:`Calibrate`. A micro-batch is a mapping of the model's arguments.

    Raises:
        TypeError: ``calibrate`` yields something else.
        ValueError: the model has no values, a gradient is not finite, or there is no micro-batch.
    """
    found = {name: torch.zeros(view.full_rank).double() for name, view in views.items()}
    params = dict(model.named_parameters())
    _check_values(params)
    names: dict[Tensor, str] = {param: name for name, param in params.items()}
    before = {param: param.grad for param in names}

    def arrived(param: Tensor) -> None:
        grad, param.grad = param.grad, None
        name = names[param]
        if name in found and grad is not None:
            found[name] += energies_of(views[name].of(grad), name)

    trained = [param for param in names if param.requires_grad]
    handles = []
    try:
        for param in trained:
            param.grad = None
            handles.append(param.register_post_accumulate_grad_hook(arrived))  # type: ignore[no-untyped-call]
        count = 0
        with torch.enable_grad():
            for loss in _losses(model, calibrate):
                loss.backward()  # type: ignore[no-untyped-call]
                count += 1
    finally:
        for handle in handles:
            handle.remove()
        for param in trained:
            param.grad = before[param]
    if not count:
        raise ValueError(
            "calibrate gave no micro-batch: a generator that has run is empty; give a function of "
            "the model, or a list"
        )
    return {name: values.tolist() for name, values in found.items()}


def energies_of(grad: Tensor, name: str) -> Tensor:
    """Squared singular values of ``(..., m, n)``, descending, summed over leading dimensions.

    They are the eigenvalues of the product with itself on the smaller side: those too small for
    that product are too small to matter in a sum of squares.

    Raises:
        ValueError: the gradient is not finite.
    """
    grad = grad.detach().to(compute_dtype(grad.dtype))
    if not bool(torch.isfinite(grad).all()):
        raise ValueError(
            f"calibrate: the gradient of {name} is not finite; give other micro-batches, and a "
            "loss that is not scaled"
        )
    grad = grad if grad.shape[-2] <= grad.shape[-1] else grad.mT
    values: Tensor = torch.linalg.eigvalsh(grad @ grad.mT).clamp_(min=0).flip(-1)
    found: Tensor = values.reshape(-1, values.shape[-1]).sum(0).double().cpu()
    return found


def _check_values(params: Mapping[str, Tensor]) -> None:
    for name, param in params.items():
        if param.is_meta:
            raise ValueError(
                f"calibrate runs the model, and {name} is on the meta device: give a model with "
                "values, or leave calibrate out"
            )


def _losses(model: nn.Module, calibrate: Calibrate) -> Iterator[Tensor]:
    """One loss after the other, each made when the one before has been taken back.

    Raises:
        TypeError: it is neither a loss nor a micro-batch.
    """
    given = calibrate(model) if callable(calibrate) else calibrate
    for each in [given] if isinstance(given, Tensor) else given:
        loss = loss_of(model, dict(each)) if isinstance(each, Mapping) else each
        if not (isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad):
            kind = type(each).__name__
            raise TypeError(
                "calibrate must yield losses (tensors of one number, with a gradient) or "
                f"micro-batches (dicts of the model's arguments, with labels), got {kind}"
            )
        yield loss
