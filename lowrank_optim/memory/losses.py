"""Losses of causal language models that never hold all logits: in chunks, and fused with the head.

They are what is really run to find what they hold. Logits are ``x @ weight.T + bias``, in
``cap * tanh(logits / cap)`` where a model caps them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowrank_optim.memory.inputs import innermost, loss_of

Loss = Literal["transformers", "chunked", "fused"]
LOSSES: tuple[Loss, ...] = get_args(Loss)

CHUNK = 1024
"""Tokens of which ``"chunked"`` has logits at once, where nobody says how many."""

IGNORED = -100
"""The label of tokens without one, as everywhere."""

_KERNEL = "lowrank_optim::cross_entropy_"


def loss_by(
    kind: Loss, model: nn.Module, batch: dict[str, Tensor], chunk: int | None = None
) -> Tensor:
    """The loss of a batch.

    Args:
        kind: ``"transformers"``, the model's own; or one of those here.
        model: of ``transformers``, or what wraps one.
        batch: as :func:`lowrank_optim.memory.inputs.batch_of` makes it.
        chunk: tokens of which ``"chunked"`` has logits at once (default: 1,024).

    Raises:
        NotImplementedError: the model has no such loss.
    """
    if kind == "transformers":
        return loss_of(model, batch)
    inner = innermost(model)
    if kind == "fused" and torch.is_autocast_enabled("cpu"):
        raise NotImplementedError(
            "loss='fused' under autocast: which of its buffers Liger has in half is not known. "
            "Leave one of the two out"
        )
    head = _head_of(inner, kind, batch)
    labels = functional.pad(batch["labels"], (0, 1), value=IGNORED)[..., 1:].reshape(-1)
    inputs = {name: x for name, x in batch.items() if name != "labels"}
    cap = getattr(inner.config, "final_logit_softcapping", None)
    with _passing(head) as seen:
        out = model(**inputs)
    if len(seen) != 1 or (cap is None and out.logits is not seen[0]):
        raise _unknown(inner, kind, "does more with logits than its head")
    aux = getattr(out, "aux_loss", None)
    hidden = seen.pop().reshape(-1, head.in_features)
    del out
    inputs_of: tuple[Any, ...] = hidden, head.weight, head.bias, labels, cap
    of: Any = Fused
    if kind == "chunked":
        of, inputs_of = Chunked, (*inputs_of, chunk or CHUNK)
    loss: Tensor = of.apply(*inputs_of)
    return loss if aux is None else loss + inner.config.router_aux_loss_coef * aux


def _head_of(inner: Any, kind: Loss, batch: dict[str, Tensor]) -> nn.Linear:
    """The map from the last hidden states to logits.

    Raises:
        NotImplementedError: it is none, or the loss is not that of a causal language model.
    """
    head = inner.get_output_embeddings()
    labels = batch.get("labels")
    causal = inner.loss_type in (None, "ForCausalLM")  # None: that of causal language models
    if head is None or not causal or labels is None or labels.dim() != 2:
        raise _unknown(inner, kind, "is no causal language model")
    if type(head) is not nn.Linear:
        raise _unknown(inner, kind, f"has a {type(head).__name__} as its head, no Linear")
    return head


def _unknown(inner: Any, kind: Loss, why: str) -> NotImplementedError:
    return NotImplementedError(
        f"loss={kind!r} is for causal language models whose logits are what a linear head makes: "
        f"{type(inner).__name__} {why}. Leave loss out, which counts the model's own"
    )


@contextmanager
def _passing(head: nn.Module) -> Iterator[list[Tensor]]:
    """Let ``head`` pass on what it is given, and list it."""
    seen: list[Tensor] = []

    def passed(x: Tensor) -> Tensor:
        seen.append(x)
        return x

    before = head.__dict__.get("forward")
    head.forward = passed
    try:
        yield seen
    finally:
        del head.forward
        if before is not None:
            head.forward = before


class Chunked(torch.autograd.Function):
    """Cross entropy of a chunk of tokens after another, whose logits are made again in backward."""

    @staticmethod
    # tensors without memory are on a CPU
    @torch.amp.custom_fwd(device_type="cpu")  # type: ignore[untyped-decorator]
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        cap: float | None,
        chunk: int,
    ) -> Tensor:
        """The mean over tokens of ``(tokens, in)`` that have a label."""
        ctx.save_for_backward(x, weight, bias, labels)
        ctx.cap, ctx.chunk = cap, chunk
        total = torch.zeros((), dtype=_float(x), device=x.device)
        for start in range(0, len(x), chunk):
            rows = slice(start, start + chunk)
            total += _summed(_log_probabilities(x[rows], weight, bias, cap), labels[rows])
        return total / _counted(labels)

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Each chunk's logits again; its gradients are added to those of the others."""
        x, weight, bias, labels = ctx.saved_tensors
        scale = grads[0] / _counted(labels)
        needed = [i for i in range(3) if ctx.needs_input_grad[i]]
        sums: list[Tensor | None] = [torch.empty_like(x) if 0 in needed else None, None, None]
        for start in reversed(range(0, len(x), ctx.chunk)):  # as autograd goes
            rows = slice(start, start + ctx.chunk)
            with torch.enable_grad():
                given: list[Any] = [
                    None if y is None else y.detach().requires_grad_(i in needed)
                    for i, y in enumerate((x[rows], weight, bias))
                ]
                kept = _log_probabilities(
                    given[0], given[1], given[2], ctx.cap
                )  # to the end, as by torch's checkpoint
                loss = _summed(kept, labels[rows])
            found = torch.autograd.grad(loss, [given[i] for i in needed], scale)
            for i, grad in zip(needed, found, strict=True):
                there = sums[i]
                if there is None:
                    sums[i] = grad
                else:
                    there[rows].copy_(grad) if i == 0 else there.add_(grad)
            del found, grad, loss, kept
        return *sums, None, None, None


def _log_probabilities(x: Tensor, weight: Tensor, bias: Tensor | None, cap: float | None) -> Tensor:
    """Of every word, in float32 as transformers takes them."""
    logits = functional.linear(x, weight, bias)
    if cap is not None:
        logits = torch.tanh(logits / cap) * cap
    return functional.log_softmax(logits.to(_float(x)), dim=1)


def _summed(log_probabilities: Tensor, labels: Tensor) -> Tensor:
    return functional.nll_loss(log_probabilities, labels, ignore_index=IGNORED, reduction="sum")


class Fused(torch.autograd.Function):
    """Liger's fused linear cross entropy: gradients are made in forward, and logits in one buffer.

    As ``liger-kernel`` 0.8 does it on a GPU of compute capability 8 and above.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, cap: float | None
    ) -> Tensor:
        """The mean over tokens of ``(tokens, in)`` that have a label."""
        tokens, rows = len(x), rows_at_once(len(x), x.shape[1], len(weight))
        grad_x = torch.zeros_like(x)
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        grad_bias = None if bias is None else torch.zeros_like(bias)
        losses = torch.zeros(tokens, dtype=_float(x), device=x.device)
        count = _counted(labels)
        buffer = x.new_empty(rows, len(weight))
        for start in range(0, tokens, rows):
            own = slice(start, min(start + rows, tokens))
            logits = buffer[: own.stop - start]
            torch.mm(x[own], weight.t(), out=logits)
            if bias is not None:
                logits.add_(bias)
            losses[own] = torch.ops.lowrank_optim.cross_entropy_(logits, labels[own], count, cap)
            torch.mm(logits, weight, out=grad_x[own])
            if grad_weight is not None and x.dtype in (torch.float16, torch.bfloat16):
                torch.addmm(grad_weight, logits.t(), x[own], out=grad_weight)
            elif grad_weight is not None:
                grad_weight += torch.mm(logits.t(), x[own])
            if grad_bias is not None:
                grad_bias += logits.sum(0)
        ctx.save_for_backward(grad_x, grad_weight, grad_bias)
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """What forward has found, scaled where it lies."""
        found = ctx.saved_tensors
        for x in found:
            if x is not None:
                x.mul_(grads[0])
        return *found, None, None


def rows_at_once(tokens: int, width: int, vocabulary: int) -> int:
    """Tokens of which Liger has logits at once: about as many bytes as all hidden states have."""
    share = math.ceil(tokens / math.ceil(vocabulary / width))
    return min(1 << (share - 1).bit_length(), tokens)


def _counted(labels: Tensor) -> Tensor:
    return (labels != IGNORED).sum()


def _float(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _cross_entropy_(logits: Tensor, labels: Tensor, count: Tensor, cap: float | None) -> Tensor:
    """Losses over ``count``; the gradient takes the place of the logits, as in Liger's kernel."""
    x = logits.to(_float(logits))
    slope = None
    if cap is not None:
        x = torch.tanh(x / cap)
        slope, x = 1 - x.square(), cap * x
    has_one = (labels != IGNORED).unsqueeze(1)
    index = labels.unsqueeze(1).where(has_one, 0)
    every = torch.logsumexp(x, 1, keepdim=True)
    losses = (every - x.gather(1, index)).where(has_one, 0) / count
    grad = (x - every).exp_().scatter_add_(1, index, -torch.ones_like(every))
    if slope is not None:
        grad *= slope
    logits.copy_(grad.where(has_one, 0) / count)
    return losses.squeeze(1)


def _fake(logits: Tensor, labels: Tensor, count: Tensor, cap: float | None) -> Tensor:
    return logits.new_empty(len(logits), dtype=_float(logits))


# one kernel: what it works with beside the logits is in registers, and no storage
torch.library.define(
    _KERNEL, "(Tensor(a!) logits, Tensor labels, Tensor count, float? cap) -> Tensor"
)
torch.library.impl(_KERNEL, "CompositeExplicitAutograd")(_cross_entropy_)
torch.library.register_fake(_KERNEL)(_fake)
