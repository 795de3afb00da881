"""Streams, devices, pointer tables and errors of launches: two devices in one process."""

from __future__ import annotations

import ctypes
from contextlib import nullcontext
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, PROT_READ, PROT_WRITE
from typing import Any

import pytest
import torch
from torch import Tensor

from lowrank_optim.ops import native
from lowrank_optim.ops.native import loader
from tests.cuda_on_host.compared import compare, compare_tensors
from tests.cuda_on_host.host import Host
from tests.cuda_on_host.test_kernels import STORAGE
from tests.ops import ops_cases as cases

OPS = [*cases.ELEMENTWISE, *cases.BITS8, *STORAGE, *cases.APPLIES, "column_norms"]
STREAM = {0: 0x1000, 1: 0x2000}
INVALID_CONFIGURATION, OF_ANOTHER = 9, 999


def example(op: str) -> dict[str, Any]:
    """All arguments of an op that may be there, flags of finite gradients too."""
    a = cases.example(op)
    return {**a, "finite": [torch.tensor(True) for _ in a["finite"]]} if "finite" in a else a


@pytest.mark.parametrize("op", OPS)
def test_each_op_runs_on_the_device_of_its_tensors_and_its_current_stream(
    host: Host, op: str
) -> None:
    for device in (1, 0, 1):
        host.stream(STREAM[device], device)
        seen = len(host.launches())
        compare(host, op, example(op), device)
        new = host.launches()[seen:]
        assert new
        assert {(x.device, x.stream) for x in new} == {(device, STREAM[device])}
        assert host.library.host_device(0) == 0  # as it was before


def test_the_default_stream_is_that_of_the_device(host: Host) -> None:
    compare(host, "moment_", example("moment_"), 1)
    assert [(x.device, x.stream) for x in host.launches()] == [(1, 0)]


@pytest.mark.parametrize("op", OPS)
def test_tensors_of_two_devices_are_refused_before_a_launch(host: Host, op: str) -> None:
    """One of each argument in turn; what a GEMM of torch's reads is refused by torch."""
    a = example(op)
    for name, value in a.items():
        tensors = value if isinstance(value, list) else [value]
        if not tensors or not isinstance(tensors[-1], Tensor):
            continue
        there = host.place(a, 1)
        moved = host.place(tensors[-1], 0)
        there[name] = [*there[name][:-1], moved] if isinstance(value, list) else moved
        seen = len(host.launches())
        with pytest.raises((ValueError, RuntimeError), match=r"cuda:|tensors on"):
            host.call(op, there)
        launched = host.launches()[seen:]
        if op not in ("lift_add_scaled_", "lift_add_sign_"):  # matrix by matrix
            assert not launched, name


def in_low_memory(x: Tensor) -> Tensor:
    """A copy where the heap of a Python is that is not position-independent, as Ubuntu's."""
    if not x.numel():
        return x.clone()
    data = low_memory(x.nbytes)
    return torch.frombuffer(data, dtype=x.dtype, count=x.numel()).view(x.shape).copy_(x)


def low_memory(size: int) -> ctypes.Array[ctypes.c_char]:
    """A mapping at an address of 32 bits, which stays: where nothing is, a hint is taken."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *3 * [ctypes.c_int], ctypes.c_long]
    for hint in range(1 << 29, 1 << 31, 1 << 20):
        at = libc.mmap(hint, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
        if at == hint:
            return (ctypes.c_char * size).from_address(at)
    raise MemoryError("no place below 2 GiB")


@pytest.mark.parametrize("low", [False, True])
def test_a_launch_on_another_device_is_seen(
    host: Host, low: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the tests above would see if the loader did not change the device."""
    if low:
        monkeypatch.setattr(host, "_guarded", in_low_memory)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    with pytest.raises(AssertionError, match="on device 0 was given an address of device 1"):
        compare(host, "moment_", example("moment_"), 1)


def test_a_stream_of_another_device_is_seen(host: Host) -> None:
    host.stream(STREAM[0], 0)
    host.current[1] = STREAM[0]
    with pytest.raises(RuntimeError, match="on cuda:1 failed with CUDA error 400"):
        compare(host, "moment_", example("moment_"), 1)


@pytest.mark.parametrize("op", [op for op in OPS if not op.startswith("lift")])
def test_tables_need_not_outlive_the_call(host: Host, op: str) -> None:
    """Kernels run when the host's arrays are full of other numbers, and the struct is freed.

    Lifts have no table, and their GEMM of torch's does not wait for the kernel here.
    """
    a = example(op)
    here, there = cases.on("cpu", a), host.place(a, 0)
    before = cases.on("cpu", a)
    wanted = getattr(native, op)(*here.values())
    with host.deferred():
        found = host.call(op, there)
        assert host.tables
        if op != "column_norms":
            compare_tensors(op, there, before)  # nothing has run
    compare_tensors(op, {**there, "": found}, {**here, "": wanted})


@pytest.mark.parametrize("op", OPS)
def test_a_launch_that_fails_raises(host: Host, op: str) -> None:
    a = example(op)
    before, there = cases.on("cpu", a), host.place(a, 1)
    host.library.host_fail(0, INVALID_CONFIGURATION)
    with pytest.raises(RuntimeError, match=r"native .* on cuda:1 failed with CUDA error 9 "):
        host.call(op, there)
    compare_tensors(op, there, before)
    assert not host.launches()
    assert host.library.host_error() == 0  # the next call does not find it
    assert host.library.host_device(0) == 0


@pytest.mark.parametrize(
    "op", ["moment_", "moment_8bit_", "quantize_blockwise_", "stochastic_round_"]
)
def test_what_comes_after_a_launch_that_fails_is_not_launched(host: Host, op: str) -> None:
    shapes = [(40,)] * 100
    make: Any = cases.storage if op in STORAGE else cases.elementwise
    there = host.place(make(op, torch.float32, shapes=shapes), 0)
    host.library.host_fail(2, INVALID_CONFIGURATION)
    with pytest.raises(RuntimeError, match="half written"):
        host.call(op, there)
    assert [x.grid[1] for x in host.launches()] == [32, 32]


@pytest.mark.parametrize("op", OPS)
def test_an_error_that_another_library_left_is_left_to_it(host: Host, op: str) -> None:
    """Of what shares the CUDA runtime: it was taken for ours, and its owner never heard of it."""
    host.library.host_leave_error(OF_ANOTHER)
    compare(host, op, example(op))
    assert host.library.host_error() == OF_ANOTHER


def test_blocks_too_large_for_a_warp_are_refused(host: Host) -> None:
    a = cases.storage("quantize_blockwise_", torch.float32, shapes=[(512,)])
    there = host.place({**a, "blocks": [512], "scales": [torch.zeros(1)]}, 0)
    with pytest.raises(RuntimeError, match=r"block size outside 1..4096 \(256 on CUDA\)"):
        host.call("quantize_blockwise_", there)
    assert not host.launches()


def test_dtypes_that_are_not_known_are_refused_by_the_library(host: Host) -> None:
    for op, struct, names in (
        ("moment", loader.Update, ["grad_dtype", "out_dtype"]),
        ("quantize", loader.Blockwise, ["dtype"]),
        ("column_norms", loader.Norms, ["dtype"]),
        ("apply_scaled", loader.Apply, ["weight_dtype", "grad_dtype", "low_dtype"]),
        ("coordinate_add", loader.Coordinate, ["weight_dtype", "grad_dtype"]),
    ):
        for name in names:
            with pytest.raises(RuntimeError, match="dtypes that the library does not take"):
                host.run(op, 0, struct(**{name: 3}))
