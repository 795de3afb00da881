"""The table of launches is what the launchers of Triton's backend do; no kernel runs."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from benchmarks import op_costs
from benchmarks.counting import FREE, launches_of, pretended_accelerator
from benchmarks.op_costs import COMPOSED, package_kernels
from lowrank_optim.ops import cublas, devices
from lowrank_optim.ops import triton as ops
from lowrank_optim.ops.passing import named
from lowrank_optim.ops.quant import dynamic_map
from lowrank_optim.ops.triton import quantize
from tests.ops import ops_cases, ops_cosines, ops_factors


class Counter(TorchDispatchMode):
    """Kernels of torch's own."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and func.overloadpacket not in FREE:
            self.launches += launches_of(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


class Launched:
    """In the place of a kernel: counts, and runs nothing."""

    def __init__(self, seen: Counter) -> None:
        self.seen = seen

    def __getitem__(self, grid: object) -> Launched:
        return self

    def __call__(self, *args: object, **meta: object) -> None:
        self.seen.launches += 1


class Products:
    """In the place of cuBLAS."""

    def __init__(self, seen: Counter) -> None:
        self.seen = seen

    def cublasSetPointerMode_v2(self, handle: int, mode: int) -> int:
        return 0

    def cublasGemmEx(self, *args: object) -> int:
        self.seen.launches += 1
        return 0


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Counter:
    seen = Counter()
    for name in sorted({*ops._MODULES.values()}):
        module = importlib.import_module(f"lowrank_optim.ops.triton.{name}")
        if hasattr(module, "launch"):
            monkeypatch.setattr(module, "launch", Launched(seen))
        for kernel in [key for key in vars(module) if key.startswith("lift_")]:
            if kernel.endswith("_kernel"):
                monkeypatch.setattr(module, kernel, Launched(seen))
    monkeypatch.setattr(cublas, "_library", lambda device: Products(seen))
    monkeypatch.setattr(cublas, "_handle", lambda: 0)
    for signed in (True, False):  # once for all lists
        quantize.form(dynamic_map(signed, torch.device("cpu")))
    monkeypatch.setattr(devices, "HOSTS", frozenset())
    return seen


def cases(op: str) -> list[ops_cases.Arguments]:
    """Lists of several shapes; those that are alike; each way to store a matrix."""
    found = [ops_cases.example(op)]
    if op in ops_cosines.COSINES:
        for basis in ("dct2", "dct3"):
            for widths in ((7, 7, 7), (7, 9, 7)):
                own: dict[str, Any] = {"basis": basis, "widths": widths, "moved": False}
                found.append(ops_cosines.arguments(op, torch.float32, **own))
    elif op == "top_rows_":  # with flags and without
        found.append(ops_cosines.top(torch.float32))
    elif op == "addmm_":  # weights that have entries, and operands that lie as cuBLAS has them
        given = {k: [x.contiguous() for x in xs] for k, xs in found[0].items()}
        full = [n for n, w in enumerate(given["params"]) if w.numel()]
        found = [{k: [xs[n] for n in full] for k, xs in given.items()}]
        loose = [ops_cases.strided(w, "slice") for w in found[0]["params"]]
        return [*found, {**found[0], "params": loose}]
    elif op == "decay_":
        for how in ("columns", "slice"):
            for factors in (True, False):
                for unsound in (None, 1):
                    own = {"how": how, "factors": factors, "unsound": unsound}
                    found.append(ops_factors.arguments(op, torch.float32, **own))
    elif op == "direction_add_":
        for how in ("rows", "slice"):
            for factors in (True, False):
                own = {"how": how, "factors": factors}
                found.append(ops_factors.arguments(op, torch.bfloat16, **own))
    elif op in (*ops_cases.APPLIES, "column_norms"):
        for factors in ((), ops_cases.FACTORS):
            given = {"shapes": [(17, 33)] * 3, "factors": factors}
            found.append(ops_cases.matrices(op, torch.float32, **given))
    return found


@pytest.mark.parametrize("op", ops.OPS)
def test_the_table_is_what_the_launchers_do(op: str, launched: Counter) -> None:
    """Of each op, by lists of tensors: launched kernels, and torch's around them."""
    for arguments in cases(op):
        given = {name: arguments[name] for name in ops_cases.names(op)}
        counted = sum(k.launches for k in package_kernels(op, given))
        launched.launches = 0
        with launched:
            getattr(ops, op)(*given.values())
        assert launched.launches == counted, {k: v for k, v in given.items() if k == "basis"}


def test_a_kernel_more_is_seen(launched: Counter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Broken on purpose: one more of what plain torch does."""
    monkeypatch.setitem(COMPOSED, "coordinate_adamw_", COMPOSED["coordinate_adamw_"] + 1)
    with pytest.raises(AssertionError):
        test_the_table_is_what_the_launchers_do("coordinate_adamw_", launched)


def test_gathers_of_other_strides_are_counted() -> None:
    """A tile of an accelerator at a time, and the op on each; what is dense shares one launch."""
    op = torch.ops.lowrank_optim.moment_.default
    with pretended_accelerator():
        x, y = torch.empty(4096, 8192), torch.empty(8192, 4096).mT
        outs = [torch.empty(4096, 8192) for _ in range(3)]
        given = named(op, ([x, y, x], outs, outs, 0.5, 0.5, []), {})
        found = {k.op: k.launches for k in op_costs.package_kernels("moment_", given)}
    assert found == {"gather": 2, "moment_": 1 + 2}
