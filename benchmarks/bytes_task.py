"""A task on which optimizers can be told apart in minutes: the bytes of Python's standard library.

A decoder as LLaMA's (RMSNorm, rotary positions, SwiGLU), small, with one embedding of standard
deviation 1 for input and output, whose logits are divided by the root of the hidden size. Matrices
begin with the inverse root of their inputs, those that write to the residual stream further divided
by the root of twice the number of layers. So one learning rate serves the embedding and matrices.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, scaled_dot_product_attention, silu

from benchmarks.common import held_out, stdlib_files


@dataclass(frozen=True)
class Shape:
    """Of the model and of its batches."""

    hidden: int = 128
    mlp: int = 344
    layers: int = 4
    heads: int = 4
    batch: int = 16
    context: int = 128


@dataclass(frozen=True)
class Text:
    """Bytes to train on, and bytes of other files."""

    train: Tensor
    held: Tensor

    def to(self, device: torch.device) -> Text:
        """The same text there."""
        return Text(self.train.to(device), self.held.to(device))

    @cached_property
    def digest(self) -> str:
        """The same for the same text."""
        parts = (part.cpu().numpy().tobytes() for part in (self.train, self.held))
        return hashlib.sha256(b"\0".join(parts)).hexdigest()[:10]

    def batches(self, count: int, shape: Shape, seed: int) -> Iterator[Tensor]:
        """``count`` batches ``(batch, context + 1)`` drawn from the training text."""
        generator = torch.Generator().manual_seed(seed)
        span = torch.arange(shape.context + 1)
        for _ in range(count):
            high = len(self.train) - shape.context
            starts = torch.randint(high, (shape.batch, 1), generator=generator)
            yield self.train[(starts + span).to(self.train.device)].long()

    def validation(self, windows: int, shape: Shape) -> Tensor:
        """The same windows always, spread over the held-out text."""
        starts = torch.linspace(0, len(self.held) - shape.context - 1, windows).long()
        places = starts.unsqueeze(1) + torch.arange(shape.context + 1)
        return self.held[places.to(self.held.device)].long()


def load_text(root: Path | None = None) -> Text:
    """The standard library, or the copy of it in ``root``, split by file."""
    parts: dict[bool, bytearray] = {True: bytearray(), False: bytearray()}
    for file in stdlib_files(root):
        content = file.read_bytes()
        parts[held_out(content)] += content
    return Text(*(torch.frombuffer(parts[side], dtype=torch.uint8) for side in (False, True)))


class Layer(nn.Module):
    """Attention and MLP, each after a norm and added to what comes in."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        hidden, mlp = shape.hidden, shape.mlp
        self.heads = shape.heads
        self.attention_norm, self.mlp_norm = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            self.add_module(name, nn.Linear(hidden, hidden, bias=False))
        for name in ("gate_proj", "up_proj"):
            self.add_module(name, nn.Linear(hidden, mlp, bias=False))
        self.down_proj = nn.Linear(mlp, hidden, bias=False)
        for name, param in self.named_parameters():
            if param.dim() == 2:
                written = name.startswith(("o_proj", "down_proj"))
                depth = math.sqrt(2 * shape.layers) if written else 1.0
                nn.init.normal_(param, std=1 / math.sqrt(param.shape[1]) / depth)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        """``(batch, length, hidden)`` to the same."""
        y = self.attention_norm(x)
        q, k, v = (
            getattr(self, name)(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        z = scaled_dot_product_attention(rotated(q, turn), rotated(k, turn), v, is_causal=True)
        x = x + self.o_proj(z.transpose(1, 2).flatten(-2))  # type: ignore[operator]
        y = self.mlp_norm(x)
        gated = silu(self.gate_proj(y)) * self.up_proj(y)  # type: ignore[operator]
        out: Tensor = x + self.down_proj(gated)
        return out


def rotated(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Pairs of entries turned by the angle of their place."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = turn
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Decoder(nn.Module):
    """A model of 256 tokens."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(256, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden)
        half = shape.hidden // shape.heads // 2
        angles = torch.outer(torch.arange(shape.context), 10000.0 ** (-torch.arange(half) / half))
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, window: Tensor) -> Tensor:
        """Mean loss, in nats, of each next byte of ``window (batch, length + 1)``."""
        x = self.embed_tokens(window[:, :-1])
        for layer in self.layers:
            x = layer(x, (self.cos, self.sin))
        logits = linear(self.norm(x), self.embed_tokens.weight) / math.sqrt(self.shape.hidden)
        return cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())


def make_model(shape: Shape, seed: int) -> Decoder:
    """The same weights for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Decoder(shape)


@torch.no_grad()
def evaluate(model: Decoder, windows: Tensor) -> float:
    """Nats per byte of held-out windows of one length."""
    parts = windows.split(model.shape.batch)
    return sum(float(model(part)) * len(part) for part in parts) / len(windows)
