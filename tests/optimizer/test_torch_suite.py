"""Every test of torch's optimizer suite, for every class: it passes, or its reason is listed."""

from __future__ import annotations

import pytest
import torch

from lowrank_optim import GaLoreAdamW
from tests import cases
from tests.optimizer import torch_infos
from tests.optimizer.torch_bodies import BODIES, BY_TORCH, NOT_ASKED

EVERY = [(method, name) for method in cases.method_names() for name in BODIES]

pytestmark = [
    # torch's problems have fewer rows than the rank of one input, and the package says so
    pytest.mark.filterwarnings("ignore:.*(clamp|projects 0.0%)"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "name"), EVERY)
def test_of_torch(method: str, name: str) -> None:
    BODIES[name](torch_infos.info(method), "cpu")


@pytest.mark.parametrize("name", [n for n in BODIES if n not in BY_TORCH])
def test_of_torch_in_outline(name: str) -> None:
    """One class; ``tests/methods`` asks much of this of every class in the default run."""
    BODIES[name](torch_infos.outline("FiraAdamW"), "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize(("method", "name"), EVERY)
def test_of_torch_on_a_gpu(method: str, name: str) -> None:
    BODIES[name](torch_infos.info(method), "cuda")


def test_what_is_not_asked_is_refused_in_words() -> None:
    """Reasons that speak of a refusal: it is one."""
    with pytest.raises(ValueError, match="complex"):
        GaLoreAdamW([torch.nn.Parameter(torch.zeros(4, 4, dtype=torch.complex64))])
    param = torch.nn.Parameter(torch.zeros(4, 4))
    optimizer = GaLoreAdamW([param], rank=2)
    param.grad = torch.eye(4).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert not BODIES.keys() & NOT_ASKED.keys() and all(NOT_ASKED.values())
