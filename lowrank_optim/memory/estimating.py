"""What a model and its optimizer will need, without allocating any of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lowrank_optim.backward.projecting import check_choices, check_projecting
from lowrank_optim.memory.activations import Flight, Left, Unit, in_flight
from lowrank_optim.memory.autocast import Autocast, check_autocast
from lowrank_optim.memory.blocks import CACHING, sized_on
from lowrank_optim.memory.checks import (
    check,
    check_device,
    check_flag,
    check_loss,
    check_sharded,
    class_of,
)
from lowrank_optim.memory.figures import Estimate
from lowrank_optim.memory.gradients import Gradients
from lowrank_optim.memory.inputs import model_of
from lowrank_optim.memory.losses import Loss
from lowrank_optim.memory.moments import worst_moments
from lowrank_optim.memory.rehearsal import Rehearsal
from lowrank_optim.memory.reporting import (
    blocks_of,
    host_bytes,
    pinned_bytes,
    report,
    staging_bytes,
    storage_bytes,
)
from lowrank_optim.memory.training import Training
from lowrank_optim.memory.turns import Make, holding, names_of, take_turns, turns_of, worst_of
from lowrank_optim.memory.world import Shard, World, check_world, pretended, refusals_of_fsdp
from lowrank_optim.ops.devices import standing_for
from lowrank_optim.optimizer import LowRankOptimizer
from lowrank_optim.sharding.parts import is_sharded, local


def estimate(
    model: Any,
    optimizer_class: type[Optimizer] | str,
    *,
    groups: Callable[[nn.Module], Iterable[Any]] | None = None,
    in_backward: Literal["project", "step"] | None = None,
    accumulation_steps: int = 1,
    first_basis: Literal["micro", "boundary"] = "micro",
    coords_dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    tokens: int | tuple[int, int] | None = None,
    checkpointing: bool = False,
    loss: Loss = "transformers",
    loss_chunk: int | None = None,
    autocast: Autocast | None = None,
    transients: bool = True,
    world_size: int | None = None,
    shard: Shard | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device | None = None,
    **options: Any,
) -> Estimate:
    """What training ``model`` with an optimizer will hold, without allocating any of it.

    No formula is repeated here: the optimizer is built over parameters on the meta device, where
    tensors have a shape and no memory, it makes its own state there, and :func:`report` adds up
    what it made. The state equals what :func:`report` says of the real one, to the byte. Of a model
    that ``fully_shard`` has sharded, all figures are of this rank and of what it holds between
    steps: its shards, not the layers that FSDP2 has gathered.

    Args:
        model: an ``nn.Module`` on any device, the meta device included, or a ``transformers``
            configuration: of the class that its ``architectures`` name, else a causal language
            model, else what there is for it.
        optimizer_class: a class of this package, any other whose step runs on the meta device
            (``torch.optim.AdamW`` and its siblings do), or ``"adamw-8bit"``, the layout of
            ``bitsandbytes.optim.AdamW8bit``.
        groups: makes the optimizer's first argument from the model, as a function such as
            ``functools.partial(lowrank_groups, rank=256)`` (default: its named parameters, so that
            embeddings and output heads stay dense).
        in_backward: the mode of :func:`lowrank_optim.attach_in_backward`, if there is one. Of
            ``"project"`` it is the worst step: the one before which most bytes of gradients stay
            whole because a basis is due (all of them with ``stagger=False``). Groups with different
            gaps are taken to have their worst steps at once.
        accumulation_steps: micro-batches of a step. ``"step"`` frees gradients in the last one. Of
            more than one, a gradient is in flight beside those that are there.
        first_basis: as of :func:`lowrank_optim.attach_in_backward`; with ``"boundary"`` the worst
            step is the first.
        coords_dtype: likewise.
        tokens: count activations too: those of a micro-batch of one sequence of so many tokens, or
            ``(sequences, length)``. Forward and backward of a copy run without memory, and every
            storage is followed: bfloat16 weights mean bfloat16 activations, but for ``autocast``.
            The model is one of ``transformers``, of text or of images, or has one in it, as PEFT's
            do; or it is a configuration. Of images, ``(images, tokens of one)``. Experts run as
            products of groups, attention fused unless the model's own is ``"eager"``.
        checkpointing: whether its layers are checkpointed.
        loss: ``"transformers"``, as the model computes it, with all logits in float32;
            ``"chunked"``, cross entropy of some tokens after another, whose logits are made again
            in backward; or ``"fused"``, Liger's fused linear cross entropy, which makes the
            gradient of the head in forward. The last two are for causal language models (default:
            ``"transformers"``).
        loss_chunk: tokens of which ``"chunked"`` has logits at once (default: 1,024).
        autocast: train under ``torch.autocast`` of this dtype, ``"bfloat16"`` or ``"float16"``,
            with weights of float32: activations are mostly in half, and the cast copy of each
            weight lives to the end of forward, that of a layer that is not checkpointed until
            backward has used it (default: None, without).
        transients: whether to find what steps and refreshes need in passing. The optimizer really
            steps, as on an accelerator and without memory: some seconds for a model of 7B, the
            matrices that are stepped alike once. Products, factorisations and kernels may take
            workspace of their own, which is not counted. False leaves it out, which is quick
            (default: True).
        world_size: figures of one of so many GPUs, among which FSDP2 shards the model: the first,
            which holds the most. Layers that are gathered and gradients that are reduced count at
            the worst moment of backward. With ``in_backward="step"`` the gradients of one
            ``fully_shard`` live at once, in a first backward those of two; with ``"project"`` the
            worst step is the first, before which all are whole (default: None, one process).
        shard: shards the model in place, called with it and a mesh of one dimension, as
            ``lambda model, mesh: fully_shard(model, mesh=mesh)`` does. It can give a
            ``MixedPrecisionPolicy`` or ``shard_placement_fn`` (default: ``fully_shard`` of each
            layer, told by names such as ``layers.0.``, and of the model).
        dtype: of the weights of a model made from a configuration (default: bfloat16).
        device: where training is to run, such as ``"cuda"`` or ``"cpu"``. A ``dct`` basis with
            ``transform="auto"`` keeps a matrix of cosines where that is faster than transforms,
            which depends on it (default: the device of the model's parameters; an accelerator for
            those on the meta device and for a configuration).
        **options: arguments of the optimizer.

    Raises:
        NotImplementedError: ``in_backward`` or ``tokens`` of a model of DTensors; ``in_backward``
            with ``world_size`` of another's class; ``tokens`` of a model that looks at values; a
            ``loss`` that is not for the model.
        RuntimeError: ``world_size`` in a process that is in a process group already.
        ValueError: ``in_backward``, ``first_basis``, ``coords_dtype``, ``loss``, ``autocast`` or a
            named layout is not known, ``loss`` or ``autocast`` would have no effect without
            ``tokens`` or of weights that are not float32, the method has no such mode, or
            activations are asked for of a model that is none of ``transformers``, takes other
            inputs, or has no place for as many tokens; or FSDP2 does not take the model.

    Example:
        >>> import torch
        >>> from lowrank_optim import GaLoreAdamW, memory
        >>> model = torch.nn.Linear(4096, 4096, bias=False, device="meta", dtype=torch.bfloat16)
        >>> own = {"rank": 1024, "in_backward": "step", "transients": False}
        >>> found = memory.estimate(model, GaLoreAdamW, **own)
        >>> found.weights >> 20, found.state >> 20, found.peak >> 20, found.peak_at
        (32, 40, 104, 'backward')
    """
    check(model, groups, in_backward, accumulation_steps, tokens, dtype)
    for name, flag in ("checkpointing", checkpointing), ("transients", transients):
        check_flag(name, flag)
    check_sharded(model, in_backward, tokens)
    check_device(device)
    check_choices(first_basis, coords_dtype)
    check_loss(loss, tokens, loss_chunk)
    cls = class_of(optimizer_class)
    check_world(model, cls, world_size, shard, in_backward)
    if isinstance(tokens, list):
        tokens = tuple(tokens)
    module = model
    if not isinstance(model, nn.Module):
        with torch.device("meta"):
            module = model_of(model, dtype)
    check_autocast(autocast, tokens, {p.dtype for p in module.parameters()})
    training = Training(
        in_backward,
        accumulation_steps,
        first_basis,
        coords_dtype,
        tokens,
        checkpointing,
        transients,
        device_of(module, device),
        loss,
        loss_chunk,
        autocast,
    )
    with among(world_size, shard) as world:
        found = estimated(module, cls, training.on(world), groups, options, {})
    if world_size is None:
        return found
    with pretended(world_size, shard, rank=world_size - 1) as last, standing_for(training.device):
        own = last.on_meta(module)
        params = list(own.parameters())
        make = _turns(params, cls, _maker(own, cls, groups, options))[found.turn]
        _, optimizer = _with_state(params, make)
        return replace(found, least=_weights(params) + report(optimizer).total)


def among(size: int | None, shard: Shard | None = None) -> AbstractContextManager[World | None]:
    """The ranks that an estimate is one of; none but this process if ``size`` is None."""
    return nullcontext() if size is None else pretended(size, shard)


def estimated(
    module: nn.Module,
    optimizer_class: type[Optimizer],
    training: Training,
    groups: Callable[[nn.Module], Iterable[Any]] | None,
    options: Mapping[str, Any],
    known: dict[Any, Any],
) -> Estimate:
    """:func:`estimate` of a module, its arguments checked.

    Args:
        module: the model.
        optimizer_class: the class.
        training: how it is trained.
        groups: as of :func:`estimate`.
        options: of the optimizer.
        known: what was found of this module before, and is not found again.
    """
    run = _estimated
    if "torch._dynamo" in sys.modules:  # which, where it watches frames, lets arguments live longer
        run = torch.compiler.disable(_estimated)  # type: ignore[no-untyped-call]
    with standing_for(training.device):
        return run(module, optimizer_class, training, groups, options, known)


def _estimated(
    module: nn.Module,
    optimizer_class: type[Optimizer],
    training: Training,
    groups: Callable[[nn.Module], Iterable[Any]] | None,
    options: Mapping[str, Any],
    known: dict[Any, Any],
) -> Estimate:
    plain, world = module, training.world
    if world is not None:
        module = known["sharded"] if "sharded" in known else world.on_meta(module)
        known["sharded"] = module
    make = _maker(module, optimizer_class, groups, options)
    chosen = optimizer_class, repr(options)
    if ("turns", *chosen) not in known:
        known["turns", *chosen] = _turns(list(module.parameters()), optimizer_class, make)
    found = []
    for names, own in known["turns", *chosen].items():
        e = _of_one_turn(plain, module, own, training, known, (*chosen, names))
        found.append(replace(e, turn=names))
    return worst_of(found)


def _turns(
    params: Sequence[Tensor], optimizer_class: type[Optimizer], make: Make
) -> dict[tuple[str, ...] | None, Make]:
    """What makes the optimizer, at each turn of its layers; under None where they take none."""
    if not take_turns(optimizer_class):
        return {None: make}
    twins, optimizer = _over_twins(params, make)
    turns = turns_of(optimizer, twins)
    return {names_of(optimizer, turn, twins): holding(make, turn) for turn in turns}


def _of_one_turn(
    plain: nn.Module,
    module: nn.Module,
    make: Make,
    training: Training,
    known: dict[Any, Any],
    chosen: tuple[Any, ...],
) -> Estimate:
    """The estimate of layers that stay as they are.

    Args:
        plain: the model.
        module: it, or its shards.
        make: makes the optimizer.
        training: how it is trained.
        known: what was found of this module before.
        chosen: under what the optimizer is found there.
    """
    world, params = training.world, list(module.parameters())
    if chosen not in known:
        known[chosen] = _with_state(params, make)
    twins, optimizer = known[chosen]
    if training.in_backward == "project":
        if not isinstance(optimizer, LowRankOptimizer):
            raise ValueError(f"in_backward='project' is not for {type(optimizer).__name__}")
        check_projecting(optimizer)
    held, sized = report(optimizer), sized_on(training.device)
    gradients = Gradients.of(optimizer, twins, training)
    flight: Flight | None = None
    if training.tokens is not None:
        flight = _flight(plain, training, gradients, known)
    passing: Flight | None = None
    if world is not None:
        passing = _flight(plain, replace(training, tokens=None), gradients, known)
    rehearsal: Rehearsal | None = None
    if training.transients and (world is not None or not any(map(is_sharded, params))):
        stepping = *chosen, training.attached
        if stepping not in known:
            mode, attached = training.attached
            known[stepping] = Rehearsal.of(params, make, mode, attached, sized)
        rehearsal = known[stepping]
    absent = held.moments + held.other
    worst = worst_moments(gradients, training, flight or passing, rehearsal, absent)
    live, units = gradients.live, list[Unit]()
    if passing is not None and training.in_backward == "step":  # those of a message, at once
        units = list(dict.fromkeys(a.unit for a in passing.arrivals))
        if not gradients.one_by_one:
            live = max((sum(gradients.sizes[n] for n in unit) for unit in units), default=0)
    gathered = None if passing is None else passing.most - live
    own = twins if world is None else params  # FSDP2 fills up the last shard
    weights = _weights(own)
    together = [frozenset(twins[n] for n in unit) for unit in units]
    staging = staging_bytes(optimizer, training.in_backward == "step", together)
    rounding = 0
    if training.device in CACHING:
        taken = blocks_of(optimizer, own, staging)
        rounding = taken - (weights + held.total - host_bytes(optimizer) + staging)
    return Estimate(
        weights=weights,
        gradients=gradients.total,
        largest_gradient=gradients.largest,
        live_gradients=live,
        basis=held.basis,
        moments=held.moments,
        other=held.other,
        in_backward=training.in_backward,
        host=host_bytes(optimizer),
        pinned=pinned_bytes(optimizer),
        staging=staging,
        rounding=rounding,
        activations=(None if flight is None else max(0, flight.most - live - (gathered or 0))),
        gathered=gathered,
        world_size=None if world is None else world.size,
        step_transients=worst.step,
        refresh_transients=worst.refresh,
        beside=worst.beside,
    )


def _maker(
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


def _with_state(params: Sequence[Tensor], make: Make) -> tuple[list[nn.Parameter], Optimizer]:
    """What stands for the parameters on the meta device, and an optimizer with its state."""
    twins, optimizer = _over_twins(params, make)
    _make_state(optimizer)
    return twins, optimizer


def _over_twins(params: Sequence[Tensor], make: Make) -> tuple[list[nn.Parameter], Optimizer]:
    """The same before there is a state."""
    twins = [_meta_twin(p) for p in params]
    return twins, make({id(p): twin for p, twin in zip(params, twins, strict=True)})


def _weights(twins: Sequence[Tensor]) -> int:
    return storage_bytes(map(local, twins))


def device_of(module: nn.Module, device: str | torch.device | None) -> str:
    """The type of the device that training is to run on."""
    if device is None:
        device = next((p.device for p in module.parameters()), torch.device("meta"))
    return torch.device(device).type


def _flight(
    module: nn.Module, training: Training, gradients: Gradients, known: dict[Any, Any]
) -> Flight:
    def left(i: int, last: bool) -> Left | None:
        if training.in_backward == "step":
            return () if last else None
        return gradients.staying(i)

    staying = tuple((i, gradients.staying(i)) for i in gradients.sizes)
    flying, world = (training.forward_and_backward, staying), training.world
    if flying not in known:
        with nullcontext() if world is None else refusals_of_fsdp(module):
            known[flying] = in_flight(
                module,
                training.tokens,
                checkpointing=training.checkpointing,
                passes=min(training.accumulation_steps, 2),
                loss=training.loss,
                loss_chunk=training.loss_chunk,
                left=left,
                trained=gradients.sizes,
                sized=gradients.sized,
                autocast=training.autocast,
                device=training.device,
                sharded=None if world is None else world.sharded,
                mode=training.in_backward,
            )
    found: Flight = known[flying]
    return found


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
