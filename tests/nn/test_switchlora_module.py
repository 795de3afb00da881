"""SwitchLoRA as modules: the same trajectory as over dense weights, with small gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.lora import LoRALinear, convert
from lowrank_optim import SwitchLoRAAdamW, SwitchLoRAAdamW8bit, lowrank_groups, memory
from lowrank_optim.nn import convert as as_factors
from lowrank_optim.nn import switchlora, switchlora_forms
from lowrank_optim.nn.switchlora import SwitchLoRALinear
from lowrank_optim.subspaces.switching import Schedule
from tests import runs
from tests.compare import assert_close
from tests.pairwise import in_turns

R = 4
FAST = {"interval": 4, "freeze_steps": 2}


class Conv1D(nn.Module):
    """GPT-2's: a linear layer whose weight is stored (in, out)."""

    def __init__(self, cols: int, rows: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(cols, rows) * 0.3)
        self.bias = nn.Parameter(torch.randn(rows))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Tall, square, wide without bias, and a norm; what is no linear layer is trained densely."""
    torch.manual_seed(0)
    layers = [nn.Linear(9, 14), nn.Tanh(), nn.Linear(14, 14), nn.LayerNorm(14)]
    return nn.Sequential(*layers, nn.Linear(14, 7, bias=False)).to(dtype)


def gpt(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Conv1D(9, 14), nn.Tanh(), Conv1D(14, 7)).to(dtype)


def data(step: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(12, 9, generator=generator, dtype=torch.float64).to(dtype)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[Tensor]:
    """Outputs on fixed data after each step."""
    dtype, out = model[0].weight.dtype, []
    for step in steps:
        optimizer.zero_grad()
        x = data(step, dtype)
        (model(x).square().mean() + model(x)[:, 0].mean()).backward()
        optimizer.step()
        with torch.no_grad():
            out.append(model(data(-1 % 2**31, dtype)).clone())
    return out


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach() for p in model.parameters()]


def forms(
    make: Callable[[], nn.Module], cls: type[SwitchLoRAAdamW] = SwitchLoRAAdamW, **options: Any
) -> tuple[nn.Module, SwitchLoRAAdamW, nn.Module, SwitchLoRAAdamW]:
    """A model with dense weights and its twin of modules, each with its optimizer."""
    dense, turned = make(), make()
    flag = {"fan_in_fan_out": True} if isinstance(dense[0], Conv1D) else {}
    own = {"rank": R, **FAST, **options}
    first = cls(lowrank_groups(dense, **own, **flag), lr=0.02)
    second = cls(switchlora.convert(turned, **own), lr=0.02)
    return dense, first, turned, second


FORMS: list[dict[str, Any]] = [
    {},
    {"order": "random", "freeze_step_counter": False},
    {"decay_on": "weight", "weight_decay": 0.3},
    {"weight_decay": 0.3, "scale": 5.0},
    {"restart_every": 7},
    {"pool_device": "param", "maximize": True},
]


@pytest.mark.parametrize(
    ("options", "make"),
    in_turns(FORMS, (network, gpt)),
)
def test_fact_18_both_forms_follow_one_trajectory(
    make: Callable[[], nn.Module], options: dict[str, Any]
) -> None:
    """20 steps in which every slot is switched several times; and merged, the same weights."""
    dense, first, turned, second = forms(make, **options)
    for a, b in zip(train(dense, first, range(20)), train(turned, second, range(20)), strict=True):
        assert_close(a, b)
    head = first.state[dense[0].weight]["host.held"]
    assert torch.equal(head, second.state[turned[0].lora_A]["host.held"])
    for a, b in zip(weights(dense), weights(switchlora.merge(turned)), strict=True):
        assert_close(a, b)


def test_fact_18_also_in_8_bits() -> None:
    """Both forms encode the same moments."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(9, 1100), nn.Tanh(), nn.Linear(1100, 7))

    dense, first, turned, second = forms(make, SwitchLoRAAdamW8bit)
    for a, b in zip(train(dense, first, range(8)), train(turned, second, range(8)), strict=True):
        assert_close(a, b, torch.bfloat16)  # a code, of 8 bits, may fall to its neighbour
    assert second.state[turned[2].lora_A]["A.exp_avg"].dtype == torch.uint8


@pytest.mark.parametrize("make", [network, gpt])
def test_fact_11_conversion_and_merge_keep_the_function(make: Callable[[], nn.Module]) -> None:
    """W0 + s B A is the weight; after 30 steps of switches alone merge returns it."""
    model, plain = make(), make()
    kept = [id(p) for p in model.parameters()]
    groups = switchlora.convert(model, rank=R, **FAST)
    assert any(isinstance(m, SwitchLoRALinear) for m in model)
    assert_close(model(data(0)), plain(data(0)))
    optimizer = SwitchLoRAAdamW(groups, lr=0.0)
    before = [m.lora_A.clone() for m in model if isinstance(m, SwitchLoRALinear)]
    train(model, optimizer, range(30))
    after = [m.lora_A for m in model if isinstance(m, SwitchLoRALinear)]
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert_close(model(data(0)), plain(data(0)))
    switchlora.merge(model)
    assert [type(m) for m in model] == [type(m) for m in plain]
    assert [id(p) for p in model.parameters()] == kept
    assert all(p.requires_grad for p in model.parameters())
    for a, b in zip(weights(model), weights(plain), strict=True):
        assert_close(a, b)


def test_no_gradient_of_the_weight_is_made() -> None:
    """Flops counted: backward has the input's gradient and the factors', and no m n N product."""
    m, n, r, tokens = 32, 48, 4, 64
    model = nn.Sequential(nn.Linear(n, m))
    switchlora.convert(model, rank=r)
    x = torch.randn(tokens, n, requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        loss = model(x).sum()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    assert forward.get_total_flops() == 2 * tokens * (m * n + r * (m + n))
    assert backward.get_total_flops() == 2 * tokens * (m * n + 2 * r * (m + n))
    layer = model[0]
    assert layer.weight.grad is None and not layer.weight.requires_grad
    g = x.grad
    assert g is not None
    trained = {k for k, p in model.named_parameters() if p.grad is not None}
    assert trained == {"0.lora_A", "0.lora_B", "0.bias"}


def test_factor_gradients_are_the_chain_rule() -> None:
    """``s B^T G`` and ``s G A^T`` with G of the dense layer."""
    model, plain = network(), network()
    switchlora.convert(model, rank=R)
    F.mse_loss(model(data(1)), data(2)[:, :7]).backward()
    F.mse_loss(plain(data(1)), data(2)[:, :7]).backward()
    for layer, dense in zip(model, plain, strict=True):
        if isinstance(layer, SwitchLoRALinear):
            grad = dense.weight.grad
            assert_close(layer.lora_A.grad, layer.s * layer.lora_B.mT @ grad)
            assert_close(layer.lora_B.grad, layer.s * grad @ layer.lora_A.mT)


@pytest.mark.parametrize(
    ("cls", "make"), in_turns([SwitchLoRAAdamW, SwitchLoRAAdamW8bit], [network, gpt])
)
def test_a_run_may_change_form_and_back(
    make: Callable[[], nn.Module], cls: type[SwitchLoRAAdamW]
) -> None:
    """Dense, modules, dense: with vectors frozen at the changes, and no state lost."""
    dense, first, model, _ = forms(make, cls)
    model = make()
    flag = {"fan_in_fan_out": True} if isinstance(model[0], Conv1D) else {}
    optimizer: Any = cls(lowrank_groups(model, rank=R, **FAST, **flag), lr=0.02)
    want = train(dense, first, range(24))
    got = train(model, optimizer, range(9))
    optimizer = switchlora_forms.to_modules(model, optimizer)
    assert isinstance(optimizer, cls)
    assert isinstance(model[0], SwitchLoRALinear)
    assert int(optimizer.state[model[0].lora_A]["host.frozen"].max()) == 2
    got += train(model, optimizer, range(9, 17))
    optimizer = switchlora_forms.to_weights(model, optimizer)
    assert not isinstance(model[0], SwitchLoRALinear)
    got += train(model, optimizer, range(17, 24))
    for a, b in zip(got, want, strict=True):
        assert_close(a, b)
    for a, b in zip(runs.entries(optimizer), runs.entries(first), strict=True):
        assert a.keys() == b.keys()
        for key in b:
            assert_close(a[key].double(), b[key].double(), torch.float64)


def test_resume_of_modules_is_exact() -> None:
    """Model and optimizer saved in mid-run, read with ``weights_only``, go on bit for bit."""

    def new() -> tuple[nn.Module, SwitchLoRAAdamW]:
        model = network(torch.float32)
        groups = switchlora.convert(model, rank=R, **FAST)
        return model, SwitchLoRAAdamW(groups, lr=0.05)

    whole, optimizer = new()
    train(whole, optimizer, range(5))
    saved = copy.deepcopy(whole.state_dict()), runs.saved(optimizer)
    train(whole, optimizer, range(5, 10))
    again, resumed = new()
    again.load_state_dict(saved[0])
    resumed.load_state_dict(runs.loaded(saved[1]))
    train(again, resumed, range(5, 10))
    runs.assert_same(again.parameters(), whole.parameters())
    runs.assert_same_state(runs.entries(resumed), runs.entries(optimizer))


def test_modules_survive_copies_and_bfloat16() -> None:
    """A deep copy trains alike; under bfloat16 weights the factors are float32."""
    model = network(torch.bfloat16)
    switchlora.convert(model, rank=R)
    assert model[0].lora_A.dtype == torch.float32 and model[0].weight.dtype == torch.bfloat16
    twin = copy.deepcopy(model)
    ends = []
    for own in (model, twin):
        params = [p for m in own for p in m.parameters()]
        layers = [m for m in own if isinstance(m, SwitchLoRALinear)]
        triples = [p for m in layers for p in (m.lora_A, m.lora_B, m.weight)]
        group = {"params": triples, "rank": R, "factor_starts": (0, 3, 6), **FAST}
        rest = [p for p in params if not any(p is t for t in triples)]
        optimizer = SwitchLoRAAdamW([group, {"params": rest}], lr=0.02)
        ends.append(train(own, optimizer, range(6))[-1])
    assert torch.equal(*ends)
    assert bool(ends[0].isfinite().all())
    layer = model[0]
    want = layer.weight.float() + layer.s * layer.lora_B @ layer.lora_A
    merged = switchlora.merge(twin)
    assert torch.equal(merged[0].weight, want.bfloat16())


@pytest.mark.parametrize("cls", [SwitchLoRAAdamW, SwitchLoRAAdamW8bit])
def test_memory_of_modules_is_the_formula(cls: type[SwitchLoRAAdamW]) -> None:
    """Weights mn + r(m+n), gradients r(m+n), moments 2r(m+n) + 2r, pools k(m+n) on the host."""
    m, n, r = 96, 2048, 8
    model = nn.Sequential(nn.Linear(n, m, bias=False))
    groups = switchlora.convert(model, rank=r)
    optimizer = cls(groups)
    model(torch.randn(3, n)).sum().backward()
    optimizer.step()
    held = memory.report(optimizer)
    estimate = memory.estimate(model, cls, groups=lambda _: groups)
    assert (estimate.basis, estimate.moments, estimate.other) == held
    assert estimate.weights == 4 * (m * n + r * (m + n))
    assert estimate.gradients == 4 * r * (m + n)
    assert held.basis == 0
    pool, counters = 4 * m * (m + n), 8 * (4 * r + 2)
    assert held.other == pool + counters + 12 and estimate.host == pool + counters
    if cls is SwitchLoRAAdamW:
        assert held.moments == 2 * 4 * r * (m + n) + 2 * 4 * r
    else:
        assert held.moments == 2 * (r * n + 4 * r * n // 256 + 4 * r * m) + 2 * 4 * r


def test_fact_19_parameter_counts() -> None:
    """LLaMA-1B of the release (vocabulary 32100): 1339.5 M, of which 609.7 M or 370.7 M train."""
    h, ffn, layers, vocab = 2048, 5461, 24, 32_100

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(h, h, bias=False) for _ in range(4))
            self.gate, self.up = (nn.Linear(h, ffn, bias=False) for _ in range(2))
            self.down = nn.Linear(ffn, h, bias=False)
            self.norm1, self.norm2 = (nn.RMSNorm(h) for _ in range(2))

    def llama() -> nn.Module:
        model = nn.Module()
        model.embed_tokens = nn.Embedding(vocab, h)
        model.layers = nn.ModuleList(Block() for _ in range(layers))
        model.norm = nn.RMSNorm(h)
        model.lm_head = nn.Linear(h, vocab, bias=False)
        return model

    for rank, expected in ((512, 609.720), (256, 370.651)):
        with torch.device("meta"):
            model = llama()
        total = sum(p.numel() for p in model.parameters())
        switchlora.convert(model, rank=rank)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert round(total / 1e6, 3) == 1339.492
        assert round(trained / 1e6, 3) == expected


def test_fact_22_two_zero_factors_have_no_gradient() -> None:
    """ReLoRA with its kept weights starts so, and cannot leave; B = 0 alone can."""
    layer = LoRALinear(nn.Linear(9, 5), 3)
    layer(data(0, torch.float32)).sum().backward()
    assert not layer.lora_A.grad.any() and layer.lora_B.grad.any()
    layer.zero_grad()
    nn.init.zeros_(layer.lora_A)
    layer(data(0, torch.float32)).sum().backward()
    assert not layer.lora_A.grad.any() and not layer.lora_B.grad.any()


def test_lora_of_equal_rank_is_a_baseline() -> None:
    """Plain LoRA starts at the model it is made from, and W moves within r directions only.

    SwitchLoRA on the same data leaves them: that is what it is for.
    """
    plain = nn.Sequential(nn.Linear(9, 9, bias=False)).double()
    lora = convert(copy.deepcopy(plain), 2)
    assert_close(lora(data(0)), plain(data(0)))
    train(lora, torch.optim.AdamW([p for p in lora.parameters() if p.requires_grad]), range(30))
    moved = lora[0].merged() - plain[0].weight
    assert int(torch.linalg.matrix_rank(moved)) == 2
    switched = copy.deepcopy(plain)
    groups = lowrank_groups(switched, rank=2, interval=2, freeze_steps=1)
    train(switched, SwitchLoRAAdamW(groups, lr=0.02), range(30))
    assert int(torch.linalg.matrix_rank(switched[0].weight - plain[0].weight)) == 9


def test_tied_weights_stay_dense() -> None:
    """Two layers of one weight would part under two pairs of factors."""
    model = nn.Sequential(nn.Linear(9, 9, bias=False), nn.Linear(9, 9, bias=False), nn.Linear(9, 9))
    model[1].weight = model[0].weight
    switchlora.convert(model, rank=2)
    kinds = [type(m) for m in model]
    assert kinds == [nn.Linear, nn.Linear, SwitchLoRALinear]


def test_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="matches no linear layer"):
        switchlora.convert(nn.Sequential(nn.Conv2d(4, 6, 3)), rank=2, target_modules="0")
    model = gpt()
    optimizer = SwitchLoRAAdamW(lowrank_groups(model, rank=2))
    with pytest.raises(ValueError, match="fan_in_fan_out does not fit"):
        switchlora_forms.to_modules(model, optimizer)
    model = network()
    optimizer = SwitchLoRAAdamW(lowrank_groups(model, rank=2))
    with pytest.raises(ValueError, match="has no factors yet"):
        switchlora_forms.to_modules(model, optimizer)
    assert not any(isinstance(m, SwitchLoRALinear) for m in model)
    monkeypatch.setattr(Schedule, "count", lambda *a: 0)
    switchlora.convert(model, rank=2)
    groups = [{"params": [model[0].lora_A, model[0].lora_B, model[0].weight], "rank": 2}]
    optimizer = SwitchLoRAAdamW([{**groups[0], "factor_starts": (0,)}])
    model[0].lora_A.grad = torch.zeros_like(model[0].lora_A)
    with pytest.raises(RuntimeError, match="its counterpart has none"):
        optimizer.step()
    with pytest.raises(ValueError, match="modules need freeze_steps of at least 1, got 0"):
        SwitchLoRAAdamW([{**groups[0], "factor_starts": (0,), "freeze_steps": 0}])


@pytest.mark.xfail(
    torch.__version__.startswith("2.6."),
    raises=KeyError,
    strict=True,
    reason="torch 2.6 takes it for granted that each parameter with a gradient has a state",
)
def test_torch_s_loader_leaves_factors_as_they_were_loaded() -> None:
    """It takes a step of zeros after that, to make the state; the run goes on as it was."""

    def made(seed: int) -> tuple[nn.Module, SwitchLoRAAdamW]:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8))
        groups = as_factors(model, "switchlora", rank=4, interval=2, freeze_steps=1)
        return model, SwitchLoRAAdamW(groups, lr=1e-2)

    def train(model: nn.Module, optimizer: SwitchLoRAAdamW, steps: range) -> None:
        for step in steps:
            x = torch.randn(5, 16, generator=torch.Generator().manual_seed(step))
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    first, second = made(0), made(1)
    train(*first, range(3))
    weights = copy.deepcopy(get_model_state_dict(first[0]))
    state = copy.deepcopy(get_optimizer_state_dict(*first))
    set_model_state_dict(second[0], weights)
    set_optimizer_state_dict(*second, state, options=StateDictOptions(strict=False))
    for more in (0, 4):
        train(*first, range(3, 3 + more))
        train(*second, range(3, 3 + more))
        pairs = zip(first[0].parameters(), second[0].parameters(), strict=True)
        assert all(torch.equal(x, y) for x, y in pairs), more
