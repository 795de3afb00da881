"""The watch sees what it is for, and nothing else."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lowrank_optim.ops import devices
from lowrank_optim.subspaces.base import State
from lowrank_optim.subspaces.coordinate import Coordinates
from tests import cases
from tests.engine.watch import Watch


def asked(work: Callable[[], object]) -> int:
    with Watch() as seen:
        work()
    return sum(seen.looks.values())


def test_every_look_is_seen() -> None:
    """Each is one that torch's CUDA backend waits for (torch.cuda.set_sync_debug_mode)."""
    x, host = torch.randn(4, 4), torch.zeros(())
    square = x @ x.mT + torch.eye(4)
    looks = [
        lambda: x[0, 0].item(),
        lambda: float(x.sum()),
        lambda: bool(x.isfinite().all()),
        lambda: x.tolist(),
        lambda: x.cpu(),
        lambda: x.equal(x + 1),
        lambda: x.nonzero(),
        lambda: x[x > 0],
        lambda: x.masked_select(x > 0),
        lambda: torch.unique(x),
        lambda: torch.linalg.eigh(square),
        lambda: torch.linalg.svd(x),
        lambda: torch.zeros(()).copy_(x[0, 0]),
        lambda: torch.randn(4, 4).to(x),
        lambda: torch.randn(4, 4).to(x.device),
        lambda: x.copy_(torch.randn(4, 4)),
        lambda: torch.tensor([1.0], device=x.device),
        lambda: x + torch.ones(4, 4),
        lambda: operator.setitem(x, x.argmax(-1), 0.5),
    ]
    for n, look in enumerate(looks):
        assert asked(look) == 1, n
    for n, free in enumerate([
        lambda: float(torch.zeros(()) + 1),
        lambda: x + torch.ones(()),
        lambda: torch.where(x > 0, x, 0),
        lambda: torch.zeros(4, device=x.device),
        lambda: torch.randperm(4).sort().values.tolist(),
        lambda: torch.linalg.cholesky_ex(square),
        lambda: torch.linalg.qr(x),
        lambda: torch.randn(4, 4).to(x.device, non_blocking=True),
        lambda: operator.setitem(x, 0, 0.5),
        lambda: x.index_fill_(0, x.argmax(-1), 0.5),
    ]):  # fmt: skip
        assert asked(free) == 0, n
    with Watch(None, host) as seen:
        float(host)
    assert not seen.looks


def test_factorisations_wait_where_torch_says_so() -> None:
    """Its documentation has a note where a CUDA device is synchronised; svd's is on svdvals."""
    x = torch.randn(4, 4)
    square = x @ x.mT + torch.eye(4)
    for name in (
        "cholesky", "eig", "eigh", "eigvals", "eigvalsh", "inv", "lu_factor", "solve", "svdvals",
        "svd", "matrix_rank", "cholesky_ex", "inv_ex", "lu_factor_ex", "solve_ex", "qr",
        "vector_norm", "matrix_norm", "solve_triangular",
    ):  # fmt: skip
        function = getattr(torch.linalg, name)
        more = {"upper": True} if name == "solve_triangular" else {}
        operands = (square, square) if name.startswith("solve") else (square,)
        waits = "synchronizes that device with the CPU" in (function.__doc__ or "")
        found = asked(lambda f=function, own=operands, m=more: f(*own, **m))
        assert (found > 0) == waits, (name, found)


def test_a_look_in_a_projector_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Broken on purpose, a step names the place; the counters of a state are the host's."""
    param = cases.parameter((6, 11), torch.float32)
    optimizer = cases.build("GaLoreAdamW", [param], projector="columns", update_proj_gap=9)
    (grad,) = cases.gradients((6, 11), 1, torch.float32)
    cases.run(optimizer, [param], [[grad]])
    with Watch(optimizer) as seen:
        optimizer.step()
    assert not seen.looks
    honest = Coordinates.coords

    def curious(self: Coordinates, state: State, grad: Tensor, **options: Any) -> Any:
        assert grad.sum().item() == grad.sum().item()
        return honest(self, state, grad, **options)

    monkeypatch.setattr(Coordinates, "coords", curious)
    with Watch(optimizer) as seen:
        optimizer.step()
    assert seen.where == {"subspaces/base.py coords_of": 2}
    assert not devices.on_accelerator(param)


def test_launches_are_counted_by_kernel() -> None:
    """Views and empty tensors launch nothing; a list op is one kernel, a lift one for a matrix."""
    x = torch.randn(4, 4)
    with Watch() as seen:
        y = x.mT[1:].unsqueeze(0)
        torch.empty_like(y)
        y @ x
        x.add_(1)
        torch._foreach_mul_([x, x], 2.0)
        torch._foreach_mul_([x, x], [y[0, 0], y[0, 0]])  # one by one: other shapes beside them
        torch._foreach_mul_([x[:, 1:], x], 2.0)  # likewise: one is not dense
        torch.ones(2, device=x.device)
        torch.zeros(()).add_(1)  # of the host
        torch.ops.lowrank_optim.moment_([x, x], [x, x], [x, x], 0.5, 0.5, [])
        torch.ops.lowrank_optim.column_norms([x, x, x.mT])
    assert dict(seen.gemms) in ({"bmm": 1}, {"mm": 1})
    assert sum(seen.launches.values()) == 1 + 2 + 2 + 2 + 1 + 1 + 2
