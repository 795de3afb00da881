"""Which devices a host may ask for a value, and how one gets there without waiting."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

HOSTS = frozenset({"cpu"})
"""Device types whose tensors a host reads at once: no queue has to run dry before. No other can be
among them."""

HOST_MEMORY = frozenset({"cpu"})
"""Those whose memory is the host's: nothing of theirs could lie elsewhere."""

GPUS = frozenset({"cuda", "meta"})
"""Those that Triton serves; tensors without memory stand for one where nobody says."""

QUEUED = frozenset({"cuda", "xpu"})
"""Those that copy to and from pinned memory while their host goes on."""


def on_accelerator(tensor: Tensor) -> bool:
    """Whether branching on a value of this tensor would stall its device."""
    return not (tensor.is_cpu and HOSTS)  # the name of a device takes four times as long


@contextmanager
def as_accelerators() -> Iterator[None]:
    """Within, hosts are accelerators too: what runs on a CPU branches on no value."""
    global HOSTS
    before, HOSTS = HOSTS, frozenset()
    try:
        yield
    finally:
        HOSTS = before


def plainly() -> AbstractContextManager[object]:
    """Within, ``torch.autocast`` is off, and a default device: they are of a model, not of steps.

    Products of a step would be in half: bases that are none, and coordinates rounded. Counters and
    draws of the host would be on the device of ``torch.set_default_device``, or of ``with``.
    """
    if torch._C._len_torch_function_stack():
        modes = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
        if any(isinstance(mode, DeviceContext) for mode in modes):
            return _without_a_device()
    return torch._C._DisableAutocast()


@contextmanager
def _without_a_device() -> Iterator[None]:
    with torch._C._DisableAutocast(), torch._C.DisableTorchFunction():
        yield


_STANDS_FOR: ContextVar[str] = ContextVar("_STANDS_FOR", default="meta")


@contextmanager
def standing_for(device_type: str) -> Iterator[None]:
    """Within, tensors without memory stand for those of a device, where a choice depends on it."""
    token = _STANDS_FOR.set(device_type)
    try:
        yield
    finally:
        _STANDS_FOR.reset(token)


def kind_of(like: Tensor) -> str:
    """The type of a tensor's device, or of the one that a tensor on the meta device stands for."""
    return _STANDS_FOR.get() if like.is_meta else like.device.type


def apart(tensor: Tensor) -> bool:
    """Whether host memory is other memory than that of this tensor's device."""
    return kind_of(tensor) not in HOST_MEMORY


def pinned(x: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host in memory which a device copies from, and to, while the host goes on."""
    real = queued(device) and not isinstance(x, FakeTensor)
    return x.pin_memory() if real and not x.is_pinned() else x


def recording() -> bool:
    """Whether a CUDA graph is being captured: kernels are recorded, and none runs."""
    return _capturing()


def _capturing() -> bool:
    # asked at every launch: whether there are devices takes longer to find out
    ready = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return ready and torch.cuda.is_current_stream_capturing()


def queued(device: torch.device) -> bool:
    """Whether copies between a device and pinned memory wait for their turn without the host."""
    return device.type in QUEUED and torch.get_device_module(device).is_available()


def sent(x: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device, from pinned memory: the host goes on meanwhile.

    A copy from other memory makes it wait until the device has done all that it was asked before.
    """
    waits = device.type != "cpu" and not queued(device)
    if x.is_cpu:
        x = pinned(x, device)
    return x.to(device, non_blocking=not waits)


def brought(*lists: list[Tensor]) -> list[tuple[Tensor, ...]]:
    """Tensors of one device on the host, which waits once, for the last: copies come in turn.

    Args:
        lists: one tensor of each matrix.

    Returns:
        Those of each matrix.
    """
    count, xs = len(lists[0]), [x for own in lists for x in own]
    device = xs[0].device
    turns = device.type == "cpu" or queued(device)
    outs = [torch.empty(x.shape, dtype=x.dtype, pin_memory=queued(device)) for x in xs]
    for n, (out, x) in enumerate(zip(outs, xs, strict=True)):
        out.copy_(x, non_blocking=turns and n + 1 < len(xs))
    return [tuple(outs[n::count]) for n in range(count)]
