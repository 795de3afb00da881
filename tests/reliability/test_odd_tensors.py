"""Parameters and gradients that few runs have: huge, overlapping, without memory, of two dtypes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_optim import SSTAdamW, SwitchLoRAAdamW, attach_in_backward, methods
from lowrank_optim.nn import convert
from tests import cases
from tests.logged import Logged

SHAPE = (16, 24)
EVERY = [*cases.pairs(), ("SSTAdamW", None), ("SwitchLoRAAdamW", None)]


def one(name: str, projector: str | None, param: Tensor, **options: Any) -> Any:
    own = {} if projector is None else {"projector": projector}
    return cases.build(name, [{"params": [param], "rank": 4}], **{**own, **options})


@pytest.mark.parametrize("accelerated", [False, True], ids=["cpu", "accelerator"])
@pytest.mark.parametrize(("name", "projector"), cases.params(EVERY))
def test_a_huge_first_gradient_moves_nothing(
    name: str, projector: str | None, accelerated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its norm is infinite, so that no basis can be found: weights decayed by zeros in place of
    coordinates."""
    if accelerated:
        cases.branching(monkeypatch, lambda _: True)
    start = cases.parameter(SHAPE, torch.float32)
    param = nn.Parameter(start.detach().clone())
    optimizer = one(name, projector, param, weight_decay=0.1)
    cases.run(optimizer, [param], [[torch.full(SHAPE, 1e30)]])
    assert torch.equal(param, start)
    held = optimizer.state[param]
    assert not any(x.any() for k, x in held.items() if "exp_avg" in k and x.dtype != torch.uint8)
    cases.run(optimizer, [param], [cases.gradients(SHAPE, 1, torch.float32)])
    assert not torch.equal(param, start) and param.isfinite().all()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("GaLoreAdamW", {"projector": "svd"}),
        ("GaLoreAdamW", {"rank": None}),
        ("FrugalAdamW", {"projector": "rows"}),
        ("DCTAdamW", {"projector": "dct"}),
        ("FrugalAdamW", {"projector": "block", "rank": 0.5}),  # one of two is idle
    ],
    ids=str,
)
def test_a_gradient_that_is_not_finite_is_told_of(
    name: str, options: dict[str, Any], logged: Logged
) -> None:
    """By whatever steps the parameter: nothing else says that it stood still."""
    params = {key: nn.Parameter(cases.parameter(SHAPE, torch.float32).detach()) for key in "ab"}
    own = {"rank": 4, "update_proj_gap": 50, "stagger": False, **options}
    group = {"params": list(params.items()), "rank": own.pop("rank")}
    optimizer = cases.build(name, [group], **own)
    good, bad = cases.gradients(SHAPE, 1, torch.float32)[0], torch.full(SHAPE, torch.nan)
    cases.run(optimizer, list(params.values()), [[good, good]])
    assert not logged.records
    cases.run(optimizer, list(params.values()), [[bad, bad]])
    want = [f"the gradient of {key} is not finite: its step is skipped" for key in params]
    assert sorted(logged.messages) == want


@pytest.mark.parametrize("accelerated", [False, True], ids=["cpu", "accelerator"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["GaLoreAdamW", "GaLoreAdafactor", "FiraAdamW", "SwitchLoRAAdamW"])
def test_nor_does_one_of_a_single_entry(
    name: str, dtype: torch.dtype, accelerated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its norm is its absolute value, which has a square that moments would keep: infinity."""
    if accelerated:
        cases.branching(monkeypatch, lambda _: True)
    params = [nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in ((), (1,), (1, 1), (9, 1))]
    optimizer = cases.build(name, [{"params": params, "rank": 1}], weight_decay=0.1)
    huge = [torch.zeros(p.shape, dtype=dtype) for p in params]
    for x in huge:
        x.view(-1)[:1] = 1e30
    cases.run(optimizer, params, [huge])
    for p in params:
        assert torch.equal(p, torch.ones_like(p))
        assert not any(x.any() for k, x in optimizer.state[p].items() if "exp_avg" in k)
    cases.run(optimizer, params, [[torch.ones_like(p) for p in params]])
    assert all(bool(p.isfinite().all()) and not torch.equal(p, torch.ones_like(p)) for p in params)


@pytest.mark.parametrize("max_norm", [None, 1.0])
@pytest.mark.parametrize("first_basis", ["micro", "boundary"])
def test_nor_inside_backward(first_basis: Any, max_norm: float | None) -> None:
    """Whoever finds the first basis, or does not."""
    param = nn.Parameter(cases.parameter(SHAPE, torch.float32).detach())
    start = param.detach().clone()
    optimizer = one("GaLoreAdamW", "svd", param, weight_decay=0.1)
    with attach_in_backward(optimizer, "project", first_basis=first_basis, max_norm=max_norm):
        (param * 1e30).sum().backward()
        optimizer.step()
        assert torch.equal(param, start)


@pytest.mark.parametrize("name", cases.method_names())
def test_entries_that_share_memory_are_refused(name: str) -> None:
    """torch says so in the middle of a step; some steps moved one place several times."""
    make = getattr(methods, name)
    row, column, single = torch.randn(1, 16), torch.randn(16, 1), torch.randn(1)
    windows = torch.randn(30).as_strided((8, 8), (3, 1))
    for x in (row.expand(16, 16), column.expand(16, 16), single.expand(16), windows):
        optimizer = make([nn.Parameter(torch.randn(4, 4))])
        for given in ([nn.Parameter(x)], [("w", nn.Parameter(x))]):
            with pytest.raises(ValueError, match=r"share memory.*clone"):
                make(given)
        with pytest.raises(ValueError, match="share memory"):
            optimizer.add_param_group({"params": [nn.Parameter(x)]})
        assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("name", cases.distinct_names())
def test_nothing_to_step_leaves_a_state_that_loads(name: str) -> None:
    """Matrices without rows, or without columns: Adafactor's means of none were NaN."""
    shapes = [(0, 5), (5, 0), (0,), (0, 3, 4), (4, 6)]
    params = [nn.Parameter(torch.ones(shape)) for shape in shapes]
    optimizer = cases.build(name, [{"params": params, "rank": 3}])
    for _ in range(2):
        for param in params:
            param.grad = torch.ones(param.shape)
        optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert params[-1].isfinite().all() and not params[-1].eq(1).all()


def test_entries_that_do_not_are_taken() -> None:
    """Gaps, any order, a row of one, and strides that interleave."""
    x = torch.randn(64)
    views = [x.as_strided((2, 3), (3, 2)), x.as_strided((4, 4), (1, 8)), x[:8].view(1, 8)]
    views += [x.view(8, 8).mT, x.view(8, 8)[::2], x[:1].expand(1), x.as_strided((1, 8), (0, 1))]
    for view in views:
        methods.GaLoreAdamW([nn.Parameter(view)], rank=1)


@pytest.mark.parametrize(("name", "projector"), cases.params(EVERY))
def test_steps_without_memory(name: str, projector: str | None) -> None:
    """On the meta device, as torch's optimizers: the state is that of a real run."""
    check_without_memory(name, projector)


@pytest.mark.parametrize("name", ["SSTAdamW", "GaLoreAdamW"])
def test_nor_where_a_part_of_the_state_rests_on_the_host(name: str) -> None:
    """There is no host memory that goes with none."""
    own = {"offload_inactive": True} if name == "SSTAdamW" else {}
    check_without_memory(name, None, **own, state_device="cpu")


def check_without_memory(name: str, projector: str | None, **options: Any) -> None:
    found = []
    for device in ("cpu", "meta"):
        params = [nn.Parameter(torch.randn(shape, device=device)) for shape in (SHAPE, (16,))]
        own = {} if projector is None else {"projector": projector}
        groups = [{"params": params[:1], "rank": 4}, {"params": params[1:], "rank": None}]
        optimizer = cases.build(name, groups, **own, **options)
        for _ in range(5):
            for param in params:
                param.grad = torch.randn(param.shape, device=device)
            optimizer.step()
        states = [optimizer.state[param] for param in params]
        found.append([{k: (x.shape, x.dtype) for k, x in own.items()} for own in states])
    assert found[0] == found[1]


@pytest.mark.skipif(not hasattr(nn.Parameter, "grad_dtype"), reason="torch has no grad_dtype")
@pytest.mark.parametrize("name", cases.method_names())
def test_gradients_of_another_dtype_are_refused(name: str) -> None:
    """torch allows them, and its optimizers fail in the middle of the second step."""
    param = nn.Parameter(cases.parameter(SHAPE, torch.bfloat16).detach())
    param.grad_dtype = torch.float32
    start = param.detach().clone()
    optimizer = cases.build(name, [param])
    param.grad = torch.randn(SHAPE)
    with pytest.raises(RuntimeError, match=r"set grad_dtype of the parameter to torch.bfloat16"):
        optimizer.step()
    assert torch.equal(param, start) and not optimizer.state


@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize("rank", [2, 8, 0.5, None])
@pytest.mark.parametrize(("form", "make"), [("switchlora", SwitchLoRAAdamW), ("sst", SSTAdamW)])
def test_the_rank_of_layers_is_that_of_their_factors(
    form: Any, make: Any, rank: Any, stepped: bool
) -> None:
    """Before the first step it was taken, or failed in an index."""
    model = nn.Sequential(nn.Linear(16, 16))
    optimizer = make(convert(model, form, rank=4), lr=1e-2)

    def step() -> None:
        model(torch.ones(2, 16)).square().sum().backward()
        optimizer.step()

    if stepped:
        step()
    optimizer.param_groups[0]["rank"] = rank
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"has 4 vectors.*Set it back to 4"):
        step()
    assert all(map(torch.equal, before, model.parameters()))
    optimizer.param_groups[0]["rank"] = 0.25
    if not stepped:
        step()
