"""The same run is the same to the bit, holds the same memory at every step, and leaves nothing."""

from __future__ import annotations

import gc
import resource
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_optim import attach_in_backward
from tests import cases, runs

NAMES = cases.method_names()
DEFAULT = ("GaLoreAdamW8bit", "SSTAdamW", "SwitchLoRAAdamW")
"""Moments in codes, and what has state of its own kind; the other classes are slow."""

BY_LAPACK = ("SST", "LDAdam")
"""Classes whose factors, or first bases, are of a whole decomposition."""

every_class = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in DEFAULT else pytest.mark.slow) for n in NAMES]
)


class Run:
    """A network of a matrix large enough for codes and for several threads, and how it trains."""

    def __init__(self, name: str, width: int = 96, **options: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        self.params = [
            nn.Parameter(torch.randn(shape, generator=generator))
            for shape in ((width, width + 64), (width + 64, width), (width,))
        ]
        groups = [{"params": self.params[:2], "rank": 8}, {"params": self.params[2:], "rank": None}]
        searches = name in cases.projecting_names() or name.startswith("Apollo")
        own = {"projector": "rsvd"} if searches else {}
        self.optimizer = cases.build(name, groups, **{**own, "on_refresh": "project", **options})
        generator.manual_seed(1)
        self.grads = [[torch.randn(p.shape, generator=generator) for p in self.params]
                      for _ in range(4)]  # fmt: skip

    def steps(self, count: int) -> None:
        for i in range(count):
            for param, grad in zip(self.params, self.grads[i % 4], strict=True):
                param.grad = grad
            self.optimizer.step()

    def same_as(self, other: Run) -> None:
        runs.assert_same(self.params, other.params)
        runs.assert_same_state(runs.entries(self.optimizer), runs.entries(other.optimizer))


@every_class
def test_two_runs_are_one(name: str) -> None:
    """Whatever the global generator drew in between, and whichever device it is of."""
    one, other = Run(name), Run(name)
    one.steps(7)
    torch.randn(1000)
    torch.manual_seed(99)
    other.steps(7)
    other.same_as(one)


def products_do_not_depend_on_threads() -> bool:
    """Whether torch's own are the same to the bit: that is not ours to promise."""
    x, y = torch.randn(256, 320), torch.randn(320, 256)
    found = []
    for count in (1, 3):
        with runs.threads(count):
            found.append((x @ y, x.mT @ x))
    return all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in NAMES if not n.startswith(BY_LAPACK)])
def test_threads_change_nothing(name: str) -> None:
    """One, two and three threads, above the sizes at which kernels share work out.

    Not with ``projector="svd"``, nor in SST and LDAdam: LAPACK's decompositions differ in their
    last bits.
    """
    assert products_do_not_depend_on_threads(), "this build of torch promises less: see the page"
    found = []
    for count in (1, 2, 3):
        with runs.threads(count):
            found.append(Run(name, width=256))
            found[-1].steps(5)
    found[1].same_as(found[0])
    found[2].same_as(found[0])


# ---------------------------------------------------------------- memory


def tensors() -> tuple[int, int]:
    """Tensors that Python holds, and the bytes of their storages."""
    gc.collect()
    held = [x for x in gc.get_objects() if type(x) in (Tensor, nn.Parameter)]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in held}
    return len(held), sum(storages.values())


def constant_storage(name: str, count: int) -> None:
    run = Run(name)
    run.steps(13)  # all state, every cache, and several refreshes
    places = [{k: v.data_ptr() for k, v in run.optimizer.state[p].items()} for p in run.params]
    before, objects = tensors(), len(gc.get_objects())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run.steps(count)
    assert tensors() == before
    assert len(gc.get_objects()) - objects < 50  # the interpreter's own come and go
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    assert grown < 8192, f"{grown} KiB more at the peak"
    sizes = [{k: v.nbytes for k, v in run.optimizer.state[p].items()} for p in run.params]
    assert [s.keys() for s in sizes] == [s.keys() for s in places]
    assert all(p.isfinite().all() for p in run.params)


@pytest.mark.parametrize("name", DEFAULT)
def test_storage_is_constant(name: str) -> None:
    constant_storage(name, 60)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_storage_is_constant_over_ten_thousand_steps(name: str) -> None:
    constant_storage(name, 10_000)


# ---------------------------------------------------------------- attach and detach


@pytest.mark.parametrize("times", [30, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("mode", ["project", "step"])
def test_attached_and_detached(mode: Any, times: int) -> None:
    """Hooks and objects are as many as before, and the next step is that of who never did."""
    one, other = Run("GaLoreAdamW"), Run("GaLoreAdamW")
    one.steps(2)
    other.steps(2)

    def trip() -> None:
        with attach_in_backward(one.optimizer, mode):
            pass

    trip()
    before, objects = tensors(), len(gc.get_objects())
    for _ in range(times):
        trip()
    assert tensors() == before
    assert len(gc.get_objects()) - objects < 50
    for param in one.params:
        assert not param._post_accumulate_grad_hooks and not param._backward_hooks
    one.steps(3)
    other.steps(3)
    one.same_as(other)


# ---------------------------------------------------------------- cycles


@contextmanager
def without_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def plain(run: Run) -> list[Any]:
    run.steps(4)
    return []


def saved_and_loaded(run: Run) -> list[Any]:
    run.steps(2)
    run.optimizer.load_state_dict(run.optimizer.state_dict())
    run.steps(2)
    return []


def detached(run: Run) -> list[Any]:
    gone = []
    for mode in ("project", "step"):
        try:
            handle = attach_in_backward(run.optimizer, mode)  # type: ignore[arg-type]
        except ValueError:  # of a method that uses what its subspace does not see
            assert mode == "project"
            continue
        for _ in range(3):
            sum(p.square().sum() for p in run.params).backward()  # type: ignore[union-attr]
            run.optimizer.step()
            run.optimizer.zero_grad()
        handle.remove()
        gone.append(weakref.ref(handle))
    return gone


@pytest.mark.parametrize("use", [plain, saved_and_loaded, detached])
@every_class
def test_no_reference_cycles(name: str, use: Callable[[Run], list[Any]]) -> None:
    """What is deleted is freed at once: memory of an accelerator cannot wait for a collector.

    After ``remove()`` a handle of ``mode="step"`` and its optimizer held each other once, and with
    them parameters and state.
    """
    use(Run(name))  # imports that torch does late leave frames behind
    with without_collector():
        run = Run(name)
        gone = use(run)
        gone += [weakref.ref(run.optimizer), *map(weakref.ref, run.params)]
        state = run.optimizer.state
        gone += [weakref.ref(x) for p in run.params for x in state[p].values()]
        del run, state
        assert not [ref for ref in gone if ref() is not None]
