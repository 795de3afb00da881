"""The best plan under a budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn

from lowrank_optim.fitting.asked import check_asked, named_optimizers
from lowrank_optim.fitting.concessions import concessions
from lowrank_optim.fitting.costs import Costs, Matrix, Mode, Place, Way, matrices_of
from lowrank_optim.fitting.paths import Path, captured, greedy
from lowrank_optim.fitting.plan import Plan
from lowrank_optim.fitting.searching import Search, ways
from lowrank_optim.fitting.spectra import Calibrate, spectra
from lowrank_optim.groups.names import bare
from lowrank_optim.memory.autocast import Autocast
from lowrank_optim.memory.inputs import model_of
from lowrank_optim.memory.losses import Loss
from lowrank_optim.memory.world import Shard, check_world


def fit(
    model: Any,
    budget_gib: float,
    *,
    host_gib: float | None = None,
    tokens: int | tuple[int, int] | None = None,
    checkpointing: bool = False,
    loss: Loss = "transformers",
    loss_chunk: int | None = None,
    autocast: Autocast | None = None,
    transients: bool = True,
    accumulation_steps: int = 1,
    optimizers: Sequence[Any] | None = None,
    in_backward: Sequence[Mode] | None = None,
    state_dtypes: Sequence[str] | None = None,
    state_devices: Sequence[Place] | None = None,
    calibrate: Calibrate | None = None,
    energy: Literal["relative", "absolute"] | None = None,
    multiple: int = 8,
    least: int | None = None,
    target_modules: str | Sequence[str] = "all-linear",
    coords_dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    world_size: int | None = None,
    shard: Shard | None = None,
    **options: Any,
) -> Plan:
    r"""The best plan to train ``model`` within a budget: method, mode, store, and every rank.

    A way to train is an optimizer, a mode of :func:`lowrank_optim.attach_in_backward`, and a format
    and a place of moments. Ways are tried in the order of what they give up: all modes but
    ``"step"``, format by format; then ``"step"``; then the next optimizer; then all of these with
    moments in host memory, which costs time on the bus. The first that has room for ranks of a
    quarter of each smaller side is taken; where none has, the one with room for the largest share.
    Its ranks are then as large as fits, up to half of the sides. Every figure is one of
    :func:`lowrank_optim.memory.estimate`, and so is the last, that of the plan itself.

    With ``calibrate`` the same bytes go where they capture most of the gradients. Of matrix i with
    singular values :math:`\sigma_{ij}` ranks maximise

    .. math::
        \sum_i E_i(r_i), \qquad E_i(r) = \sum_{j \le r} \sigma_{ij}^2

    which steps in the order of energy per byte do (:mod:`lowrank_optim.fitting.paths`).

    Args:
        model: an ``nn.Module`` on any device, the meta device included, or a ``transformers``
            configuration.
        budget_gib: of the device, in GiB.
        host_gib: that moments may take of the host, in GiB, as torch pins them: each tensor rounded
            up to a power of two (default: no limit; ``plan.estimate.pinned`` is what they take).
        tokens: as of :func:`lowrank_optim.memory.estimate`: activations count too.
        checkpointing: likewise.
        loss: likewise.
        loss_chunk: likewise.
        autocast: likewise.
        transients: likewise. False leaves out what steps need in passing, so that training may pass
            the budget: it is quick, and compares states (default: True).
        accumulation_steps: micro-batches of a step (default: 1).
        optimizers: classes, names of them, or pairs of either and a dict of arguments, best first
            (default: GaLoreAdamW, FrugalAdamW, DCTAdamW). FrugalAdamW is by columns where its
            projector is not given.
        in_backward: modes, least intrusive first (default: None, ``"project"``, and ``"step"``,
            which is for one micro-batch).
        state_dtypes: formats of moments, best first (default: every one there is).
        state_devices: where moments may lie, best first: None, which is on the device, and
            ``"cpu"``, in host memory (default: both; on a CPU None alone).
        calibrate: a function of the model that yields losses, or an iterable of micro-batches
            (dicts of the model's arguments, with labels) or of losses. A few suffice. The model
            must have values; one gradient lives at a time (default: no calibration, uniform
            shares).
        energy: ``"absolute"``, as above, or ``"relative"``: each :math:`E_i` as a share of the
            energy of its matrix, whatever the norm of its gradients (default: "absolute", which
            trained better where both were tried).
        multiple: what ranks are multiples of (default: 8).
        least: the smallest rank, a multiple of that; matrices whose smaller side is no larger stay
            dense (default: ``multiple``).
        target_modules: as of :func:`lowrank_optim.lowrank_groups`.
        coords_dtype: as of :func:`lowrank_optim.attach_in_backward`.
        dtype: of the weights of a model made from a configuration (default: bfloat16).
        device: as of :func:`lowrank_optim.memory.estimate`: where training is to run (default: the
            device of the model's parameters; an accelerator for those on the meta device and for a
            configuration).
        world_size: plan for so many GPUs among which FSDP2 shards the model, with the budget of
            each: as of :func:`lowrank_optim.memory.estimate`. No rank of a matrix depends on which
            GPU plans, as all count the worst of all; ``plan.optimizer``
            of the sharded model looks whether all have the same (default: None, one process).
        shard: likewise.
        **options: further arguments of every optimizer.

    Returns:
        A :class:`Plan`, which constructs and attaches.

    Raises:
        NotImplementedError: the model has DTensors: plan before it is sharded.
        TypeError: an argument is of a wrong type, or an option is not known.
        ValueError: nothing fits (the message has the smallest budget that would), an argument is
            out of range or has no effect, or no way is possible.

    Example:
        >>> import torch
        >>> from lowrank_optim import fit
        >>> model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.Linear(256, 256))
        >>> plan = fit(model, budget_gib=0.0018)
        >>> print(plan)  # doctest: +ELLIPSIS
        GaLoreAdamW(state_dtype=...
        >>> optimizer = plan.optimizer(model, lr=1e-2)
        >>> handle = plan.attach(optimizer)
    """
    trained: dict[str, Any] = {
        "tokens": tokens,
        "checkpointing": checkpointing,
        "loss": loss,
        "loss_chunk": loss_chunk,
        "autocast": autocast,
        "transients": transients,
        "accumulation_steps": accumulation_steps,
        "coords_dtype": coords_dtype,
    }
    asked = check_asked(
        model=model,
        budget_gib=budget_gib,
        host_gib=host_gib,
        in_backward=in_backward,
        state_dtypes=state_dtypes,
        state_devices=state_devices,
        calibrate=calibrate,
        energy=energy,
        multiple=multiple,
        least=least,
        dtype=dtype,
        device=device,
        options=options,
        **trained,
    )
    named = named_optimizers(optimizers, options)
    if not isinstance(model, nn.Module):
        with torch.device("meta"):
            model = model_of(model, dtype or torch.bfloat16)
    for cls, _ in named:
        check_world(model, cls, world_size, shard, None)
    matrices = _with_room(model, asked.least, target_modules)
    costs = Costs(
        model,
        matrices,
        asked.least,
        **trained,
        device=asked.device,
        world_size=world_size,
        shard=shard,
    )
    search = Search(costs, asked, ways(named, asked))
    way = search.way()
    spectrum = None
    if calibrate is not None:
        spectrum = _spectrum(model, matrices, calibrate, asked.energy)
    return _plan(search, way, spectrum, coords_dtype, world_size)


def _plan(
    search: Search,
    way: Way,
    spectrum: Sequence[Sequence[float]] | None,
    coords_dtype: Literal["auto", "float32", "bfloat16"],
    world_size: int | None,
) -> Plan:
    """With the largest ranks that fit, and what was given up for them."""
    asked, model, matrices = search.asked, search.costs.model, search.costs.matrices
    path = search.even if spectrum is None else _by_energy(search, way, spectrum)
    ranks, estimate = search.fill(way, path)
    return Plan(
        optimizer_class=way.optimizer,
        arguments=way.arguments,
        in_backward=way.in_backward,
        accumulation_steps=asked.accumulation_steps,
        ranks={bare(m.name): r for m, r in zip(matrices, ranks, strict=True)},
        estimate=estimate,
        budget=asked.budget.device,
        coords_dtype=coords_dtype,
        device=asked.device,
        world_size=world_size,
        gave_up=tuple(concessions(search, way, ranks, spectrum)),
        dense=_sizes(model, matrices, trained=True),
        frozen=_sizes(model, matrices, trained=False),
        energy=None if spectrum is None else _share(spectrum, ranks),
    )


def _with_room(model: nn.Module, least: int, target_modules: Any) -> list[Matrix]:
    """The matrices that may have ranks.

    Raises:
        ValueError: there is none.
    """
    found = matrices_of(model, least, target_modules)
    if not found:
        raise ValueError(
            f"no matrix has room for a rank: all smaller sides are at most {least}; give a "
            "smaller least and multiple"
        )
    return found


def _spectrum(
    model: nn.Module, matrices: Sequence[Matrix], calibrate: Calibrate, energy: str
) -> list[list[float]]:
    """Squared singular values of the gradient of each matrix, as they count."""
    found = spectra(model, {m.name: m.view for m in matrices}, calibrate)
    return [_scaled(found[m.name], energy) for m in matrices]


def _by_energy(search: Search, way: Way, spectrum: Sequence[Sequence[float]]) -> Path:
    """Ranks where they capture most, up to the bytes of half of all sides."""
    slopes, least = search.costs.slopes(way), search.asked.least
    half = search.even.ranks(len(search.even.steps))
    spend = sum(s * (r - least) for s, r in zip(slopes, half, strict=True))
    return greedy(spectrum, slopes, search.asked.multiple, least, spend)


def _scaled(values: Sequence[float], energy: str) -> list[float]:
    """Squared singular values, as shares of their sum where energy is relative."""
    total = sum(values)
    return [v / total for v in values] if energy == "relative" and total > 0 else list(values)


def _share(spectrum: Sequence[Sequence[float]], ranks: Sequence[int]) -> float | None:
    total = sum(map(sum, spectrum))
    return captured(spectrum, ranks) / total if total > 0 else None


def _sizes(model: nn.Module, matrices: Sequence[Matrix], trained: bool) -> dict[str, int]:
    """Bytes of what gets no rank: trained ones of two dimensions and more, or all frozen ones."""
    ranked = {m.name for m in matrices}
    return {
        bare(name): param.nbytes
        for name, param in model.named_parameters()
        if param.requires_grad is trained
        and name not in ranked
        and (param.dim() >= 2 or not trained)
    }
