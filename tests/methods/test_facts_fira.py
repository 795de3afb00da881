"""Facts about Fira: 23 to 32 of the list in the fact sheet, by number."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_optim import FiraAdamW, lowrank_groups
from lowrank_optim.residuals import ResidualInputs, Scaled
from lowrank_optim.subspaces.base import make_projector
from lowrank_optim.subspaces.refresh import RefreshContext
from lowrank_optim.subspaces.target import Target
from lowrank_optim.subspaces.terms import Term
from lowrank_optim.tensors.matrix import matrix_view
from tests import cases
from tests.compare import assert_close, relative
from tests.oracles.fira import fira
from tests.pairwise import paired

LR = 0.1
PLAIN: dict[str, Any] = {"lr": LR, "weight_decay": 0.0, "limiter": None, "rank": 3}
MODES = ["release", "paper"]


def canonical(x: Tensor, proj_type: str = "std") -> Tensor:
    view = matrix_view(x.shape, proj_type)
    assert view is not None
    return view.of(x.detach())


def steps(name: str, start: Tensor, grads: list[Tensor], **options: Any) -> tuple[Tensor, Any]:
    """What the last gradient did to the weights, in canonical view, and the state after it."""
    param = torch.nn.Parameter(start.detach().clone())
    optimizer = cases.build(name, [param], **options)
    *before, last = grads
    cases.run(optimizer, [param], [[g] for g in before])
    old = param.detach().clone()
    cases.run(optimizer, [param], [[last]])
    return canonical(param.detach() - old), optimizer.state[param]


def residual(start: Tensor, grads: list[Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    """``-S`` times learning rate and bias correction of the last step, and its basis.

    Fira's step less GaLore's: the moments of both see the same coordinates.
    """
    ours, state = steps("FiraAdamW", start, grads, **{**PLAIN, **options})
    common = {k: v for k, v in {**PLAIN, **options}.items() if k not in FIRA_ONLY}
    galore, _ = steps("GaLoreAdamW", start, grads, **common)
    return ours - galore, state["basis"]


FIRA_ONLY = ("limiter", "alpha_mode", "scaling")


@pytest.mark.filterwarnings("ignore:rank 99 is clamped")
@pytest.mark.parametrize("shape", [(6, 11), (13, 7), (8, 8)])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_fact_23_full_rank_is_galore_unless_alpha_is_left_in_the_residual(
    dtype: torch.dtype, bound: float, shape: tuple[int, ...]
) -> None:
    """At r = k nothing is outside: the two agree at alpha 1, and at any alpha in paper mode.

    The release takes out ``alpha P R`` alone: at 0.25 three quarters of the gradient remain, and
    the step differs by 163 %.
    """
    start, grads = torch.zeros(shape, dtype=dtype), cases.gradients(shape, 5, dtype)
    common = {"rank": 99, "lr": LR, "weight_decay": 0.0}

    def run(name: str, **options: Any) -> Tensor:
        return cases.train(name, start, grads, **common, **options)[0]

    for mode in MODES:
        options = {"scale": 1.0, "alpha_mode": mode}
        assert relative(run("FiraAdamW", **options), run("GaLoreAdamW", scale=1.0)) < bound
    want = run("GaLoreAdamW", scale=0.25)
    assert relative(run("FiraAdamW", scale=0.25, alpha_mode="paper"), want) < bound
    assert relative(run("FiraAdamW", scale=0.25), want) > 1


@pytest.mark.parametrize("shape", [(6, 11), (13, 7)])
@pytest.mark.parametrize("dtype, bound", [
    (torch.float64, 1e-12), (torch.float32, 3e-6), (torch.bfloat16, 3e-2)
])  # fmt: skip
def test_fact_24_what_is_left_of_the_gradient_within_the_subspace(
    dtype: torch.dtype, bound: float, shape: tuple[int, ...]
) -> None:
    """``P^T S = 0`` in paper mode; ``P^T S = (1 - alpha) R o phi`` in the release's."""
    alpha, (grad,) = 0.25, cases.gradients(shape, 1, dtype)
    start, b1, b2 = torch.zeros_like(grad), 0.9, 0.999
    s, p = residual(start, [grad], scale=alpha, alpha_mode="paper", betas=(b1, b2))
    inside = p.double().mT @ s.double()
    assert float(inside.norm() / s.double().norm()) < bound
    s, p = residual(start, [grad], scale=alpha, betas=(b1, b2), eps=0.0)
    low = p.double().mT @ canonical(grad).double()
    phi = 3**0.5 / (low.norm(dim=0) + 1e-8)  # fact 25, times the bias correction
    want = -LR * (1 - alpha) * low * phi
    assert relative(p.double().mT @ s.double(), want) < bound


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(6, 11), (13, 7), (8, 8)])
def test_fact_25_the_factors_of_the_first_step_are_known(shape: tuple[int, ...], mode: str) -> None:
    """eps = 0: ``phi_j = sqrt(r) (1 - b1) / sqrt(1 - b2) / |R_j|``, one for each of l lines.

    Per column when m < n, per row when m >= n, which the canonical view makes columns of both.
    """
    alpha, (grad,) = 0.25, cases.gradients(shape, 1)
    start = torch.zeros_like(grad)
    s, p = residual(start, [grad], scale=alpha, alpha_mode=mode, eps=0.0, betas=(0.9, 0.999))
    g = canonical(grad)
    low = p.mT @ g
    correction = (1 - 0.999) ** 0.5 / (1 - 0.9)
    part, share = (1.0, alpha) if mode == "paper" else (alpha, 1.0)
    outside = g - part * p @ low
    phi = s.norm(dim=0) / outside.norm(dim=0) / (LR * correction * share)
    assert phi.shape == (max(shape),)
    assert_close(phi, 3**0.5 * 3.16227766016838 / low.norm(dim=0), torch.float32)


@pytest.mark.parametrize("alpha", [0.25, 0.0625, 2.0])
@pytest.mark.parametrize("shape", [(6, 11), (13, 7)])
def test_fact_26_the_release_steps_one_over_alpha_times_the_papers_residual(
    shape: tuple[int, ...], alpha: float
) -> None:
    """Outside the subspace, at the first step: 4.000 at alpha 0.25, where all scripts ran."""
    start, grads = cases.parameter(shape), cases.gradients(shape, 1)
    sizes = []
    for mode in MODES:
        step, state = steps("FiraAdamW", start, grads, scale=alpha, alpha_mode=mode, **PLAIN)
        p = state["basis"]
        sizes.append((step - p @ (p.mT @ step)).norm())
    assert float(sizes[0] / sizes[1]) == pytest.approx(1 / alpha, rel=1e-9)


@pytest.mark.parametrize("scaling", ["column", "matrix"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_fact_27_the_residual_grows_by_one_percent_a_step_at_most(
    dtype: torch.dtype, mode: str, scaling: str
) -> None:
    """The first step is not limited, a decrease is not, and a lasting 50-fold jump is, each step.

    With ``beta1 = beta2 = 0`` the direction is the sign of R, and the jump is put outside the
    subspace, where phi does not see it. What is recorded is what the weights moved by.
    """
    m, n, r = 6, 11, 2
    grad = torch.zeros(m, n, dtype=dtype)
    grad[0, 0], grad[1, 1] = 10.0, 9.0
    grad[:2, 2:] = 5.0
    small, large = grad.clone(), grad.clone()
    noise = torch.randn(m - 2, n, generator=torch.Generator().manual_seed(0)).to(dtype)
    small[2:], large[2:] = 0.1 * noise, 5 * noise
    options = {"rank": r, "scale": 1.0, "update_proj_gap": 1000, "betas": (0.0, 0.0)}
    options |= {"alpha_mode": mode, "scaling": scaling, "weight_decay": 0.0, "lr": LR}
    param = torch.nn.Parameter(torch.zeros(m, n, dtype=dtype))
    optimizer = cases.build("FiraAdamW", [param], **options)
    galore = {k: v for k, v in options.items() if k not in FIRA_ONLY}
    other = torch.nn.Parameter(param.detach().clone())
    beside = cases.build("GaLoreAdamW", [other], **galore)
    norms, measured = [], []
    for g in [small, small, *[large] * 8, small, large]:
        before = param.detach() - other.detach()
        for p, o in ((param, optimizer), (other, beside)):
            cases.run(o, [p], [[g]])
        norms.append(float(optimizer.state[param]["residual_norm"]))
        measured.append(float((param - other - before).detach().norm()) / LR)
    assert norms == pytest.approx(measured, rel=1e-5 if dtype == torch.float64 else 2e-2)
    growth = [b / a for a, b in itertools.pairwise(norms)]
    assert growth[0] == pytest.approx(1.0, rel=1e-6)
    assert growth[1:9] == pytest.approx([1.01] * 8, rel=1e-5)
    assert growth[9] == pytest.approx(1.01**-8, rel=1e-4)
    assert growth[10] == pytest.approx(1.01, rel=1e-5)


@pytest.mark.parametrize("scaling", ["column", "matrix"])
@pytest.mark.parametrize("proj_type", cases.PROJ_TYPES)
def test_fact_28_where_adam_is_linear_fira_is_sgd(proj_type: str, scaling: str) -> None:
    """An eps that dwarfs the second moment makes N = R / eps, so phi the same for all columns.

    With alpha 1 and no limiter ``P N + S`` is then the gradient over eps, whatever the basis.
    """
    start, grads = cases.parameter((6, 11)), cases.gradients((6, 11), 5)
    options = {**PLAIN, "scale": 1.0, "scaling": scaling, "proj_type": proj_type}
    options |= {"betas": (0.0, 0.999), "eps": 1e9, "lr": 1e9 * LR}
    got, _ = cases.train("FiraAdamW", start, grads, **options)
    assert relative(got - start, -LR * torch.stack(grads).sum(0)) < 1e-6


def test_fact_28_a_single_factor_scales_the_whole_residual() -> None:
    """Matrix mode: S is a multiple of ``G - alpha P R``; column mode: it is not."""
    (grad,) = cases.gradients((6, 11), 1)
    for scaling, bound in (("matrix", 1e-10), ("column", None)):
        s, p = residual(torch.zeros_like(grad), [grad], scale=0.5, scaling=scaling)
        outside = grad - 0.5 * p @ (p.mT @ grad)
        cosine = float((s * outside).sum() / (s.norm() * outside.norm()))
        assert (1 + cosine < bound) if bound else (1 + cosine > 1e-3)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("how", ["zero", "inside"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_fact_29_a_first_residual_of_zero_locks_nothing(
    dtype: torch.dtype, how: str, mode: str
) -> None:
    """LoRA's A has a first gradient of exactly zero, an idle expert too; or G is all inside.

    The release then caps every later residual at 1.01 times the norm before: 1.01e-8 at step 2,
    and 1,388 steps until the cap is 1 again. Here step 2 is as without a limiter.
    """
    shape = (16, 40)
    first, *rest = cases.gradients(shape, 4, dtype)
    if how == "zero":
        first = torch.zeros_like(first)
    else:
        first = first.clone()
        first[3:] = 0  # rank 3: the basis is found from it, and holds all of it
    alpha = 1.0 if how == "inside" else 0.25
    common = {**PLAIN, "alpha_mode": mode, "scale": alpha, "eps": 1e-3}
    start = torch.zeros(shape, dtype=dtype)
    runs = {
        limiter: steps("FiraAdamW", start, [first, rest[0]], **{**common, "limiter": limiter})
        for limiter in (1.01, None)
    }
    assert torch.equal(runs[1.01][0], runs[None][0])
    assert float(runs[1.01][1]["residual_norm"]) > 0.05
    if how == "zero":  # what the guard is for: the literal rule
        norms: list[float] = []
        wide = [first.double(), rest[0].double()]
        fira(start.double(), wide, rank=3, gap=1, scale=0.25, lr=LR, guard=False, norms=norms)
        assert norms[1] == pytest.approx(1.01e-8, rel=1e-6)
        assert math.ceil(math.log(1 / norms[1]) / math.log(1.01)) > 1300


def test_fact_29_an_expert_without_tokens_is_not_locked_and_locks_no_other() -> None:
    """Each expert has a limiter of its own."""
    shape = (3, 6, 10)
    start, grads = cases.parameter(shape), cases.gradients(shape, 4)
    grads[0][1] = 0
    batch, state = steps("FiraAdamW", start, grads[:2], **{**PLAIN, "limiter": 1.01})
    assert state["residual_norm"].shape == (3,)
    for i in (0, 2):
        own = [g[i] for g in grads[:2]]
        alone, other = steps("FiraAdamW", start[i], own, **{**PLAIN, "limiter": 1.01})
        assert_close(batch[i], alone)
        assert_close(state["residual_norm"][i], other["residual_norm"])
    free, _ = steps("FiraAdamW", start, grads[:2], **PLAIN)
    assert_close(batch[1], free[1])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(6, 11), (13, 7)])
def test_fact_30_the_residual_keeps_its_direction_line_by_line(
    shape: tuple[int, ...], mode: str
) -> None:
    """Cosine 1 with ``G - b P R`` in every line, whatever phi and the limiter did.

    The moments are those of several steps, and the limiter acts: the last gradient leaves the span.
    """
    start, grads = cases.parameter(shape), cases.gradients(shape, 5)
    (grads[-1],) = cases.gradients(shape, 1, seed=9)
    options = {"scale": 0.25, "alpha_mode": mode, "limiter": 1.01, "update_proj_gap": 100}
    s, p = residual(start, grads, **options)
    g = canonical(grads[-1])
    outside = g - (1.0 if mode == "paper" else 0.25) * p @ (p.mT @ g)
    cosines = (s * outside).sum(0) / (s.norm(dim=0) * outside.norm(dim=0))
    assert_close(cosines, -torch.ones_like(cosines), torch.float64)
    free, _ = residual(start, grads, **{**options, "limiter": None})
    assert float(s.norm()) < 0.9 * float(free.norm())  # it did act


@pytest.mark.parametrize("kind", ["scaled", "sign"])
@pytest.mark.parametrize("paper", [False, True])
def test_fact_31_nothing_is_read_on_the_host(paper: bool, kind: str) -> None:
    """On the meta device there is nothing to read: a ``max`` or ``float`` of a tensor raises.

    The release calls Python's ``max`` on a tensor, which waits for the device at every matrix.
    """
    group = {**cases.build("FiraAdamW", [nn.Parameter(torch.zeros(4, 4))]).param_groups[0]}
    for shape in [(8, 24), (3, 8, 24)]:
        view = matrix_view(shape)
        assert view is not None
        subspace = make_projector(group, view)
        param = torch.zeros(shape, device="meta")
        scaled, finite = Scaled(paper=paper), torch.ones((), dtype=torch.bool, device="meta")
        state = {**subspace.init(view, param), **scaled.init(view, param)}
        low = subspace.coords(state, param)["low"]
        term: Term = scaled.after(
            state, ResidualInputs(param, low, low.clone(), 0.5, subspace, finite)
        )
        if kind == "sign":
            term = Term("sign", gain=0.5)
        lr = torch.ones((), device="meta")
        into = Target(param, param, low, 1.0, 1 - lr * 0.1, None, finite)
        subspace.push_(into, state, {"low": low * lr}, term.times(lr))


@pytest.mark.parametrize(
    ("mode", "scaling", "proj_type", "projector"),
    paired([*MODES], ["column", "matrix"], cases.PROJ_TYPES, cases.projector_names()),
)
def test_the_norm_identity_is_the_norm(
    mode: str, scaling: str, proj_type: str, projector: str
) -> None:
    """The limiter's memory after a step is the norm of a residual formed in full.

    For every projector: the identity holds for any orthonormal basis, of one side or of both, and
    for single entries. A block in its turn leaves nothing over.
    """
    start, grads = cases.parameter((6, 10)), cases.gradients((6, 10), 1)
    alpha, (grad,) = 0.4, grads
    options = {"scale": alpha, "alpha_mode": mode, "scaling": scaling, "rank": 3}
    options |= {"proj_type": proj_type, "projector": projector, "betas": (0.8, 0.95)}
    _, optimizer = cases.train("FiraAdamW", start, grads, **options)
    (state,) = optimizer.state.values()
    ((item,),) = [optimizer._items(g) for g in optimizer.param_groups]
    assert item.subspace is not None and item.view is not None
    g = item.view.of(grad)
    if projector == "block":
        assert float(state["residual_norm"]) == 0.0
        return
    if projector == "randk":
        (tile,) = item.subspace.tiles(item.view.m, item.view.n, int(state["key"]), g)
        back = torch.zeros(g.numel(), dtype=g.dtype)
        back[tile.places] = low = g.reshape(-1)[tile.places]
        back, right = back.view(g.shape), []
    else:
        p, *right = item.subspace.bases(state, item.view)
        low = p.mT @ g
        low = low @ right[0] if right else low
        back = p @ low @ right[0].mT if right else p @ low
    n = 0.2 * low / ((0.05 * low.square()).sqrt() + 1e-8 * 0.05**0.5)
    if scaling == "matrix" or right or projector == "randk":
        phi = n.norm() / (low.norm() + 1e-8)
    else:
        phi = n.norm(dim=0) / (low.norm(dim=0) + 1e-8)
    s = phi * (g - (1.0 if mode == "paper" else alpha) * back)
    assert_close(state["residual_norm"], s.norm())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "projector, proj_type, rank", [("randk", "std", 1), ("svd", "full", 6), ("columns", "full", 3)]
)
def test_columns_are_told_apart_only_where_coordinates_have_them(
    projector: str, proj_type: str, rank: int, mode: str
) -> None:
    """k entries of a matrix of k columns, or r directions of r, are not the columns of the matrix.

    Their number was compared, so that ``scaling="column"`` scaled column j by entry j. Columns of
    one side are columns whatever ``proj_type`` says.
    """
    start, grads = cases.parameter((6, 6)), cases.gradients((6, 6), 3)
    options = {"projector": projector, "proj_type": proj_type, "rank": rank, "scale": 0.5}
    options |= {"alpha_mode": mode, "update_proj_gap": 100}
    column, _ = cases.train("FiraAdamW", start, grads, scaling="column", **options)
    matrix, _ = cases.train("FiraAdamW", start, grads, scaling="matrix", **options)
    assert torch.equal(column, matrix) == (projector != "columns")


def test_a_bad_gradient_leaves_the_limiter_as_it_was() -> None:
    """On a device the host has not looked: NaN, Inf and what overflowed leave the memory alone."""
    view = matrix_view((6, 10))
    assert view is not None
    group = cases.build("FiraAdamW", [nn.Parameter(torch.zeros(4, 4))]).param_groups[0]
    subspace, scaled = make_projector({**group, "rank": 3}, view), Scaled()
    (grad,) = cases.gradients((6, 10), 1)
    state = {**subspace.init(view, grad), **scaled.init(view, grad)}
    subspace.refresh_(state, grad, RefreshContext(view, torch.Generator()))
    for factor, finite, changes in [
        (1.0, None, True), (2.0, True, True), (3.0, False, False),
        (math.nan, False, False), (math.inf, None, False), (1.0, None, True),
    ]:  # fmt: skip
        low = subspace.coords(state, factor * grad)["low"]
        flag = None if finite is None else torch.tensor(finite)
        before = state["residual_norm"].clone()
        scaled.after(state, ResidualInputs(factor * grad, low, low.clone(), 1.0, subspace, flag))
        assert bool(state["residual_norm"] != before) == changes
        assert bool(state["residual_norm"].isfinite())


def test_fact_32_a_target_without_a_match_raises() -> None:
    """The release returns a group of no parameters and trains plain AdamW."""
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(ValueError, match="'attn' matches no trainable matrix"):
        lowrank_groups(model, target_modules=["attn"], alpha=1.0)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(8, 8), nn.Linear(8, 6)
        self.mlp_up, self.norm = nn.Linear(8, 20), nn.LayerNorm(8)


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "mlp"]])
def test_fact_32_lowrank_groups_do_what_divide_params_does(targets: list[str]) -> None:
    """Substrings of module names, with ``alpha`` and the release's defaults: the same split."""
    fira = pytest.importorskip("fira")
    model = nn.Sequential(Block(), Block())
    theirs = fira.divide_params(model, targets, rank=4, alpha=0.5)
    groups = lowrank_groups(model, rank=4, target_modules=targets, alpha=0.5, proj_type="std")
    ours = FiraAdamW(groups)
    want = {id(p) for p in theirs[1]["params"]}
    got = {id(p) for g in ours.param_groups if g["rank"] for p in g["params"]}
    assert got == want and want
    assert {g["scale"] for g in ours.param_groups if g["rank"]} == {0.5}
    also = FiraAdamW([g for g in theirs if g["params"]])
    assert [g["rank"] for g in also.param_groups] == [None, 4]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("alpha", [1.0, 0.25])
@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "left", "right"])
@pytest.mark.parametrize("shape", ["wide", "tall", "square"])
def test_oracle_is_the_release(
    shape: str, proj_type: str, alpha: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fira's own FiraAdamW, ten steps, four refreshes, gradients on which the limiter acts.

    As for GaLore: eps where the release has it, the SVD's own signs, no decay, and no cast to
    float32 before the SVD. A rank below every side: the release takes the axis of its factors from
    the shape of the coordinates.
    """
    released = pytest.importorskip("fira").FiraAdamW
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self)
    size = cases.SHAPES[shape]
    grads = [g * f for g, f in zip(cases.gradients(size, 10), [1, 9, 0.1] * 4, strict=False)]
    start = cases.parameter(size)
    param = torch.nn.Parameter(start.detach().clone())
    group = {"rank": 4, "update_proj_gap": 3, "alpha": alpha, "proj_type": proj_type}
    theirs = released(
        [{"params": [param], **group}], lr=3e-2, betas=(0.8, 0.95), eps=1e-4,
        no_deprecation_warning=True,
    )  # fmt: skip
    ours = fira(
        start.detach(), grads, rank=4, gap=3, scale=alpha, proj_type=proj_type, lr=3e-2,
        betas=(0.8, 0.95), eps=1e-4, eps_first=True, align=False,
    )  # fmt: skip
    for grad, want in zip(grads, ours, strict=True):
        cases.run(theirs, [param], [[grad]])
        assert relative(param, want) < 1e-12
