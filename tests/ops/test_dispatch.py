"""Who serves an op, and who sees a call of it.

Plain torch in place of kernels is said where it costs: at the first 8-bit step, once.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank_optim import GaLoreAdamW, GaLoreAdamW8bit, ops
from lowrank_optim.ops import dispatch, native, reference, schema, triton
from lowrank_optim.ops.native import loader


@pytest.fixture
def anew() -> Iterator[None]:
    """Nothing was chosen and nothing was said before, or is after."""
    caches = dispatch._choose, dispatch._warn_slow
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def bare(anew: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine without the compiled library and triton."""
    for name in ("TRITON_INTERPRET", dispatch.VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOWRANK_OPTIM_LIBRARY", str(tmp_path))
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(loader, "_load", loader._load.__wrapped__)


def steps(cls: Any, dtype: torch.dtype = torch.float32) -> None:
    param = torch.nn.Parameter(torch.ones(64, 96, dtype=dtype))
    optimizer = cls([param], rank=48)
    for _ in range(2):
        param.grad = torch.randn(64, 96, dtype=dtype)
        optimizer.step()


@pytest.mark.usefixtures("bare")
def test_one_warning_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not where plain torch was asked for, nor for float32 moments, nor float64 gradients; once."""
    assert triton.available("cuda") == (False, "triton is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with monkeypatch.context() as asked:
            asked.setenv(dispatch.VARIABLE, "reference")
            steps(GaLoreAdamW8bit)
        steps(GaLoreAdamW)
        steps(GaLoreAdamW8bit, torch.float64)
    with pytest.warns(UserWarning) as seen:
        for dtype in (torch.float32, torch.bfloat16):
            steps(GaLoreAdamW8bit, dtype)
    (line,) = (str(x.message) for x in seen)
    for part in (
        "8-bit moments on cpu are updated in plain torch",
        "liblowrank_optim.so was not built with this installation",
        "Install a C++ compiler and then lowrank_optim again",
        "`python -m lowrank_optim.ops` says",
        "LOWRANK_OPTIM_BACKEND=reference",
    ):
        assert part in line


@pytest.mark.skipif(not native.available("cpu")[0], reason="no compiled library")
def test_no_warning_where_kernels_serve() -> None:
    param = torch.nn.Parameter(torch.ones(64, 96))
    optimizer = GaLoreAdamW8bit([param], rank=48)
    param.grad = torch.randn(64, 96)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


@pytest.fixture
def nothing(anew: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without kernels of any kind."""
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    monkeypatch.setattr(dispatch, "available", lambda name, kind: (False, f"no {name} here"))


@pytest.mark.usefixtures("nothing")
def test_a_gpu_without_kernels_is_said_too() -> None:
    """Each kind of device once; not one that kernels were never made for."""
    like = SimpleNamespace(dtype=torch.float32, device=torch.device("cuda"))
    with pytest.warns(UserWarning, match="Install triton, or nvcc and then lowrank_optim") as seen:
        for _ in range(3):
            assert dispatch.backend(like, in_8bit=True) is reference  # type: ignore[arg-type]
    assert len(seen) == 1
    assert "triton: no triton here; native: no native here" in str(seen[0].message)
    other = SimpleNamespace(dtype=torch.float32, device=torch.device("mps"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dispatch.backend(like)  # type: ignore[arg-type]
        dispatch.backend(other, in_8bit=True)  # type: ignore[arg-type]


class Seen(TorchDispatchMode):
    """Names of the ops of its block."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_a_call_is_seen_by_all_that_listen() -> None:
    """A mode, a profiler, fake tensors, tensors without memory: each gets the op by its name."""
    x, moment, out = (torch.ones(4, 3) for _ in range(3))
    assert not schema.is_heard(x)
    with Seen() as seen:
        ops.moment_([x], [moment], [out], 0.5, 0.5)
    assert "moment_" in seen.names
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ops.moment_([x], [moment], [out], 0.5, 0.5)
    assert "lowrank_optim::moment_" in {event.name for event in profile.events()}
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(own) for own in (x, moment, out)]
    for own in (fake, [y.to("meta") for y in (x, moment, out)]):
        ops.moment_(*([y] for y in own), 0.5, 0.5)  # nothing to compute
    with torch.enable_grad():
        assert schema.is_heard(x)


@torch.no_grad()
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_past_the_dispatcher_arguments_are_what_it_makes_of_them(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole numbers become floats and tuples lists, so that backends see one type of each."""
    monkeypatch.setenv("LOWRANK_OPTIM_BACKEND", backend)
    given: list[tuple[Any, ...]] = []
    module = dispatch.BACKENDS[backend]
    monkeypatch.setattr(module, "moment_", lambda *args: given.append(args))
    xs = tuple(torch.ones(4, 3) for _ in range(2))
    for call in (schema.calls.moment_, torch.ops.lowrank_optim.moment_):
        call(xs, list(xs), xs, 1, 2, ())
    past, by = given
    assert [type(x) for x in past] == [type(x) for x in by]
    assert past[3:5] == by[3:5] == (1.0, 2.0)
    with pytest.raises(ValueError, match="outs has 1 tensors, not 2"):
        schema.calls.moment_(xs, xs, xs[:1], 1, 2, ())
