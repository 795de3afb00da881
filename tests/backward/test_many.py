"""Of many matrices: what one of them takes inside backward does not grow with the others."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import lowrank_optim
from lowrank_optim import GaLoreAdamW, attach_in_backward

PACKAGE = str(Path(lowrank_optim.__file__).parent)


def calls(mode: Any, count: int) -> Counter[str]:
    """Of each function of the package, in one training step of ``count`` matrices."""
    net = nn.Sequential(*(nn.Linear(6, 6, bias=False) for _ in range(count)))
    optimizer = GaLoreAdamW(net.named_parameters(), lr=1e-2, rank=2, update_proj_gap=100)
    attach_in_backward(optimizer, mode, max_norm=1.0)
    found: Counter[str] = Counter()

    def heard(frame: FrameType, event: str, arg: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(PACKAGE):
            found[code.co_qualname] += 1

    def step() -> None:
        net(torch.randn(5, 6)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3):
        step()
    sys.setprofile(heard)
    try:
        step()
    finally:
        sys.setprofile(None)
    return found


@pytest.mark.filterwarnings("ignore:mode='step' clips the gradient")
@pytest.mark.parametrize("mode", ["project", "step"])
def test_what_a_hook_asks_does_not_grow_with_the_model(mode: Any) -> None:
    """A plan looked up for each matrix looked at all of the group: n^2 of a 7B's 291."""
    three, six, twelve = (calls(mode, count) for count in (3, 6, 12))
    assert sum(twelve.values()) > 12 * 20
    grows = {
        name: (three[name], six[name], twelve[name])
        for name in twelve
        if twelve[name] - six[name] > 2 * (six[name] - three[name]) + 2
    }
    assert not grows
