"""Module forms against the optimizer forms, autograd, and the weights they came from."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_optim import SSTAdamW, SSTAdamW8bit, lowrank_groups, memory
from lowrank_optim.nn import (
    CONVERTERS,
    FORMS,
    Converter,
    SpectralLinear,
    convert,
    merge,
    to_modules,
    to_weights,
)
from tests import runs
from tests.compare import TOLERANCES, assert_close, relative

F64 = torch.float64
SST: dict[str, Any] = {"steps_per_iteration": 4, "warmup_steps": 2, "lr": 1e-2}


class Conv1D(nn.Module):
    """As GPT-2's: ``x W + b`` with the weight stored as (in, out)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(nx, nf) * 0.3)
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def network(dtype: torch.dtype = F64) -> nn.Sequential:
    """Wide, tall and square layers, with bias and without, stored either way."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 9, bias=False), nn.Tanh(), nn.Linear(9, 9),
        Conv1D(14, 9), nn.LayerNorm(14), Conv1D(7, 14),
    ).to(dtype)  # fmt: skip


def weights(model: nn.Module) -> list[Tensor]:
    """Of all layers with one, as the dense model stores them."""
    return [
        m.weight.detach() for m in model.modules() if isinstance(getattr(m, "weight", None), Tensor)
    ]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x = torch.randn(16, 12, generator=torch.Generator().manual_seed(step), dtype=F64)
        x = x.to(next(model.parameters()).dtype)
        optimizer.zero_grad()
        F.mse_loss(model(x), x[:, :7].tanh()).backward()
        optimizer.step()


SAME: dict[str, dict[str, Any]] = {
    "default": {},
    "plain": {"enhanced": False, "seed": 3},
    "flip": {"sampling": "topr", "negative": "flip", "vector_lr_scale": 0.5},
    "maximize": {"iterations_per_round": 2, "proj_type": "left", "maximize": True, "lr": 1e-3},
}


@pytest.mark.parametrize(
    ("options", "stagger"),
    [
        pytest.param(
            options, stagger, id=f"{name}-{stagger}",
            marks=pytest.mark.slow if i % 2 == stagger else (),
        )
        for i, (name, options) in enumerate(SAME.items())
        for stagger in (False, True)
    ],
)  # fmt: skip
def test_modules_and_weights_follow_the_same_run(stagger: bool, options: dict[str, Any]) -> None:
    """Five iterations and several factorisations, layer by layer."""
    dense, model = network(), network()
    options = {**SST, "weight_decay": 0.1, "stagger": stagger, **options}
    of_weights = SSTAdamW(lowrank_groups(dense, rank=3), **options)
    at_convert = {k: v for k, v in options.items() if k in SpectralLinear.options}
    of_factors = SSTAdamW(convert(model, "sst", rank=3, **at_convert), **options)
    assert sum(isinstance(m, SpectralLinear) for m in model) == 5
    for step in range(20):
        train(dense, of_weights, range(step, step + 1))
        train(model, of_factors, range(step, step + 1))
        for a, b in zip(weights(model), weights(dense), strict=True):
            assert_close(a, b)


def plain(model: nn.Module) -> Any:
    return model.parameters()


def grouped(model: nn.Module) -> Any:
    return lowrank_groups(model, rank=3)


@pytest.mark.parametrize(
    ("first", "groups", "cls"),
    [
        (0, grouped, SSTAdamW),
        (11, grouped, SSTAdamW8bit),
        (12, plain, SSTAdamW),
        pytest.param(0, grouped, SSTAdamW8bit, marks=pytest.mark.slow),
        pytest.param(11, grouped, SSTAdamW, marks=pytest.mark.slow),
        pytest.param(12, plain, SSTAdamW8bit, marks=pytest.mark.slow),
    ],
)
def test_a_run_may_change_its_form(cls: type[SSTAdamW], first: int, groups: Any) -> None:
    """To modules and back, in the middle of an iteration, between two, or before the first step.

    Also where the groups had no names of parameters.
    """
    dense, model = (nn.Sequential(OrderedDict(body=network())) for _ in range(2))
    want = cls(groups(dense), rank=3, **SST)
    got: Any = cls(groups(model), rank=3, **SST)
    train(dense, want, range(20))
    train(model, got, range(first))
    got = to_modules(model, got, "sst")
    assert isinstance(model.body[0], SpectralLinear)
    train(model, got, range(first, 16))
    got = to_weights(model, got)
    assert type(model.body[0]) is nn.Linear
    train(model, got, range(16, 20))
    for a, b in zip(weights(model), weights(dense), strict=True):
        assert_close(a, b)
    for a, b in zip(model.parameters(), dense.parameters(), strict=True):
        assert got.state[a].keys() == want.state[b].keys()
        assert got.state[a]["step"] == 20


def reference(layer: SpectralLinear, x: Tensor, enhanced: bool) -> dict[str, Tensor]:
    """Gradients of ``sum(tanh(y))`` by autograd through the product of all factors."""
    factors = {
        k: p.detach().clone().requires_grad_() for k, p in layer.named_parameters() if k != "order"
    }
    index, r = layer.order.long(), layer.u.shape[0]

    def output(s: Tensor) -> Tensor:
        u, v = (torch.cat([factors[k], factors[f"{k}_rest"]]) for k in "uv")
        return F.linear(inputs, (u.mT * s[index]) @ v, factors.get("bias"))

    inputs = x.detach().clone().requires_grad_()
    loss = output(factors["s"]).tanh().sum()
    loss.backward()
    grads = {k: p.grad for k, p in factors.items() if p.grad is not None}
    if enhanced:
        s = factors["s"].detach()[index[:r], None]
        grads |= {"u": grads["u"] / s, "v": grads["v"] / s}
    assert inputs.grad is not None
    return {**grads, "x": inputs.grad}


@pytest.mark.parametrize("enhanced", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(6, 11), (11, 6), (5, 5)])
def test_backward_is_autograds(enhanced: bool, bias: bool, shape: tuple[int, int]) -> None:
    """Without any product of the size of the weight."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(*shape, bias=bias)).to(F64)
    convert(model, "sst", rank=2, enhanced=enhanced)
    layer = model[0]
    assert isinstance(layer, SpectralLinear)
    x = torch.randn(3, 4, shape[0], dtype=F64, requires_grad=True)
    want = reference(layer, x, enhanced)
    layer(x).tanh().sum().backward()
    got = {k: p.grad for k, p in layer.named_parameters() if p.grad is not None}
    assert set(got) == {"u", "v", "s"} | ({"bias"} if bias else set())
    for key, grad in {**got, "x": x.grad}.items():
        assert grad is not None
        assert float((grad - want[key]).abs().max()) <= 1e-12


def test_no_gradient_has_the_size_of_the_weight() -> None:
    """Neither kept nor made on the way: the largest product of a backward is counted."""
    model = nn.Sequential(nn.Linear(64, 48, bias=False))
    convert(model, "sst", rank=4)
    x = torch.randn(5, 64, requires_grad=True)
    sizes: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm_.default):
                sizes.append(out.numel())
            return out

    with Watch():
        model(x).square().sum().backward()
    assert len(sizes) == 4 + 4 + 2 + 2
    assert max(sizes) <= 5 * 64


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
def test_convert_and_merge_give_the_weights_back(dtype: torch.dtype) -> None:
    """With the type, dtype, bias, mode and requires_grad of before, and the same outputs."""
    model = network(dtype).eval()
    before, x = copy.deepcopy(model), torch.randn(4, 12).to(dtype)
    y = model(x)
    bias = model[0].bias
    convert(model, "sst", rank=3)
    if dtype != torch.bfloat16:
        assert_close(model(x), y, dtype)
    assert merge(model) is model
    assert [type(m) for m in model] == [type(m) for m in before]
    assert model[0].bias is bias and not model[0].training
    for a, b in zip(model.state_dict().values(), before.state_dict().values(), strict=True):
        assert a.dtype == b.dtype
        assert_close(a, b, dtype)


@pytest.mark.parametrize("cls", [SSTAdamW, SSTAdamW8bit])
def test_resume(cls: type[SSTAdamW]) -> None:
    """Model and optimizer from ``weights_only`` files in the middle of an iteration: same bits."""
    model, other = network(), network()
    optimizer = cls(convert(model, "sst", rank=3), **SST)
    train(model, optimizer, range(7))
    resumed = cls(convert(other, "sst", rank=3), **SST)
    other.load_state_dict(runs.through_a_file(model.state_dict()))
    resumed.load_state_dict(runs.loaded(runs.saved(optimizer)))
    train(model, optimizer, range(7, 15))
    train(other, resumed, range(7, 15))
    runs.assert_same(other.parameters(), model.parameters())
    runs.assert_same_state(runs.entries(resumed), runs.entries(optimizer))


def test_memory_is_the_formula() -> None:
    """``k(m+n)+k`` weights, ``r(m+n)+k`` gradients, twice that of moments; places are int32."""
    model = nn.Sequential(nn.Linear(64, 48, bias=False))
    m, n, k, r = 48, 64, 48, 5
    groups = convert(model, "sst", rank=r)
    optimizer = SSTAdamW(groups, lr=1e-2)
    model(torch.randn(3, 64)).sum().backward()
    optimizer.step()
    assert memory.storage_bytes(model.parameters()) == 4 * (k * (m + n) + k) + 4 * k
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert memory.storage_bytes(grads) == 4 * (r * (m + n) + k)
    held = memory.report(optimizer)
    assert (held.basis, held.moments, held.other) == (0, 4 * 2 * (r * (m + n) + k), 16)
    estimate = memory.estimate(model, SSTAdamW, groups=lambda _: groups)
    assert estimate.state == held.total and estimate.gradients == memory.storage_bytes(grads)


def test_shared_weights_stay_dense() -> None:
    """A weight of two layers, or of a kind of layer that is not known, is stepped as a weight."""

    class Own(nn.Linear):
        pass

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 9), Own(9, 9), nn.Linear(9, 6)).to(F64)
    model[1].weight = model[0].weight
    twin = copy.deepcopy(model)
    groups = convert(model, "sst", rank=2)
    assert [type(m).__name__ for m in model] == ["Linear", "Linear", "Own", "SpectralLinear"]
    optimizer, dense = SSTAdamW(groups, **SST), SSTAdamW(lowrank_groups(twin, rank=2), **SST)
    for step in range(15):
        x = torch.randn(8, 9, generator=torch.Generator().manual_seed(step), dtype=F64)
        for net, own in ((model, optimizer), (twin, dense)):
            own.zero_grad()
            net(x).square().sum().backward()
            own.step()
    for a, b in zip(weights(model), weights(twin), strict=True):
        assert_close(a, b)


def test_bfloat16_and_autocast() -> None:
    """Factors stay float32; products are in the input's dtype, or autocast's."""
    model = network(torch.bfloat16)
    x = torch.randn(4, 12)
    first = model[0](x.bfloat16())
    convert(model, "sst", rank=3)
    assert model[0].u.dtype == model[0].s.dtype == torch.float32
    # three rounded factors, where a weight is one: close in norm, not entry by entry
    assert relative(model[0](x.bfloat16()), first) < TOLERANCES[torch.bfloat16].rtol
    y = model(x.bfloat16())
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert model[0].u.grad.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert model[0](x).dtype == torch.bfloat16


def test_errors() -> None:
    model = network()
    with pytest.raises(ValueError, match="method"):
        convert(model, "lora")
    with pytest.raises(ValueError, match="modules hold all factors"):
        convert(model, "sst", rank=2, factors="active")
    with pytest.raises(ValueError, match="matches no"):
        convert(model, "sst", rank=2, target_modules="nothing")
    optimizer = SSTAdamW(lowrank_groups(network(), rank=3), **SST)
    other = SSTAdamW(convert(network(), "sst", rank=3), **SST)
    with pytest.raises(ValueError):
        optimizer.load_state_dict(other.state_dict())


def test_a_method_may_convert_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its functions are called with our arguments; ``merged`` is all else."""

    class Doubled(nn.Module):
        def merged(self) -> nn.Module:
            return nn.Identity()

    def own(model: nn.Module, *, rank: int, target_modules: str, **options: Any) -> list[Any]:
        model[0] = Doubled()  # type: ignore[operator]
        return [(rank, target_modules, options)]

    def changed(model: nn.Module, optimizer: Any) -> Any:
        return model, optimizer

    monkeypatch.setitem(CONVERTERS, "tmp", Converter(Doubled, own, changed, changed))
    model, optimizer = network(), object()
    assert convert(model, "tmp", rank=7, gain=2) == [(7, "all-linear", {"gain": 2})]
    assert to_modules(model, optimizer, "tmp") == (model, optimizer)
    assert to_weights(model, optimizer) == (model, optimizer)
    assert type(merge(model)[0]) is nn.Identity  # type: ignore[index]
    assert type(merge(Doubled())) is nn.Identity


@pytest.mark.parametrize("method", [*FORMS, *CONVERTERS])
def test_hooks_stay_with_their_layer(method: str) -> None:
    """Those of an activation that is steered or recorded, say: by hand on a model without hooks."""

    def model() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(9, 12, dtype=torch.float64))

    x, plain, hooked = torch.randn(4, 9, dtype=torch.float64), model(), model()
    layer, seen = hooked[0], list[Tensor]()
    handles = [
        layer.register_forward_pre_hook(lambda _, args: (3 * args[0],)),
        layer.register_forward_hook(lambda _m, _a, _k, y: y + 1, with_kwargs=True),
        layer.register_full_backward_hook(lambda _, __, grads: seen.append(grads[0])),
    ]
    for m in (plain, hooked):
        convert(m, method, rank=2)
    wanted = plain(3 * x) + 1
    y = hooked(x)
    y.sum().backward()
    assert type(hooked[0]) is type(plain[0]) is not nn.Linear
    assert torch.equal(y, wanted) and torch.equal(seen[0], torch.ones_like(y))
    assert_close(merge(hooked)(x), wanted)
    for handle in handles:
        handle.remove()
    assert_close(hooked(x), plain(x))


@pytest.mark.parametrize("method", ["sst", "switchlora"])
def test_a_layer_with_a_forward_of_its_own_stays_a_weight(method: str) -> None:
    """As packages that move tensors between devices make it."""
    model = nn.Sequential(nn.Linear(9, 12), nn.Linear(12, 9))
    forward = model[0].forward
    model[0].forward = lambda x: 2 * forward(x)
    convert(model, method, rank=2)
    assert [type(layer) is nn.Linear for layer in model] == [True, False]
