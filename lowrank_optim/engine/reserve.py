"""Memory that phases three and four of a step need, asked for before they write anything."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowrank_optim.engine.matrix_step import MatrixStep
from lowrank_optim.engine.plan import Strategies
from lowrank_optim.engine.undo import Undo
from lowrank_optim.ops.devices import on_accelerator, recording
from lowrank_optim.ops.schema import NAMESPACE, runs
from lowrank_optim.tensors.alive import Alive

LARGE = 1 << 20
"""Bytes from which on a caching allocator keeps a tensor apart from small ones."""


class _Most(Alive):  # type: ignore[no-untyped-call]
    """Which storages there were when most bytes were."""

    def __init__(self, device: str) -> None:
        super().__init__(device)
        self.sizes: list[int] = []

    def __enter__(self) -> Alive:
        # nothing is resized, so that other threads may step too
        TorchDispatchMode.__enter__(self)  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *raised: Any) -> None:
        TorchDispatchMode.__exit__(self, *raised)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Also what ops of the package make in themselves, and give back before they end.

        What an operation is given and none has made was there before, and so are views of it.
        """
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        self.leave_out(x for x in given if x.untyped_storage()._cdata not in self._sizes)
        if func.namespace != NAMESPACE:
            return super().__torch_dispatch__(func, types, args, kwargs)
        with self:
            return runs[func.overloadpacket.__name__](*args)

    def _grow(self, storage: UntypedStorage) -> None:
        before = self.most
        super()._grow(storage)
        if self.most > before:
            self.sizes = [*self._sizes.values()]


def _pieces(sizes: Sequence[int]) -> list[int]:
    """The large ones each, and small ones as one: an allocator has these together."""
    large = [size for size in sizes if size >= LARGE]
    return [*large, sum(sizes) - sum(large)]


def ask(sizes: Iterable[int], dtype: torch.dtype, device: torch.device) -> None:
    """Ask for tensors of so many elements, all at once, and give them back.

    What an allocator has given it keeps for whoever asks next; if it has none nothing has begun.
    """
    made = [torch.empty(size, dtype=dtype, device=device) for size in sizes]
    made.clear()


def _kind(chosen: Strategies) -> Hashable:
    """What of a group decides how much it is."""
    roles = chosen.rule, chosen.store, type(chosen.residual)
    return *roles, chosen.rounding, chosen.maximize, chosen.lr_scale, chosen.capturable


def written(
    work: Sequence[MatrixStep],
    chosen: Strategies,
    undo: Undo,
    write: Callable[[Sequence[MatrixStep], Undo], None],
) -> None:
    """Adapt and apply: where memory runs out on an accelerator, nothing has been written.

    An accelerator copies no moments before it writes them. So all the memory that this takes is
    asked for first. How much that is, and in what pieces, is counted before the bucket does so for
    the first time, as it rehearses.

    Args:
        work: alike matrices whose coordinates are known.
        chosen: what their group chose.
        undo: what to put back.
        write: adapts and applies, and tells ``undo``.
    """
    # a gradient that was projected inside backward has no memory of its own
    low = next(iter(work[0].coords.values())) if work else None
    if low is not None and _can_run_out(low):
        item, kind = work[0].item, _kind(chosen)
        if item.needs is None or item.needs[0] != kind:
            item.needs = kind, len(work), _pieces(_rehearsed(work, write))
        else:
            _, count, sizes = item.needs
            own = [-(-size * len(work) // count) for size in sizes]
            ask(own, torch.uint8, low.device)
    write(work, undo)


def _can_run_out(low: Tensor) -> bool:
    """Whether memory is asked for step by step, of a device whose moments are not copied."""
    if not on_accelerator(low) or recording():
        return False
    return not (low.is_meta or isinstance(low, FakeTensor))  # these have none


def _rehearsed(
    work: Sequence[MatrixStep], write: Callable[[Sequence[MatrixStep], Undo], None]
) -> Sequence[int]:
    """What is made if no gradient is finite: as much as of any, and nothing changes."""
    flags = torch.zeros(len(work), dtype=torch.bool, device=work[0].grad.device)
    undo, own, meter = Undo(), [copy.copy(w) for w in work], _Most(work[0].grad.device.type)
    for w, flag in zip(own, flags.unbind(0), strict=True):
        undo.begin(w.state)
        w.finite, w.directions = flag, {}
    with meter:
        write(own, undo)
    return meter.sizes
