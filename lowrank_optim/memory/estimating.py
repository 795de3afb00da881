"""What a model and its optimizer will need, without allocating any of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lowrank_optim.backward.projecting import (
    check_choices,
    check_projecting,
    coords_of,
    items_of,
    kept_dtype,
)
from lowrank_optim.engine.refresh import phase
from lowrank_optim.engine.summary import binary
from lowrank_optim.groups.values import whole
from lowrank_optim.memory.activations import Left, in_flight
from lowrank_optim.memory.inputs import model_of
from lowrank_optim.memory.layouts import LAYOUTS
from lowrank_optim.memory.reporting import host_bytes, report, staging_bytes, storage_bytes
from lowrank_optim.ops.devices import standing_for
from lowrank_optim.optimizer import LowRankOptimizer
from lowrank_optim.sharding.parts import is_sharded, local


@dataclass(frozen=True)
class Estimate:
    """Bytes that training will hold, the temporaries of a step not counted."""

    weights: int
    """Parameters, tied ones once; buffers are not counted."""
    gradients: int
    """One gradient of every trainable parameter."""
    largest_gradient: int
    """The largest of them: all that lives at once when each is stepped inside backward."""
    live_gradients: int
    """What of them lives at the worst moment of the worst step.

    All, the largest, or coordinates with those that stay whole. One that is on its way to where it
    is added up, or to its coordinates, counts too.
    """
    basis: int
    moments: int
    other: int
    """Counters, indices, the maps of quantised formats, SwitchLoRA's pools."""
    in_backward: Literal["project", "step"] | None = None
    """What happens to gradients inside backward; decides :attr:`live_gradients`."""
    host: int = 0
    """The part of the state in host memory: moments with ``state_device="cpu"``, SwitchLoRA's
    pools. It is not in the peak."""
    staging: int = 0
    """Two buffers on the device, through which moments in host memory pass in a step."""
    activations: int | None = None
    """What forward and backward need beside the live gradients; None where nobody asked."""

    @property
    def state(self) -> int:
        """What :func:`report` will say once the optimizer has stepped."""
        return self.basis + self.moments + self.other

    @property
    def peak(self) -> int:
        """Weights, state, buffers, live gradients and activations, on the device."""
        held = self.weights + self.state - self.host + self.staging
        return held + self.live_gradients + (self.activations or 0)

    def fits(self, budget: float) -> bool:
        """Whether the peak is within ``budget`` bytes; activations count if they are known."""
        return self.peak <= budget

    def __str__(self) -> str:
        """One figure a line."""
        note = "  (coordinates, dense ones, those whose basis is due, and one in flight)"
        if self.in_backward != "project":
            freed = self.in_backward is not None and self.live_gradients == self.largest_gradient
            note = "  (the largest: freed inside backward)" if freed else ""
        rows = [
            ("weights", self.weights, ""),
            ("gradients", self.live_gradients, note),
            ("basis", self.basis, ""),
            ("moments", self.moments, ""),
            ("other state", self.other, ""),
        ]
        if self.staging:
            rows += [("on the host", self.host, "  (of these, not in the peak)")]
            rows += [("staging", self.staging, "  (two buffers that they pass through)")]
        if self.activations is not None:
            rows.append(("activations", self.activations, ""))
        rows.append(("peak", self.peak, "  without activations" * (self.activations is None)))
        return "\n".join(f"{name:<12}{binary(size):>12}{note}" for name, size, note in rows)


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
            storage is followed: bfloat16 weights mean bfloat16 activations, as without autocast.
            The model is one of ``transformers``, of text or of images, or has one in it, as PEFT's
            do; or it is a configuration. Of images, ``(images, tokens of one)``. Experts run as
            products of groups, attention fused unless the model's own is ``"eager"``.
        checkpointing: whether its layers are checkpointed.
        dtype: of the weights of a model made from a configuration (default: bfloat16).
        device: where training is to run, such as ``"cuda"`` or ``"cpu"``. A ``dct`` basis with
            ``transform="auto"`` keeps a matrix of cosines where that is faster than transforms,
            which depends on it (default: the device of the model's parameters; an accelerator for
            those on the meta device and for a configuration).
        **options: arguments of the optimizer.

    Raises:
        NotImplementedError: ``in_backward`` or ``tokens`` of a model of DTensors; ``tokens`` of a
            model that looks at values.
        ValueError: ``in_backward``, ``first_basis``, ``coords_dtype`` or a named layout is not
            known, the method has no such mode, or activations are asked for of a model that is none
            of ``transformers``, takes other inputs, or has no place for as many tokens.

    Example:
        >>> import torch
        >>> from lowrank_optim import GaLoreAdamW, memory
        >>> model = torch.nn.Linear(4096, 4096, bias=False, device="meta", dtype=torch.bfloat16)
        >>> print(memory.estimate(model, GaLoreAdamW, rank=1024, in_backward="step"))
        weights        32.00 MiB
        gradients      32.00 MiB  (the largest: freed inside backward)
        basis           8.00 MiB
        moments        32.00 MiB
        other state         12 B
        peak          104.00 MiB  without activations
    """
    _check(model, groups, in_backward, accumulation_steps, tokens, checkpointing, dtype)
    _check_device(device)
    _check_sharded(model, in_backward, tokens)
    optimizer_class = _class_of(optimizer_class)
    check_choices(first_basis, coords_dtype)
    module = model
    if not isinstance(model, nn.Module):
        with torch.device("meta"):
            module = model_of(model, dtype)
    twins = {id(p): _meta_twin(p) for p in module.parameters()}
    entries = module.named_parameters() if groups is None else groups(module)
    on_meta = [_on_meta(entry, twins) for entry in entries]
    optimizer = optimizer_class(on_meta, **options)
    place = _device_of(module, device)
    if in_backward == "project":
        if not isinstance(optimizer, LowRankOptimizer):
            raise ValueError(f"in_backward='project' is not for {type(optimizer).__name__}")
        check_projecting(optimizer)
    with standing_for(place):
        _make_state(optimizer)
    held = report(optimizer)
    trained: list[Tensor] = [p for p in twins.values() if p.requires_grad]
    sizes = {p: storage_bytes([local(p)]) for p in trained}
    left: dict[Tensor, Left] = {}
    whole: set[Tensor] = set()
    if in_backward == "project" and first_basis == "micro":
        with standing_for(place):
            left, whole = _coordinates(optimizer, coords_dtype)
    elif in_backward == "step" and accumulation_steps == 1:
        left = {param: [] for param in sizes}
    coming = sizes if accumulation_steps > 1 else left
    gradients, largest = sum(sizes.values()), max(sizes.values(), default=0)
    live = gradients + max((sizes[p] for p in coming), default=0)
    left = {p: parts for p, parts in left.items() if p not in whole}
    live += sum(_bytes(parts) - sizes[p] for p, parts in left.items())
    found = Estimate(
        weights=storage_bytes([local(p) for p in twins.values()]),
        gradients=gradients,
        largest_gradient=largest,
        live_gradients=live,
        basis=held.basis,
        moments=held.moments,
        other=held.other,
        in_backward=in_backward,
        host=host_bytes(optimizer),
        staging=staging_bytes(optimizer, alone=in_backward == "step"),
    )
    if tokens is None:
        return found
    params = list(twins.values())

    def stays(i: int, last: bool) -> Left | None:
        if in_backward == "step":
            return [] if last else None
        return left.get(params[i])

    worst = in_flight(
        module,
        tokens,
        checkpointing=checkpointing,
        passes=min(accumulation_steps, 2),
        left=stays,
    )
    return replace(found, activations=max(0, worst - found.live_gradients))


def _check(
    model: Any,
    groups: Any,
    in_backward: Any,
    accumulation_steps: Any,
    tokens: Any,
    checkpointing: Any,
    dtype: Any,
) -> None:
    """The arguments of :func:`estimate`, but for the class of the optimizer.

    Raises:
        TypeError: one is of a wrong type.
        ValueError: one is out of range.
    """
    if not isinstance(model, nn.Module) and not hasattr(model, "to_dict"):
        kind = type(model).__name__
        raise TypeError(
            f"model must be an nn.Module or a configuration of transformers, got {kind}"
        )
    if groups is not None and not callable(groups):
        raise TypeError(f"groups must be a function of the model, got {groups!r}")
    if in_backward is not None and not (
        isinstance(in_backward, str) and in_backward in ("project", "step")
    ):
        raise ValueError(f"in_backward must be None, 'project' or 'step', got {in_backward!r}")
    if not _positive(accumulation_steps):
        raise ValueError(f"accumulation_steps must be a positive int, got {accumulation_steps!r}")
    pair = isinstance(tokens, tuple | list) and len(tokens) == 2 and all(map(_positive, tokens))
    if tokens is not None and not (_positive(tokens) or pair):
        raise ValueError(f"tokens must be None, a positive int or a pair of them, got {tokens!r}")
    if not isinstance(checkpointing, bool):
        raise ValueError(f"checkpointing must be True or False, got {checkpointing!r}")
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype, got {dtype!r}")


def _check_sharded(model: Any, in_backward: Any, tokens: Any) -> None:
    """Raise for what is not known of one rank of several.

    Raises:
        NotImplementedError: the model is sharded, and gradients or activations are asked for that
            depend on when its layers are gathered.
    """
    if not isinstance(model, nn.Module) or not any(map(is_sharded, model.parameters())):
        return
    if in_backward is not None:
        raise NotImplementedError(
            f"in_backward={in_backward!r} of a model of DTensors: attach_in_backward does not "
            "support them, as FSDP2 frees whole gradients itself. Leave it out"
        )
    if tokens is not None:
        raise NotImplementedError(
            "tokens of a model of DTensors: what is gathered at once depends on how it is sharded. "
            "Give its configuration for the activations, or leave tokens out"
        )


def _check_device(device: Any) -> None:
    """Raise unless torch knows a device of this name.

    Raises:
        ValueError: it does not.
    """
    try:
        torch.device("meta" if device is None else device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"device must be None or one of torch's, such as 'cuda' or 'cpu', got {device!r}"
        ) from error


def _device_of(module: nn.Module, device: str | torch.device | None) -> str:
    """The type of the device that training is to run on."""
    if device is None:
        device = next((p.device for p in module.parameters()), torch.device("meta"))
    return torch.device(device).type


def _positive(value: Any) -> bool:
    return whole(1).holds(value)


def _class_of(given: Any) -> type[Optimizer]:
    """The class of an optimizer, or of a layout by its name.

    Raises:
        TypeError: it is neither.
        ValueError: there is no layout of that name.
    """
    if isinstance(given, str):
        if given not in LAYOUTS:
            raise ValueError(f"optimizer_class must be a class or in {[*LAYOUTS]}, got {given!r}")
        return LAYOUTS[given]
    if not (isinstance(given, type) and issubclass(given, Optimizer)):
        raise TypeError(
            f"optimizer_class must be a class of optimizers or in {[*LAYOUTS]}, got {given!r}"
        )
    return given


def _bytes(left: Left) -> int:
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in left)


def _coordinates(optimizer: Optimizer, coords_dtype: str) -> tuple[dict[Tensor, Left], set[Tensor]]:
    """Parameters whose gradients become coordinates, and those; and who stays whole at the worst.

    Coordinates are taken on the meta device, so that their formats are those of a real run.
    """
    assert isinstance(optimizer, LowRankOptimizer)
    found: dict[Tensor, Left] = {}
    due: dict[int, dict[int, list[Tensor]]] = {}
    for group, item in items_of(optimizer):
        if item.subspace is None or not item.alone or not item.param.requires_grad:
            continue
        param, chosen = item.param, optimizer._strategies(group)
        coords = coords_of(item, optimizer.state[param], torch.empty_like(param)).values()
        found[param] = [(x.shape, kept_dtype(x.dtype, coords_dtype)) for x in coords]
        due.setdefault(chosen.gap, {}).setdefault(phase(item, chosen), []).append(param)
    whole: set[Tensor] = set()
    for phases in due.values():
        whole.update(max(phases.values(), key=lambda ps: _saved(ps, found)))
    return found, whole


def _saved(params: Iterable[Tensor], left: Mapping[Tensor, Left]) -> int:
    return sum(param.nbytes - _bytes(left[param]) for param in params)


def _meta_twin(param: Tensor) -> nn.Parameter:
    return nn.Parameter(torch.empty_like(param, device="meta"), requires_grad=param.requires_grad)


def _on_meta(entry: Any, twins: dict[int, nn.Parameter]) -> Any:
    """A parameter, named parameter or group with the twins in place of the parameters."""
    if isinstance(entry, dict):
        params = entry["params"]
        params = [params] if isinstance(params, Tensor) else params
        return {**entry, "params": [_on_meta(p, twins) for p in params]}
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
