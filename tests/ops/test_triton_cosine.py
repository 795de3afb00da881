"""The Triton kernels around the FFT of the cosine ops, against the matrix of scipy in float64.

As ``test_triton.py``: interpreted on CPU tensors in a process of their own, compiled on a GPU where
there is one. bfloat16 weights, which the interpreter truncates, are held to a unit in the last
place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from lowrank_optim import DCTAdamW
from lowrank_optim.ops import cosine as reference
from lowrank_optim.ops import dispatch, fuses_cosine
from lowrank_optim.ops.triton import cosine as ops
from lowrank_optim.ops.triton import matrices
from tests import cases
from tests.ops import ops_cosines
from tests.ops.checks import check
from tests.ops.interpreted import INTERPRETED, unless_interpreted
from tests.ops.ops_cases import strided
from tests.oracles.dct_adamw import dct_adamw

DEVICE = "cpu" if INTERPRETED else "cuda"
MARKS = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
BASES = ["dct2", "dct3"]
LENGTHS = {"dct2": (1, 35, 128), "dct3": (2, 131)}
PAIRED = [
    pytest.param(basis, m, marks=() if m in LENGTHS[basis] or not INTERPRETED else pytest.mark.slow)
    for basis in BASES
    for m in (1, 2, 3, 6, 35, 64, 127, 128, 131, 258)
]
"""Alone, with and without a middle; odd, even and prime; tiles of 32 pairs, whole and not.

64 and 128 have whole tiles of pairs, and one more in a spectrum; 258 has 129 pairs, and 130 of a
spectrum: a fifth tile of one pair, and of it and the middle.
"""
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = [
    pytest.param(how, dtype, m, marks=pytest.mark.slow if INTERPRETED and i != j else ())
    for i, how in enumerate(("rows", "columns", "slice"))
    for j, (dtype, m) in enumerate((d, (35, 66)[(k + i) % 2]) for k, d in enumerate(FLOATS))
]


def randn(*shape: int, how: str = "rows", dtype: torch.dtype = torch.float32) -> Tensor:
    return strided(torch.randn(*shape).to(DEVICE, dtype), how)


def rows(m: int, basis: str) -> Tensor:
    return ops_cosines.rows(m, basis).to(DEVICE)


def plan(m: int, basis: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return reference.CosineTransform.make(m, basis, dtype, torch.device(DEVICE)).plan


def some(m: int, count: int) -> Tensor:
    """Indices, the first, the middle and the last of them among them where there is room."""
    order = dict.fromkeys([m // 2, m - 1, 0, *torch.randperm(m).tolist()])
    return torch.tensor(sorted([*order][:count])).int().to(DEVICE)


def project(grad: Tensor, index: Tensor, basis: str) -> Tensor:
    out = torch.full((index.numel(), grad.shape[1]), torch.nan, device=DEVICE)
    ops.cosine_project_([grad], [index], [out], plan(grad.shape[0], basis), basis)
    return out


def lift(
    w: Tensor, index: Tensor, low: Tensor, basis: str, decay: float = 0.9, step: float = 0.1
) -> None:
    ops.cosine_lift_add_([w], [index], [low], plan(w.shape[0], basis), basis, decay, [step])


def scores(grad: Tensor, basis: str, ranking: str = "l2") -> Tensor:
    return ops.cosine_scores([grad], plan(grad.shape[0], basis), basis, ranking)[0]


@pytest.mark.parametrize(("basis", "m"), PAIRED)
class TestLengths:
    pytestmark = [] if INTERPRETED else MARKS

    def test_scores(self, basis: str, m: int) -> None:
        """One column; a tile and a tail of one; more than one program adds up, and a tail."""
        for width, ranking in ((1, "l1"), (65, "l2"), (161, "l1" if m % 2 else "l2")):
            grad = randn(m, width)
            size = (rows(m, basis) @ grad.double()).abs()
            want = size.sum(1) if ranking == "l1" else size.square().sum(1)
            check(scores(grad, basis, ranking), (want, None), f"{width} {ranking}")

    def test_projections_and_lifts(self, basis: str, m: int) -> None:
        """Some of the coefficients, one and all; columns less and more than a tile."""
        q = rows(m, basis)
        for width, count in ((33, (m + 1) // 2), (1, m), (70, 1)):
            index, grad = some(m, count), randn(m, width)
            own = q[index.long()]
            check(project(grad, index, basis), (own @ grad.double(), None), "project")
            w, low = randn(m, width), randn(index.numel(), width)
            want = 0.9 * w.double() - 0.1 * (own.mT @ low.double())
            lift(w, index, low, basis)
            check(w, (want, None), "lift")


@pytest.mark.parametrize("basis", BASES)
class TestTransforms:
    pytestmark = [] if INTERPRETED else MARKS

    @pytest.mark.parametrize("m", [1, 35, 128])
    def test_an_index_that_is_no_coefficient_is_not_followed(self, basis: str, m: int) -> None:
        """A kernel cannot raise: nothing is read there, and the row is NaN; others are right."""
        wrong = [-(2**31), -1, m, m + 1, 2**31 - 1]
        grad = randn(m, 40)
        index = torch.tensor([0, *wrong, m - 1], dtype=torch.int32, device=DEVICE)
        out = project(grad, index, basis)
        assert out[1:-1].isnan().all()
        assert torch.equal(out[[0, -1]], project(grad, index[[0, -1]], basis))

    @pytest.mark.parametrize(("how", "dtype", "m"), LAYOUTS)
    def test_layouts_and_formats(self, basis: str, how: str, dtype: torch.dtype, m: int) -> None:
        """Matrices of any strides; coefficients, too, are read wherever they lie."""
        q, index = rows(m, basis), some(m, 20)
        grad, w = (randn(m, 70, how=how, dtype=dtype) for _ in range(2))
        spaced = index.repeat_interleave(2)[::2]
        low = randn(20, 70, how=how)
        full = q @ grad.double()
        check(scores(grad, basis), (full.square().sum(1), None), "scores")
        check(project(grad, spaced, basis), (full[index.long()], None), "project")
        want = 0.9 * w.double() - 0.1 * (q[index.long()].mT @ low.double())
        before = w.clone(), w.data_ptr()
        lift(w, spaced, low, basis)
        check(w, (want, None), "lift")
        assert w.data_ptr() == before[1] and not torch.equal(w, before[0])

    def test_what_lies_beside_a_slice_is_not_written(self, basis: str) -> None:
        wide = randn(35, 80)
        old = wide.clone()
        lift(wide[:, 10:50:2], some(35, 9), randn(9, 20), basis)
        kept = torch.ones(80, dtype=torch.bool, device=DEVICE)
        kept[10:50:2] = False
        assert torch.equal(wide[:, kept], old[:, kept])
        assert (wide[:, ~kept] != old[:, ~kept]).all()

    @pytest.mark.parametrize("m", [35, 64])
    def test_all_coefficients_are_the_matrix(self, basis: str, m: int) -> None:
        """Orthonormal: what is projected on everything and lifted again leaves nothing."""
        w, every = randn(m, 40), torch.arange(m, dtype=torch.int32, device=DEVICE)
        lift(w, every, project(w, every, basis), basis, 1.0, 1.0)
        assert float(w.abs().max()) < 1e-5

    def test_none_of_the_coefficients(self, basis: str) -> None:
        """A rank of 0 decays; matrices of no elements are nothing to do."""
        w = randn(35, 40)
        old, none = w.clone(), torch.empty(0, dtype=torch.int32, device=DEVICE)
        lift(w, none, randn(0, 40), basis)
        check(w, (0.9 * old.double(), None), "decay")
        empty = randn(35, 0)
        assert project(empty, some(35, 3), basis).shape == (3, 0)
        assert torch.equal(scores(empty, basis), torch.zeros(35, device=DEVICE))
        lift(empty, some(35, 3), randn(3, 0), basis)

    @staticmethod
    def three(basis: str, m: int, n: int) -> Sequence[Tensor]:
        """All that is computed of one draw."""
        torch.manual_seed(3)
        grad, w, low, index = randn(m, n), randn(m, n), randn(m // 2, n), some(m, m // 2)
        found = scores(grad, basis), project(grad, index, basis), w
        lift(w, index, low, basis)
        return found

    @pytest.mark.parametrize(("m", "width"), [(12, 20), (35, 1)])
    def test_tiles_of_columns(
        self, basis: str, m: int, width: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Whole tiles and a shorter last one, as what is too large for one transform is cut.

        An FFT of several columns may round otherwise than of one: close, not equal.
        """
        n = 2 * width + 1
        whole = self.three(basis, m, n)
        monkeypatch.setattr(reference, "TILE_ELEMENTS", dict.fromkeys((False, True), width * m))
        assert len(list(reference.column_tiles(torch.empty(m, n)))) == 3
        for got, want in zip(self.three(basis, m, n), whole, strict=True):
            check(got, (want.double(), None), f"{n} columns")

    @pytest.mark.parametrize(("m", "most"), [(12, 1), (35, 2)])
    def test_a_transform_that_is_kept_is_that_of_two_ops(
        self, basis: str, m: int, most: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Of several tiles, of one or two matrices at once; and of what is too large to be kept."""
        monkeypatch.setattr(reference, "TILE_ELEMENTS", dict.fromkeys((False, True), 20 * m))
        monkeypatch.setattr(
            reference, "TOGETHER_ELEMENTS", dict.fromkeys((False, True), most * 45 * m)
        )
        grads, olds, results = [randn(m, 45) for _ in range(3)], [some(m, 5) for _ in range(3)], []
        for largest in (45 * m, 45 * m - 1):
            monkeypatch.setattr(reference, "WHOLE_ELEMENTS", largest)
            indices = [x.clone() for x in olds]
            sources, lows = [torch.empty_like(x) for x in indices], [randn(5, 45) for _ in grads]
            flags = [[torch.zeros((), dtype=torch.bool, device=DEVICE) for _ in grads]
                     for _ in range(2)]  # fmt: skip
            ops.cosine_top_project_(
                grads, indices, sources, *flags, lows, plan(m, basis), basis, "l2"
            )
            assert all(bool(x) for x in [*flags[0], *flags[1]])
            results.append((indices, sources, lows))
        for grad, index, low in zip(grads, *[results[0][i] for i in (0, 2)], strict=True):
            full = rows(m, basis) @ grad.double()
            best = full.square().sum(1).topk(5).indices.sort().values
            assert index.tolist() == best.tolist()
            check(low, (full[best], None), "coefficients")
        for one, two in zip(*results, strict=True):
            for x, y in zip(one, two, strict=True):
                check(x.float(), (y.double(), None), "kept or not")

    def test_offsets_beyond_32_bits(self, basis: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Strides so large that a tile overruns 2^31 use 64-bit offsets: same numbers."""
        for m in (131, 64):
            results = []
            for span in (2**31 - 1, 0):
                monkeypatch.setattr(matrices, "_SPAN", span)
                results.append(self.three(basis, m, 9))
            assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

    def test_a_lost_number_stays_in_its_column(self, basis: str) -> None:
        for m in (35, 64):
            grad, index, low, w = randn(m, 40), some(m, 7), randn(7, 40), randn(m, 40)
            grad[3, 4], low[5, 6] = torch.nan, torch.inf
            lift(w, index, low, basis)
            for x, column in ((project(grad, index, basis), 4), (w, 6)):
                assert (~x.isfinite()).any(0).nonzero().tolist() == [[column]]
            for ranking in ("l1", "l2"):
                assert not scores(grad, basis, ranking).sum().isfinite()

    def test_an_unsound_matrix_keeps_its_bits(self, basis: str) -> None:
        """Its neighbours in the list move."""
        for m in (35, 64):
            ws = [randn(m, 40) for _ in range(3)]
            old, lows = [w.clone() for w in ws], [randn(7, 40) for _ in ws]
            lows[1].fill_(torch.nan)
            finite = [torch.tensor(i != 1, device=DEVICE) for i in range(3)]
            indices = [some(m, 7) for _ in ws]
            ops.cosine_lift_add_(
                ws, indices, lows, plan(m, basis), basis, 0.9, [0.1, 0.2, 0.3], finite
            )
            assert torch.equal(ws[1], old[1])
            for i in (0, 2):
                lifted = rows(m, basis)[indices[i].long()].mT @ lows[i].double()
                want = 0.9 * old[i].double() - 0.1 * (i + 1) * lifted
                check(ws[i], (want, None), f"matrix {i}")

    def test_a_plan_of_another_matrix_is_refused(self, basis: str) -> None:
        grad = randn(12, 5)
        for wrong in (plan(14, basis), plan(12, basis, torch.float64)):
            with pytest.raises(ValueError, match="a plan of another length than 12"):
                ops.cosine_scores([grad], wrong, basis, "l2")
        with pytest.raises(ValueError, match="basis must be one of 'dct2', 'dct3', got 'dct4'"):
            ops.cosine_scores([grad], plan(12, basis), "dct4", "l2")


class TestSteps:
    pytestmark = [] if INTERPRETED else MARKS

    @pytest.fixture(autouse=True)
    def forced(self, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
        """Triton serves every op; how often each of these was called."""
        monkeypatch.setenv(dispatch.VARIABLE, "triton")
        calls: dict[str, int] = {}

        def count(name: str, own: Callable[..., Any]) -> Callable[..., Any]:
            def counted(*args: Any) -> Any:
                calls[name] = calls.get(name, 0) + 1
                return own(*args)

            return counted

        for name in (
            "cosine_scores", "cosine_project_", "cosine_top_project_", "cosine_lift_add_",
        ):  # fmt: skip
            monkeypatch.setattr(ops, name, count(name, getattr(ops, name)))
        return calls

    def test_every_length_is_served(self) -> None:
        assert all(fuses_cosine(randn(m, 1), m) for m in (1, 12, 97, 4093))

    @pytest.mark.parametrize(("options", "waits"), [
        ({}, True), ({"basis": "dct3", "ranking": 1, "gap": 3}, False), ({"memory": 32}, True),
        unless_interpreted({"own_age": False, "gap": 3}, False),
        unless_interpreted({}, False), unless_interpreted({"memory": 32}, False),
        unless_interpreted({"basis": "dct3", "ranking": 1, "gap": 3}, True),
        unless_interpreted({"own_age": False, "gap": 3}, True),
    ], ids=str)  # fmt: skip
    def test_dct_adamw(
        self, options: dict[str, Any], waits: bool, forced: dict[str, int],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        """Both orders of a step, that of a host that may look at gradients and that of others."""
        if not waits:
            cases.branching(monkeypatch, lambda x: True)
        keys: dict[str, Any] = {"update_proj_gap": options.get("gap", 1), "transform": "fft"}
        keys |= {"basis": options.get("basis", "dct2"), "ranking": f"l{options.get('ranking', 2)}"}
        keys |= {"slot_bias_correction": options.get("own_age", True)}
        keys |= {"error_feedback": "float32" if "memory" in options else None}
        hyper: dict[str, Any] = {"lr": 0.05, "betas": (0.8, 0.95), "weight_decay": 0.1}
        shapes: tuple[tuple[int, int], ...] = ((9, 14), (15, 7), (8, 8))
        if INTERPRETED:  # one side a case: either meets both orders
            shapes = shapes[len(options) % 2 :][:1]
        for shape in shapes:
            start, grads = cases.parameter(shape).detach().float(), cases.gradients(shape, 4)
            weight = torch.nn.Parameter(start.to(DEVICE, copy=True))
            optimizer = DCTAdamW([weight], rank=4, stagger=False, **hyper, **keys)
            for grad in grads:
                weight.grad = grad.float().to(DEVICE)
                optimizer.step()
            want, _ = dct_adamw(
                start.double(), [g.float().double() for g in grads], rank=4, **options, **hyper
            )
            gap = weight.detach().double().cpu() - want[-1]
            assert float(gap.abs().max()) < 2e-5, (shape, options)
        count = len(shapes) * 4
        chosen = forced.get("cosine_top_project_", 0)
        assert forced.get("cosine_scores", 0) + chosen >= count // options.get("gap", 1)
        if options.get("gap", 1) == 1 and not waits:
            assert chosen == count
        if "memory" not in options:  # which takes what the step leaves through torch
            taken = forced.get("cosine_project_", 0) + chosen
            assert min(taken, forced.get("cosine_lift_add_", 0)) >= count

    def test_a_lost_gradient_leaves_all_as_it_was(self, monkeypatch: pytest.MonkeyPatch) -> None:
        cases.branching(monkeypatch, lambda x: True)
        weight = torch.nn.Parameter(randn(12, 20))
        optimizer = DCTAdamW([weight], rank=4, lr=0.1, transform="fft", update_proj_gap=5)
        for n in range(3):
            weight.grad = randn(12, 20)
            if n == 1:
                weight.grad[2, 3] = torch.nan
            old = weight.detach().clone()
            optimizer.step()
            assert torch.equal(weight.detach(), old) == (n == 1)
            assert weight.isfinite().all()

    def test_a_choice_captures_what_it_says(self) -> None:
        """``|G|^2 - |P^T G|^2`` is what the scores that are left out add up to."""
        from lowrank_optim.subspaces import DCT, RefreshContext
        from lowrank_optim.tensors.matrix import matrix_view

        grad = randn(30, 70)
        view = matrix_view(grad.shape, "left")
        assert view is not None
        sub = DCT(6, transform="fft")
        state = sub.init(view, grad)
        norm, seen = sub.look(grad)
        assert seen is not None
        assert float(norm) == pytest.approx(float(grad.double().square().sum()), rel=1e-5)
        sub.refresh_(state, grad, RefreshContext(view, torch.Generator().manual_seed(0), seen=seen))
        low = sub.coords(state, grad)["low"]
        left = seen.sort().values[: 30 - 6].sum()
        assert float(norm - low.square().sum()) == pytest.approx(float(left), rel=1e-4)
