"""Calls of cuBLAS, answered by straight-line code that reads their addresses as its manual says.

``cublasGemmEx``: ``C <- alpha op(A) op(B) + beta C``, columns one after the other in memory,
``lda`` entries from one to the next; with ``CUBLAS_POINTER_MODE_DEVICE`` the factors are read at
their addresses. Memory is the host's here, and the numbers of its enumerations are those of
``cublas_api.h`` and ``library_types.h`` of CUDA 12.6 and 13.0.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from lowrank_optim.ops import cublas
from tests.ops import ops_factors
from tests.ops.checks import check

FORMATS = {0: torch.float32, 2: torch.float16, 14: torch.bfloat16}
N, T = 0, 1
HANDLE = 0xB1A5


def at(address: int, kind: int, rows: int, columns: int, ld: int) -> Tensor:
    """A matrix of columns in memory."""
    assert ld >= max(1, rows)
    dtype = FORMATS[kind]
    count = ld * (columns - 1) + rows
    memory = (ctypes.c_char * (count * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).as_strided((rows, columns), (1, ld))


class Library:
    """In the place of cuBLAS."""

    def __init__(self, status: int = 0) -> None:
        self.status, self.mode, self.products = status, 0, 0

    def cublasSetPointerMode_v2(self, handle: int, mode: int) -> int:
        assert handle == HANDLE
        self.mode = mode
        return 0

    def cublasGemmEx(self, *args: int) -> int:
        assert len(args) == len(cublas.CALLS["cublasGemmEx"]) == 19
        handle, op_a, op_b, m, n, k, alpha, a, kind_a, lda = args[:10]
        b, kind_b, ldb, beta, c, kind_c, ldc, sums, algorithm = args[10:]
        assert (handle, self.mode, sums, algorithm) == (HANDLE, 1, 68, -1)
        if self.status:
            return self.status
        left = at(a, kind_a, *((m, k) if op_a == N else (k, m)), lda)
        right = at(b, kind_b, *((k, n) if op_b == N else (n, k)), ldb)
        left, right = left.T if op_a == T else left, right.T if op_b == T else right
        out = at(c, kind_c, m, n, ldc)
        factors = [float(at(x, 0, 1, 1, 1)) for x in (alpha, beta)]
        out.copy_(factors[0] * (left.double() @ right.double()) + factors[1] * out.double())
        self.products += 1
        return 0


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    found = Library()
    monkeypatch.setattr(cublas, "_library", lambda device: found)
    monkeypatch.setattr(cublas, "_handle", lambda: HANDLE)
    return found


def operands(dtype: torch.dtype, how: str) -> list[list[Tensor]]:
    """Of matrices with entries."""
    a = ops_factors.arguments("addmm_", dtype, how=how)
    keep = [n for n, w in enumerate(a["params"]) if w.numel()]
    return [[a[k][n] for n in keep] for k in ("params", "lefts", "rights", "steps", "decays")]


def compare(lists: Sequence[Sequence[Tensor]]) -> None:
    names = ("params", "lefts", "rights", "steps", "decays")
    want = ops_factors.expected("addmm_", dict(zip(names, lists, strict=True)))["params"]
    cublas.addmm_(*lists)
    for n, (w, one) in enumerate(zip(lists[0], want, strict=True)):
        check(w, one, f"{n}: {tuple(w.shape)}")


@pytest.mark.parametrize("dtype", FORMATS.values(), ids=str)
@pytest.mark.parametrize("how", ["rows", "columns", "slice"])
def test_products_are_asked_for_as_the_manual_has_it(
    library: Library, how: str, dtype: torch.dtype
) -> None:
    """Weights and operands by rows and by columns, others copied; odd sizes, and sizes of one."""
    lists = operands(dtype, how)
    compare(lists)
    assert library.products == len(lists[0]) and library.mode == 0


def test_operands_of_other_formats(library: Library) -> None:
    """What is wider is rounded to the format of the weights; factors come in float32."""
    lists = operands(torch.float32, "rows")
    lists[0] = [w.bfloat16() for w in lists[0]]
    lists[1:3] = [[x.bfloat16().float() for x in own] for own in lists[1:3]]
    lists[3:] = [[x.double() for x in own] for own in lists[3:]]
    compare(lists)
    assert library.products == len(lists[0])


def test_what_the_call_does_not_write_torch_does(library: Library) -> None:
    compare(operands(torch.float64, "rows"))
    assert not library.products


def test_factors_are_the_hosts_again_after_an_error(library: Library) -> None:
    """Else every later product of torch would read its factors at addresses of the host."""
    library.status = 13
    lists = operands(torch.float32, "rows")
    before = [w.clone() for w in lists[0]]
    with pytest.raises(RuntimeError, match=r"status 13 .* LOWRANK_OPTIM_CUBLAS=0 in"):
        cublas.addmm_(*lists)
    assert library.mode == 0
    assert all(map(torch.equal, lists[0], before))


def test_the_environment_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cublas.VARIABLE, "0")
    monkeypatch.setattr(torch.version, "cuda", "0.0")
    assert cublas._load.__wrapped__() == (None, "LOWRANK_OPTIM_CUBLAS=0")
    monkeypatch.delenv(cublas.VARIABLE)
    monkeypatch.setattr(cublas, "OWNER", "libtorch_cuda_of_nobody.so")
    assert cublas._load.__wrapped__()[1].startswith("torch shows no cuBLAS of its own")
