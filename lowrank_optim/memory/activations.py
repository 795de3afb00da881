"""What forward and backward of a model hold at their worst moment, found without allocating it."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
from torch.overrides import TorchFunctionMode

from lowrank_optim.backward.shards import Together, alone, keep_shard
from lowrank_optim.memory.autocast import Autocast, casting, run_again
from lowrank_optim.memory.blocks import Sized
from lowrank_optim.memory.gathered import without_activations
from lowrank_optim.memory.inputs import batch_of, innermost
from lowrank_optim.memory.losses import Loss, loss_by
from lowrank_optim.sharding.parts import is_sharded, local
from lowrank_optim.tensors.alive import Alive

Left = Sequence[tuple[Sequence[int], torch.dtype]]
"""Shapes and dtypes of the tensors that take a gradient's place, if any does."""


Unit = tuple[int, ...]
"""Parameters of the model, by number, whose gradients are there at once: one, or several shards."""


class Arrival(NamedTuple):
    """A gradient is complete; of FSDP2 those that one message brought."""

    unit: Unit
    again: bool
    """Whether one of an earlier micro-batch was there."""
    alive: int
    """Bytes of activations and gradients at that moment, this gradient included."""
    first: bool = False
    """Whether it is of a first backward, in which the last of a message is not known yet."""


class Flight(NamedTuple):
    """What forward and backward of the micro-batches of a step hold, the weights not counted."""

    most: int
    """Bytes alive at once."""
    arrivals: tuple[Arrival, ...]
    """In their order."""

    @property
    def begun(self) -> Flight:
        """With arrivals of a first backward; where none are told apart, with all."""
        return self._replace(arrivals=tuple(a for a in self.arrivals if a.first) or self.arrivals)

    @property
    def after(self) -> Flight:
        """With arrivals of later ones."""
        return self._replace(arrivals=tuple(a for a in self.arrivals if not a.first))


WITHOUT_VALUES = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
"""What an operation raises that needs values, or that nobody has described without them."""


class _Grouped(torch.autograd.Function):
    """Sizes of a product of groups of rows, and of its gradients."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor) -> Tensor:
        """``(S, in)`` and ``(groups, in, out)`` to ``(S, out)``."""
        ctx.save_for_backward(rows, weights)
        return rows.new_empty(rows.shape[0], weights.shape[2])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        """Both gradients, dense as the kernel makes them."""
        rows, weights = ctx.saved_tensors
        return torch.empty_like(rows), torch.empty_like(weights)


class GroupedProducts(TorchFunctionMode):
    """Products of groups of any dtype and width.

    What torch knows of them without memory is a kernel of one GPU, for bfloat16 and rows of a
    multiple of 16 bytes.
    """

    KINDS = tuple(
        getattr(owner, name)
        for owner, name in ((torch, "_grouped_mm"), (nn.functional, "grouped_mm"))
        if hasattr(owner, name)
    )

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run ``func``, or make what it would."""
        if func in self.KINDS and len(args) == 2 and (args[0].dim(), args[1].dim()) == (2, 3):
            return _Grouped.apply(*args)  # type: ignore[no-untyped-call]
        return func(*args, **(kwargs or {}))


def without_memory(
    model: nn.Module, asked: str = "tokens", device: Literal["cpu", "meta"] = "cpu"
) -> nn.Module:
    """A copy in training mode whose parameters and buffers have no memory.

    They are on the CPU if this is called inside ``FakeTensorMode``. All the rest of the model is
    copied as it is: adapters, heads and hooks, so that what runs is what was given.

    Args:
        model: to be copied.
        asked: the argument of :func:`lowrank_optim.memory.estimate` that needs a copy, for errors.
        device: that its tensors say they are on (default: "cpu").

    Raises:
        NotImplementedError: the model cannot be copied, or has tensors of a class of their own,
            such as quantised weights, whose operations are not known without memory.
    """
    memo: dict[int, Any] = {}
    for name, x in (*model.named_parameters(), *model.named_buffers()):
        if type(x) not in (Tensor, nn.Parameter, FakeTensor):
            raise NotImplementedError(
                f"{asked} of a {type(model).__name__} with a {type(x).__name__} ({name}): its "
                f"operations are not known without memory. Leave {asked} out, and measure "
                "a real step"
            )
        fake = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
        memo[id(x)] = (
            nn.Parameter(fake, requires_grad=x.requires_grad)
            if isinstance(x, nn.Parameter)
            else fake
        )
    try:
        return copy.deepcopy(model, memo).train()
    except Exception as error:
        raise NotImplementedError(
            f"{asked} of a {type(model).__name__} that cannot be copied ({_line(error)}): give it "
            f"without wrappers, or leave {asked} out"
        ) from error


def _as_on_a_gpu(model: nn.Module) -> None:
    """Attention and experts by torch's fused kernels, where the model has a choice.

    Attention without the look for padding that needs values: not where a model asks for
    ``"eager"``, whose scores are what it will hold. Experts as one product of groups, as the loop
    over those that tokens chose needs values too.
    """
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register("fused", sdpa_attention_forward)
    inner = innermost(model)
    if inner.config._attn_implementation != "eager":
        inner.set_attn_implementation("fused")
    can_set = getattr(inner, "_can_set_experts_implementation", None)
    if can_set is not None and can_set():
        from transformers.integrations.moe import ExpertsInterface

        ExpertsInterface.register("grouped", _grouped_experts)
        inner.set_experts_implementation("grouped")


def checkpoint_layers(model: Any, **own: Any) -> None:
    """Every layer of a model of ``transformers``, whichever name its version has for it.

    Args:
        model: the model.
        **own: further arguments of ``torch.utils.checkpoint``.
    """
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False, **own})


def _grouped_experts(*args: Any, **kwargs: Any) -> Any:
    """The experts of ``transformers`` as products of groups; also where backward runs them again.

    A mode around the whole of forward and backward would not be on there.
    """
    from transformers.integrations.moe import grouped_mm_experts_forward

    with GroupedProducts():
        return grouped_mm_experts_forward(*args, **kwargs)


def in_flight(
    model: nn.Module,
    tokens: int | Sequence[int] | None,
    *,
    checkpointing: bool,
    passes: int,
    loss: Loss,
    loss_chunk: int | None,
    left: Callable[[int, bool], Left | None],
    trained: Collection[int],
    sized: Sized,
    autocast: Autocast | None = None,
    device: str = "meta",
    sharded: Callable[[nn.Module], nn.Module] | None = None,
    mode: Literal["project", "step"] | None = None,
) -> Flight:
    """Bytes of activations and gradients alive at once, at most and as each gradient arrives.

    The model runs forward and backward, with its loss, on tensors that have no memory, and every
    storage is followed from the operation that makes it to its end. Attention is what torch takes
    on a CPU: fused, without a matrix of scores, as on a GPU.

    Args:
        model: one of ``transformers``, or what wraps one.
        tokens: of a micro-batch: one sequence of so many, or ``(sequences, length)``. None of a
            model that is sharded: what is gathered and reduced, without activations.
        checkpointing: keep the inputs of the layers alone, and run each again inside backward.
        passes: micro-batches that add up.
        loss: which it has.
        loss_chunk: its tokens at once, if it goes in chunks.
        left: what is left of the gradient of parameter i, in the last pass or before; None if it
            stays.
        trained: numbers of the parameters that ask for gradients, as the optimizer left it: layers
            that wait for their turn do not.
        sized: what is taken for a tensor.
        autocast: as of :func:`lowrank_optim.memory.estimate`.
        device: the type of the one to train on.
        sharded: shards the copy that runs (default: None, which leaves it whole).
        mode: of ``attach_in_backward``, where the copy is sharded.

    Raises:
        NotImplementedError: the model cannot run without memory, or has no such loss.
        ValueError: it is not one of ``transformers``, or takes other inputs.
    """
    if tokens is not None:
        innermost(model)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = without_memory(model)
        for i, param in enumerate(model.parameters()):
            param.requires_grad_(i in trained)
        batch: dict[str, Tensor] = {}
        if tokens is not None:
            _as_on_a_gpu(model)
            if checkpointing:
                within = {} if autocast is None else {"context_fn": lambda: _contexts(device)}
                checkpoint_layers(innermost(model), **within)
            shape = (1, tokens) if isinstance(tokens, int) else (tokens[0], tokens[1])
            batch = batch_of(model, shape)
        model = model if sharded is None else sharded(model)
        run: Callable[[], Tensor] = (
            partial(loss_by, loss, model, batch, loss_chunk)
            if batch
            else without_activations(model)
        )
        alive = Alive(sized=sized)
        arriving = _Arriving([*model.parameters()], alive, passes, mode, left)
        alive.leave_out([*map(local, model.parameters()), *model.buffers(), *batch.values()])
        steps = 2 if sharded is not None and mode == "step" else 1
        with alive:
            for arriving.step, arriving.done in itertools.product(range(steps), range(passes)):
                _run(model, run, casting(autocast, device))
        return Flight(alive.most, tuple(arriving.found))


class _Arriving:
    """What training does as each gradient arrives: it stays, or something is left of it.

    Args:
        params: of the model that runs.
        alive: counts what there is.
        passes: micro-batches of a step.
        mode: as of :func:`in_flight`.
        left: likewise.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        alive: Alive,
        passes: int,
        mode: Literal["project", "step"] | None,
        left: Callable[[int, bool], Left | None],
    ) -> None:
        self.step = self.done = 0
        """The step, and its passes before this one."""
        self.found: list[Arrival] = []
        self._alive, self._passes, self._mode, self._left = alive, passes, mode, left
        self._numbers = {p: i for i, p in enumerate(params)}
        self._parts: dict[Tensor, list[Tensor]] = {}
        """What is left of gradients, alive as long as those of training are."""
        self._together = Together(self._stepped)
        for own in params:
            if own.requires_grad:
                own.register_post_accumulate_grad_hook(self._arrived)  # type: ignore[no-untyped-call]

    def _stepped(self, params: Sequence[Tensor]) -> None:
        """Those of one message are there, and are freed."""
        unit = tuple(self._numbers[p] for p in params)
        now = self._alive.now
        self.found.append(Arrival(unit, self._passes > 1, now, first=self.step == 0))
        for p in params:
            p.grad = None

    def _arrived(self, param: Tensor) -> None:
        number, is_last = self._numbers[param], self.done == self._passes - 1
        if is_sharded(param) and self._mode == "step":
            if is_last:
                self._together.arrived(param)
            return
        self.found.append(Arrival((number,), self.done > 0, self._alive.now))
        found = self._left(number, is_last)
        if is_sharded(param) and self._mode == "project":
            assert param.grad is not None
            keep_shard(param, alone(local(param.grad)))
        if found is not None:
            if param not in self._parts:
                self._parts[param] = [torch.empty(tuple(s), dtype=kept) for s, kept in found]
            param.grad = None


def _contexts(device: str) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Of a checkpointed layer, run and run again."""
    return nullcontext(), run_again(device)


def _run(model: nn.Module, run: Callable[[], Tensor], cast: AbstractContextManager[Any]) -> None:
    """Forward and backward of one micro-batch.

    Raises:
        NotImplementedError: something in it needs values, or is not known without memory.
    """
    try:
        with cast:
            found = run()
        found.backward()  # type: ignore[no-untyped-call]
    except WITHOUT_VALUES as error:
        raise NotImplementedError(
            f"tokens of a {type(innermost(model)).__name__}: forward or backward does what tensors "
            f"without memory cannot ({_line(error)}), such as looking at values. Leave tokens out, "
            "and measure activations in a real step"
        ) from error


def _line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
