"""Names and shapes of the parameters of a model, from the fields of its configuration.

They are those of ``transformers`` 5, name by name and in its order, as names decide what is
projected and when bases are due. It need not be installed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import nn

from lowrank_optim.groups.linear_maps import EMBEDDING
from lowrank_optim.memory.models import Config

Shapes = Iterator[tuple[str, tuple[int, ...]]]


class Family(NamedTuple):
    """Models of one ``model_type``."""

    shapes: Callable[[Config], Shapes]
    fields: tuple[str, ...]
    """What a configuration must say: the rest has a default, or no say in the shapes."""


def _attention(c: Config) -> Shapes:
    hidden, heads = c["hidden_size"], c["num_attention_heads"]
    dim = c.get("head_dim") or hidden // heads
    queries, keys = heads * dim, (c.get("num_key_value_heads") or heads) * dim
    for name, wide in (("q", queries), ("k", keys), ("v", keys)):
        yield f"self_attn.{name}_proj.weight", (wide, hidden)
        if c["model_type"] == "qwen2":
            yield f"self_attn.{name}_proj.bias", (wide,)
    yield "self_attn.o_proj.weight", (hidden, queries)
    if c["model_type"] == "qwen3":
        yield "self_attn.q_norm.weight", (dim,)
        yield "self_attn.k_norm.weight", (dim,)


def _mlp(c: Config) -> Shapes:
    hidden, mlp, experts = c["hidden_size"], c["intermediate_size"], c.get("num_local_experts")
    if experts is not None:
        yield "mlp.gate.weight", (experts, hidden)
        yield "mlp.experts.gate_up_proj", (experts, 2 * mlp, hidden)
        yield "mlp.experts.down_proj", (experts, hidden, mlp)
        return
    yield "mlp.gate_proj.weight", (mlp, hidden)
    yield "mlp.up_proj.weight", (mlp, hidden)
    yield "mlp.down_proj.weight", (hidden, mlp)


def _decoder(c: Config) -> Shapes:
    hidden, embedding = c["hidden_size"], (c["vocab_size"], c["hidden_size"])
    norms = ["input_layernorm", "post_attention_layernorm"]
    if c["model_type"] == "gemma2":
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    yield "model.embed_tokens.weight", embedding
    for i in range(c["num_hidden_layers"]):
        for part in (_attention(c), _mlp(c)):
            for name, shape in part:
                yield f"model.layers.{i}.{name}", shape
        for norm in norms:
            yield f"model.layers.{i}.{norm}.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    if not c["tie_word_embeddings"]:
        yield "lm_head.weight", embedding


def _both(name: str, weight: tuple[int, ...], bias: int) -> Shapes:
    yield f"{name}.weight", weight
    yield f"{name}.bias", (bias,)


def _gpt2(c: Config) -> Shapes:
    wide = c["n_embd"]
    yield "transformer.wte.weight", (c["vocab_size"], wide)
    yield "transformer.wpe.weight", (c["n_positions"], wide)
    for i in range(c["n_layer"]):
        at = f"transformer.h.{i}"  # its Conv1D has inputs first
        yield from _both(f"{at}.ln_1", (wide,), wide)
        yield from _both(f"{at}.attn.c_attn", (wide, 3 * wide), 3 * wide)
        yield from _both(f"{at}.attn.c_proj", (wide, wide), wide)
        yield from _both(f"{at}.ln_2", (wide,), wide)
        yield from _both(f"{at}.mlp.c_fc", (wide, 4 * wide), 4 * wide)
        yield from _both(f"{at}.mlp.c_proj", (4 * wide, wide), wide)
    yield from _both("transformer.ln_f", (wide,), wide)


def _vit(c: Config) -> Shapes:
    wide, mlp, patch = c["hidden_size"], c["intermediate_size"], c["patch_size"]
    channels, tokens = c["num_channels"], (c["image_size"] // patch) ** 2 + 1
    yield "vit.embeddings.cls_token", (1, 1, wide)
    yield "vit.embeddings.position_embeddings", (1, tokens, wide)
    projection = "vit.embeddings.patch_embeddings.projection"
    yield from _both(projection, (wide, channels, patch, patch), wide)
    for i in range(c["num_hidden_layers"]):
        at = f"vit.layers.{i}"
        for name in "qkvo":
            yield from _both(f"{at}.attention.{name}_proj", (wide, wide), wide)
        yield from _both(f"{at}.layernorm_before", (wide,), wide)
        yield from _both(f"{at}.layernorm_after", (wide,), wide)
        yield from _both(f"{at}.mlp.fc1", (mlp, wide), mlp)
        yield from _both(f"{at}.mlp.fc2", (wide, mlp), wide)
    yield from _both("vit.layernorm", (wide,), wide)
    yield from _both("classifier", (c["num_labels"], wide), c["num_labels"])


_WIDTHS = ("hidden_size", "intermediate_size", "num_hidden_layers")
_DECODER = (*_WIDTHS, "num_attention_heads", "vocab_size")
_IMAGES = (*_WIDTHS, "image_size", "patch_size")

FAMILIES: dict[str, Family] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma2"), Family(_decoder, _DECODER)),
    "mixtral": Family(_decoder, (*_DECODER, "num_local_experts")),
    "gpt2": Family(_gpt2, ("n_embd", "n_layer", "n_head", "vocab_size")),
    "vit": Family(_vit, _IMAGES),
}
"""By ``model_type``."""


def parameter_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Shapes by name, of a configuration of :data:`~lowrank_optim.memory.models.MODELS`."""
    return dict(FAMILIES[config["model_type"]].shapes(config))


def _holder(name: str, shape: tuple[int, ...]) -> nn.Module:
    """What holds a parameter: of the type that says what its weight is, without parameters."""
    with torch.device("meta"):
        holder: nn.Module = nn.Module()
        if EMBEDDING.search(name):
            holder = nn.Embedding(shape[0], shape[1])
        elif name.endswith(".weight") and len(shape) == 4:
            holder = nn.Conv2d(shape[1], shape[0], shape[2:], bias=False)
    for own in list(holder._parameters):
        del holder._parameters[own]
    return holder


def on_meta(config: Config, dtype: torch.dtype) -> nn.Module:
    """Modules that hold these parameters on the meta device, and that cannot run."""
    root = nn.Module()
    for name, shape in parameter_shapes(config).items():
        *path, last = name.split(".")
        module = root
        for n, part in enumerate(path, start=1):
            if part not in dict(module.named_children()):
                module.add_module(part, _holder(name, shape) if n == len(path) else nn.Module())
            module = module.get_submodule(part)
        param = nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"))
        module.register_parameter(last, param)
    return root
