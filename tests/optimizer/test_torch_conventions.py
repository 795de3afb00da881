"""What ``torch.optim``'s own test suite asks of an optimizer, asked of every method here."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from lowrank_optim import GaLoreAdafactor, GaLoreAdamW, GaLoreLion, GaLoreSGD
from lowrank_optim.optimizer import LowRankOptimizer
from tests import cases, runs
from tests.compare import assert_close
from tests.pairwise import paired

LR = 2.0**-6  # the same number in float32 and in Python
METHODS: dict[str, tuple[Callable[..., LowRankOptimizer], dict[str, Any]]] = {
    "adamw": (GaLoreAdamW, {}),
    "adamw bfloat16": (GaLoreAdamW, {"state_dtype": "bfloat16"}),
    "adamw random": (GaLoreAdamW, {"projector": "random", "on_refresh": "project"}),
    "lion": (GaLoreLion, {}),
    "sgd": (GaLoreSGD, {"momentum": 0.9}),
    "adafactor": (GaLoreAdafactor, {"relative_step": False, "scale_parameter": False}),
}
every_method = pytest.mark.parametrize("method", METHODS)


def make(method: str, params: Any, **options: Any) -> LowRankOptimizer:
    cls, own = METHODS[method]
    return cls(
        params, **{"lr": LR, "rank": 3, "update_proj_gap": 4, "scale": 1.0, **own, **options}
    )


@every_method
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("contiguous", [True, False])
def test_goes_in_the_right_direction(method: str, maximize: bool, contiguous: bool) -> None:
    """torch's own problem: ten inputs to five, twenty steps, loss lower (higher if maximize)."""
    if contiguous:
        weight, bias = nn.Parameter(torch.randn(10, 5)), nn.Parameter(torch.randn(10))
    else:
        weight = nn.Parameter(torch.randn(10, 5, 2)[..., 0])
        bias = nn.Parameter(torch.randn(10, 2)[..., 0])
        assert not weight.is_contiguous()
    x = torch.randn(5)

    def loss() -> Tensor:
        return (weight.mv(x) + bias).square().sum()

    optimizer = make(method, [weight, bias], maximize=maximize)
    first = float(loss().detach())
    for _ in range(20):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert (float(loss().detach()) > first) == maximize


@every_method
def test_strides_of_a_parameter_do_not_change_the_arithmetic(method: str) -> None:
    dense = [nn.Parameter(torch.randn(s)) for s in ((9, 6), (6, 9), (2, 6, 8), (5,))]
    strided = [
        nn.Parameter(torch.stack([p.detach()] * 2, -1)[..., 0]) if i % 2 else
        nn.Parameter(p.detach().mT.contiguous().mT)
        for i, p in enumerate(dense)
    ]  # fmt: skip
    assert not any(p.is_contiguous() for p in strided)
    one, other = make(method, dense), make(method, strided)
    for step in range(6):
        runs.set_grads(dense, step)
        for p, q in zip(strided, dense, strict=True):
            assert q.grad is not None
            p.grad = torch.empty_like(p).copy_(q.grad)
        one.step()
        other.step()
    for a, e in zip(strided, dense, strict=True):
        assert_close(a, e, torch.bfloat16 if "bfloat16" in method else None)


@every_method
def test_tensor_lr_is_float_lr(method: str) -> None:
    params = list(runs.parameters().values())
    mine = runs.copies(params)
    one, other = make(method, params), make(method, mine, lr=torch.tensor(LR))
    for step in range(6):
        if step == 3:  # schedulers fill a tensor in place
            one.param_groups[0]["lr"] = LR / 2
            other.param_groups[0]["lr"].fill_(LR / 2)
        runs.train(params, one, [step])
        runs.train(mine, other, [step])
    for a, e in zip(mine, params, strict=True):
        assert_close(a, e)


@pytest.mark.parametrize("on_accelerator", [False, True], ids=["host", "accelerator"])
@pytest.mark.parametrize("name", ["GaLoreAdamW", "FrugalLion", "SwitchLoRAAdamW", "SSTAdamW"])
def test_a_tensor_lr_may_have_a_dimension(
    name: str, on_accelerator: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One element, as torch takes it, is the number: a parameter without a dimension keeps none."""
    cases.branching(monkeypatch, lambda _: on_accelerator)
    found = []
    for lr in (torch.tensor(LR), torch.tensor([LR])):
        params = [cases.parameter(shape, torch.float32) for shape in ((), (3,), (6, 9))]
        optimizer = cases.build(name, params, lr=lr, state_dtype="bfloat16", weight_decay=0.1)
        cases.run(optimizer, params, [[torch.ones(p.shape) for p in params]] * 2)
        found.append(params)
    runs.assert_same(*found)


@every_method
def test_lr_and_weight_decay_are_per_group(method: str) -> None:
    """lr = 0 leaves a group alone; decay shrinks by exactly ``1 - lr decay`` more than without."""
    a, b, c = (nn.Parameter(torch.ones(6, 8)) for _ in range(3))
    optimizer = make(
        method,
        [
            {"params": [a], "lr": 0.0, "weight_decay": 0.5},
            {"params": [b], "weight_decay": 0.5},
            {"params": [c], "weight_decay": 0.0},
        ],
        stagger=False,
        projector="svd",
    )
    g = torch.randn(6, 8)
    for p in (a, b, c):
        p.grad = g.clone()
    optimizer.step()
    assert torch.equal(a, torch.ones(6, 8))
    assert_close(b, c - LR * 0.5)


@pytest.mark.parametrize(
    ("method", "named", "named_copy"), paired([*METHODS], [False, True], [False, True])
)
def test_state_dict_is_deterministic_under_interleaved_steps(
    method: str, named: bool, named_copy: bool
) -> None:
    """Two optimizers that share a random generator drift apart here (hakuli's does)."""
    weights = runs.parameters()
    params = list(weights.values())
    mine = runs.copies(params)

    def listed(ps: list[nn.Parameter], with_names: bool) -> Any:
        return list(zip(weights, ps, strict=True)) if with_names else ps

    optimizer = make(method, listed(params, named))
    runs.train(params, optimizer, range(3))
    for p, q in zip(mine, params, strict=True):
        p.data.copy_(q.data)
    twin = make(method, listed(mine, named_copy))
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    if named_copy and not named:  # draws are of the names from here on, and were of places
        without, optimizer = optimizer, make(method, listed(params, True))
        optimizer.load_state_dict(without.state_dict())
    for step in range(3, 7):
        runs.train(params, optimizer, [step])
        runs.train(mine, twin, [step])
        runs.assert_same(mine, params)
    runs.assert_same_state(runs.entries(twin), runs.entries(optimizer))
    names = twin.param_groups[0].get("param_names")
    assert names == (list(weights) if named or named_copy else None)  # kept if either had them


def conv_model() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Conv2d(4, 6, 3, stride=2), nn.BatchNorm2d(6), nn.Flatten())


@every_method
def test_can_load_an_older_state_dict(method: str) -> None:
    """With the model that torch uses: groups lack the keys that came later."""
    model = conv_model()
    optimizer = make(method, model.parameters())
    x = torch.randn(2, 4, 7, 7)

    def advance(m: nn.Module, o: LowRankOptimizer) -> None:
        o.zero_grad()
        m(x).square().mean().backward()
        o.step()

    for _ in range(3):
        advance(model, optimizer)
    old = copy.deepcopy(optimizer.state_dict())
    for key in ("maximize", "stagger", "seed", "stochastic_rounding", "method", "targets"):
        del old["param_groups"][0][key]
    twin_model = copy.deepcopy(model)
    twin = make(method, twin_model.parameters())
    twin.load_state_dict(old)
    for _ in range(3):
        advance(model, optimizer)
        advance(twin_model, twin)
    runs.assert_same(twin_model.parameters(), model.parameters())


@every_method
def test_can_be_printed(method: str) -> None:
    """A line for every key of every group, as torch prints them."""
    optimizer = make(method, [{"params": [nn.Parameter(torch.ones(4, 6))], "rank": 2}])
    text = repr(optimizer)
    assert text.startswith(f"{type(optimizer).__name__} (\nParameter Group 0\n")
    for key, value in optimizer.param_groups[0].items():
        assert key == "params" or f"    {key}: {value}\n" in text


@every_method
def test_deepcopy_copies_all_public_attributes(method: str) -> None:
    params = list(runs.parameters().values())
    optimizer = make(method, params)
    runs.train(params, optimizer, range(2))

    def public(o: Any) -> dict[str, type]:
        return {k: type(getattr(o, k)) for k in dir(o) if not k.startswith("_")}

    assert public(copy.deepcopy(optimizer)) == public(optimizer)


@every_method
def test_grad_scaler_skips_a_step_that_overflows(method: str) -> None:
    """Bitwise as if the step had not been: no refresh, no counter, no moment moves."""
    params = list(runs.parameters().values())
    mine = runs.copies(params)
    optimizer, plain = make(method, params), make(method, mine)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for step in range(6):
        overflow = step in (0, 4)  # before the first basis, and where refreshes are due
        runs.set_grads(params, step)
        for p, q in zip(mine, params, strict=True):
            assert q.grad is not None
            p.grad = q.grad.clone()
            q.grad.mul_(float("inf") if overflow else scaler.get_scale())
        scaler.scale(torch.ones(()))  # what a loss would do: the scale comes into being
        scaler.step(optimizer)
        scaler.update()
        if not overflow:
            plain.step()
        runs.assert_same(params, mine)
        runs.assert_same_state(runs.entries(optimizer), runs.entries(plain))


@every_method
def test_accelerate_loads_the_state_dict_before_the_first_step(method: str) -> None:
    """``AcceleratedOptimizer`` round-trips the state dict at once; the run must be the same."""
    params = list(runs.parameters().values())
    mine = runs.copies(params)
    optimizer, prepared = make(method, params), make(method, mine)
    prepared.load_state_dict(prepared.state_dict())
    assert not prepared.state
    assert prepared.param_groups[0].keys() == optimizer.param_groups[0].keys()
    runs.train(params, optimizer, range(6))
    runs.train(mine, prepared, range(6))
    runs.assert_same(mine, params)


@pytest.mark.parametrize("rank", [None, 3])
def test_one_cycle_moves_lr_and_betas_together(rank: int | None) -> None:
    """It needs ``betas`` in the groups (optimi has none), and edits both before every step.

    Dense against ``torch.optim.AdamW`` under the same scheduler; low-rank against the same values
    written by hand.
    """
    params = list(runs.parameters().values())
    mine = runs.copies(params)
    dense = rank is None
    options: dict[str, Any] = {"update_proj_gap": 4, "projector": "svd"}
    reference = (
        torch.optim.AdamW(params, foreach=False)
        if dense
        else GaLoreAdamW([{"params": params, "rank": rank}], **options)
    )
    optimizer = GaLoreAdamW([{"params": mine, "rank": rank}], **options)
    scheduler = OneCycleLR(optimizer, max_lr=0.1, total_steps=12)
    twin = OneCycleLR(reference, max_lr=0.1, total_steps=12) if dense else None
    seen = set()
    for step in range(12):
        seen.add(optimizer.param_groups[0]["betas"])
        if not dense:
            reference.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"]
            reference.param_groups[0]["betas"] = optimizer.param_groups[0]["betas"]
        runs.train(params, reference, [step])
        runs.train(mine, optimizer, [step])
        if step < 11:
            scheduler.step()
            if twin is not None:
                twin.step()
    assert len(seen) > 6
    runs.assert_same(mine, params)


@pytest.mark.parametrize("on_accelerator", [False, True], ids=["host", "accelerator"])
@pytest.mark.parametrize("name", cases.distinct_names())
def test_a_graph_of_old_weights_raises(
    name: str, on_accelerator: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of every optimizer of torch: weights that were written since are no longer its weights."""
    cases.branching(monkeypatch, lambda _: on_accelerator)
    for projector, dtype in itertools.product(
        ("svd", "columns", "dct"), (torch.float32, torch.bfloat16)
    ):
        if (name, projector) not in cases.pairs() and projector != "svd":
            continue
        weight = cases.parameter((16, 24), dtype)
        options = {"projector": projector, "stochastic_rounding": dtype == torch.bfloat16}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a class that has no projector
            optimizer = cases.build(name, [weight], **options)
        for _ in range(2):
            x = torch.randn(5, 24, dtype=dtype, requires_grad=True)
            loss = (x @ weight.mT).square().mean()
            loss.backward(retain_graph=True)
            before = weight.detach().clone()
            optimizer.step()
            assert not torch.equal(weight, before)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()
            optimizer.zero_grad()
