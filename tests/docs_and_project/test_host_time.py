"""The benchmark of the host: what it counts, and that nothing of its pretence is left behind."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime import driver
from triton.runtime.jit import JITFunction

from benchmarks import host_time
from lowrank_optim.ops import devices, dispatch, triton
from tests.ops.interpreted import INTERPRETED

pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="kernels are functions of Python here"),
    pytest.mark.skipif(
        not hasattr(JITFunction, "_do_compile"), reason="Triton 3.2 compiles where it launches"
    ),
]


def test_launches_are_those_of_shapes() -> None:
    """Of each of three buckets of matrices one kernel of ours, and of the norms two."""
    before = devices.HOSTS, dispatch.ORDER["cpu"], triton.available, JITFunction._do_compile
    active = driver._active
    for layers in (1, 3):
        found = host_time.measure(layers, torch.bfloat16, ["GaLoreAdamW"], 5)
        assert found["GaLoreAdamW"]["launches"] == 5
        assert found[host_time.BASE]["launches"] == 0
        assert found["GaLoreAdamW"]["over_adamw"] > 1 and found[host_time.BASE]["over_adamw"] == 1
    after = devices.HOSTS, dispatch.ORDER["cpu"], triton.available, JITFunction._do_compile
    assert after == before and driver._active is active
    assert dispatch.backend(torch.zeros(1)) is not triton
