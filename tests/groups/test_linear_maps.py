"""Which parameters of real models are projected by default, and how kernels are seen."""

from __future__ import annotations

import contextlib
import functools
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from lowrank_optim import (
    FrugalAdamW,
    GaLoreAdamW,
    GaLoreSGD,
    SSTAdamW,
    lowrank_groups,
    memory,
)
from lowrank_optim.groups.linear_maps import is_linear_map, looks_like_vocabulary
from lowrank_optim.groups.names import bare
from lowrank_optim.tensors.matrix import matrix_view
from tests.compare import assert_close
from tests.logged import Logged

transformers = pytest.importorskip("transformers")
SMALL = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
EXPERTS = {**SMALL, "intermediate_size": 64, "num_key_value_heads": 2}


def on_meta(name: str, config: str, **options: Any) -> nn.Module:
    with torch.device("meta"):
        return getattr(transformers, name)(getattr(transformers, config)(**options))


def mixtral(**options: Any) -> nn.Module:
    return on_meta("MixtralForCausalLM", "MixtralConfig", **options)


class UNet(nn.Module):
    """The kinds of module of a diffusion model, with the names that they have there."""

    def __init__(self) -> None:
        super().__init__()
        self.time_embedding = nn.ModuleDict(
            {"linear_1": nn.Linear(16, 32), "linear_2": nn.Linear(32, 32)}
        )
        self.conv_in = nn.Conv2d(4, 16, 3)
        self.norm = nn.GroupNorm(4, 16)
        self.depthwise = nn.Conv2d(16, 16, 3, groups=16)
        self.attention = nn.MultiheadAttention(16, 2)
        self.up = nn.ConvTranspose2d(16, 8, 2)
        self.label_emb = nn.Embedding(50, 16)
        self.pos_embed = nn.Parameter(torch.empty(1, 64, 16))
        self.relative_position_bias_table = nn.Parameter(torch.empty(49, 12))
        self.recurrent = nn.LSTM(8, 12)
        self.A_log = nn.Parameter(torch.empty(16, 12))


MODELS: dict[str, tuple[Any, set[str]]] = {
    "llama": (
        lambda: on_meta("LlamaForCausalLM", "LlamaConfig", **EXPERTS),
        {"model.embed_tokens.weight", "lm_head.weight"},
    ),
    "gpt2": (
        lambda: on_meta("GPT2LMHeadModel", "GPT2Config", vocab_size=96, n_embd=32, n_layer=2,
                        n_head=4, n_positions=16),
        {"transformer.wte.weight", "transformer.wpe.weight"},
    ),
    "mixtral": (
        lambda: mixtral(**EXPERTS, num_local_experts=4),
        {"model.embed_tokens.weight", "lm_head.weight",
         *(f"model.layers.{i}.mlp.gate.weight" for i in range(2))},
    ),
    "qwen2 moe": (
        lambda: on_meta("Qwen2MoeForCausalLM", "Qwen2MoeConfig", **EXPERTS, num_experts=4,
                        moe_intermediate_size=16, shared_expert_intermediate_size=16),
        {"model.embed_tokens.weight", "lm_head.weight",
         *(f"model.layers.{i}.mlp.{x}.weight" for i in range(2)
           for x in ("gate", "shared_expert_gate"))},
    ),
    "deepseek": (
        lambda: on_meta("DeepseekV3ForCausalLM", "DeepseekV3Config", **EXPERTS,
                        n_routed_experts=4, n_group=2, topk_group=1, num_experts_per_tok=2,
                        moe_intermediate_size=16, kv_lora_rank=8, q_lora_rank=8,
                        qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
                        first_k_dense_replace=1),
        {"model.embed_tokens.weight", "lm_head.weight", "model.layers.1.mlp.gate.weight"},
    ),
    "vit": (
        lambda: on_meta("ViTForImageClassification", "ViTConfig", hidden_size=32,
                        intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                        image_size=32, patch_size=8),
        {"vit.embeddings.cls_token", "vit.embeddings.position_embeddings", "classifier.weight"},
    ),
    "whisper": (
        lambda: on_meta("WhisperForConditionalGeneration", "WhisperConfig", vocab_size=96,
                        d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=64,
                        encoder_attention_heads=4, decoder_attention_heads=4, decoder_ffn_dim=64,
                        num_mel_bins=20, max_source_positions=20, max_target_positions=20,
                        pad_token_id=1, bos_token_id=2, eos_token_id=3, decoder_start_token_id=4),
        {"model.encoder.embed_positions.weight", "model.decoder.embed_tokens.weight",
         "model.decoder.embed_positions.weight"},
    ),
    "t5": (
        lambda: on_meta("T5ForConditionalGeneration", "T5Config", vocab_size=96, d_model=32,
                        d_ff=64, d_kv=8, num_layers=1, num_heads=4),
        {"shared.weight", *(f"{x}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
                            for x in ("encoder", "decoder"))},
    ),
    "mamba": (
        lambda: on_meta("MambaForCausalLM", "MambaConfig", vocab_size=96, hidden_size=32,
                        num_hidden_layers=1),
        {"backbone.embeddings.weight", "backbone.layers.0.mixer.A_log",
         "backbone.layers.0.mixer.conv1d.weight"},
    ),
    "unet": (
        UNet,
        {"depthwise.weight", "label_emb.weight", "pos_embed", "relative_position_bias_table",
         "A_log"},
    ),
}  # fmt: skip
"""Models, and their parameters of two and more dimensions that stay dense, unlike all others."""


@functools.cache
def built(name: str) -> nn.Module:
    return MODELS[name][0]()


def matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if p.dim() >= 2}


def low(groups: Any) -> set[str]:
    return {n for g in groups if g.get("rank") is not None for n in g["param_names"]}


@pytest.mark.parametrize("name", MODELS)
def test_all_linear_projects_every_linear_map(name: str) -> None:
    model, dense = built(name), MODELS[name][1]
    chosen = low(lowrank_groups(model, rank=1))
    assert matrices(model).keys() - chosen == dense


@pytest.mark.parametrize("name", MODELS)
def test_named_parameters_split_alike(name: str) -> None:
    """But where only the module tells: a kernel of three dimensions, and a router."""
    model, dense = built(name), MODELS[name][1]
    optimizer = GaLoreAdamW(model.named_parameters(), rank=1)
    group = optimizer.param_groups[0]
    found = {group["param_names"][i.index] for i in optimizer._items(group) if i.subspace}
    kernels = {n for n, p in matrices(model).items() if "conv" in n and p.dim() == 3}
    routers = {n for n in dense if n.endswith("mlp.gate.weight")}
    assert matrices(model).keys() - found == (dense | kernels) - routers


SHARES = {
    "llama": 0.745, "gpt2": 0.846, "mixtral": 0.894, "qwen2 moe": 0.761, "deepseek": 0.740,
    "vit": 0.940, "whisper": 0.827, "t5": 0.852, "mamba": 0.647, "unet": 0.602,
}  # fmt: skip
"""Share of the parameters that are projected; what is left are vocabularies, tables and vectors."""


@pytest.mark.parametrize("name", MODELS)
def test_share_of_parameters_projected(name: str) -> None:
    model = built(name)
    chosen = low(lowrank_groups(model, rank=1))
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    assert sum(sizes[n] for n in chosen) / sum(sizes.values()) == pytest.approx(
        SHARES[name], abs=1e-3
    )


@pytest.mark.slow
def test_mixtral_8x7b_holds_the_state_of_low_rank_experts() -> None:
    """Before, 2.9 % of it were projected, and 343 GiB of state was AdamW's."""
    model = mixtral()
    groups = functools.partial(lowrank_groups, rank=128)
    named, total = low(groups(model)), sum(p.numel() for p in model.parameters())
    assert total == 46_702_792_704
    share = sum(p.numel() for n, p in model.named_parameters() if n in named) / total
    assert share == pytest.approx(0.9943, abs=1e-4)
    # by hand: of each (m, n) a basis of 128 n' in bfloat16 and two moments of 128 m' in float32
    basis = moments = 0
    for name, p in model.named_parameters():
        if name not in named:
            moments += 8 * p.numel()
            continue
        batch, (rows, cols) = p.shape[:-2].numel(), p.shape[-2:]
        basis += 2 * batch * 128 * min(rows, cols)
        moments += 8 * batch * 128 * max(rows, cols)
    found = memory.estimate(model.bfloat16(), GaLoreAdamW, groups=groups)
    assert (found.basis, found.moments) == (basis, moments)
    assert found.state / memory.GIB == pytest.approx(13.54, abs=0.01)


def test_embeddings_and_heads_by_type_tie_and_accessor_not_by_an_ancestors_name() -> None:
    class Lookup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(40, 8))

    class SpecialEmbedding(Lookup):
        pass

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding_stack = nn.Sequential(nn.Linear(8, 8), nn.Embedding(40, 8))
            self.table = SpecialEmbedding()
            self.out = nn.Linear(8, 40, bias=False)
            self.tied = nn.Linear(8, 40, bias=False)
            self.tied.weight = self.embedding_stack[1].weight

        def get_output_embeddings(self) -> nn.Module:
            return self.out

    assert low(lowrank_groups(Model(), rank=2)) == {"embedding_stack.0.weight"}
    wrapped = nn.Sequential(Model())  # a wrapper does not hand the accessor on
    assert low(lowrank_groups(wrapped, rank=2)) == {"0.embedding_stack.0.weight"}


def test_a_table_is_what_the_model_says_is_one() -> None:
    """Whatever its class is called; a model whose input is a map has none."""

    class Lookup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(8, 8))

    class Model(nn.Module):
        def __init__(self, first: nn.Module) -> None:
            super().__init__()
            self.first, self.second = first, nn.Linear(8, 8)

        def get_input_embeddings(self) -> nn.Module:
            return self.first

    assert low(lowrank_groups(Model(Lookup()), rank=2)) == {"second.weight"}
    both = {"first.weight", "second.weight"}
    assert low(lowrank_groups(Model(nn.Linear(8, 8)), rank=2)) == both
    alone = lowrank_groups(nn.ModuleDict({"first": Lookup(), "second": nn.Linear(8, 8)}), rank=2)
    assert low(alone) == both


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("time_embedding.linear_1.weight", (64, 16), True),
        ("embeddings.patch_embeddings.projection.weight", (64, 3, 4, 4), True),
        ("model.embed_tokens.weight", (64, 16), False),
        ("embeddings.word_embeddings.weight", (64, 16), False),
        ("shared.weight", (64, 16), False),
        ("shared_expert.up_proj.weight", (64, 16), True),
        ("classifier.dense.weight", (16, 16), False),
        ("layers.0.mlp.experts.gate_up_proj", (4, 64, 16), True),
        ("layers.0.mlp.experts.gate_up_proj_bias", (4, 64), False),
        ("attn.in_proj_weight", (48, 16), True),
        ("mixer.A_log", (64, 16), False),
        ("pos_embed", (2, 64, 16), False),
        ("token_proj", (64, 16), True),
        ("attn.relative_position_bias_table", (49, 12), False),
        ("conv.weight", (64, 16, 3), False),  # as a batch it would be 64 matrices (16, 3)
        ("depthwise.weight", (64, 1, 3, 3), False),
        (None, (64, 16), True),
    ],
)
def test_what_a_name_and_a_shape_tell(
    name: str | None, shape: tuple[int, ...], expected: bool
) -> None:
    assert is_linear_map(name, shape, flatten=False) is expected


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda name: f"module.{name}",  # DistributedDataParallel
        lambda name: f"_orig_mod.module.{name}",  # torch.compile of it
        lambda name: name.replace(".weight", "._checkpoint_wrapped_module.weight"),
    ],
)
def test_a_wrapper_makes_no_map_of_a_table_or_a_head(wrapped: Any) -> None:
    """``output.weight``, which Meta's LLaMA ends with, was dense until the model was wrapped."""
    names = ["output.weight", "decoder.weight", "tok_embeddings.weight", "lm_head.weight"]
    names += ["wte.weight", "layers.0.output.weight", "layers.0.wq.weight"]
    for name in names:
        found = is_linear_map(wrapped(name), (64, 16), flatten=False)
        assert found is is_linear_map(name, (64, 16), flatten=False) is ("layers" in name), name


@pytest.mark.parametrize(
    "wrap", [lambda m: torch.compile(m, backend="eager"), lambda m: nn.ModuleDict({"module": m})]
)
def test_a_head_by_its_name_in_a_wrapped_model(wrap: Any) -> None:
    def model() -> nn.Module:
        return nn.ModuleDict({"wq": nn.Linear(8, 8), "output": nn.Linear(8, 40)})

    wrapped = low(lowrank_groups(wrap(model()), rank=2))
    assert {bare(name) for name in wrapped} == low(lowrank_groups(model(), rank=2)) == {"wq.weight"}


# ------------------------------------------------------------------ kernels are one matrix


def test_a_kernel_of_three_dimensions_is_one_matrix() -> None:
    """In its own group, and stepped bit for bit as the matrix ``(out, in * k)``."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(6, 9, 3), nn.ConvTranspose1d(9, 5, 4), nn.Linear(7, 8))
    groups = lowrank_groups(model, rank=2, projector="svd", stagger=False)
    flat = {n: g.get("flatten", False) for g in groups for n in g["param_names"]}
    assert {n for n, on in flat.items() if on} == {"0.weight", "1.weight"}
    kernel = model[0].weight
    twin = nn.Parameter(kernel.detach().flatten(1).clone())
    same = {"lr": 0.1, "weight_decay": 0.0}
    optimizer = GaLoreSGD(groups, **same)
    other = GaLoreSGD([twin], rank=2, projector="svd", stagger=False, **same)
    for step in range(3):
        grad = torch.randn(kernel.shape, generator=torch.Generator().manual_seed(step))
        kernel.grad, twin.grad = grad, grad.flatten(1).clone()
        optimizer.step()
        other.step()
        assert torch.equal(kernel.flatten(1), twin)
    assert optimizer.state[kernel]["basis"].shape == (9, 2)


def test_flatten_is_an_option_and_an_override() -> None:
    model = nn.Sequential(nn.Conv1d(6, 9, 8), nn.Linear(7, 8))
    batch = lowrank_groups(model, rank=2, overrides={"0": {"flatten": False}})
    assert not any(g.get("flatten", False) for g in batch)
    weight = nn.Parameter(torch.zeros(4, 6, 8))
    optimizer = GaLoreAdamW([weight], rank=2, flatten=True)
    weight.grad = torch.randn(4, 6, 8)
    optimizer.step()
    assert optimizer.state[weight]["basis"].shape == (4, 2)
    assert matrix_view((4, 6, 8)).batch == (4,)
    assert matrix_view((4, 6, 8), flatten=True)[1:] == ((), 4, 48, False)
    with pytest.raises(ValueError, match="flatten must be True or False, got 1"):
        GaLoreAdamW([weight], flatten=1)


def test_a_checkpoint_does_not_cross_the_two_views() -> None:
    def make(flatten: bool) -> GaLoreAdamW:
        weight = nn.Parameter(torch.ones(4, 6, 8))
        optimizer = GaLoreAdamW([weight], rank=2, flatten=flatten)
        weight.grad = torch.ones(4, 6, 8)
        optimizer.step()
        return optimizer

    with pytest.raises(
        ValueError, match=r"does not fit parameter 0 .* flatten is False there and True here"
    ):
        make(True).load_state_dict(make(False).state_dict())


def test_experts_step_as_matrices_of_their_own() -> None:
    torch.manual_seed(1)
    with torch.device("cpu"):
        model = transformers.MixtralForCausalLM(
            transformers.MixtralConfig(**EXPERTS, num_local_experts=4)
        )
    optimizer = GaLoreSGD(lowrank_groups(model, rank=2, projector="svd"), lr=0.1)
    experts = model.model.layers[0].mlp.experts.down_proj
    singles = [nn.Parameter(x.detach().clone()) for x in experts]
    other = GaLoreSGD([{"params": singles, "rank": 2}], lr=0.1, projector="svd")
    model(input_ids=torch.arange(12)[None], labels=torch.arange(12)[None]).loss.backward()
    for single, grad in zip(singles, experts.grad, strict=True):
        single.grad = grad.clone()
    optimizer.step()
    other.step()
    for single, expert in zip(singles, experts, strict=True):
        assert_close(expert, single)


# ------------------------------------------------------------------ what is said


VOCABULARIES = [
    ((128256, 4096), [(4096, 4096), (14336, 4096), (4096, 14336)], True),
    ((32000, 8192), [(28672, 8192)] * 4 + [(8192, 28672)] * 2, True),
    ((28672, 8192), [(28672, 8192), (8192, 28672)], False),  # the MLP of a single layer
    ((16384, 2048), [(16384, 2048)] * 36 + [(2048, 16384)] * 18, False),
    ((4096, 4096), [], False),
    ((4096, 32000), [], False),
    ((50257, 768), [(1024, 768), (768, 2304)], True),
]


@pytest.mark.parametrize(("shape", "others", "expected"), VOCABULARIES)
def test_vocabularies_are_told_from_mlps(shape: Any, others: Any, expected: bool) -> None:
    assert looks_like_vocabulary(shape, [shape, *others]) is expected


def test_an_embedding_without_a_name_warns_once_with_the_remedy() -> None:
    llama = on_meta("LlamaForCausalLM", "LlamaConfig", **{**EXPERTS, "vocab_size": 32000})
    message = r"parameter 0 of shape \(32000, 32\) and parameter \d+ .* model\.named_parameters\(\)"
    with pytest.warns(UserWarning, match=message) as caught:
        optimizer = GaLoreAdamW(llama.parameters(), rank=2)
    assert len(caught) == 1 and caught[0].filename == __file__
    with warnings_off():
        optimizer.add_param_group({"params": [nn.Parameter(torch.empty(32001, 3, device="meta"))]})
        GaLoreAdamW(llama.named_parameters(), rank=2)
        GaLoreAdamW(lowrank_groups(llama, rank=2))


@pytest.mark.parametrize("cls", [GaLoreAdamW, FrugalAdamW, SSTAdamW])
def test_a_warning_points_at_the_line_that_made_the_group(cls: Any) -> None:
    options = {"projector": "svd"} if cls is FrugalAdamW else {}
    with pytest.warns(UserWarning, match="rank 6 is clamped to 4") as caught:
        optimizer = cls([{"params": [nn.Parameter(torch.ones(4, 30))], "rank": 6}], **options)
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(4, 30))], "rank": 6})
    lines = {w.lineno for w in caught if "clamped" in str(w.message)}
    assert len(lines) == 2 and {w.filename for w in caught} == {__file__}


def test_a_rank_that_covers_much_of_a_model_warns_once() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 64), nn.Linear(64, 64))
    message = r"rank 16 leaves nothing out of 0\.weight .*and 1 more, 12% of the matrices"
    with pytest.warns(UserWarning, match=message) as caught:
        GaLoreAdamW(model.named_parameters(), rank=16)
    assert len(caught) == 1
    with warnings_off():
        GaLoreAdamW(model.named_parameters(), rank=0.25)
        GaLoreAdamW(nn.Sequential(nn.Linear(8, 8), nn.Linear(512, 512)).named_parameters(), rank=16)


@contextlib.contextmanager
def warnings_off() -> Iterator[None]:
    """Any warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_a_kernel_without_its_module_is_dense_and_logged(logged: Logged) -> None:
    model = nn.Sequential(nn.Conv1d(6, 9, 3), nn.Linear(6, 9))
    with logged.at_level(logging.INFO, "lowrank_optim"):
        optimizer = GaLoreAdamW(model.named_parameters(), rank=2)
        optimizer._items(optimizer.param_groups[0])
    assert any("dense in a group of rank 2: 0.weight" in m for m in logged.messages)
