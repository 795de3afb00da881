"""The library of the CUDA sources, built once, and its two devices for each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lowrank_optim.ops import native
from tests.cuda_on_host.host import Host, serving
from tests.cuda_on_host.library import build


@pytest.fixture(scope="session")
def cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that is there in the next run, if pytest keeps any."""
    kept = getattr(request.config, "cache", None)
    return Path(kept.mkdir("cuda_on_host")) if kept else tmp_path_factory.mktemp("cuda_on_host")


@pytest.fixture(scope="session")
def library(cache: Path) -> Path:
    return build(cache)


@pytest.fixture
def host(library: Path) -> Iterator[Host]:
    ready, reason = native.available("cpu")
    if not ready:
        pytest.skip(f"what the kernels are compared with: {reason}")
    with serving(library) as host:
        yield host
