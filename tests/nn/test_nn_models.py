"""``lowrank_optim.nn`` on real models, by its public functions alone, for every method it has."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_optim import SSTAdamW, SwitchLoRAAdamW, lowrank_groups
from lowrank_optim import nn as forms
from lowrank_optim.optimizer import LowRankOptimizer
from tests import runs
from tests.compare import assert_close
from tests.pairwise import in_turns

transformers = pytest.importorskip("transformers")

VOCAB, LENGTH, RANK = 50, 8, 4
METHODS: dict[str, tuple[type[LowRankOptimizer], type[nn.Module], dict[str, Any]]] = {
    "sst": (SSTAdamW, forms.SpectralLinear, {"steps_per_iteration": 3, "warmup_steps": 2}),
    "switchlora": (SwitchLoRAAdamW, forms.SwitchLoRALinear, {"interval": 4, "freeze_steps": 2}),
}
# gradients that are rounding alone (of the bias of keys, which softmax does not see) stay so
RULE: dict[str, Any] = {"lr": 0.01, "eps": 1e-3, "weight_decay": 0.1}


def gpt2() -> nn.Module:
    """``Conv1D`` throughout, and a head tied to the embedding."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_positions=LENGTH, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model: nn.Module = transformers.GPT2LMHeadModel(config).double()
    assert model.lm_head.weight is model.transformer.wte.weight
    return model


def llama() -> nn.Module:
    """Grouped keys and values, and a head tied to the embedding."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=28, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=LENGTH,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model: nn.Module = transformers.LlamaForCausalLM(config).double()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {"gpt2": (gpt2, 8), "llama": (llama, 14)}
"""Models, and how many linear layers they have but for the head."""

every = pytest.mark.parametrize("method", METHODS)
in_turn = pytest.mark.parametrize(("method", "name"), in_turns([*METHODS], [*MODELS]))
in_other_turn = pytest.mark.parametrize(("method", "name"), in_turns([*METHODS], [*MODELS][::-1]))
on_both = pytest.mark.parametrize("name", MODELS)


def dense(model: nn.Module, method: str, name: str) -> LowRankOptimizer:
    """The method over the model's weights."""
    cls, _, options = METHODS[method]
    stored = {"fan_in_fan_out": True} if (method, name) == ("switchlora", "gpt2") else {}
    return cls(lowrank_groups(model, rank=RANK, **options, **stored), **RULE)  # type: ignore[call-arg]


def converted(model: nn.Module, method: str) -> LowRankOptimizer:
    """The method over the model's factors."""
    cls, _, options = METHODS[method]
    return cls(forms.convert(model, method, rank=RANK, **options), **RULE)  # type: ignore[call-arg]


def ids(step: int) -> Tensor:
    return torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(step))


def train(model: nn.Module, optimizer: LowRankOptimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        model(input_ids=ids(step), labels=ids(step)).loss.backward()
        optimizer.step()


def count(model: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(m, kind) for m in model.modules())


def assert_same_model(actual: nn.Module, expected: nn.Module) -> None:
    """Kinds of layers, names, tied weights, what is trained; values to rounding."""
    kinds = [[type(m) for m in net.modules()] for net in (actual, expected)]
    assert kinds[0] == kinds[1]
    theirs = dict(expected.named_parameters())
    assert dict(actual.named_parameters()).keys() == theirs.keys()
    for key, param in actual.named_parameters():
        assert param.requires_grad and param.dtype == theirs[key].dtype
        assert_close(param, theirs[key])
    assert actual.lm_head.weight is actual.get_input_embeddings().weight


@on_both
@every
def test_convert_and_merge(method: str, name: str) -> None:
    """The same function at once; merged, the same model."""
    make, layers = MODELS[name]
    model, plain = make(), make()
    groups = forms.convert(model, method, rank=RANK)
    assert count(model, METHODS[method][1]) == layers
    out = model(input_ids=ids(0)).logits
    assert_close(out, plain(input_ids=ids(0)).logits)
    held = {id(p) for g in groups for p in g["params"]}
    assert all(id(p) in held for p in model.parameters() if p.requires_grad)
    out.square().mean().backward()
    sizes = {p.shape for p in plain.parameters() if p.dim() == 2}
    tied = model.lm_head.weight
    of_weights = [
        n for n, p in model.named_parameters()
        if p.grad is not None and p.shape in sizes and p is not tied
    ]  # fmt: skip
    assert of_weights == (["transformer.wpe.weight"] if name == "gpt2" else [])
    assert forms.merge(model) is model
    assert_same_model(model, plain)


@in_turn
def test_modules_follow_the_weights(method: str, name: str) -> None:
    """From ``convert`` to ``merge``: the weights that the dense form ends with."""
    make, _ = MODELS[name]
    model, twin = make(), make()
    train(model, converted(model, method), range(14))
    train(twin, dense(twin, method, name), range(14))
    assert_same_model(forms.merge(model), twin)


@in_other_turn
def test_a_run_may_change_form_twice(method: str, name: str) -> None:
    """Weights, modules, weights: the end of a run that never changed, and its state."""
    make, layers = MODELS[name]
    model, twin = make(), make()
    optimizer, whole = dense(model, method, name), dense(twin, method, name)
    train(twin, whole, range(15))
    train(model, optimizer, range(5))
    optimizer = forms.to_modules(model, optimizer, method)
    assert count(model, METHODS[method][1]) == layers
    train(model, optimizer, range(5, 10))
    optimizer = forms.to_weights(model, optimizer)
    assert count(model, METHODS[method][1]) == 0
    train(model, optimizer, range(10, 15))
    assert_same_model(model, twin)
    names = {id(p): n for n, p in model.named_parameters()}
    got = {names[id(p)]: s for p, s in optimizer.state.items()}
    for key, param in twin.named_parameters():
        want = whole.state[param]
        assert got[key].keys() == want.keys(), key
        for entry, x in want.items():
            assert_close(got[key][entry].double(), x.double(), torch.float64)


@in_turn
def test_resume_of_modules(method: str, name: str) -> None:
    """Weights and state of a converted model, saved and read safely: the same bits."""
    make, _ = MODELS[name]
    model, again = make(), make()
    optimizer, resumed = converted(model, method), converted(again, method)
    train(model, optimizer, range(5))
    again.load_state_dict(copy.deepcopy(model.state_dict()))
    resumed.load_state_dict(runs.loaded(runs.saved(optimizer)))
    train(model, optimizer, range(5, 12))
    train(again, resumed, range(5, 12))
    runs.assert_same(again.parameters(), model.parameters())
    runs.assert_same_state(runs.entries(resumed), runs.entries(optimizer))


@every
def test_a_weight_that_layers_share_is_stepped_as_a_weight(method: str) -> None:
    """Two projections of one weight would part under two sets of factors."""
    model, twin = llama(), llama()
    for net in (model, twin):
        first, second = (layer.mlp for layer in net.model.layers)
        second.up_proj.weight = first.up_proj.weight
    optimizer = converted(model, method)
    assert count(model, METHODS[method][1]) == 12
    train(model, optimizer, range(9))
    train(twin, dense(twin, method, "llama"), range(9))
    merged = forms.merge(model)
    for a, b in zip(merged.parameters(), twin.parameters(), strict=True):
        assert_close(a, b)
    first, second = (layer.mlp for layer in merged.model.layers)
    assert first.up_proj.weight is second.up_proj.weight
