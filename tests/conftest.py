"""One torch thread, a seed per test, deterministic hypothesis, and worlds of processes."""

from __future__ import annotations

import gc
import logging
import os
import sys
from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING, Any

import pytest
from _pytest.doctest import DoctestModule
from hypothesis import settings

from tests.logged import Logged

if TYPE_CHECKING:  # what deals tests to other processes needs no torch, whose import they wait for
    from tests.sharded.ranks import Ranks

# what helpers assert is explained as what tests assert is
pytest.register_assert_rewrite(
    *(f"tests.{name}" for name in ("cases", "compare", "runs", "integrations.trainers")),
    *(f"tests.{name}.contract" for name in ("methods", "subspaces")),
    *(f"tests.{name}" for name in ("backward.nets", "engine.product_cases", "ops.checks")),
)

# the suite runs in parallel processes, and tests start others; results do not depend on cores
os.environ["OMP_NUM_THREADS"] = "1"

# this package is compiled by the first process, and read by those that it starts and by later runs
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

settings.register_profile(
    "lowrank_optim", deadline=None, max_examples=20, derandomize=True, database=None
)
settings.load_profile("lowrank_optim")


collect_ignore = ["sharded/preload.py"]  # of the server of worlds: it silences a process that ends


gc.disable()  # imports and collected tests are no garbage, and there are more and more to walk


def pytest_collection() -> None:
    """One thread of torch, whatever else has set."""
    import torch

    torch.set_num_threads(1)


@pytest.hookimpl(wrapper=True)
def pytest_collect_file() -> Generator[None, list[Any], list[Any]]:
    """Tests have no examples in their docstrings; to look takes a second in each process."""
    found = yield
    return [x for x in found if not isinstance(x, DoctestModule)]


def pytest_collection_finish() -> None:
    """Thousands of tests and libraries stay: nothing that collects garbage walks them again.

    Each run of ``transformers.Trainer`` collects, which took most of the time of its tests.
    """
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """After a file, what it imported and keeps is no garbage either: it would be walked by all."""
    if nextitem is None or nextitem.path != item.path:
        gc.collect()
        gc.freeze()


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test draws the same numbers whatever ran before it.

    ``torch.manual_seed`` keeps, for kinds of devices that are not there, from where it was called:
    half a millisecond of each of thousands of tests.
    """
    import torch

    if torch.cuda.is_available():
        torch.manual_seed(0)
    else:
        torch.default_generator.manual_seed(0)


@pytest.fixture
def logged() -> Iterator[Logged]:
    handler, logger = Logged(), logging.getLogger("lowrank_optim")
    silenced = logging.root.manager.disable  # by the job of a rank that ran in this process
    logging.disable(logging.NOTSET)
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)
    logging.disable(silenced)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], Ranks]]:
    """The world of a size: its processes start with its first job and stay for the others."""
    from tests.sharded.ranks import Ranks

    worlds: dict[int, Ranks] = {}

    def of(size: int) -> Ranks:
        return worlds.setdefault(size, Ranks(size))

    yield of
    for world in worlds.values():
        world.close()


@pytest.fixture(params=["held", pytest.param("stepped", marks=pytest.mark.slow)])
def held_or_stepped(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Estimates of what is held; and of what steps need in passing too, which takes five times."""
    if request.param == "held":
        monkeypatch.setattr("lowrank_optim.memory.rehearsal.Rehearsal.of", lambda *_: None)
