"""SLTrain and LOST against the paper's equations, autograd, and the layers that they merge into."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_optim import (
    GaLoreAdamW,
    GaLoreAdamW8bit,
    attach_in_backward,
    memory,
    methods,
)
from lowrank_optim.nn import LOSTLinear, SLTrainLinear, convert, merge, to_modules, to_weights
from tests import cases, runs
from tests.compare import TOLERANCES, assert_close, relative
from tests.nn.test_nn import Conv1D, network, train
from tests.oracles import sltrain as oracle
from tests.pairwise import in_turns

F64 = torch.float64
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "sltrain": ("sltrain", {"density": 0.1, "scale": 6.0, "seed": 3}),
    "lost": ("lost", {"density": 0.3, "gamma": 0.7}),
    "lost-silu": ("lost", {"density": 0.3, "gamma": 0.7, "activation": "silu"}),
}
LAYERS: dict[str, Any] = {"sltrain": SLTrainLinear, "lost": LOSTLinear}
each = pytest.mark.parametrize("case", CASES)


def converted(case: str, dtype: torch.dtype = F64, **more: Any) -> tuple[nn.Module, Any]:
    """A net of all kinds of layers, with b filled: at its beginning it is zero for SLTrain."""
    method, options = CASES[case]
    model = network(dtype)
    groups = convert(model, method, rank=3, **{**options, **more})
    for n, layer in enumerate(layers(model)):
        generator = torch.Generator().manual_seed(n)
        with torch.no_grad():
            layer.b.add_(0.1 * torch.randn(layer.b.shape, generator=generator, dtype=F64).to(dtype))
    return model, groups


def layers(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, SLTrainLinear | LOSTLinear)]


def dense(layer: Any, x: Tensor) -> Tensor:
    """What the paper says of the layer's parameters, in float64 and outside of its code."""
    a, b, values = (p.to(F64) for p in (layer.a, layer.b, layer.values))
    bias = None if layer.bias is None else layer.bias.to(F64)
    if isinstance(layer, SLTrainLinear):
        weight = oracle.sltrain_weight(a, b, values, layer.index, layer.s * len(a))
        return oracle.sltrain(x, weight, bias)
    silu = layer.activation == "silu"
    y = oracle.lost(x, a, b, values, layer.index.tolist(), layer.gamma, silu)
    return y if bias is None else y + bias


@each
def test_forward_and_gradients_are_those_of_the_equations(case: str) -> None:
    """Wide, tall and square layers, with bias and without, stored either way."""
    model, _ = converted(case)
    found = layers(model)
    assert len(found) == 5 and isinstance(found[0], LAYERS[CASES[case][0]])
    for layer in found:
        x = torch.randn(2, 5, layer.in_features, dtype=F64, requires_grad=True)
        wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
        outputs = layer(x), dense(layer, x)
        assert_close(*outputs)
        ours, theirs = (torch.autograd.grad(y.tanh().sum(), wanted) for y in outputs)
        for g, h in zip(ours, theirs, strict=True):
            assert_close(g, h)


@each
def test_gradcheck(case: str) -> None:
    layer = layers(converted(case)[0])[-1]
    names = [n for n, p in layer.named_parameters() if p.requires_grad]

    def run(x: Tensor, *params: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, params, strict=True)), x)

    inputs = [torch.randn(3, layer.in_features, dtype=F64, requires_grad=True)]
    inputs += [
        p.detach().clone().requires_grad_() for n, p in layer.named_parameters() if n in names
    ]
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)  # entries: the test above


def test_only_what_is_asked_for_is_computed() -> None:
    """Frozen parts have no gradient, and the others' do not change."""
    layer = layers(converted("sltrain")[0])[0]
    x = torch.randn(4, layer.in_features, dtype=F64)
    layer(x).sum().backward()
    grads = {n: p.grad for n, p in layer.named_parameters() if p.requires_grad}
    for name in ("a", "b", "values", "bias"):
        layer.zero_grad()
        layer.get_parameter(name).requires_grad_(False)
        layer(x).sum().backward()
        for other, param in layer.named_parameters():
            assert (param.grad is None) == (not param.requires_grad)
            assert param.grad is None or torch.equal(param.grad, grads[other])
        layer.get_parameter(name).requires_grad_(True)


# ------------------------------------------------------------------ the beginning


def test_sltrain_begins_as_published() -> None:
    model = nn.Sequential(nn.Linear(200, 100), nn.Linear(100, 200))
    convert(model, "sltrain", rank=8, density=0.03)
    for layer in layers(model):
        bound = layer.in_features**-0.5
        assert not layer.b.any() and layer.s == 2.0
        assert len(layer.values) == 600 and layer.index.dtype == torch.int32
        assert (layer.index.diff() > 0).all() and layer.index[0] >= 0 and layer.index[-1] < 20000
        for drawn in (layer.a.detach(), layer.values.detach()):
            assert float(drawn.abs().max()) < bound
            assert 0.9 < float(drawn.std()) / (bound / 3**0.5) < 1.1
            assert abs(float(drawn.mean())) < 0.1 * bound
        # uniform over rows and columns: each of ten bands has a tenth
        for band in (layer.index // layer.in_features * 10 // layer.out_features,
                     layer.index % layer.in_features * 10 // layer.in_features):  # fmt: skip
            assert (band.bincount(minlength=10) - 60).abs().max() < 35  # 4.8 deviations
    first, second = layers(model)
    assert not torch.equal(first.a[:, :100], second.a)


def test_draws_are_of_the_seed_and_the_name() -> None:
    one, same, other = (converted("sltrain", seed=s)[0] for s in (1, 1, 2))
    for a, b, c in zip(*map(layers, (one, same, other)), strict=True):
        assert torch.equal(a.index, b.index) and torch.equal(a.values, b.values)
        assert not torch.equal(a.values, c.values)
    alone = nn.Sequential(nn.Linear(12, 20)).to(F64)
    convert(alone, "sltrain", rank=3, density=0.1, seed=1)  # whatever else there is
    assert torch.equal(alone[0].values, layers(one)[0].values)


def test_lost_begins_with_the_spectrum_of_the_weight() -> None:
    model = network()
    before = [
        m.weight.detach().mT if isinstance(m, Conv1D) else m.weight.detach()
        for m in model if isinstance(m, nn.Linear | Conv1D)
    ]  # fmt: skip
    convert(model, "lost", rank=3, density=0.3)
    for layer, weight in zip(layers(model), before, strict=True):
        a, b, columns = oracle.lost_beginning(weight, 3, max(1, int(0.3 * weight.shape[1])))
        assert layer.index.tolist() == columns
        assert torch.equal(layer.values, weight[:, columns])
        assert_close(layer.b @ layer.a, b @ a)  # signs of singular vectors are free
        assert_close(layer.a.norm(dim=1), a.norm(dim=1))
        assert_close(layer.b.norm(dim=0), b.norm(dim=0))


# ------------------------------------------------------------------ there and back


@each
def test_merge(case: str) -> None:
    """The plain net does the same; an activation leaves everything as it was, with an error."""
    model, _ = converted(case)
    x = torch.randn(6, 12, dtype=F64)
    y = model(x)
    if case == "lost-silu":
        mixed = nn.Sequential(converted("sltrain")[0], model)
        with pytest.raises(ValueError, match=r"activation='silu' .* no linear.*activation=None"):
            merge(mixed)
        assert len(layers(mixed)) == 10
        return
    products = [layer.product() for layer in layers(model)]
    kinds = [type(m) for m in network()]
    merged: Any = merge(model)
    assert [type(m) for m in merged] == kinds
    assert_close(merged(x), y)
    plain = [m for m in merged if isinstance(m, nn.Linear | Conv1D)]
    for layer, product in zip(plain, products, strict=True):
        weight = layer.weight.mT if isinstance(layer, Conv1D) else layer.weight
        assert torch.equal(weight, product) and layer.weight.requires_grad


@each
def test_a_state_dict_goes_into_another_conversion(case: str) -> None:
    """To the bit, whatever that one drew; an index that is none is an error."""
    model, _ = converted(case)
    saved = runs.through_a_file(model.state_dict())
    torch.manual_seed(7)
    other = network()
    for p in other.parameters():
        nn.init.normal_(p)
    method, options = CASES[case]
    convert(other, method, rank=3, **({**options, "seed": 9} if method == "sltrain" else options))
    x = torch.randn(6, 12, dtype=F64)
    assert not torch.equal(other(x), model(x))
    other.load_state_dict(saved)
    assert torch.equal(other(x), model(x))
    with pytest.raises(RuntimeError, match=r"0\._extra_state holds 3 numbers; allowed are [12]:"):
        other.load_state_dict({**saved, "0._extra_state": torch.zeros(3)})
    key = "0.index"
    for wrong, said in (
        (saved[key] + 10**6, r"0\.index holds .* allowed are 0 to"),
        (saved[key].flip(0), r"0\.index holds .* ascending"),
        (saved[key].double(), r"0\.index is torch\.float64; allowed is torch\.int32"),
    ):
        with pytest.raises(RuntimeError, match=said):
            other.load_state_dict({**saved, key: wrong})
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize(
    ("method", "own", "said"),
    [
        ("sltrain", {"scale": 6.0}, r"scale / rank of 0 is 2 in the checkpoint and 5\.3+ here"),
        ("lost", {"gamma": 0.7}, r"gamma of 0 is 0\.7 in the checkpoint and 0\.9 here: convert"),
        ("lost", {"activation": "silu"}, r"activation of 0 is 1 in the checkpoint and 0 here"),
    ],
)
def test_a_state_dict_of_other_settings_is_an_error(
    method: str, own: dict[str, Any], said: str
) -> None:
    """The same shapes with another meaning."""
    saved, other = network(), network()
    convert(saved, method, rank=3, **own)
    convert(other, method, rank=3)
    with pytest.raises(RuntimeError, match=said):
        other.load_state_dict(saved.state_dict())


@pytest.mark.parametrize("method", LAYERS)
def test_no_form_over_dense_weights(method: str) -> None:
    model = network()
    optimizer = GaLoreAdamW(model.named_parameters(), rank=3)
    with pytest.raises(NotImplementedError, match=rf"convert\(model, '{method}'\) before the run"):
        to_modules(model, optimizer, method)
    groups = convert(model, method, rank=3)
    with pytest.raises(NotImplementedError, match=r"merge\(model\) after it"):
        to_weights(model, GaLoreAdamW(groups))


# ------------------------------------------------------------------ optimizers


@pytest.mark.parametrize(
    ("name", "case"),
    [
        *in_turns(cases.method_names(), ("sltrain", "lost")),
        ("GaLoreAdamW", "lost-silu"),
    ],
)
def test_any_optimizer_steps_the_factors(name: str, case: str) -> None:
    """Groups are dense ones: what torch's own class does on the same layers, to the rounding."""
    model, groups = converted(case)
    assert all(g["rank"] is None for g in groups)
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for g in groups for p in g["params"]} == trained
    names = {n for g in groups for n in g["param_names"]}
    assert names == {n for n, p in model.named_parameters() if p.requires_grad}
    start = [layer.index.clone() for layer in layers(model)]
    make = getattr(methods, name)
    optimizer = make(groups, lr=1e-2)
    before = copy.deepcopy(model.state_dict())
    train(model, optimizer, range(3))
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]) == key.endswith(("index", "_extra_state")), key
    assert all(torch.equal(layer.index, x) for layer, x in zip(layers(model), start, strict=True))
    if name != "GaLoreAdamW":
        return
    other, _ = converted(case)
    train(other, torch.optim.AdamW((p for p in other.parameters() if p.requires_grad), lr=1e-2),
          range(3))  # fmt: skip
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert_close(a.double(), b.double())


def test_a_run_learns_what_the_low_rank_part_cannot() -> None:
    """A target of rank 1 and two entries beside it: the places of S are trained to them."""
    torch.manual_seed(0)
    target = torch.outer(torch.randn(8), torch.randn(8)).to(F64)
    model = nn.Sequential(nn.Linear(8, 8, bias=False)).to(F64)
    groups = convert(model, "sltrain", rank=1, density=0.2, scale=1.0)
    layer = model[0]
    wide = target.clone()
    wide.view(-1)[layer.index[:4].long()] += torch.tensor([3.0, -2.0, 4.0, 1.0], dtype=F64)
    optimizer = GaLoreAdamW(groups, lr=0.1, weight_decay=0.0)
    for step in range(200):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * (1 - step / 200)
        optimizer.zero_grad()
        F.mse_loss(layer(torch.eye(8, dtype=F64)), wide.mT, reduction="sum").backward()
        optimizer.step()
    assert relative(layer.weight, wide) < 1e-2
    best = torch.linalg.svdvals(wide)[1:].square().sum().sqrt() / wide.norm()
    assert best > 0.3  # what rank 1 leaves


@each
def test_inside_backward(case: str) -> None:
    """``mode="step"`` frees each gradient, with the same run."""
    ordinary, inside = (converted(case) for _ in range(2))
    train(ordinary[0], GaLoreAdamW(ordinary[1], lr=1e-2), range(3))
    optimizer = GaLoreAdamW(inside[1], lr=1e-2)
    with attach_in_backward(optimizer, "step"):
        train(inside[0], optimizer, range(3))
        assert all(p.grad is None for p in inside[0].parameters())
    for a, b in zip(ordinary[0].parameters(), inside[0].parameters(), strict=True):
        assert torch.equal(a, b)


@each
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16(case: str, autocast: bool) -> None:
    """Parameters in the weight's dtype; outputs and gradients near those of float64."""
    dtype = torch.float32 if autocast else torch.bfloat16
    model, groups = converted(case, dtype)
    for layer in layers(model):
        assert {p.dtype for n, p in layer.named_parameters() if n != "index"} == {dtype}
        x = torch.randn(64, layer.in_features, dtype=dtype)
        wide = copy.deepcopy(layer).double()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = layer(x)
        assert y.dtype == torch.bfloat16
        assert relative(y.double(), wide(x.double())) < TOLERANCES[torch.bfloat16].rtol
        y.double().square().sum().backward()
        wide(x.double()).square().sum().backward()
        for p, q in zip(layer.parameters(), wide.parameters(), strict=True):
            assert p.grad is None or relative(p.grad.double(), q.grad) < 0.03
    if not autocast:
        train(model, GaLoreAdamW8bit(groups, lr=1e-2), range(2))
    cast = layers(model)[0]
    cast.index = nn.Parameter(cast.index.float(), requires_grad=False)
    with pytest.raises(RuntimeError, match=r"index of the sparse part is in torch\.float32"):
        cast(torch.randn(2, cast.in_features, dtype=dtype))


# ------------------------------------------------------------------ memory


@each
@pytest.mark.parametrize("optimizer", [GaLoreAdamW, GaLoreAdamW8bit])
def test_memory_is_known_before_there_is_any(case: str, optimizer: Any) -> None:
    """On the meta device: the bytes of the real run, places of the sparse part included."""
    method, options = CASES[case]
    with torch.device("meta"):
        shell = nn.Sequential(nn.Linear(96, 64), nn.Linear(64, 96))
    groups = convert(shell, method, rank=8, **options)
    assert all(p.is_meta for p in shell.parameters())
    said = memory.estimate(shell, optimizer, groups=lambda _: groups, device="cpu")
    model = nn.Sequential(nn.Linear(96, 64), nn.Linear(64, 96))
    real = optimizer(convert(model, method, rank=8, **options))
    model(torch.randn(4, 96)).sum().backward()
    real.step()
    assert said.weights == sum(p.numel() * p.element_size() for p in model.parameters())
    assert said.state == memory.report(real).total
    trained = [p for p in model.parameters() if p.requires_grad]
    assert said.gradients == sum(p.numel() * p.element_size() for p in trained)


def test_backward_keeps_nothing_of_the_size_of_the_weight() -> None:
    layer = layers(converted("sltrain")[0])[0]
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.append(x.numel()) or x, lambda x: x
    ):
        layer(torch.randn(2, layer.in_features, dtype=F64))
    assert kept and max(kept) < layer.in_features * layer.out_features


# ------------------------------------------------------------------ what may be given


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("sltrain", {"density": 0.0}, r"density must be a number in \(0, 1\], got 0\.0"),
        ("sltrain", {"density": True}, r"density must be a number .* got True"),
        ("sltrain", {"scale": -1.0}, r"scale must be a number in \(0, inf\], got -1\.0"),
        ("lost", {"density": 1.5}, r"density must be a number in \(0, 1\], got 1\.5"),
        ("lost", {"gamma": 1.0}, r"gamma must be below 1"),
        ("lost", {"activation": "relu"}, r"activation must be None or 'silu', got 'relu'"),
        ("lost", {"target_modules": "norm"}, r"matches no linear layer"),
        ("sltrain", {"rank": 0}, r"rank must be a positive int or a fraction"),
    ],
    ids=str,
)
def test_what_may_not_be_given(method: str, options: dict[str, Any], said: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential())
    model[1].norm = nn.Bilinear(4, 4, 4)
    before = list(model.modules())
    with pytest.raises(ValueError, match=said):
        convert(model, method, **{"rank": 2, **options})
    assert list(model.modules()) == before


def test_ranks_and_keys() -> None:
    model = network()
    with pytest.warns(UserWarning, match=r"rank 10 is clamped .* 2\.weight of shape \(9, 20\) and"):
        groups = convert(model, "sltrain", rank=10, weight_decay=0.2, lr=1e-3)
    assert [len(layer.a) for layer in layers(model)] == [10, 9, 9, 9, 7]
    factors = next(g for g in groups if "0.a" in g["param_names"])
    assert (factors["weight_decay"], factors["lr"]) == (0.2, 1e-3)
    fractions = network()
    convert(fractions, "lost", rank=0.5)
    assert [len(layer.a) for layer in layers(fractions)] == [6, 4, 4, 4, 4]
