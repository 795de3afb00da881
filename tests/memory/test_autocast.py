"""``torch.autocast`` over float32 weights, against MemTracker and torch's lists of operations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from lowrank_optim import GaLoreAdamW, fit
from lowrank_optim.memory import estimate
from lowrank_optim.memory.autocast import casting, run_again
from tests.memory.test_peaks import TOKENS, both, config

CASES = [
    (model, mode, checkpointing, autocast)
    for model in ("llama", "gpt2", "mixtral")
    for mode in (None, "step")
    for checkpointing in (False, True)
    for autocast in ("bfloat16", "float16")
]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "mode", "checkpointing", "autocast"), CASES)
@pytest.mark.filterwarnings("ignore")
def test_peaks_are_what_torch_counts(
    monkeypatch: pytest.MonkeyPatch, model: str, mode: Any, checkpointing: bool, autocast: Any
) -> None:
    """Of whole steps, with cast copies of weights, activations in half and gradients in float32."""
    training = {"in_backward": mode, "checkpointing": checkpointing, "autocast": autocast}
    found, counted = both(
        monkeypatch, config(model, 1), "GaLoreAdamW", dtype=torch.float32, **training
    )
    held = found.held - found.weights
    assert held + max(found.beside.values()) == pytest.approx(max(counted.values()), rel=0.02)


def test_copies_of_all_weights_live_at_the_end_of_forward() -> None:
    """Two bytes of each, of layers that are run again too."""
    copies = {}
    for checkpointing in (False, True):
        own: Any = {"tokens": (1, 8), "checkpointing": checkpointing, "transients": False}
        own |= {"rank": 8, "dtype": torch.float32, "device": "cpu", "in_backward": "step"}
        deep, flat = (
            estimate(config("llama", layers), GaLoreAdamW, autocast="bfloat16", **own).beside
            for layers in (6, 2)
        )
        copies[checkpointing] = deep["backward"] - flat["backward"]
    of_layers = 4 * 2 * (4 * 64 * 64 + 3 * 64 * 176)
    assert all(found >= 0.99 * of_layers for found in copies.values()), copies


FLOAT32 = {
    "pow": lambda x: x**3,
    "pow of two": lambda x: torch.pow(x, x),
    "rsqrt": lambda x: x.rsqrt(),
    "exp": torch.exp,
    "softmax": lambda x: functional.softmax(x, dim=-1),
    "method": lambda x: x.softmax(-1),
    "log_softmax": lambda x: x.log_softmax(-1),
    "sum": lambda x: x.sum(),
    "layer_norm": lambda x: functional.layer_norm(x, (8,)),
    "module": nn.LayerNorm(8),
    "rms_norm": lambda x: functional.rms_norm(x, (8,)),
    "softplus": functional.softplus,
    "mse_loss": lambda x: functional.mse_loss(x, x),
    "cross_entropy": lambda x: functional.cross_entropy(x, torch.zeros(4, dtype=torch.long)),
}
HALF = {
    "gelu": functional.gelu,
    "silu": functional.silu,
    "tanh": torch.tanh,
    "add": lambda x: x + 1,
    "mean": lambda x: x.mean(),
    "linear": nn.Linear(8, 8),
    "in place": lambda x: x.clone().exp_(),
    "given": lambda x: x.sum(dtype=torch.bfloat16),
}


@pytest.mark.parametrize("name", [*FLOAT32, *HALF])
def test_operations_are_cast_as_on_a_gpu(name: str) -> None:
    """By the lists of "Automatic Mixed Precision package" for CUDA; where it is off, nothing is."""
    x = torch.ones(4, 8, dtype=torch.bfloat16)
    work = {**FLOAT32, **HALF}[name]
    with casting("bfloat16", "cuda"):
        assert work(x).dtype == (torch.float32 if name in FLOAT32 else torch.bfloat16)
        with torch.autocast("cpu", enabled=False):
            assert torch.exp(x).dtype == torch.bfloat16
    with casting("bfloat16", "cpu"):
        assert torch.exp(x).dtype == torch.bfloat16  # as torch's own for a CPU


def test_a_layer_that_is_run_again_is_cast_again() -> None:
    """Or what backward finds would not be what forward had, which torch's checkpoint tells."""
    x = torch.ones(4, 8, dtype=torch.bfloat16, requires_grad=True)
    seen = []

    def layer(x: torch.Tensor) -> torch.Tensor:
        seen.append(torch.pow(x, 3.0).dtype)
        return torch.pow(x, 3.0)

    with casting("bfloat16", "cuda"):
        contexts = lambda: (run_again("cpu"), run_again("cuda"))  # noqa: E731
        out = checkpoint(layer, x, use_reentrant=False, context_fn=contexts)
    out.sum().backward()
    assert seen == [torch.float32] * 2


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"autocast": "half", "tokens": 8}, "autocast must be None or one of 'bfloat16', 'float16'"),
    ({"autocast": "bfloat16"}, "autocast='bfloat16' has no effect without tokens"),
    ({"autocast": "bfloat16", "tokens": 8, "dtype": torch.bfloat16}, "give dtype=torch.float32"),
]  # fmt: skip


@pytest.mark.parametrize(("own", "text"), REFUSED, ids=["unknown", "tokens", "half"])
def test_what_has_no_effect_is_refused(own: dict[str, Any], text: str) -> None:
    own = {"dtype": torch.float32, **own}
    with pytest.raises(ValueError, match=text):
        estimate(config("llama", 1), GaLoreAdamW, rank=8, **own)
    with pytest.raises(ValueError, match=text):
        fit(config("llama", 1), 1.0, **own)


def test_fused_and_chunked_losses() -> None:
    """What Liger does under autocast is not known; chunks are cast in backward too."""
    own: Any = {"rank": 8, "dtype": torch.float32, "autocast": "bfloat16", "transients": False}
    with pytest.raises(NotImplementedError, match="loss='fused' under autocast"):
        estimate(config("llama", 1), GaLoreAdamW, loss="fused", tokens=TOKENS, **own)
    plain, chunked = (
        estimate(config("llama", 1), GaLoreAdamW, loss=loss, tokens=(64, 64), **own).activations
        for loss in ("transformers", "chunked")
    )
    assert chunked < plain
