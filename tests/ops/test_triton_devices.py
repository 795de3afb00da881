"""Where Triton's launches go: to the device of the tensors, whichever is the current one.

Tensors of the CPU say that they are on one of two CUDA devices, and the launcher that Triton
compiles for is a stub: it notes the current device, whose current stream Triton takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton

from lowrank_optim.ops import cublas
from lowrank_optim.ops import triton as ops
from lowrank_optim.ops.triton import cosine, launch, lift, tables
from tests.cuda_on_host.host import OnDevice, _Cuda
from tests.ops import ops_cases, ops_cosines, ops_factors
from tests.ops.interpreted import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="kernels are functions of Python here")


class Devices:
    """The current device, and what was launched."""

    def __init__(self) -> None:
        self.current = 0
        self.launches: list[tuple[str, int, set[Any]]] = []
        self.pinned: list[int] = []
        self.tables: list[Tensor] = []
        self.stream = 0

    def mark(self, x: Tensor, device: int) -> Tensor:
        """``x``, on ``device`` from now on."""
        found = x.as_subclass(OnDevice)
        found.index = device
        return found

    def place(self, x: Any, device: int) -> Any:
        """Copies of all tensors of a list or a dict, on ``device``."""
        if isinstance(x, dict):
            return {name: self.place(y, device) for name, y in x.items()}
        if isinstance(x, list):
            return [self.place(y, device) for y in x]
        return self.mark(x.clone(), device) if isinstance(x, Tensor) else x


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> Iterator[Devices]:
    own = Devices()

    class Device:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def __enter__(self) -> None:
            self.before, own.current = own.current, self.device.index

        def __exit__(self, *_: Any) -> None:
            own.current = self.before

    def run(self: Any, *args: Any, **_: Any) -> None:
        tensors = [x for x in args if isinstance(x, Tensor)]
        own.launches.append((self.fn.__name__, own.current, {x.device for x in tensors}))
        own.tables.append(args[0])

    def pinned(self: Tensor) -> Tensor:
        own.pinned.append(self.numel())
        return self

    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: own.stream)
    monkeypatch.setattr(tables, "_kept", {})
    monkeypatch.setattr(tables, "_size", 0)
    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", run)
    monkeypatch.setattr(Tensor, "pin_memory", pinned)
    yield own


def arguments(op: str) -> dict[str, Any]:
    """Of a call with two matrices or more."""
    if op in ops_cosines.COSINES:
        return ops_cosines.arguments(op, torch.float32, widths=(33, 33), unsound=None)
    if op in ops_factors.OPS:
        return ops_factors.arguments(op, torch.float32)
    return ops_cases.example(op)


OPS = [
    *ops_cases.ELEMENTWISE, *ops_cases.BITS8, "quantize_blockwise_", "dequantize_blockwise_",
    "stochastic_round_", *ops_cases.APPLIES, "column_norms", *ops_factors.OPS,
    *ops_cosines.COSINES,
]  # fmt: skip
OPS.remove("addmm_")  # cuBLAS's: see below


def check(devices: Devices, op: str) -> None:
    a = arguments(op)
    for device in (1, 0, 1):
        devices.launches.clear()
        with _Cuda(devices):  # type: ignore[arg-type]
            getattr(ops, op)(*devices.place(a, device).values())
        assert devices.launches, op
        for kernel, current, places in devices.launches:
            assert current == device, f"{kernel} of tensors on cuda:{device} went to cuda:{current}"
            assert places == {torch.device("cuda", device)}, kernel
        assert devices.current == 0  # as it was before


@pytest.mark.parametrize("op", OPS)
def test_each_op_is_launched_on_the_device_of_its_tensors(devices: Devices, op: str) -> None:
    """Its table of pointers too, which comes from pinned memory."""
    check(devices, op)


@pytest.mark.parametrize("op", ["adamw_direction_", "lift_add_scaled_", "cosine_scores"])
def test_a_launch_on_the_current_device_is_seen(
    devices: Devices, op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the test above sees where nobody changes the device."""
    for module in (launch, lift, cosine):
        monkeypatch.setattr(module, "guard", lambda x: nullcontext())
    with pytest.raises(AssertionError, match="on cuda:1 went to cuda:0"):
        check(devices, op)


def test_products_are_asked_of_the_handle_of_their_device(
    devices: Devices, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch has one for each device, and gives that of the current one."""
    asked = []
    library = SimpleNamespace(
        cublasSetPointerMode_v2=lambda handle, mode: 0,
        cublasGemmEx=lambda handle, *args: asked.append((handle, devices.current)) or 0,
    )
    monkeypatch.setattr(cublas, "_library", lambda device: library)
    monkeypatch.setattr(cublas, "_handle", lambda: devices.current)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: devices.current)
    a = {k: xs[:2] for k, xs in arguments("addmm_").items()}
    for device in (1, 0):
        with _Cuda(devices):  # type: ignore[arg-type]
            ops.addmm_(*devices.place(a, device).values())
        assert asked == [(device, device)] * 2 and devices.current == 0
        asked.clear()


def test_tables_of_pointers_come_from_pinned_memory(devices: Devices) -> None:
    """A copy from other memory would make the host wait; and it is not waited for."""
    a = arguments("adamw_direction_")
    lists = [devices.place(a, device) for device in (1, 0, 1)]
    with _Cuda(devices):  # type: ignore[arg-type]
        for own in lists:
            ops.adamw_direction_(*own.values())
    assert len(devices.pinned) == len(devices.launches) > 0


def direction(devices: Devices, a: dict[str, Any]) -> Tensor:
    """A launch on the lists of ``a``, and its table."""
    with _Cuda(devices):  # type: ignore[arg-type]
        ops.adamw_direction_(*a.values())
    return devices.tables[-1]


def two(devices: Devices) -> dict[str, Any]:
    """Arguments of a list of two, for one launch."""
    a = arguments("adamw_direction_")
    pairs = {k: [x[-1]] * 2 if isinstance(x, list) and x else x for k, x in a.items()}
    return dict(devices.place(pairs, 0))


def test_a_table_is_kept_for_lists_with_the_same_addresses(devices: Devices) -> None:
    """Whatever differs between two calls, an address, a number or a stream, is another table."""
    a = two(devices)
    first = direction(devices, a)
    assert (
        direction(devices, {k: [*x] if isinstance(x, list) else x for k, x in a.items()}) is first
    )
    assert len(devices.pinned) == 1
    others = {k: [*reversed(a[k])] for k in ("grads", "exp_avgs", "outs")}
    others["eps"] = [2 * x for x in a["eps"]]
    for name, value in others.items():
        table = direction(devices, {**a, name: value})
        assert table is not first, name
        assert not torch.equal(torch.Tensor(table), torch.Tensor(first)), name
    assert direction(devices, a) is first
    devices.stream = 1  # where the upload of the first may not have come yet
    assert direction(devices, a) is not first


def test_tables_take_no_more_memory_than_they_may(
    devices: Devices, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oldest go first; what is left is found again."""
    a = two(devices)
    size = direction(devices, a).numel()
    monkeypatch.setattr(tables, "MOST", 3 * size)
    made = [direction(devices, {**a, "eps": [1e-3 * n] * 2}) for n in range(1, 6)]
    assert len(tables._kept) == 3
    assert tables._size == sum(x.numel() for x in tables._kept.values()) == 3 * size
    assert direction(devices, {**a, "eps": [5e-3] * 2}) is made[-1]
    assert direction(devices, {**a, "eps": [1e-3] * 2}) is not made[0]


@pytest.mark.parametrize("op", ["moment_", "stochastic_round_", "column_norms"])
def test_a_list_over_two_devices_is_launched_on_both(devices: Devices, op: str) -> None:
    """No table has addresses of another device."""
    a = arguments(op)
    lists = {name: isinstance(x, list) and x and isinstance(x[0], Tensor) for name, x in a.items()}
    both = {
        name: [devices.mark(y.clone(), n % 2) for n, y in enumerate(x)] if lists[name] else x
        for name, x in a.items()
    }
    with _Cuda(devices):  # type: ignore[arg-type]
        getattr(ops, op)(*both.values())
    assert {current for _, current, _ in devices.launches} == {0, 1}
    for kernel, current, places in devices.launches:
        assert places == {torch.device("cuda", current)}, kernel
