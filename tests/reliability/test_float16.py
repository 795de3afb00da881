"""Gradients near the end of float16's range, where a loss scale puts them.

The largest number of float16 is 65,504, and a sum of m of them is beyond it: coordinates,
directions and what is lifted are those of the same numbers in float32.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lowrank_optim import PROJECTORS, GaLoreAdamW, Projector, ops, register
from lowrank_optim.ops import native, reference
from lowrank_optim.subspaces import RefreshContext
from tests import cases
from tests.compare import assert_close
from tests.reliability.test_numerics import GAP, RANK, SHAPE, SOME, check_sound, make

LARGEST = 65504.0
HALF = torch.float16


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (3, 24, 40)])
@pytest.mark.parametrize("flipped", [False, True])
def test_products_have_the_range_of_float32(shape: tuple[int, ...], flipped: bool) -> None:
    grad = LARGEST * cases.parameter(shape, torch.float32).sign()
    basis = torch.linalg.qr(cases.parameter((*shape[:-1], 5), torch.float32)).Q.to(HALF)
    basis[..., :, 0] = grad[..., :, 0] / LARGEST / shape[-2] ** 0.5  # along it
    exact = basis.mT.double() @ grad.double()
    assert float(exact.abs().max()) > LARGEST
    narrow = grad.to(HALF)
    narrow = narrow.mT.contiguous().mT if flipped else narrow
    assert_close(ops.project(basis, narrow) / LARGEST, exact / LARGEST, torch.float32)
    if len(shape) == 2:
        out = torch.empty(exact.shape)
        assert ops.project(basis, narrow, out) is out
        assert torch.equal(out, ops.project(basis, narrow))


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("backend", [native, reference], ids=["native", "reference"])
def test_lifts_have_the_range_of_float32(backend: object, flipped: bool) -> None:
    """``W - lr (P (N - R c) + G c)`` and ``W - lr (P N + sign(G - P R))``, R beyond float16."""
    w, g = (cases.parameter((12, 20), torch.float32, seed=n).detach() for n in (1, 2))
    g = (LARGEST * g.sign()).to(HALF)
    p = torch.linalg.qr(cases.parameter((12, 3), torch.float32, seed=3).detach()).Q.to(HALF)
    r = p.float().mT @ g.float()
    r[0] = 2 * LARGEST
    n, c = cases.parameter((3, 20), torch.float32, seed=4).detach(), torch.full((1, 20), 0.5)
    g, p, w = (x.mT.contiguous().mT if flipped else x for x in (g, p, w.to(HALF)))
    scaled, signed = w.clone(), w.clone()
    lr = 1e-3
    backend.lift_add_scaled_([scaled], [g], [p], [n], [r], [c], 1.0, lr, 1.0)  # type: ignore[attr-defined]
    backend.lift_add_sign_([signed], [g], [p], [n], [r], 1.0, lr, 1.0, 1.0)  # type: ignore[attr-defined]
    wide = [x.double() for x in (w, g, p, n, r, c)]
    want_scaled = wide[0] - lr * (wide[2] @ (wide[3] - wide[4] * wide[5]) + wide[1] * wide[5])
    want_signed = wide[0] - lr * (wide[2] @ wide[3] + (wide[1] - wide[2] @ wide[4]).sign())
    assert_close(scaled, want_scaled, HALF)
    assert_close(signed, want_signed, HALF)


EXACT = [
    pair
    for pair in SOME
    if pair[0] not in ("SSTAdamW", "SwitchLoRAAdamW")  # whose factors are rounded as well
]


@pytest.mark.parametrize(("name", "projector"), EXACT)
def test_the_largest_gradient_steps_as_in_float32(name: str, projector: str | None) -> None:
    """At the first step, between and at a refresh: a float32 run from the same weights says where.

    Each step begins from the weights and the state of the float32 run, rounded.
    """
    wide = nn.Parameter(cases.parameter(SHAPE, torch.float32).to(HALF).float())
    narrow = nn.Parameter(wide.detach().to(HALF))
    runs = [make(name, projector, p) for p in (wide, narrow)]
    for n in range(GAP + 1):
        sign = cases.gradients(SHAPE, GAP + 1, torch.float32, seed=3)[n].sign()
        sign[:, 1::2] = sign[:, ::2]  # so that columns are alike, and coordinates large
        wide.grad = LARGEST * sign
        narrow.grad = wide.grad.to(HALF)
        with torch.no_grad():
            wide.copy_(narrow)
        for run in runs:
            run.step()
        check_sound(runs[1])
        size = max(1.0, float(wide.abs().max()))  # of SGD's, whose updates are as large
        assert_close(narrow / size, wide / size, torch.bfloat16)


def test_other_factors_stay_finite() -> None:
    """SST and SwitchLoRA, whose coordinates are gradients of factors."""
    for name in ("SSTAdamW", "SwitchLoRAAdamW"):
        param = nn.Parameter(cases.parameter(SHAPE, HALF).detach())
        run = make(name, None, param)
        for grad in cases.gradients(SHAPE, GAP + 1, torch.float32):
            before = param.detach().clone()
            param.grad = (LARGEST * grad.sign()).to(HALF)
            run.step()
            check_sound(run)
            assert not torch.equal(before, param), name


def test_the_first_coordinates_may_overflow_too() -> None:
    """A basis that stretches: its first coordinates are Inf, of a gradient whose norm is not.

    The norm of the gradient alone was looked at before there was a basis.
    """

    @register("tmp_stretching")
    class Stretching(Projector):
        def find(self, grad: Tensor, previous: Tensor | None, ctx: RefreshContext) -> Tensor:
            return 1e25 * torch.eye(grad.shape[-2], self.rank)

    try:
        param = nn.Parameter(cases.parameter(SHAPE, torch.float32).detach())
        before = param.detach().clone()
        optimizer = GaLoreAdamW([{"params": [param], "rank": RANK, "projector": "tmp_stretching"}])
        param.grad = torch.full(SHAPE, 1e14)
        optimizer.step()
        assert torch.equal(param, before)
    finally:
        del PROJECTORS["tmp_stretching"]
