"""Activations of models that are no plain causal language model, against torch's MemTracker."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    RobertaConfig,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
)

from lowrank_optim import GaLoreAdamW
from lowrank_optim.memory import estimate
from lowrank_optim.memory.inputs import batch_of
from lowrank_optim.memory.losses import Loss, loss_by

SIZES = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2}
TEXT = {**SIZES, "vocab_size": 256}
IMAGE = {**SIZES, "image_size": 32, "patch_size": 8}


class Adapter(nn.Module):
    """A frozen map and a trained product of two small ones, as PEFT's LoRA."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Linear(base.in_features, 4, bias=False)
        self.b = nn.Linear(4, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.b(self.a(x))


class Wrapper(nn.Module):
    """What holds the model of transformers, as PEFT's ``PeftModel``: names are longer by a part."""

    def __init__(self, base_model: nn.Module) -> None:
        super().__init__()
        self.base_model = base_model

    def forward(self, **inputs: torch.Tensor) -> object:
        return self.base_model(**inputs)


def adapted() -> nn.Module:
    model = LlamaForCausalLM(LlamaConfig(**TEXT)).requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.q_proj = Adapter(layer.self_attn.q_proj)
        layer.self_attn.v_proj = Adapter(layer.self_attn.v_proj)
    return Wrapper(model)


def mixture() -> nn.Module:
    config = MixtralConfig(**TEXT, num_key_value_heads=2, num_local_experts=4)
    return MixtralForCausalLM(config)


MODELS = {
    "adapters": (adapted, (4, 64)),
    "bert": (lambda: BertForSequenceClassification(BertConfig(**TEXT)), (4, 64)),
    "vit": (lambda: ViTForImageClassification(ViTConfig(**IMAGE)), (16, 17)),
    "mixtral": (mixture, (4, 64)),
}


class Tracker(MemTracker):
    """One that takes frozen parameters: hooks of gradients only say what kind a tensor is."""

    def _track_module_params_and_buffers(
        self, module: nn.Module, install_grad_hooks: bool = False
    ) -> tuple[int, int]:
        return super()._track_module_params_and_buffers(module, install_grad_hooks=False)


def tracked(model: nn.Module, tokens: tuple[int, int], loss: Loss = "transformers") -> int:
    """Bytes beside the weights at the worst moment of forward and backward, which really run."""
    batch = batch_of(model, tokens)
    tracker = Tracker()
    tracker.track_external(model, *batch.values())
    cpu = torch.device("cpu")
    with tracker:
        before = tracker.get_tracker_snapshot("current")[cpu]["Total"]
        loss_by(loss, model, batch).backward()
    return tracker.get_tracker_snapshot("peak")[cpu]["Total"] - before


@pytest.mark.parametrize(
    ("name", "checkpointing"),
    [
        ("adapters", False), ("mixtral", True),
        *(
            pytest.param(*x, marks=pytest.mark.slow)
            for x in (
                ("adapters", True), ("mixtral", False), ("bert", False), ("bert", True),
                ("vit", False), ("vit", True),
            )
        ),
    ],
)  # fmt: skip
def test_peak_is_what_torch_counts(name: str, checkpointing: bool) -> None:
    """The model given is what runs: its adapters, its head, its inputs, its experts."""
    make, tokens = MODELS[name]
    model = make().train()
    found = estimate(
        model, GaLoreAdamW, rank=4, transients=False, tokens=tokens, checkpointing=checkpointing
    )
    inner = model.base_model if name == "adapters" else model
    if checkpointing:
        inner.gradient_checkpointing_enable({"use_reentrant": False})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peak = tracked(model, tokens)
    assert found.live_gradients + found.activations == pytest.approx(peak, rel=0.02)


def test_the_model_is_left_alone() -> None:
    """No parameter, gradient, mode or implementation of it changes."""
    model = adapted().eval()
    before = {name: (p, p._version) for name, p in model.named_parameters()}
    attention = model.base_model.config._attn_implementation
    estimate(model, GaLoreAdamW, rank=4, transients=False, tokens=8)
    after = {name: (p, p._version) for name, p in model.named_parameters()}
    assert before.keys() == after.keys()
    assert all(
        a is b and v == w for (a, v), (b, w) in zip(before.values(), after.values(), strict=True)
    )
    assert all(p.grad is None for p in model.parameters()) and not model.training
    assert model.base_model.config._attn_implementation == attention


def test_a_configuration_is_the_class_that_it_names() -> None:
    """``architectures`` wins; ViT has no causal language model, and says its tokens."""
    config = BertConfig(**TEXT, architectures=["BertForSequenceClassification"])
    own = {"rank": 4, "transients": False, "tokens": (4, 64)}
    one = estimate(config, GaLoreAdamW, dtype=torch.float32, device="cpu", **own)
    model = BertForSequenceClassification(BertConfig(**TEXT))
    assert one == estimate(model, GaLoreAdamW, **own)
    assert (
        estimate(
            ViTConfig(**IMAGE), GaLoreAdamW, rank=4, transients=False, tokens=(2, 17)
        ).activations
        > 0
    )


class Looks(LlamaForCausalLM):
    """A forward that depends on values."""

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> object:
        if input_ids.sum() > 3:
            raise AssertionError
        return super().forward(input_ids=input_ids, labels=labels)


class Packed(nn.Parameter):
    """As a quantiser's, whose layers look for what a plain parameter has not."""


def packed() -> nn.Module:
    model = LlamaForCausalLM(LlamaConfig(**TEXT))
    head = model.lm_head
    head.weight = Packed(head.weight.detach(), requires_grad=False)
    return model


@pytest.mark.parametrize(
    ("make", "tokens", "error", "match"),
    [
        (lambda: ViTConfig(**IMAGE), 64, ValueError, r"is 17 tokens .* got 64: give \(images, 17"),
        (lambda: RobertaConfig(**TEXT, max_position_embeddings=32), 64, ValueError, "32 places"),
        (lambda: Looks(LlamaConfig(**TEXT)), 8, NotImplementedError, "looking at values"),
        (packed, 8, NotImplementedError, r"with a Packed \(lm_head.weight\)"),
        (lambda: nn.Linear(4, 4), 8, ValueError, "needs a transformers model.* got a Linear"),
        (lambda: BertConfig(**TEXT, architectures=["BertForPreTraining"]), 8, ValueError,
         "labels of BertForPreTraining are not known"),
        (lambda: WhisperConfig(
            d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=1,
            decoder_attention_heads=1, vocab_size=64, pad_token_id=0,
            architectures=["WhisperForConditionalGeneration"],
        ), 8, ValueError, "takes input_features"),
    ],
    ids=["vit", "positions", "values", "packed", "plain", "labels", "sound"],
)  # fmt: skip
def test_what_cannot_be_run_says_so(make, tokens, error, match) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=match):
        estimate(make(), GaLoreAdamW, rank=4, transients=False, tokens=tokens)
