"""What an optimizer holds now, by storage."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim import Optimizer

from lowrank_optim.engine.bucket import bucketed
from lowrank_optim.engine.offload import load_of
from lowrank_optim.engine.plan import ParamPlan, State, Strategies
from lowrank_optim.engine.sharded.local import meta_state
from lowrank_optim.engine.sharded.work import bucketed_shards
from lowrank_optim.engine.state import on_host, resting_keys
from lowrank_optim.memory.blocks import in_blocks, of_a_new_segment
from lowrank_optim.optimizer import LowRankOptimizer
from lowrank_optim.sharding.parts import local
from lowrank_optim.subspaces.block import Block

GIB = 2**30


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind ``tensors``, each counted once: a view holds all it views."""
    storages = {}
    for tensor in list(tensors):  # one that goes would leave its place to another
        storage = tensor.untyped_storage()
        no_data = tensor.is_meta or isinstance(tensor, FakeTensor)
        key = storage._cdata if no_data else (str(tensor.device), storage.data_ptr())
        if storage.nbytes():
            storages[key] = storage.nbytes()
    return sum(storages.values())


class _Sizes(NamedTuple):
    basis: int
    moments: int
    other: int
    """Counters, indices, the maps of quantised formats, SwitchLoRA's pools."""


class Report(_Sizes):
    """Bytes an optimizer holds, by storage: a tuple of three, and two figures about them.

    Args:
        basis: of bases and factors.
        moments: of moments, and what goes with them.
        other: of counters, indices, pools.
        host: the part of these that lies in host memory by choice: ``state_device="cpu"``, pools.
        staging: buffers of the device, beside the state, through which the former pass in a step.
    """

    host: int
    staging: int

    def __new__(
        cls, basis: int, moments: int, other: int, host: int = 0, staging: int = 0
    ) -> Report:
        """Made of five."""
        self = super().__new__(cls, basis, moments, other)
        self.host, self.staging = host, staging
        return self

    @property
    def total(self) -> int:
        """All of the state."""
        return self.basis + self.moments + self.other

    def __str__(self) -> str:
        """One line."""
        text = (
            f"optimizer state {self.total:,} bytes: basis {self.basis:,}, moments "
            f"{self.moments:,}, other {self.other:,}"
        )
        if self.host:
            text += f"; {self.host:,} of it in host memory"
        return text + (f"; staging {self.staging:,}" if self.staging else "")


def _kind(key: str, value: Tensor, param: Tensor) -> str:
    if key.startswith("basis"):
        return "basis"
    if on_host(key) or key == "index" or key.startswith(("qmap", "residual_")):
        return "other"
    # a 0-d entry is a counter, unless the parameter itself is 0-d
    return "moments" if value.dim() or "." in key or value.shape == param.shape else "other"


def report(optimizer: Optimizer) -> Report:
    """What ``optimizer`` holds now, by storage. Works on any ``torch.optim.Optimizer``.

    Example:
        >>> import torch
        >>> from lowrank_optim import GaLoreAdamW, memory
        >>> weight = torch.nn.Parameter(torch.randn(64, 32))
        >>> optimizer = GaLoreAdamW([weight], rank=4)
        >>> weight.grad = torch.randn(64, 32)
        >>> optimizer.step()
        >>> memory.report(optimizer)
        Report(basis=512, moments=2048, other=12)
    """
    kinds: dict[str, list[Tensor]] = {"basis": [], "moments": [], "other": []}
    for param, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                kinds[_kind(key, value, param)].append(local(value))
    staging = 0
    if isinstance(optimizer, LowRankOptimizer):
        kinds["basis"] += optimizer._shared.tensors()
        staging = optimizer._staging.nbytes
    sizes = {kind: storage_bytes(tensors) for kind, tensors in kinds.items()}
    return Report(**sizes, host=host_bytes(optimizer), staging=staging)


def _resting(optimizer: Optimizer) -> Iterator[tuple[Strategies, list[ParamPlan]]]:
    """Groups whose moments lie in host memory."""
    if isinstance(optimizer, LowRankOptimizer):
        for group in optimizer.param_groups:
            chosen = optimizer._strategies(group)
            if chosen.offload:
                yield chosen, [x for x in optimizer._items(group) if optimizer._trains(x.param)]


def host_bytes(optimizer: Optimizer) -> int:
    """The part of the state that lies in host memory by choice, such as SwitchLoRA's pools."""
    moments, pools = _on_host(optimizer)
    return storage_bytes([*moments, *pools])


def pinned_bytes(optimizer: Optimizer) -> int:
    """What these take of a host beside a GPU: torch rounds pinned memory up to a power of two."""
    moments, pools = _on_host(optimizer)
    return sum(_power_of_two(x.untyped_storage().nbytes()) for x in moments) + storage_bytes(pools)


def blocks_of(optimizer: Optimizer, params: Iterable[Tensor], staging: int) -> int:
    """What an accelerator's allocator takes for parameters, state and staging.

    Args:
        optimizer: with its state, all over tensors without memory.
        params: of the model.
        staging: bytes of two buffers.
    """
    # by storage: what :func:`local` gives of a DTensor is another tensor each time
    hosted = {x.untyped_storage()._cdata for some in _on_host(optimizer) for x in some}
    entries = (x for state in optimizer.state.values() for x in state.values())
    kept = [local(x) for x in entries if isinstance(x, Tensor)]
    if isinstance(optimizer, LowRankOptimizer):
        kept += optimizer._shared.tensors()
    on_device = {x.untyped_storage()._cdata: x for x in kept if x.is_meta}
    there = [x for key, x in on_device.items() if key not in hosted]
    weights = sum(of_a_new_segment(storage_bytes([local(p)])) for p in params)
    states = sum(in_blocks(storage_bytes([x])) for x in there)
    return weights + states + 2 * in_blocks(staging // 2)


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length() if size else 0


def _on_host(optimizer: Optimizer) -> tuple[list[Tensor], list[Tensor]]:
    """Moments that lie in host memory, which are pinned, and what else does by choice."""
    resting: dict[Tensor, list[str]] = {}
    for chosen, items in _resting(optimizer):
        resting |= {item.param: resting_keys(item, chosen) for item in items}
    entries = [
        (key in resting.get(param, ()), key, local(value))
        for param, state in optimizer.state.items()
        for key, value in state.items()
    ]
    moments = [x for rests, _, x in entries if rests]
    return moments, [x for rests, key, x in entries if key.startswith("host.") and not rests]


def staging_bytes(
    optimizer: Optimizer, alone: bool = False, together: Sequence[Collection[Tensor]] = ()
) -> int:
    """What the buffers will take once an optimizer has stepped: two of the largest load.

    They never shrink, so that blocks count as they are in their turn, each of which comes.

    Args:
        optimizer: with its state.
        alone: whether parameters are stepped one by one, inside backward.
        together: shards of which some are stepped at once there.
    """
    largest = 0
    for chosen, items in _resting(optimizer):
        together_now = list[Sequence[ParamPlan]]()
        for unit in together if alone else ():
            shards = [x for x in items if x.sharded and x.param in unit]
            together_now += bucketed_shards(shards, chosen)
        single = [x for x in items if x.alone and alone]
        rest = [x for x in items if not (x.alone and alone)]
        spread = [x for x in rest if x.sharded and x.alone]
        units = together_now + [[x] for x in single]
        units += bucketed([x for x in rest if not (x.sharded and x.alone)], chosen)
        units += bucketed_shards(spread, chosen)
        for own in units:
            load = load_of(own, [_as_stepped(optimizer, x, chosen) for x in own], chosen)
            largest = max(largest, load.nbytes)
    return 2 * largest


def _as_stepped(optimizer: Optimizer, item: ParamPlan, chosen: Strategies) -> State:
    """The state with which a parameter is stepped at most: of a block, that of its turn."""
    if isinstance(item.subspace, Block) and item.subspace.size:
        return meta_state(item, chosen, active=True)
    state: State = optimizer.state[item.param]
    return state
