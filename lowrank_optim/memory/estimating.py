"""What a model and its optimizer will need, without allocating any of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lowrank_optim.backward.projecting import check_choices
from lowrank_optim.memory.autocast import Autocast, check_autocast
from lowrank_optim.memory.checks import (
    check,
    check_device,
    check_flag,
    check_loss,
    check_sharded,
    class_of,
)
from lowrank_optim.memory.figures import Estimate
from lowrank_optim.memory.inputs import model_of
from lowrank_optim.memory.losses import Loss
from lowrank_optim.memory.one_turn import of_one_turn
from lowrank_optim.memory.ranks import of_ranks
from lowrank_optim.memory.reporting import report
from lowrank_optim.memory.sets import beginning, worst_sets
from lowrank_optim.memory.training import Training
from lowrank_optim.memory.turns import (
    holding,
    names_of,
    over_first,
    take_turns,
    turns_of,
    worst_of,
)
from lowrank_optim.memory.twins import Make, maker, over_twins, weight_bytes, with_state
from lowrank_optim.memory.world import Shard, World, check_world, pretended
from lowrank_optim.ops.devices import standing_for


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
            whose weights and state are the most, with the peak of the worst, which ``.rank`` names.
            Layers that are gathered and gradients that are reduced count at the worst moment of
            backward. With ``in_backward="step"`` the gradients of one ``fully_shard`` live at once,
            in a first backward those of two; with ``"project"`` the worst step is the first, before
            which all are whole (default: None, one process).
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
    if world_size is None:
        return estimated(module, cls, training, groups, options, {})
    return _of_world(module, cls, training, groups, options, world_size, shard)


def _of_world(
    module: nn.Module,
    cls: type[Optimizer],
    training: Training,
    groups: Callable[[nn.Module], Iterable[Any]] | None,
    options: Mapping[str, Any],
    world_size: int,
    shard: Shard | None,
) -> Estimate:
    """The figures of the first of several GPUs, with the worst peak and the least state of all."""

    def of_rank(known: dict[Any, Any], world: World) -> Estimate:
        return estimated(module, cls, training.on(world), groups, options, known)

    found = of_ranks(of_rank, world_size, shard, lambda own: maker(own, cls, groups, options))
    with pretended(world_size, shard, rank=world_size - 1) as last, standing_for(training.device):
        own = last.on_meta(module)
        params = list(own.parameters())
        make = maker(own, cls, groups, options)
        if found.turn is not None:
            make = _turns(params, cls, make)[found.turn]
        _, optimizer = with_state(params, make)
        return replace(found, least=weight_bytes(params) + report(optimizer).total)


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
    make = maker(module, optimizer_class, groups, options)
    chosen = optimizer_class, repr(options)
    if ("turns", *chosen) not in known:
        known["turns", *chosen] = _turns(list(module.parameters()), optimizer_class, make)
    found = []
    for turn, own in known["turns", *chosen].items():
        e = of_one_turn(plain, module, own, training, known, (*chosen, turn))
        found.append(replace(e, turn=turn) if take_turns(optimizer_class) else e)
    return worst_of(found) if take_turns(optimizer_class) else over_first(found)


def _turns(
    params: Sequence[Tensor], optimizer_class: type[Optimizer], make: Make
) -> dict[Any, Make]:
    """What makes the optimizer, at each turn of its layers, or with each set of tensors first."""
    twins, optimizer = over_twins(params, make)
    if not take_turns(optimizer_class):
        return {begun: beginning(make, begun) for begun in worst_sets(optimizer, twins)}
    turns = turns_of(optimizer, twins)
    return {names_of(optimizer, turn, twins): holding(make, turn) for turn in turns}


def device_of(module: nn.Module, device: str | torch.device | None) -> str:
    """The type of the device that training is to run on."""
    if device is None:
        device = next((p.device for p in module.parameters()), torch.device("meta"))
    return torch.device(device).type
