"""Gradients projected, or stepped, and freed as soon as backward has made them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch.distributed as dist

from lowrank_optim.backward.handle import InBackward
from lowrank_optim.backward.parallel import is_process_group
from lowrank_optim.backward.project_mode import ProjectMode
from lowrank_optim.backward.projecting import COORDS_DTYPES, FIRST_BASES
from lowrank_optim.backward.shards import check_shards
from lowrank_optim.backward.step_mode import StepMode
from lowrank_optim.backward.wrapped import unwrapped
from lowrank_optim.optimizer import LowRankOptimizer

ARGUMENTS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "mode": (lambda x: x in ("project", "step"), "'project' or 'step'"),
    "accumulation_steps": (lambda x: type(x) is int and x > 0, "a positive int"),
    "max_norm": (
        lambda x: x is None or (isinstance(x, int | float) and not isinstance(x, bool) and x > 0),
        "None or a positive number",
    ),
    "first_basis": (lambda x: x is None or x in FIRST_BASES, "None, 'micro' or 'boundary'"),
    "coords_dtype": (lambda x: x in COORDS_DTYPES, "'auto', 'float32' or 'bfloat16'"),
    "keep_norms": (lambda x: isinstance(x, bool), "True or False"),
    "process_group": (
        lambda x: x is None or is_process_group(x),
        "None or a ProcessGroup that this process is in, such as torch.distributed.group.WORLD",
    ),
}
"""Arguments of :func:`attach_in_backward`: what each may be, as a test and in words."""


def attach_in_backward(
    optimizer: LowRankOptimizer,
    mode: Literal["project", "step"] = "project",
    *,
    accumulation_steps: int = 1,
    max_norm: float | None = None,
    first_basis: Literal["micro", "boundary"] | None = None,
    keep_norms: bool = False,
    coords_dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    process_group: dist.ProcessGroup | None = None,
) -> InBackward:
    r"""Free every gradient inside backward, so that whole gradients never coexist.

    ``mode="project"`` replaces each gradient by its coordinates :math:`R = P^T G` as soon as it is
    complete, and further micro-batches add theirs. Projection is linear, so the step equals that of
    the un-split batch. A matrix whose basis is due keeps its whole gradient until the step, which
    refreshes on the sum; staggering keeps these few. The training loop stays as it is:
    ``step()``, ``zero_grad()``, schedulers, ``GradScaler``, and ``clip_grad_norm_``, to which the
    gradient of a matrix is that of its subspace. Parameters without a subspace keep ``p.grad``.

    ``mode="step"`` steps each parameter and frees its gradient during the last of
    ``accumulation_steps`` backwards, for every method. ``optimizer.step()`` is still called: it
    steps what a backward did not reach. Not for scaled losses: use bfloat16, or ``"project"``.

    State and checkpoints are those of the optimizer without it.

    With a ``process_group`` every rank trains the module itself on its own data, without
    ``DistributedDataParallel``, which keeps all gradients in its buckets. What is kept of gradients
    (coordinates; whole ones where a basis is due, or there is no subspace) is averaged over the
    ranks in buckets that leave while backward runs, and ``p.grad`` holds the average when it
    returns. ``handle.no_sync()`` is that of ``DistributedDataParallel``. Ranks begin with the
    parameters of rank 0; buffers, and parameters that the optimizer has not, are as each rank made
    them. One rank finds each basis. A rank that does not reach a parameter counts as zeros.

    Parameters that are DTensors, as of ``fully_shard``, need no ``process_group``: what is kept is
    of the shard that a rank has. ``mode="step"`` steps those of one ``fully_shard`` together, on
    all ranks. ``mode="project"`` keeps whole the shards of matrices in ``handle.whole_shards``.

    Args:
        optimizer: any optimizer of this package, also as accelerate or Lightning wrapped it.
        mode: ``"project"`` or ``"step"``.
        accumulation_steps: calls of ``backward()`` before a step, under FSDP2 those that reduce
            gradients (default: 1). ``mode="project"`` takes any number without being told; with a
            ``process_group`` only the last of as many averages, as if the others were in
            ``no_sync()``.
        max_norm: ``mode="project"`` clips by the global norm of what will be applied, in
            ``step()``: of coordinates, and of gradients that have none. ``mode="step"`` clips each
            parameter alone, and warns that it does. Norms of DTensors are those of the whole,
            over all ranks.
        first_basis: where the very first basis of ``mode="project"`` comes from: ``"micro"``, the
            first micro-batch, or ``"boundary"``, the accumulated gradient, which is exact and keeps
            whole gradients during the first step (default: ``"micro"``; with a ``process_group``,
            and of DTensors, ``"boundary"``, as the first basis must be that of all ranks).
        coords_dtype: what ``mode="project"`` keeps coordinates in. ``"auto"``: bfloat16 where they
            come in bfloat16, as products with gradients of bfloat16 do, so that one micro-batch
            loses nothing; else float32, or wider as the weights. ``"float32"`` and ``"bfloat16"``:
            all of them. Micro-batches are added in float32, and rounded into bfloat16 without bias
            by a seed of parameter, step and micro-batch, so a resumed run is the same.
        keep_norms: ``mode="step"`` leaves in ``p.grad`` the norm that the gradient had, without
            memory, until ``step()``: ``clip_grad_norm_`` then returns the true global norm, and
            scales nothing that has been stepped. ``mode="project"`` needs no telling: its norms are
            those of coordinates (default: False).
        process_group: the ranks that gradients are averaged over, such as
            ``torch.distributed.group.WORLD`` (which is None before ``init_process_group``), or None
            for this process alone (default: None). Every rank of it calls this function.

    Returns:
        A handle with ``remove()`` and ``no_sync()``, and a context manager.

    Raises:
        TypeError: the optimizer is not one of this package.
        NotImplementedError: a parameter is a DTensor on another device than its mesh.
        ValueError: an argument is out of range, has no effect on the mode, or does not go with a
            DTensor, or
            ``mode="project"`` and the method uses what its subspace does not see; or a group is
            capturable; or the ranks have other parameters.
        RuntimeError: the optimizer, or another one of its parameters, works inside backward
            already; later, ``step(closure)`` runs
            backward in its closure, or the first backward is that of ``DistributedDataParallel``.

    Example:
        >>> import torch
        >>> from lowrank_optim import GaLoreAdamW, attach_in_backward
        >>> model = torch.nn.Linear(64, 32)
        >>> optimizer = GaLoreAdamW(model.named_parameters(), lr=1e-2, rank=4)
        >>> with attach_in_backward(optimizer, max_norm=1.0):
        ...     for x in torch.randn(2, 8, 64):
        ...         (model(x).square().mean() / 2).backward()
        ...     print(model.weight.grad)
        ...     optimizer.step()
        ProjectedGrad((32, 64), coords={'low': (4, 64)})
    """
    given = {
        "mode": mode,
        "accumulation_steps": accumulation_steps,
        "max_norm": max_norm,
        "first_basis": first_basis,
        "keep_norms": keep_norms,
        "coords_dtype": coords_dtype,
        "process_group": process_group,
    }
    optimizer = unwrapped(optimizer)
    for name, (allowed, words) in ARGUMENTS.items():
        if not allowed(given[name]):
            raise ValueError(f"{name} must be {words}, got {given[name]!r}")
    check_shards(optimizer, given)
    handle: InBackward
    if mode == "step":
        for name, fine in (("first_basis", (None, "boundary")), ("coords_dtype", ("auto",))):
            if given[name] not in fine:
                raise ValueError(
                    f"{name}={given[name]!r} has no effect on mode='step', which accumulates whole "
                    "gradients: leave it out, or take mode='project'"
                )
        handle = StepMode(optimizer, max_norm, accumulation_steps, keep_norms, process_group)
    else:
        if process_group is not None and first_basis == "micro":
            raise ValueError(
                "first_basis='micro' finds the first bases in gradients of this rank alone, and "
                "with a process_group they must be those of all ranks: pass 'boundary', or leave "
                "it out"
            )
        first_basis = first_basis or ("micro" if process_group is None else "boundary")
        handle = ProjectMode(
            optimizer, max_norm, first_basis, coords_dtype, process_group, accumulation_steps
        )
    handle.check_new = partial(check_shards, optimizer, given)
    return handle
