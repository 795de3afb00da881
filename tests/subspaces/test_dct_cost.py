"""What a choice among cosines costs, counted: times are for the benchmarks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from lowrank_optim import PROJECTORS
from lowrank_optim.subspaces import RefreshContext
from lowrank_optim.tensors.matrix import matrix_view


class Written(TorchDispatchMode):
    """Elements that operations wrote, of transforms and of all."""

    def __init__(self) -> None:
        super().__init__()
        self.transformed = self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not func.is_view:
            self.total += out.numel()
            self.transformed += out.numel() * ("fft" in func.name())
        return out


def refresh(name: str, rank: int, grad: torch.Tensor, **keys: Any) -> tuple[Written, int]:
    view = matrix_view(grad.shape, "left")
    assert view is not None
    sub = PROJECTORS[name].from_group(
        {"rank": rank, "proj_type": "left", "update_proj_gap": 10, **keys}, view
    )
    sub.prepare(view, grad)
    state = sub.init(view, grad)
    with FlopCounterMode(display=False) as flops, Written() as written:
        sub.refresh_(state, grad, RefreshContext(view, torch.Generator().manual_seed(0)))
    return written, flops.get_total_flops()


@pytest.mark.parametrize("transform", ["fft", "matmul"])
def test_fact_30_the_choice_costs_the_same_at_any_rank(
    transform: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One transform, or one product with all of Q; what is left is r indices. A basis costs more.

    The randomised SVD is what the choice stands in for: its products grow with the rank. Counted in
    torch's own ops, which see nothing of what kernels do.
    """
    monkeypatch.setenv("LOWRANK_OPTIM_BACKEND", "reference")
    grad = torch.randn(96, 160, generator=torch.Generator().manual_seed(0))
    few, flops_few = refresh("dct", 8, grad, transform=transform)
    many, flops_many = refresh("dct", 64, grad, transform=transform)
    assert flops_few == flops_many == (2 * 96 * 96 * 160 if transform == "matmul" else 0)
    assert few.transformed == many.transformed
    assert (few.transformed > 0) == (transform == "fft")
    assert many.total - few.total <= 20 * (64 - 8)
    _, svd_few = refresh("rsvd", 8, grad)
    _, svd_many = refresh("rsvd", 64, grad)
    assert svd_many > 2 * svd_few
