"""Configurations of known models, so that nothing is downloaded to know their shapes.

Each is what decides the shapes of parameters, under the names that ``transformers`` has for it, the
number of parameters that its publisher gives, and where both come from.
"""

from __future__ import annotations

from typing import Any, NamedTuple

Config = dict[str, Any]


class Known(NamedTuple):
    """A published model."""

    config: Config
    """Fields of its ``transformers`` configuration, ``model_type`` among them."""
    parameters: int
    """As published; what is tied counts once."""
    source: str


def _decoder(
    model_type: str,
    hidden: int,
    mlp: int,
    layers: int,
    heads: int,
    kv_heads: int,
    vocabulary: int,
    *,
    tied: bool = False,
    **own: Any,
) -> Config:
    return {
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        **own,
    }


def _llama(hidden: int, mlp: int, layers: int, heads: int, kv_heads: int | None = None) -> Config:
    return _decoder("llama", hidden, mlp, layers, heads, kv_heads or heads, 32000)


def _gpt2(hidden: int, layers: int, heads: int) -> Config:
    shape = {"n_embd": hidden, "n_layer": layers, "n_head": heads, "n_positions": 1024}
    return {"model_type": "gpt2", "vocab_size": 50257, "tie_word_embeddings": True, **shape}


def _vit(hidden: int, layers: int, heads: int) -> Config:
    return {
        "model_type": "vit",
        "architectures": ["ViTForImageClassification"],
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "image_size": 224,
        "patch_size": 16,
        "num_channels": 3,
        "num_labels": 1000,
    }


_GALORE = "configs/ of GaLore's repository (Zhao et al., 2024)"
_QWEN = 151936

MODELS: dict[str, Known] = {
    "llama-60m": Known(_llama(512, 1376, 8, 8), 58_073_600, _GALORE),
    "llama-130m": Known(_llama(768, 2048, 12, 12), 134_105_856, _GALORE),
    "llama-350m": Known(_llama(1024, 2736, 24, 16), 367_969_280, _GALORE),
    "llama-1b": Known(_llama(2048, 5461, 24, 32), 1_339_082_752, _GALORE),
    "llama-7b": Known(_llama(4096, 11008, 32, 32), 6_738_415_616, "Touvron et al. (2023)"),
    "llama-13b": Known(_llama(5120, 13824, 40, 40), 13_015_864_320, "Touvron et al. (2023)"),
    "llama-70b": Known(
        _llama(8192, 28672, 80, 64, 8), 68_976_648_192, "config.json of Llama-2-70b-hf"
    ),
    "Llama-3-8B": Known(
        _decoder("llama", 4096, 14336, 32, 32, 8, 128256),
        8_030_261_248,
        "config.json of Meta-Llama-3-8B",
    ),
    "Llama-3.2-1B": Known(
        _decoder("llama", 2048, 8192, 16, 32, 8, 128256, tied=True),
        1_235_814_400,
        "config.json of Llama-3.2-1B",
    ),
    "Llama-3.2-3B": Known(
        _decoder("llama", 3072, 8192, 28, 24, 8, 128256, tied=True),
        3_212_749_824,
        "config.json of Llama-3.2-3B",
    ),
    "Qwen2.5-0.5B": Known(
        _decoder("qwen2", 896, 4864, 24, 14, 2, _QWEN, tied=True),
        494_032_768,
        "config.json of Qwen2.5-0.5B",
    ),
    "Qwen2.5-1.5B": Known(
        _decoder("qwen2", 1536, 8960, 28, 12, 2, _QWEN, tied=True),
        1_543_714_304,
        "config.json of Qwen2.5-1.5B",
    ),
    "Qwen2.5-7B": Known(
        _decoder("qwen2", 3584, 18944, 28, 28, 4, 152064),
        7_615_616_512,
        "config.json of Qwen2.5-7B",
    ),
    "Qwen2.5-14B": Known(
        _decoder("qwen2", 5120, 13824, 48, 40, 8, 152064),
        14_770_033_664,
        "config.json of Qwen2.5-14B",
    ),
    "Qwen2.5-32B": Known(
        _decoder("qwen2", 5120, 27648, 64, 40, 8, 152064),
        32_763_876_352,
        "config.json of Qwen2.5-32B",
    ),
    "Qwen3-0.6B": Known(
        _decoder("qwen3", 1024, 3072, 28, 16, 8, _QWEN, tied=True, head_dim=128),
        596_049_920,
        "config.json of Qwen3-0.6B",
    ),
    "Qwen3-4B": Known(
        _decoder("qwen3", 2560, 9728, 36, 32, 8, _QWEN, tied=True, head_dim=128),
        4_022_468_096,
        "config.json of Qwen3-4B",
    ),
    "Qwen3-8B": Known(
        _decoder("qwen3", 4096, 12288, 36, 32, 8, _QWEN, head_dim=128),
        8_190_735_360,
        "config.json of Qwen3-8B",
    ),
    "Mistral-7B": Known(
        _decoder("mistral", 4096, 14336, 32, 32, 8, 32000),
        7_241_732_096,
        "config.json of Mistral-7B-v0.1",
    ),
    "Mixtral-8x7B": Known(
        _decoder(
            "mixtral", 4096, 14336, 32, 32, 8, 32000, num_local_experts=8, num_experts_per_tok=2
        ),
        46_702_792_704,
        "config.json of Mixtral-8x7B-v0.1",
    ),
    "Gemma-2-2B": Known(
        _decoder("gemma2", 2304, 9216, 26, 8, 4, 256000, tied=True, head_dim=256),
        2_614_341_888,
        "config.json of gemma-2-2b",
    ),
    "Gemma-2-9B": Known(
        _decoder("gemma2", 3584, 14336, 42, 16, 8, 256000, tied=True, head_dim=256),
        9_241_705_984,
        "config.json of gemma-2-9b",
    ),
    "GPT-2": Known(_gpt2(768, 12, 12), 124_439_808, "config.json of gpt2"),
    "GPT-2-medium": Known(_gpt2(1024, 24, 16), 354_823_168, "config.json of gpt2-medium"),
    "GPT-2-large": Known(_gpt2(1280, 36, 20), 774_030_080, "config.json of gpt2-large"),
    "GPT-2-xl": Known(_gpt2(1600, 48, 25), 1_557_611_200, "config.json of gpt2-xl"),
    "ViT-B/16": Known(_vit(768, 12, 12), 86_567_656, "Dosovitskiy et al. (2021), 224 px"),
    "ViT-L/16": Known(_vit(1024, 24, 16), 304_326_632, "Dosovitskiy et al. (2021), 224 px"),
}
"""By name. The LLaMAs without a version are the first (70B: the second)."""
