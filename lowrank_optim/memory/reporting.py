"""What an optimizer holds now, by storage."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim import Optimizer

from lowrank_optim.engine.plan import on_host
from lowrank_optim.optimizer import LowRankOptimizer
from lowrank_optim.sharding.parts import local

GIB = 2**30


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind ``tensors``, each counted once: a view holds all it views."""
    storages = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        no_data = tensor.is_meta or isinstance(tensor, FakeTensor)
        key = id(tensor) if no_data else (str(tensor.device), storage.data_ptr())
        if storage.nbytes():
            storages[key] = storage.nbytes()
    return sum(storages.values())


class Report(NamedTuple):
    """Bytes an optimizer holds, by storage."""

    basis: int
    moments: int
    other: int
    """Counters, indices, the maps of quantised formats, and what is kept on the host."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.basis + self.moments + self.other

    def __str__(self) -> str:
        """One line."""
        return (
            f"optimizer state {self.total:,} bytes: basis {self.basis:,}, moments "
            f"{self.moments:,}, other {self.other:,}"
        )


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
    if isinstance(optimizer, LowRankOptimizer):
        kinds["basis"] += optimizer._shared.tensors()
    return Report(**{kind: storage_bytes(tensors) for kind, tensors in kinds.items()})


def host_bytes(optimizer: Optimizer) -> int:
    """The part of the state that stays in host memory by design, such as SwitchLoRA's pools."""
    states = optimizer.state.values()
    return storage_bytes(v for s in states for k, v in s.items() if k.startswith("host."))
