"""What is common to tests of other libraries."""

from __future__ import annotations

from importlib.util import find_spec
from types import SimpleNamespace

import pytest


@pytest.fixture(autouse=True)
def no_collection_after_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run of Trainer ends with a walk over all that lives: half of the time of its tests."""
    if find_spec("accelerate"):
        from accelerate.utils import memory

        monkeypatch.setattr(memory, "gc", SimpleNamespace(collect=lambda: 0))
