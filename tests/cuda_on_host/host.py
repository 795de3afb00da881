"""Two CUDA devices of this process, both made of the CPU.

Tensors say that they are on one of them, and the native backend calls the CUDA half of csrc for
them as it does on a GPU: nothing of it is replaced but the library and torch's device and stream.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lowrank_optim.ops import native
from lowrank_optim.ops.native import arrays, loader

DEVICES = 2
END = 2**31 - 1
"""Past every block."""
GUARD, FILL = 64, 0xA5
"""Bytes on each side of a tensor."""


class Launch(ctypes.Structure):
    """One launch, as `devices.cpp` kept it."""

    device: int
    grid: Sequence[int]
    block: Sequence[int]
    stream: int
    _fields_ = (
        ("device", ctypes.c_int32),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("padding", ctypes.c_int32),
        ("stream", ctypes.c_uint64),
    )


class OnDevice(Tensor):
    """A tensor of the CPU that says it is on a CUDA device."""

    index: int

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", self.index)


class Host:
    """The library, and what it was told and saw."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.host_message.restype = ctypes.c_char_p
        self.library.host_memory.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int]
        self.library.host_stream.argtypes = [ctypes.c_void_p, ctypes.c_int]
        self.library.host_fail.argtypes = [ctypes.c_int64, ctypes.c_int]
        self.library.host_launches.restype = ctypes.c_int64
        self.library.host_launches.argtypes = [ctypes.c_void_p, ctypes.c_int64]
        self.library.host_reset()
        self.current = [0] * DEVICES  # streams
        self.tables: list[array[Any]] = []  # of the calls so far
        self.guarded: list[Tensor] = []  # bytes around and of tensors

    def stream(self, handle: int, device: int) -> None:
        """Make ``handle`` the current stream of ``device``."""
        self.library.host_stream(handle, device)
        self.current[device] = handle

    def place(self, x: Any, device: int) -> Any:
        """Copies of the tensors of a list or a dict of arguments, on ``device``, with guards."""
        if isinstance(x, dict):
            return {name: self.place(y, device) for name, y in x.items()}
        if isinstance(x, list):
            return [self.place(y, device) for y in x]
        return self.mark(self._guarded(x), device) if isinstance(x, Tensor) else x

    def _guarded(self, x: Tensor) -> Tensor:
        reach = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) + 1
        size = x.element_size() * (reach if x.numel() else 0)
        whole = torch.full((size + 2 * GUARD,), FILL, dtype=torch.uint8)
        self.guarded.append(whole)
        inside = whole[GUARD : GUARD + size].view(x.dtype)
        return inside.as_strided(x.shape, x.stride(), inside.storage_offset()).copy_(x)

    def mark(self, x: Tensor, device: int) -> OnDevice:
        """``x`` itself, on ``device`` from now on."""
        found = x.as_subclass(OnDevice)
        found.index = device
        storage = x.untyped_storage()
        self.library.host_memory(storage.data_ptr(), storage.nbytes(), device)
        return found

    def launches(self) -> list[Launch]:
        """All of them, in order."""
        count = self.library.host_launches(None, 0)
        found = (Launch * count)()
        self.library.host_launches(found, count)
        return list(found)

    def check(self) -> None:
        """Raise what a kernel did wrong that a GPU would not always say."""
        if said := self.library.host_message().decode():
            raise AssertionError(said)
        for whole in self.guarded:
            before, after = whole[:GUARD], whole[-GUARD:]
            assert (before == FILL).all() and (after == FILL).all(), "written beside a tensor"

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Kernels run after the block, when the tables of its calls are gone."""
        self.library.host_defer(1)
        yield
        self.library.host_defer(0)
        for table in self.tables:
            ctypes.memset(table.buffer_info()[0], 0xEE, table.itemsize * len(table))
        self.library.host_synchronize()
        self.check()

    @contextmanager
    def blocks(
        self, x: tuple[int, int] = (0, END), y: tuple[int, int] = (0, END)
    ) -> Iterator[None]:
        """Only these blocks run, the second end excluded: of a grid that is too large to."""
        self.library.host_blocks(*x, *y)
        yield
        self.library.host_blocks(0, END, 0, END)

    def call(self, op: str, arguments: dict[Any, Any]) -> Any:
        """An op of the native backend on tensors of the devices."""
        with _Cuda(self):
            result = getattr(native, op)(*arguments.values())
        self.check()
        return result

    def run(self, op: str, device: int, args: ctypes.Structure) -> None:
        """A function of the library on the arguments of its C interface."""
        loader.run(op, torch.device("cuda", device), args)
        self.check()


class _Cuda(TorchFunctionMode):
    """What torch computes from tensors of a device is on that device."""

    def __init__(self, host: Host) -> None:
        super().__init__()
        self.host = host

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        given = [x for x in args if isinstance(x, torch.device)]  # as of Tensor.to
        wanted = torch.device(kwargs.get("device") or (given or ["cpu"])[0])
        if wanted.type == "cuda" and given:
            args = tuple("cpu" if isinstance(x, torch.device) else x for x in args)
        elif wanted.type == "cuda":
            kwargs["device"] = "cpu"
        tensors = [x for x in _flat((args, [*kwargs.values()])) if isinstance(x, Tensor)]
        devices = {x.device for x in tensors if x.dim()} | ({wanted} - {torch.device("cpu")})
        if len(devices) > 1 and func is not Tensor.to:  # which moves
            raise RuntimeError(f"{func} of tensors on {devices}, as torch says it")
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        cuda = [d.index for d in (wanted, *(x.device for x in tensors)) if d.type == "cuda"]
        return self._marked(result, cuda[0]) if cuda else result

    def _marked(self, x: Any, device: int) -> Any:
        if type(x) in (list, tuple):
            return type(x)(self._marked(y, device) for y in x)
        return self.host.mark(x, device) if type(x) is Tensor else x


def _flat(x: Any) -> Iterator[Any]:
    if isinstance(x, (list, tuple)):
        for y in x:
            yield from _flat(y)
    else:
        yield x


@contextmanager
def serving(path: Path) -> Iterator[Host]:
    """The library in the place of the CUDA half, and its devices in that of torch's."""
    host = Host(path)
    paths, keep = loader._paths, arrays.Arrays._keep

    class Device:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def __enter__(self) -> None:
            self.before = host.library.host_device(self.device.index)

        def __exit__(self, *_: Any) -> None:
            host.library.host_device(self.before)

    def stream() -> Any:
        device = host.library.host_device(0)
        host.library.host_device(device)
        return SimpleNamespace(cuda_stream=host.current[device])

    def kept(self: arrays.Arrays, values: array[Any]) -> int:
        host.tables.append(values)
        address = keep(self, values)
        # here it lives on; where it does not, its memory may be another's before the launch
        assert any(x is values for x in self.kept), "a table that nobody keeps for the call"
        return address

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "device", Device)
        patch.setattr(torch.cuda, "current_stream", stream)
        patch.setattr(arrays.Arrays, "_keep", kept)
        patch.setattr(loader, "_paths", lambda name: [path] if "cuda" in name else paths(name))
        caches = loader._load, loader._function
        for cache in caches:
            cache.cache_clear()
        yield host
        for cache in caches:
            cache.cache_clear()
