"""What forward and backward of a model hold at their worst moment, found without allocating it."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Left = Sequence[tuple[Sequence[int], torch.dtype]]
"""Shapes and dtypes of the tensors that take a gradient's place, if any does."""


class Alive(TorchDispatchMode):
    """Counts bytes of the storages that operations made and that still exist."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation and count what it made."""
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self._count(x.untyped_storage())
        return out

    def leave_out(self, tensors: Sequence[Tensor]) -> None:
        """Not to be counted: there before."""
        self._known.update(x.untyped_storage()._cdata for x in tensors)

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, key, size).atexit = False

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def causal_lm(config: Any, dtype: torch.dtype, attention: str | None = None) -> nn.Module:
    """The causal language model of a ``transformers`` configuration, on the default device."""
    from transformers import AutoModelForCausalLM  # optional, and slow to import

    make: Callable[..., nn.Module] = AutoModelForCausalLM.from_config
    own = {} if attention is None else {"attn_implementation": attention}
    return make(copy.deepcopy(config), dtype=dtype, **own)


def _fused_attention() -> str:
    """Name of torch's fused attention, without the look for padding that needs values."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register("fused_causal", sdpa_attention_forward)
    return "fused_causal"


def in_flight(
    config: Any,
    tokens: int | tuple[int, int],
    *,
    dtype: torch.dtype,
    checkpointing: bool,
    passes: int,
    trained: Sequence[bool],
    left: Callable[[int, bool], Left | None],
) -> int:
    """Most bytes of activations and gradients alive at once, the weights not counted.

    The model runs forward and backward, with its loss, on tensors that have no memory, and every
    storage is followed from the operation that makes it to its end. Attention is what torch takes
    on a CPU: fused, without a matrix of scores, as on a GPU.

    Args:
        config: a ``transformers`` configuration of a causal language model.
        tokens: of a micro-batch: one sequence of so many, or ``(sequences, length)``.
        dtype: of weights and activations.
        checkpointing: keep the inputs of the layers alone, and run each again inside backward.
        passes: micro-batches that add up.
        trained: whether each parameter has a gradient.
        left: what is left of the gradient of parameter i, in the last pass or before; None if it
            stays.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # a second, to import

    shape = tokens if isinstance(tokens, tuple) else (1, tokens)
    with FakeTensorMode():
        model = causal_lm(config, dtype, _fused_attention()).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        batch = torch.zeros(shape, dtype=torch.long)
        alive, parts, last = Alive(), dict[Tensor, list[Tensor]](), False

        def arrived(param: Tensor) -> None:
            found = left(numbers[param], last)
            if found is not None:
                if param not in parts:
                    parts[param] = [torch.empty(tuple(s), dtype=own) for s, own in found]
                param.grad = None

        numbers: dict[Tensor, int] = {p: i for i, p in enumerate(model.parameters())}
        for param, gets in zip(numbers, trained, strict=True):
            param.requires_grad_(gets)
            if gets:
                param.register_post_accumulate_grad_hook(arrived)  # type: ignore[no-untyped-call]
        with alive:
            alive.leave_out([*numbers, *model.buffers(), batch])
            for n in range(passes):
                last = n == passes - 1
                model(input_ids=batch, labels=batch).loss.backward()
        return alive.most
