"""No host in a step: what one would make the host of an accelerator wait for, on the CPU."""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.gpu.variants import OWN, gap_of
from benchmarks.gpu.waiting import RESTART, SPECTRAL, refresh_may_wait
from lowrank_optim import LowRankOptimizer, attach_in_backward, methods
from lowrank_optim.nn import convert
from lowrank_optim.ops import quant
from lowrank_optim.stores import STORES
from lowrank_optim.subspaces import random as draws
from lowrank_optim.subspaces import searches, svd
from lowrank_optim.subspaces.base import State
from lowrank_optim.subspaces.randomized import RandomizedSVD
from lowrank_optim.subspaces.refresh import BasisChange, RefreshContext
from lowrank_optim.subspaces.svd import SVD
from tests import cases
from tests.compare import assert_close
from tests.engine import product_cases
from tests.engine.watch import Watch


def check(seen: Watch, optimizer: LowRankOptimizer, matrices: int, refreshes: bool) -> None:
    """Nothing but what is allowed at a refresh, and answers to what was asked a step before."""
    allowed: set[str] = set()
    for group in optimizer.param_groups if refreshes else ():
        allowed |= {*refresh_may_wait(type(optimizer).__name__, group["projector"])}
    left = Counter(seen.where)
    for where, count in seen.where.items():
        once = where in allowed and count <= matrices
        if once or where.split()[0] in allowed:
            del left[where]
    assert not left, seen.looks


def test_looks_of_a_projector_are_not_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Broken on purpose: one that asks for a value, in a refresh where another's status is read."""
    honest = RandomizedSVD.searching

    def curious(self: RandomizedSVD, grad: Tensor, *others: Any) -> Any:
        assert grad.isfinite().all().item()
        return honest(self, grad, *others)

    monkeypatch.setattr(RandomizedSVD, "searching", curious)
    params = [cases.parameter((20, 32), torch.float32)]
    optimizer = cases.build("GaLoreAdamW", params, projector="rsvd")
    with pytest.raises(AssertionError, match=r"projector\.py:\d+ _sought"):
        stepped(optimizer, params, rows(1, [(20, 32)], torch.float32), {0})


def stepped(
    optimizer: LowRankOptimizer, params: list[Tensor], grads: list[list[Tensor]], due: set[int]
) -> None:
    """Steps under the watch; a basis is due in some."""
    for n, row in enumerate(grads):
        for param, grad in zip(params, row, strict=True):
            param.grad = grad
        with Watch(optimizer) as seen:
            optimizer.step()
        check(seen, optimizer, len(params), n in due)


SHAPES = [(20, 32), (2, 20, 24), (9,)]


def rows(count: int, shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[list[Tensor]]:
    each = [cases.gradients(shape, count, dtype, seed=i) for i, shape in enumerate(shapes)]
    return [list(row) for row in zip(*each, strict=True)]


def classes() -> Iterator[Any]:
    """Every class, one of each residual on every projector, at gaps of 1 and 2."""
    own = [pair for pair in cases.pairs() if not cases.is_beyond(*pair)]
    for n, (name, projector) in enumerate(own):
        yield name, projector, 1 + n % 2
    for n, name in enumerate(sorted({*cases.method_names()} - {*cases.projecting_names()})):
        yield name, "svd", 1 + n % 2


@pytest.mark.filterwarnings("ignore:.*does not use")
def test_no_step_of_a_class_waits() -> None:
    """It was 3 looks a matrix in every step of DCT-AdamW, and 17 in a refresh of the default."""
    for name, projector, gap in classes():
        for dtype in (torch.float32, torch.bfloat16)[: 1 + (projector == "rsvd")]:
            params = [cases.parameter(shape, dtype) for shape in SHAPES]
            options: dict[str, Any] = {"projector": projector, "weight_decay": 0.1}
            options |= {gap_of(getattr(methods, name)): gap, **OWN.get(name, {})}
            optimizer = cases.build(name, params, **options)
            stepped(optimizer, params, rows(3, SHAPES, dtype), {0, 1, 2} if gap == 1 else {0, 2})


@pytest.mark.filterwarnings("ignore:.*does not use")
def test_what_factors_of_a_weight_wait_for() -> None:
    """SST where W is factored, SwitchLoRA where B A is: a round, and not the steps between."""
    sst = {"factors": "active", "steps_per_iteration": 2}
    switched = {"restart_every": 2, "interval": 4, "freeze_steps": 1}
    for name, options, allowed in (
        ("SSTAdamW", sst, SPECTRAL),
        ("SwitchLoRAAdamW", switched, RESTART),
    ):
        params = [cases.parameter((20, 32), torch.float32)]
        optimizer = cases.build(name, params, **options)
        waits = []
        for grad in cases.gradients((20, 32), 5, torch.float32):
            params[0].grad = grad
            with Watch(optimizer) as seen:
                optimizer.step()
            waits.append(bool(seen.looks))
            assert all(w in allowed or w.split()[0] in allowed for w in seen.where), seen.looks
        first = name == "SSTAdamW"  # SwitchLoRA draws its first factors
        assert waits == [first, False, True, False, True]


@pytest.mark.parametrize("part", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_no_composition_waits(monkeypatch: pytest.MonkeyPatch, part: int) -> None:
    """Every subspace with every kind of residual, half of them at a time; all else is drawn."""
    monkeypatch.setattr(quant, "MIN_SIZE", 0)
    for store in STORES:  # tables of a format are sent to a device once a process
        params = [cases.parameter((5, 7), torch.float32)]
        optimizer = cases.build("GaLoreAdamW", params, state_dtype=store)
        cases.run(optimizer, params, [cases.gradients((5, 7), 1, torch.float32)])
    kinds: dict[str, list[str]] = {}
    for name, spec in product_cases.RESIDUALS.items():
        kinds.setdefault(spec["kind"], []).append(name)
    for n, subspace in enumerate(product_cases.SUBSPACES):
        for k, own in enumerate(kinds.values()):
            if (n + k) % 2 != part:
                continue
            residual = own[n % len(own)]
            generator = random.Random(f"{subspace}/{residual}")
            case = product_cases.one(
                subspace,
                generator,
                rule=generator.choice([*product_cases.RULES]),
                store=generator.choice([*STORES]),
                on_refresh=generator.choice(["keep", "reset", "project"]),
            )
            if product_cases.refusal(subspace, residual, case):
                continue
            shapes = [(5, 7), (2, 5, 7)]
            params: list[Tensor] = [
                nn.Parameter(product_cases.start(x, torch.float32, i, small=False))
                for i, x in enumerate(shapes)
            ]
            optimizer = product_cases.built(subspace, residual, case, params)
            try:
                stepped(optimizer, params, rows(3, shapes, torch.float32), {0, 2})
            except AssertionError as error:
                error.add_note(f"{subspace} x {residual}: {case}")
                raise


@pytest.mark.parametrize("kind", ["sst", "switchlora"])
def test_no_step_of_a_module_waits(kind: str) -> None:
    """Slots that are switched were a list of the host: three waits a factor whenever one was."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(24, 64), nn.Tanh(), nn.Linear(64, 24))
    name = {"sst": "SSTAdamW", "switchlora": "SwitchLoRAAdamW"}[kind]
    optimizer: LowRankOptimizer = getattr(methods, name)(convert(net, kind, rank=4), lr=1e-2)
    for _ in range(3):
        x = torch.randn(5, 24)
        with Watch(optimizer) as seen:
            net(x).square().mean().backward()
            optimizer.step()
        assert not seen.looks


@pytest.mark.parametrize("mode", ["project", "step"])
def test_no_backward_waits(mode: Any) -> None:
    """Nor for whether there is a gradient for the first basis of ``mode="project"``."""
    for name, options in {
        "GaLoreAdamW": {"projector": "rsvd"},
        "DCTAdamW": {},
        "GaLoreLion": {"projector": "random", "state_dtype": "8bit"},
        "GaLoreSGD": {"projector": "random", "state_dtype": "4bit", "momentum": 0.9},
        "FrugalAdamW": {"projector": "columns", "free_rule": "none"},
    }.items():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 24))
        optimizer = cases.build(name, net.named_parameters(), update_proj_gap=2, **options)
        for item in optimizer._items(optimizer.param_groups[0]):
            if item.subspace is not None and item.view is not None:
                item.subspace.prepare(item.view, item.param)  # in a hook nobody is told where it is
        attach_in_backward(optimizer, mode)
        for n in range(4):
            x = torch.randn(5, 24)
            with Watch(optimizer) as seen:
                net(x).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            check(seen, optimizer, 2, refreshes=n % 2 == 0)


def run(
    forced: bool, start: Tensor, grads: list[Tensor], projector: str, **options: Any
) -> tuple[Tensor, dict[str, Tensor], LowRankOptimizer]:
    with pytest.MonkeyPatch.context() as patch:
        cases.branching(patch, lambda tensor: forced)
        param = nn.Parameter(start.clone())
        optimizer = cases.build("GaLoreAdamW", [param], projector=projector, **options)
        cases.run(optimizer, [param], [[g] for g in grads])
        state = optimizer.state_dict()["state"]
        return param.detach(), next(iter(state.values())), optimizer


BAD = {"zero": 0.0, "inf": float("inf"), "nan": float("nan")}


def sequences() -> Iterator[tuple[str, set[int]]]:
    """Where gradients are bad: at the first step, at a refresh, between, and all of these."""
    for at in ({0}, {2}, {1}, {0, 1}, {2, 3}, {0, 2, 3, 4}):
        for kind in BAD:
            yield kind, at


@pytest.mark.parametrize(
    "projector",
    [
        # as rsvd, dct and columns
        pytest.param(x, marks=pytest.mark.slow if x in ("svd", "golore", "hadamard") else ())
        for x in (*cases.basis_names(), "columns")
    ],
)
def test_what_an_accelerator_selects_is_what_a_host_decides(projector: str) -> None:
    """Zero, Inf and NaN at the first step, at a refresh and between: the same run, and counts."""
    for n, (kind, at) in enumerate(sequences()):
        shape = [(12, 20), (20, 12), (2, 12, 20)][n % 3]
        gap = 1 if n % 5 == 4 else 2
        on_refresh = ["keep", "project", "reset"][n % 3 if kind != "zero" else n % 2]
        start = cases.parameter(shape).detach()
        grads = cases.gradients(shape, 6)
        for i in at:
            grads[i] = torch.zeros_like(grads[i]) if kind == "zero" else grads[i] * BAD[kind]
        options = {"update_proj_gap": gap, "on_refresh": on_refresh, "weight_decay": 0.1}
        want, state, optimizer = run(False, start, grads, projector, **options)
        got, other, accelerated = run(True, start, grads, projector, **options)
        assert bool(got.isfinite().all())
        assert accelerated.postponed_refreshes() == optimizer.postponed_refreshes(), (kind, at)
        if gap > 1:  # else it is due in any case
            assert torch.equal(other["refresh_step"], state["refresh_step"]), (kind, at)
        if projector == "rsvd":
            continue  # its bases differ within its tolerance: below
        assert_close(got, want)
        for key in state.keys() - {"refresh_step"}:
            assert_close(other[key], state[key])


def energies(forced: bool, grads: list[Tensor]) -> list[Tensor]:
    """What each basis captures of the gradient that it was found from, as a fraction."""
    with pytest.MonkeyPatch.context() as patch:
        cases.branching(patch, lambda tensor: forced)
        param = nn.Parameter(torch.zeros_like(grads[0]))
        optimizer = cases.build("GaLoreSGD", [param], projector="rsvd", update_proj_gap=1)
        found = []
        for grad in grads:
            cases.run(optimizer, [param], [[grad]])
            basis = optimizer.state[param]["basis"]
            eye = torch.eye(basis.shape[-1], dtype=basis.dtype)
            assert_close(basis.mT @ basis, eye.expand(*basis.shape[:-2], *eye.shape))
            low = torch.linalg.matrix_norm(basis.mT @ grad)
            found.append((low / torch.linalg.matrix_norm(grad)).square())
    return found


@pytest.mark.parametrize("shape", [(60, 90), (2, 60, 90)])
@pytest.mark.parametrize("kind", ["decaying", "low rank", "flat"])
def test_a_fixed_number_of_iterations_captures_what_the_adaptive_one_does(
    kind: str, shape: tuple[int, ...]
) -> None:
    """Within its tolerance of 1 %, cold and warm; beyond the rank of a gradient too.

    Of a flat spectrum, where it goes on to 8 iterations and each direction is as good as another,
    within 5 %.
    """
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(*shape[:-2], 60, 60, generator=generator)
    values = {"decaying": 0.9 ** torch.arange(60), "flat": torch.ones(60)}.get(kind)
    values = (torch.arange(60) < 2).float() if values is None else values
    grads = []
    for _ in range(3):
        left = left + 0.2 * torch.randn(left.shape, generator=generator)
        grads.append(left * values @ torch.randn(*shape[:-2], 60, 90, generator=generator))
    for got, want in zip(energies(True, grads), energies(False, grads), strict=True):
        assert bool((got >= want * (0.95 if kind == "flat" else 0.99)).all()), (got, want)


def test_a_refresh_of_ones_own_that_selects_nothing_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A gradient of zeros would have become a basis; with ``selects = False`` the host looks."""

    def refresh_(self: SVD, state: State, grad: Tensor, ctx: RefreshContext) -> Any:
        state["basis"].copy_(self.find(grad, None, ctx))
        return {"low": BasisChange()}

    cases.branching(monkeypatch, lambda tensor: True)
    monkeypatch.setattr(SVD, "refresh_", refresh_)
    param = cases.parameter((12, 20), torch.float32)
    optimizer = cases.build("GaLoreAdamW", [param], projector="svd")
    before = param.detach().clone()
    param.grad = torch.zeros_like(param)
    with pytest.raises(TypeError, match=r"SVD.refresh_ of parameter 0 .* selects = False"):
        optimizer.step()
    assert torch.equal(param, before)
    monkeypatch.setattr(SVD, "selects", False)
    optimizer.step()
    assert optimizer.postponed_refreshes() == {"parameter 0": 1}


def accumulated(forced: bool, kinds: Sequence[str]) -> tuple[list[Tensor], LowRankOptimizer]:
    """Weights of ``mode="project"`` after steps whose first gradients are bad, or not."""
    with pytest.MonkeyPatch.context() as patch:
        cases.branching(patch, lambda tensor: forced)
        param = cases.parameter((12, 20), torch.float64)
        optimizer = cases.build("GaLoreAdamW", [param], projector="svd", update_proj_gap=3)
        attach_in_backward(optimizer, "project", first_basis="micro")
        found = []
        rows = iter(cases.gradients((12, 20), 5 * len(kinds)))
        for step in range(5):
            for kind in kinds:
                grad = next(rows) * (1.0 if step else BAD.get(kind, 1.0))
                (param * grad).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(param.detach().clone())
        return found, optimizer


@pytest.mark.parametrize(
    "kinds",
    [("zero", "good"), ("good", "good"), ("zero", "zero"), ("nan", "good"), ("zero", "inf")],
)
def test_a_first_basis_that_a_device_selects_is_that_of_a_host(kinds: tuple[str, str]) -> None:
    """``mode="project"``: the first gradient that says something, of those of a step."""
    want, optimizer = accumulated(False, kinds)
    got, accelerated = accumulated(True, kinds)
    for x, y in zip(got, want, strict=True):
        assert_close(x, y)
    assert accelerated.postponed_refreshes() == optimizer.postponed_refreshes()


RESTS: dict[str, Any] = {"offload_inactive": True}
"""Vectors that are not in use lie on the host, where they change places: one copy goes there."""
BOTH: dict[str, Any] = {"proj_type": "full", "update_proj_gap": 2}


@pytest.mark.parametrize(
    ("name", "options", "waits"),
    [
        ("GaLoreAdamW", {"projector": "rsvd", "update_proj_gap": 2}, [1, 0, 1]),
        ("GaLoreAdamW", {"projector": "svd", "update_proj_gap": 2}, [1, 0, 1]),
        ("GaLoreAdamW", {"projector": "rsvd", "rank": 18, "update_proj_gap": 2}, [1, 0, 1]),
        ("GaLoreAdamW", {**BOTH, "projector": "rsvd"}, [1, 0, 1]),
        ("GaLoreAdamW", {**BOTH, "projector": "svd"}, [1, 0, 1]),
        ("LDAdamW", {}, [1, 0, 0]),
        ("LDAdamW", {"proj_type": "full"}, [1, 0, 0]),
        ("SSTAdamW", {"steps_per_iteration": 1, "iterations_per_round": 2}, [1, 0, 1]),
        ("SSTAdamW", {"factors": "active", "steps_per_iteration": 1}, [1, 1, 1]),
        ("SSTAdamW", {**RESTS, "steps_per_iteration": 1, "iterations_per_round": 2}, [2, 1, 2]),
        ("SSTAdamW", {**RESTS, "factor_dtype": "bfloat16", "steps_per_iteration": 2}, [2, 0, 1]),
        ("SwitchLoRAAdamW", {"restart_every": 2, "interval": 4, "freeze_steps": 1}, [0, 0, 1]),
    ],
    ids=[
        "rsvd", "svd", "no thin sketch", "rsvd of both sides", "svd of both sides",
        "LDAdam", "LDAdam of both sides", "sst", "active sst", "sst on the host",
        "sst in bfloat16", "switchlora",
    ],
)  # fmt: skip
def test_equal_matrices_share_one_wait(
    name: str, options: dict[str, Any], waits: list[int]
) -> None:
    """All that are due in a bucket are factored in one call, and nothing else is waited for.

    It was 14 and 17 of SST on the host.
    """
    shapes = [(20, 32)] * 3
    params = [cases.parameter(shape, torch.float32) for shape in shapes]
    optimizer = cases.build(name, params, **options)
    found = []
    for row in rows(3, shapes, torch.float32):
        for param, grad in zip(params, row, strict=True):
            param.grad = grad
        with Watch(optimizer) as seen:
            optimizer.step()
        found.append(sum(seen.looks.values()))
    assert found == waits


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("GaLoreAdamW", {"projector": "random"}),
        ("GaLoreAdamW", {"projector": "rsvd"}),
        ("GaLoreAdamW", {"projector": "golore"}),
        ("ApolloAdamW", {"projector": "random"}),
    ],
    ids=lambda x: str(x),
)
def test_draws_of_equal_matrices_are_one_copy(
    name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is drawn on the host goes to the device at once; the numbers are those of each alone."""
    copies: list[torch.Size] = []
    honest = draws.sent

    def counted(x: Tensor, device: torch.device) -> Tensor:
        copies.append(x.shape)
        return honest(x, device)

    monkeypatch.setattr(draws, "sent", counted)
    grads = rows(3, [(20, 32)] * 3, torch.float64)
    found = []
    for forced in (True, False):
        params = [nn.Parameter(torch.zeros(20, 32, dtype=torch.float64)) for _ in range(3)]
        optimizer = cases.build(name, params, update_proj_gap=1, **options)
        with monkeypatch.context() as patch:
            cases.branching(patch, lambda tensor, forced=forced: forced)  # type: ignore[misc]
            cases.run(optimizer, params, grads)
        found.append(torch.stack([optimizer.state[p]["basis"] for p in params]))
        if forced:
            assert len(copies) == 3 and all(shape[0] == 3 for shape in copies)  # one a step
    if options.get("projector") != "rsvd":  # which takes a fixed number of iterations there
        assert_close(*found)


@pytest.mark.parametrize("projector", ["rsvd", "random"])
def test_equal_matrices_share_factorisations(projector: str) -> None:
    """Of a refresh of three as many are launched as of one, the first and the second."""

    def factorisations(count: int) -> list[dict[str, int]]:
        shapes = [(20, 32)] * count
        params = [cases.parameter(shape, torch.float32) for shape in shapes]
        optimizer = cases.build("GaLoreAdamW", params, projector=projector, update_proj_gap=1)
        found = []
        for row in rows(2, shapes, torch.float32):
            for param, grad in zip(params, row, strict=True):
                param.grad = grad
            with Watch(optimizer) as seen:
                optimizer.step()
            names = ("linalg_qr", "linalg_cholesky_ex", "_linalg_eigh", "linalg_solve_triangular")
            found.append({name: seen.launches[name] for name in names})
        return found

    one = factorisations(1)
    assert one == factorisations(3)
    assert all(own["linalg_qr"] for own in one) == (projector == "random")
    assert all(own["linalg_cholesky_ex"] for own in one) == (projector == "rsvd")


def test_a_matrix_that_has_no_eigenvectors_holds_up_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The call that they share fails: each is tried alone, and one of three is postponed."""
    exact = torch.linalg.eigh

    def eigh(x: Tensor) -> Any:  # of a gradient of rank one
        trace = x.diagonal(dim1=-2, dim2=-1).sum(-1)
        if bool((torch.linalg.matrix_norm(x) > 0.999 * trace).any()):
            raise torch.linalg.LinAlgError("did not converge")
        return exact(x)

    shapes = [(20, 32)] * 3
    starts, grads = (
        [cases.parameter(s, torch.float32).detach() for s in shapes],
        rows(2, shapes, torch.float32),
    )
    ends = []
    for bad in (False, True):
        params = [nn.Parameter(x.clone()) for x in starts]
        optimizer = cases.build("GaLoreAdamW", params, projector="rsvd")
        if bad:
            for row in grads:
                row[1] = row[1][:, :1] @ row[1][:1]
        with monkeypatch.context() as patch:
            patch.setattr(torch.linalg, "eigh", eigh)
            cases.branching(patch, lambda tensor: True)
            cases.run(optimizer, params, grads)
        assert optimizer.postponed_refreshes() == ({"parameter 1": 2} if bad else {})
        ends.append([p.detach() for p in params])
    for n in (0, 2):
        assert_close(ends[1][n], ends[0][n])
    assert not torch.equal(ends[0][1], ends[1][1])


def test_the_host_asks_once_for_each_refresh_and_only_where_it_matters() -> None:
    """A step after it; at every step of the first alone. A copy of the state is settled."""
    for projector, gap, asked in [
        ("svd", 2, [0, 1, 0, 1]),
        ("svd", 1, [0, 1, 0, 0]),  # whether there is a first basis to start from
        ("dct", 2, [0, 1, 0, 1]),
        ("dct", 1, [0, 1, 0, 0]),  # or first indices, from which moments follow
        ("columns", 1, [0, 0, 0, 0]),
    ]:
        param = cases.parameter((12, 20), torch.float32)
        optimizer = cases.build("GaLoreAdamW", [param], projector=projector, update_proj_gap=gap)
        found = []
        for grad in cases.gradients((12, 20), 4, torch.float32):
            param.grad = grad
            with Watch(optimizer) as seen:
                optimizer.step()
            found.append(seen.answers)
        assert found == asked, (projector, gap)
        param.grad = torch.zeros_like(param)
        with Watch(optimizer):
            optimizer.step()
        wanted = {} if projector == "columns" else {"parameter 0": 1}
        copied = copy.deepcopy(optimizer)
        assert copied.postponed_refreshes() == optimizer.postponed_refreshes() == wanted
        assert float(optimizer.state[param]["refresh_step"]) == (2 if gap == 2 else 4)


@pytest.mark.parametrize("projector", ["dct", "hadamard", "svd"])
def test_moments_follow_from_the_first_basis_there_is(
    projector: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Zeros at first are no basis: ages of rows go on, as on a host and where a run resumes."""
    grads = [torch.zeros(8, 12), *cases.gradients((8, 12), 2, torch.float32)]
    found = []
    for accelerated, saved in ((False, False), (True, False), (True, True)):
        cases.branching(monkeypatch, lambda tensor, own=accelerated: own)  # type: ignore[misc]
        param = cases.parameter((8, 12), torch.float32)
        options = {"projector": projector, "update_proj_gap": 1, "on_refresh": "project"}
        optimizer = cases.build("DCTAdamW", [param], **options)
        for grad in grads:
            cases.run(optimizer, [param], [[grad]])
            if saved:
                optimizer.load_state_dict(optimizer.state_dict())
        found.append({"weights": param.detach(), **optimizer.state_dict()["state"][0]})
    host, whole, resumed = found
    for key, x in resumed.items():
        assert torch.equal(whole[key], x), key
        assert_close(whole[key], host[key])


def test_a_step_that_raises_takes_its_question_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was undone, and so is what it asked of its device: nothing is counted twice."""
    cases.branching(monkeypatch, lambda tensor: True)
    params = [cases.parameter((12, 20), torch.float32) for _ in range(2)]
    optimizer = cases.build("GaLoreAdamW", params, projector="svd")
    for param in params:
        param.grad = torch.zeros_like(param)

    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr("lowrank_optim.engine.step.adapt", fails)
        with pytest.raises(RuntimeError, match="out of memory"):
            optimizer.step()
    assert optimizer.postponed_refreshes() == {}
    optimizer.step()
    optimizer.step()
    assert set(optimizer.postponed_refreshes().values()) == {2}
    assert all(float(optimizer.state[p]["refresh_step"]) == -1 for p in params)


def test_whole_matrices_share_calls_within_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is copied into one tensor: two of five matrices at a time, and none is lost."""
    grads = [torch.randn(6, 9, generator=torch.Generator().manual_seed(n)) for n in range(5)]
    want = [torch.linalg.svd(x, full_matrices=False).U for x in grads]
    calls = []
    honest = svd._driven

    def counted(x: Tensor) -> Tensor:
        calls.append(len(x) if x.dim() == 3 else 1)
        return honest(x)

    monkeypatch.setattr(svd, "_driven", counted)
    monkeypatch.setattr(searches, "SHARED_BYTES", 2 * 6 * 9 * 4 + 7)
    for got, expected in zip(searches.together([*map(svd.exact, grads)]), want, strict=True):
        assert_close(got, expected)
    assert calls == [2, 2, 1]


def test_a_matrix_whose_svd_fails_leaves_the_call_to_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is factored by the Gram matrix, alone; they keep what the driver finds in float32."""
    grads = [torch.randn(6, 9, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    want = [torch.linalg.svd(x, full_matrices=False).U for x in grads]
    exact = torch.linalg.svd

    def fails(x: Tensor, **options: Any) -> Any:
        if any(torch.equal(own.float(), grads[1]) for own in x.reshape(-1, 6, 9)):
            raise torch.linalg.LinAlgError("did not converge")
        return exact(x, **options)

    monkeypatch.setattr(torch.linalg, "svd", fails)
    got = searches.together([*map(svd.exact, grads)])
    assert torch.equal(got[0], want[0]) and torch.equal(got[2], want[2])
    truth = exact(grads[1].double(), full_matrices=False).U
    assert_close((got[1].double().mT @ truth).abs(), torch.eye(6).double(), torch.float32)
