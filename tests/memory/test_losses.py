"""Losses that never hold all logits: what they compute, and what they hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import (
    BertConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    ViTConfig,
)

from benchmarks.allocations import allocations
from lowrank_optim import GaLoreAdamW, fit
from lowrank_optim.memory import Estimate, estimate, losses
from lowrank_optim.memory.inputs import model_of
from tests.memory.test_activations import IMAGE, TEXT, Adapter, tracked
from tests.memory.test_peaks import both

KINDS = {"chunked": losses.Chunked, "fused": losses.Fused}
TOKENS = (2, 64)
WIDE = {**TEXT, "num_hidden_layers": 1, "vocab_size": 2048}
CHUNK = 32


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("trained", ["bias", "head", "hidden"])
def test_values_and_gradients(kind: str, cap: float | None, trained: str) -> None:
    """Those of the cross entropy of all logits at once, by autograd in float64."""
    chunk = (5,) if kind == "chunked" else ()
    x, weight, bias = (torch.randn(s, dtype=torch.float64) for s in ((13, 6), (17, 6), (17,)))
    labels = torch.randint(17, (13,))
    labels[[0, 7, 12]] = losses.IGNORED
    given = [x.requires_grad_(), weight.requires_grad_(trained != "hidden")]
    given.append(bias.requires_grad_() if trained == "bias" else None)
    logits = functional.linear(*given)
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    wanted = functional.cross_entropy(logits, labels)
    asked = [y for y in given if y is not None and y.requires_grad]
    expected = torch.autograd.grad(3 * wanted, asked)
    loss: Any = KINDS[kind].apply(*given, labels, cap, *chunk)
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=0)
    for one, other in zip(torch.autograd.grad(3 * loss, asked), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-14)


def of_loss(model: Any, kind: str, **training: Any) -> Estimate:
    own = {"rank": 4, "transients": False, "tokens": TOKENS, "loss": kind, **training}
    return estimate(model, GaLoreAdamW, **own)


class InChunks(nn.Module):
    """As one would write it with torch's checkpoint."""

    def forward(self, hidden: Tensor, head: nn.Linear, labels: Tensor, chunk: int) -> Tensor:
        def summed(x: Tensor, y: Tensor) -> Tensor:
            return functional.cross_entropy(head(x).float(), y, reduction="sum")

        pieces = zip(hidden.split(chunk), labels.split(chunk), strict=True)
        total: Any = sum(checkpoint(summed, x, y, use_reentrant=False) for x, y in pieces)
        return total / len(labels)


class Liger(torch.autograd.Function):
    """The buffers of liger-kernel 0.8.5; its kernel puts the gradient in place of the logits.

    2048 words of a width of 64 are 32 times the hidden states: 128 tokens go four by four.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        grad_x, grad_weight = torch.zeros_like(x), torch.zeros_like(weight)
        logits = x.new_empty(4, 2048)
        for rows, grad in zip(x.split(4), grad_x.split(4), strict=True):
            torch.mm(rows, weight.t(), out=logits)
            torch.mm(logits, weight, out=grad)
            grad_weight += torch.mm(logits.t(), rows)  # as of weights in float32
        ctx.save_for_backward(grad_x, grad_weight)
        return x.new_zeros(len(x)).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return tuple(x.mul_(grads[0]) for x in ctx.saved_tensors)


@pytest.mark.parametrize(("kind", "chunk"), [("chunked", 32), ("chunked", 100), ("fused", None)])
def test_peak_is_what_an_allocator_gives(kind: str, chunk: int | None) -> None:
    """Of the same loss as others write it, in real steps of backward on a CPU."""
    model = LlamaForCausalLM(LlamaConfig(**WIDE)).train()
    tokens = torch.zeros(TOKENS, dtype=torch.long)

    def work() -> None:
        hidden = model.model(input_ids=tokens).last_hidden_state.flatten(0, 1)
        if kind == "chunked":
            loss = InChunks()(hidden, model.lm_head, tokens.flatten(), chunk)
        else:
            loss = Liger.apply(hidden, model.lm_head.weight)
        del hidden
        loss.backward()

    found = of_loss(model, kind, loss_chunk=chunk)
    peak = found.live_gradients + found.activations
    assert peak == pytest.approx(allocations(work).peak, rel=0.02)
    whole = of_loss(model, "transformers")
    logits = 4 * 128 * 2048
    assert whole.live_gradients + whole.activations > max(3 * logits, peak)
    if chunk != 100:  # which is nearly all tokens
        assert whole.live_gradients + whole.activations > peak + logits


@pytest.mark.parametrize(
    ("kind", "checkpointing"),
    [
        ("chunked", True), ("fused", False),
        pytest.param("chunked", False, marks=pytest.mark.slow),
        pytest.param("fused", True, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_peak_is_what_torch_counts(
    monkeypatch: pytest.MonkeyPatch, kind: Any, checkpointing: bool
) -> None:
    monkeypatch.setattr(losses, "CHUNK", CHUNK)
    model = LlamaForCausalLM(LlamaConfig(**WIDE)).train()
    found = of_loss(model, kind, checkpointing=checkpointing)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    peak = found.live_gradients + found.activations
    assert peak == pytest.approx(tracked(model, TOKENS, kind), rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", [None, "step", "project"])
@pytest.mark.filterwarnings("ignore")
def test_peaks_of_whole_steps(monkeypatch: pytest.MonkeyPatch, kind: Any, mode: str | None) -> None:
    """In every mode, in bfloat16."""
    monkeypatch.setattr(losses, "CHUNK", 16)
    config = LlamaConfig(**WIDE)
    found, counted = both(monkeypatch, config, "GaLoreAdamW", in_backward=mode, loss=kind)
    held = found.held - found.weights
    assert held + max(found.beside.values()) == pytest.approx(max(counted.values()), rel=0.02)
    if mode is None:
        assert held + found.beside["backward"] == pytest.approx(counted["backward"], rel=0.02)


def adapted() -> nn.Module:
    model = LlamaForCausalLM(LlamaConfig(**WIDE))
    model.lm_head = Adapter(model.lm_head)
    return model


@pytest.mark.parametrize(
    ("make", "tokens", "match"),
    [
        (lambda: BertConfig(**TEXT, architectures=["BertForMaskedLM"]), 8, "BertForMaskedLM is no"),
        (lambda: ViTConfig(**IMAGE), (1, 17), "ViTForImageClassification is no causal"),
        (adapted, 8, "has a Adapter as its head"),
        (lambda: GraniteConfig(**TEXT), 8, "GraniteForCausalLM does more with logits"),
    ],
    ids=["masked", "images", "adapter", "scaled"],
)
def test_other_models_are_refused(make: Any, tokens: Any, match: str) -> None:
    with pytest.raises(NotImplementedError, match=f"loss='fused' is for .* {match}.*Leave loss"):
        of_loss(make(), "fused", tokens=tokens)


SIZES = {**TEXT, "num_hidden_layers": 1, "num_key_value_heads": 2}
MODELS = {
    "llama": LlamaConfig(**SIZES),
    "capped": Gemma2Config(**SIZES, head_dim=32, final_logit_softcapping=0.02),
    "router": MixtralConfig(**SIZES, num_local_experts=4, output_router_logits=True),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_is_the_models_own(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Labels are shifted, logits capped as Gemma 2's, and the loss of a router is added."""
    monkeypatch.setattr(losses, "CHUNK", 5)
    torch.manual_seed(0)
    model = model_of(MODELS[name], torch.float32)
    batch = {key: torch.randint(256, (2, 8)) for key in ("input_ids", "labels")}
    batch["labels"][:, :3] = losses.IGNORED
    found = {kind: losses.loss_by(kind, model, batch) for kind in losses.LOSSES}
    for kind in KINDS:
        torch.testing.assert_close(found[kind], found["transformers"], rtol=2e-6, atol=0)
    assert model.lm_head(torch.ones(64)).shape == (256,)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cap_costs_chunks_alone_and_no_kernel(kind: str) -> None:
    plain = Gemma2Config(**SIZES, head_dim=32, final_logit_softcapping=None)
    more = of_loss(MODELS["capped"], kind).activations - of_loss(plain, kind).activations
    assert (more > 0) == (kind == "chunked")


@pytest.mark.parametrize(
    ("own", "match"),
    [
        ({"loss_chunk": 8}, "loss_chunk=8 has no effect on loss='transformers'"),
        ({"loss_chunk": 8, "kind": "fused"}, "loss_chunk=8 has no effect on loss='fused'"),
        ({"loss_chunk": 0, "kind": "chunked"}, "loss_chunk must be None or a positive int, got 0"),
    ],
)
def test_a_chunk_is_of_a_loss_in_chunks(own: dict[str, Any], match: str) -> None:
    own = {"kind": "transformers", **own}
    with pytest.raises(ValueError, match=match):
        of_loss(LlamaConfig(**WIDE), **own)
    own["loss"] = own.pop("kind")
    with pytest.raises(ValueError, match=match):
        fit(LlamaConfig(**WIDE), 1.0, tokens=8, **own)
