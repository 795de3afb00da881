"""Parameter groups: made from a model, or written for another package."""

from __future__ import annotations

import logging
import random
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lowrank_optim import FrugalAdamW, GaLoreAdamW, GaLoreSGD, lowrank_groups
from lowrank_optim.groups import Group
from lowrank_optim.groups.names import bare
from tests import runs
from tests.logged import Logged


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.Linear(8, 8)
        self.mlp = nn.Linear(8, 16)
        self.norm = nn.LayerNorm(8)


class Model(nn.Module):
    """Embedding, eleven layers (so that ``layers.1`` and ``layers.10`` both exist) and a head."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(20, 8)
        self.layers = nn.ModuleList(Block() for _ in range(11))
        self.lm_head = nn.Linear(8, 20, bias=False)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight


def ranks(groups: list[Group]) -> dict[str, Any]:
    return {name: g.get("rank") for g in groups for name in g["param_names"]}


def keyed(groups: list[Group], name: str) -> Group:
    return next(g for g in groups if name in g["param_names"])


def low(groups: list[Group]) -> set[str]:
    return {name for name, rank in ranks(groups).items() if rank is not None}


# ------------------------------------------------------------------ what is targeted


def test_all_linear_takes_every_linear_but_embeddings_and_heads() -> None:
    model = Model()
    groups = lowrank_groups(model, rank=2)
    expected = {f"layers.{i}.{m}.weight" for i in range(11) for m in ("attn", "mlp")}
    assert low(groups) == expected
    assert ranks(groups).keys() == dict(model.named_parameters()).keys()


def test_every_parameter_is_in_one_group_tied_ones_once() -> None:
    model = Model(tied=True)
    groups = lowrank_groups(model, rank=2)
    ids = [id(p) for g in groups for p in g["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())
    assert all(len(g["params"]) == len(g["param_names"]) for g in groups)


def test_a_tied_weight_answers_to_each_of_its_names() -> None:
    """It is listed under the first; a pattern for the second must not be reported as unused."""
    model = Model(tied=True)
    groups = lowrank_groups(model, rank=2, overrides={"lm_head": {"rank": 3}})
    assert ranks(groups)["embed_tokens.weight"] == 3
    with pytest.raises(ValueError, match=r"overrides \['lm_head'\] match no trainable parameter"):
        lowrank_groups(model, overrides={"embed": {"rank": 3}, "lm_head": {"rank": 2}})


def test_frozen_parameters_are_left_out() -> None:
    model = Model()
    model.layers[3].requires_grad_(False)
    groups = lowrank_groups(model, rank=2)
    assert not any(name.startswith("layers.3.") for name in ranks(groups))
    with pytest.raises(ValueError, match=r"'layers\.3' matches no trainable matrix"):
        lowrank_groups(model, target_modules="layers.3")


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (r"layers\.\d\.attn", {f"layers.{i}.attn.weight" for i in range(10)}),
        ("attn", {f"layers.{i}.attn.weight" for i in range(11)}),
        (r"layers\.2\.mlp$", {"layers.2.mlp.weight"}),  # a module's name, anchored
        (r".*\.(attn)", {f"layers.{i}.attn.weight" for i in range(11)}),  # transformers' fullmatch
        ("layers.1", {"layers.1.attn.weight", "layers.1.mlp.weight"}),  # not layers.10
        ("layers.1.mlp.weight", {"layers.1.mlp.weight"}),
        (["layers.1", r"layers\.2\.m"], {"layers.1.attn.weight", "layers.1.mlp.weight",
                                         "layers.2.mlp.weight"}),
        ("embed_tokens", {"embed_tokens.weight"}),  # whoever names it gets it
    ],
)  # fmt: skip
def test_targets_are_names_or_regular_expressions(target: Any, expected: set[str]) -> None:
    """The full name of a module means that module; everything else is searched for."""
    groups = lowrank_groups(Model(), rank=2, target_modules=target)
    assert low(groups) == expected


@pytest.mark.parametrize("target", ["q_proj", ["attn", "q_proj"], r"\.norm\.", "norm"])
def test_a_target_that_matches_no_matrix_raises(target: Any) -> None:
    bad = target if isinstance(target, str) else target[-1]
    with pytest.raises(ValueError, match=r"target_modules .* matches no trainable matrix") as error:
        lowrank_groups(Model(), target_modules=target)
    assert repr(bad) in str(error.value)


def test_all_linear_without_a_linear_raises() -> None:
    """With what there is, as of any other target, or with what to do if there is nothing."""
    table = nn.Sequential(nn.Embedding(4, 4), nn.LayerNorm(4))
    with pytest.raises(ValueError, match=r"'all-linear' matches no .* matrices: 0\.weight$"):
        lowrank_groups(table)
    with pytest.raises(ValueError, match=r"'all-linear' matches no .*\. Unfreeze .* rank=None"):
        lowrank_groups(table[1])


@pytest.mark.parametrize("where", ["target_modules", "overrides", "no_decay"])
def test_a_glob_is_not_a_regular_expression_and_says_so(where: str) -> None:
    value = {"*.mlp": {"rank": 3}} if where == "overrides" else "*.mlp"
    with pytest.raises(ValueError, match=r"'\*\.mlp' is not a regular expression: nothing to"):
        lowrank_groups(Model(), **{where: value})


# ------------------------------------------------------------------ overrides


def test_first_override_that_matches_wins() -> None:
    overrides = {
        r"layers\.0\.mlp": {"rank": 4, "projector": "random"},
        r"mlp": {"rank": 0.5, "state_dtype": "bfloat16"},
        r"attn\.weight": {"scale": 1.0},
    }
    groups = lowrank_groups(Model(), rank=2, overrides=overrides, projector="svd", scale=0.5)
    first = keyed(groups, "layers.0.mlp.weight")
    assert (first["rank"], first["projector"], first["scale"]) == (4, "random", 0.5)
    assert "state_dtype" not in first
    second = keyed(groups, "layers.1.mlp.weight")
    assert (second["rank"], second["projector"]) == (0.5, "svd")
    assert second["state_dtype"] == "bfloat16"
    third = keyed(groups, "layers.1.attn.weight")
    assert (third["rank"], third["scale"]) == (2, 1.0)
    model = Model()
    optimizer = GaLoreAdamW(lowrank_groups(model, rank=2, overrides=overrides), projector="svd")
    runs.train(list(model.parameters()), optimizer, [0])
    assert optimizer.state[model.layers[1].mlp.weight]["low.exp_avg"].dtype == torch.bfloat16
    assert optimizer.state[model.layers[1].attn.weight]["low.exp_avg"].dtype == torch.float32


def test_rank_none_makes_dense_and_a_rank_makes_low_rank() -> None:
    overrides = {"attn": {"rank": None}, "lm_head": {"rank": 5}}
    groups = lowrank_groups(Model(), rank=2, overrides=overrides, projector="svd")
    assert low(groups) == {f"layers.{i}.mlp.weight" for i in range(11)} | {"lm_head.weight"}
    assert keyed(groups, "lm_head.weight")["projector"] == "svd"
    assert "projector" not in keyed(groups, "layers.0.attn.weight")
    assert "rank" not in keyed(groups, "layers.0.attn.weight")  # as galore-torch reads it


def test_all_dense_stays_dense() -> None:
    """Without a rank in any group the constructor's own would have applied to every matrix."""
    model = Model()
    groups = lowrank_groups(model, rank=2, overrides={".": {"rank": None}})
    optimizer = GaLoreAdamW(groups)
    runs.train(list(model.parameters()), optimizer, [0])
    assert all("basis" not in state for state in optimizer.state.values())


@pytest.mark.parametrize("overrides", [{"q_proj": {"rank": 3}}, {"mlp": {}, r"0\.mlp": {}}])
def test_an_override_without_a_parameter_of_its_own_raises(overrides: dict[str, Any]) -> None:
    """Also one that an earlier one shadows: whoever wrote it expects it to do something."""
    with pytest.raises(ValueError, match="match no trainable parameter not taken already"):
        lowrank_groups(Model(), overrides=overrides)


def test_bad_values_raise_when_the_groups_are_made() -> None:
    with pytest.raises(ValueError, match="rank must be a positive int or a fraction"):
        lowrank_groups(Model(), rank=0)
    with pytest.raises(ValueError, match="projector must be one of"):
        lowrank_groups(Model(), rank=2, overrides={"mlp": {"projector": "qr"}})
    with pytest.raises(ValueError, match="update_proj_gap must be a positive int, got '200'"):
        lowrank_groups(Model(), rank=2, update_proj_gap="200")


@pytest.mark.parametrize("no_decay", [("bias", "norm"), ["bias", "norm"], r"bias|norm"])
def test_no_decay(no_decay: Any) -> None:
    """A plain string is one pattern: read as a sequence it was b, i, a, s, and matched all."""
    groups = lowrank_groups(Model(), rank=2, no_decay=no_decay)
    for group in groups:
        for name in group["param_names"]:
            spared = "bias" in name or "norm" in name
            assert (group.get("weight_decay") == 0.0) == spared, name
    lowrank_groups(Model(), rank=2, no_decay="rotary")  # not every model has every pattern


# ------------------------------------------------------------------ order, log, equality


def test_order_of_groups_and_parameters_is_the_models() -> None:
    """Checkpoints are by position: the same call must give the same order in every process."""
    make: Any = lambda: lowrank_groups(  # noqa: E731
        Model(), rank=2, overrides={"mlp": {"rank": 3}}, no_decay=["norm"]
    )
    first = make()
    random.seed(5)
    assert [g["param_names"] for g in make()] == [g["param_names"] for g in first]
    order = list(dict(Model().named_parameters()))
    for group in first:
        assert group["param_names"] == sorted(group["param_names"], key=order.index)
    heads = [g["param_names"][0] for g in first]
    assert heads == sorted(heads, key=order.index)


def test_the_split_is_logged_as_a_table(logged: Logged) -> None:
    with logged.at_level(logging.INFO, "lowrank_optim.groups"):
        lowrank_groups(Model(), rank=2)
    rows = [line.split() for line in logged.messages[-1].splitlines()]
    assert rows[0] == ["rank", "tensors", "parameters", "first"]
    assert ["2", "22", "2,112", "layers.0.attn.weight"] in rows  # 11 (64 + 128)
    dense = 20 * 8 * 2 + 11 * (8 + 16 + 8 + 8)
    assert ["dense", "46", f"{dense:,}", "embed_tokens.weight"] in rows


@pytest.mark.parametrize("cls", [GaLoreAdamW, GaLoreSGD])
def test_equal_to_groups_written_by_hand_step_by_step(cls: Any) -> None:
    """The order of groups differs, so the published cadence: an offset depends on the position."""
    ours, hand = nn.Sequential(nn.Linear(9, 7), nn.Linear(7, 5)), None
    hand = nn.Sequential(nn.Linear(9, 7), nn.Linear(7, 5))
    hand.load_state_dict(ours.state_dict())
    common = {"lr": 0.05, "projector": "svd", "stagger": False, "update_proj_gap": 2}
    made = lowrank_groups(ours, rank=3, overrides={"1": {"rank": 2}}, no_decay="bias", scale=0.5)
    optimizer = cls(made, weight_decay=0.1, **common)
    other = cls(
        [
            {"params": [hand[0].bias, hand[1].bias], "weight_decay": 0.0},
            {"params": [hand[1].weight], "rank": 2, "scale": 0.5},
            {"params": [hand[0].weight], "rank": 3, "scale": 0.5},
        ],
        weight_decay=0.1,
        **common,
    )
    for step in range(5):
        runs.set_grads(ours.parameters(), step)
        for p, q in zip(hand.parameters(), ours.parameters(), strict=True):
            assert q.grad is not None
            p.grad = q.grad.clone()
        optimizer.step()
        other.step()
        runs.assert_same(hand.parameters(), ours.parameters())


# ------------------------------------------------------------------ real models


def test_llama_from_a_config() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    for tie in (False, True):
        config.tie_word_embeddings = tie
        model = transformers.LlamaForCausalLM(config)
        parts = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
        parts += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
        expected = {f"model.layers.{i}.{part}.weight" for i in range(2) for part in parts}
        assert low(lowrank_groups(model, rank=4)) == expected
        named = GaLoreAdamW(model.named_parameters(), rank=4)  # the one-line swap splits alike
        runs.train(list(model.parameters()), named, [0])
        projected = {n for n, p in model.named_parameters() if "basis" in named.state[p]}
        assert projected == expected


def test_gpt2_whose_linears_are_conv1d() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=40, n_positions=8, n_embd=12, n_layer=1, n_head=2)
    groups = lowrank_groups(transformers.GPT2LMHeadModel(config), rank=4)
    parts = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    assert low(groups) == {f"transformer.h.0.{part}.weight" for part in parts}


def test_an_accessor_that_a_model_does_not_implement_is_no_error() -> None:
    """transformers' base class raises NotImplementedError where a model has no embeddings."""

    class Odd(nn.Linear):
        def get_input_embeddings(self) -> nn.Module:
            raise NotImplementedError

    assert low(lowrank_groups(Odd(8, 8), rank=2)) == {"weight"}


# ------------------------------------------------------------------ keys of released packages


def one(**keys: Any) -> Group:
    weight = nn.Parameter(torch.zeros(8, 12))
    return GaLoreAdamW([{"params": [weight], **keys}]).param_groups[0]


def test_galore_torch_groups_work_as_they_are() -> None:
    keys = {"rank": 4, "update_proj_gap": 7, "scale": 0.5, "proj_type": "right", "dim": 2}
    params = list(runs.parameters().values())
    given = [{"params": params[:1], **keys}, {"params": params[1:]}]
    optimizer = GaLoreAdamW(given)
    low_rank, dense = optimizer.param_groups
    assert {k: low_rank[k] for k in keys if k != "dim"} == {k: keys[k] for k in keys if k != "dim"}
    assert "dim" not in low_rank
    assert dense["rank"] is None  # galore-torch: a group without rank is plain AdamW
    assert given[0] == {"params": params[:1], **keys}  # the caller's dicts are left alone


@pytest.mark.parametrize(
    ("alias", "value", "key", "read"),
    [
        ("alpha", 0.125, "scale", 0.125),  # Fira
        ("update_gap", 50, "update_proj_gap", 50),  # FRUGAL
        ("proj_side", "left", "proj_type", "left"),
        ("reset_statistics", True, "on_refresh", "reset"),
        ("reset_statistics", False, "on_refresh", "keep"),
    ],
)
def test_an_alias_is_its_key(alias: str, value: Any, key: str, read: Any) -> None:
    group = one(rank=4, **{alias: value})
    assert group[key] == read and alias not in group
    assert one(rank=4, **{alias: value, key: read})[key] == read  # both, and agreeing


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"alpha": 0.5, "scale": 0.25}, r"scale=0\.25 and its alias alpha=0\.5 differ"),
        ({"update_gap": 5, "update_proj_gap": 6}, r"update_proj_gap=6 and its alias update_gap=5"),
        ({"proj_side": "left", "proj_type": "right"}, r"its alias proj_side='left' differ"),
        ({"reset_statistics": True, "on_refresh": "keep"}, r"reset_statistics='reset' differ"),
        (
            {"alpha": "0.5"},
            r"scale must be a finite number .*, got '0\.5'",
        ),  # never converted in silence
        ({"update_gap": 2.7}, r"update_proj_gap must be a positive int, got 2\.7"),
        ({"correct_bias": False}, r"correct_bias=False is not supported"),
    ],
)
def test_aliases_that_conflict_or_hold_nonsense_raise(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        one(rank=4, **keys)


# ------------------------------------------------------------------ what `rank` means


def projected(optimizer: GaLoreAdamW) -> list[bool]:
    params = [p for g in optimizer.param_groups for p in g["params"]]
    runs.train(params, optimizer, [0])
    return ["basis" in optimizer.state[p] for p in params]


def matrices(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(s)) for s in shapes]


def test_constructor_rank_applies_where_no_group_names_one() -> None:
    a, b = matrices((8, 12), (12, 8))
    assert projected(GaLoreAdamW([a, b], rank=4)) == [True, True]
    assert projected(GaLoreAdamW([{"params": [a]}, {"params": [b]}], rank=4)) == [True, True]
    assert projected(GaLoreAdamW([{"params": [a], "rank": 4}, {"params": [b]}])) == [True, False]
    given = [{"params": [a], "rank": None}, {"params": [b]}]
    assert projected(GaLoreAdamW(given, rank=4)) == [False, False]


@pytest.mark.parametrize("cls", [GaLoreAdamW, FrugalAdamW])
def test_a_rank_of_the_constructor_that_no_group_takes_warns(cls: Any) -> None:
    """``GaLoreAdamW(lowrank_groups(model), rank=512)`` trained at rank 128, without a word."""
    groups = lowrank_groups(Model(), rank=0.5, no_decay="norm")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cls(groups, projector="columns")  # nobody asked for another rank
        cls(groups, projector="columns", rank=0.5)  # the one that they have
    message = r"rank=0.75 of .* has no effect.*such as 0.5,.*lowrank_groups"
    with pytest.warns(UserWarning, match=message) as caught:
        optimizer = cls(groups, projector="columns", rank=0.75)
    assert [w.filename for w in caught] == [__file__]
    assert {g["rank"] for g in optimizer.param_groups} == {0.5, None}


WRAPPED = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "layers compiled": lambda model: compiled_layers(model),
    "in a wrapper": lambda model: nn.ModuleDict({"module": model}),  # as of DistributedDataParallel
}


def compiled_layers(model: Model) -> Model:
    for i, block in enumerate(model.layers):
        block.attn = torch.compile(block.attn, backend="eager")
        model.layers[i] = torch.compile(block, backend="eager")
    return model


@pytest.mark.parametrize("wrapped", WRAPPED)
@pytest.mark.parametrize(
    "asked",
    [
        {"target_modules": ["layers.1"]},
        {"target_modules": ["layers.1.attn", "layers.2.mlp.weight"]},
        {"target_modules": r"^layers\.\d+\.attn$"},
        {"overrides": {"layers.1": {"rank": 3}, r"^layers\.(2|3)\.attn\.weight": {"rank": None}}},
        {"no_decay": ["layers.1", r"^embed", r"\.norm$"]},
    ],
)
def test_what_wrappers_add_to_names_changes_no_group(wrapped: str, asked: dict[str, Any]) -> None:
    """``layers.1`` meant ``layers.10`` too in a compiled model, and ``^layers`` meant nothing."""

    def found(model: nn.Module) -> dict[str, Any]:
        groups = lowrank_groups(model, rank=2, **asked)
        return {
            bare(name): (g.get("rank"), g.get("weight_decay"))
            for g in groups
            for name in g["param_names"]
        }

    assert found(WRAPPED[wrapped](Model())) == found(Model())


def test_a_rank_that_does_not_fit_leaves_a_matrix_dense_and_says_so(
    logged: Logged,
) -> None:
    """Under the one-line swap: a basis as wide as the matrix would only cost memory."""
    named = list(zip(("small", "large"), matrices((4, 30), (5, 30)), strict=True))
    with logged.at_level(logging.INFO, "lowrank_optim"):
        assert projected(GaLoreAdamW(named, rank=4)) == [False, True]
    assert any("dense in a group of rank 4: small" in m for m in logged.messages)


def test_a_clamped_rank_warns_once_for_a_group_that_names_it() -> None:
    a, b, c = matrices((4, 30), (3, 30), (8, 30))
    with pytest.warns(
        UserWarning, match=r"rank 6 is clamped to 4 for parameter 0 .* and 1 mo"
    ) as w:
        optimizer = GaLoreAdamW([{"params": [a, b, c], "rank": 6}])
    assert len(w) == 1
    assert projected(optimizer) == [True, True, True]
    assert [optimizer.state[p]["basis"].shape[1] for p in (a, b, c)] == [4, 3, 6]


def test_a_group_whose_rank_leaves_nothing_out_warns_once() -> None:
    """Factors of LoRA at their own rank, say: the state is larger than that of a dense group."""
    rank = 4
    factors, layer = matrices((rank, 30), (20, rank)), matrices((40, 50))
    message = (
        r"rank 4 leaves nothing out of parameter 0 of shape \(4, 30\) and 1 more, 9% .* below 4"
    )
    with pytest.warns(UserWarning, match=message) as caught:
        optimizer = GaLoreAdamW([{"params": [*factors, *layer], "rank": rank}])
        optimizer.add_param_group({"params": matrices((rank, 30)), "rank": rank})
    assert len(caught) == 1 and caught[0].filename == __file__
    assert projected(optimizer) == [True, True, True, True]
    state = optimizer.state[factors[0]]
    moments = sum(x.numel() for key, x in state.items() if "exp_avg" in key)
    assert moments == 2 * factors[0].numel()  # as dense; the basis comes on top


@pytest.mark.parametrize(
    ("shape", "rank"),
    [((4, 30), 3), ((4, 30), 0.75), ((1, 30), 0.25), ((4, 30), None)],
    ids=["less", "a fraction", "a fraction of one", "dense"],
)
def test_a_rank_that_leaves_something_out_does_not_warn(
    shape: tuple[int, int], rank: float | None
) -> None:
    """Nor a fraction of a side of one, which is none of the user's numbers."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GaLoreAdamW([{"params": matrices(shape), "rank": rank}])
        GaLoreAdamW([{"params": [*matrices((3, 4)), *matrices((400, 500))], "rank": 3}])


def test_a_fraction_counts_the_projected_dimension() -> None:
    a, b = matrices((8, 30), (30, 12))
    optimizer = GaLoreAdamW([{"params": [a, b], "rank": 0.25}])
    assert projected(optimizer) == [True, True]
    assert [optimizer.state[p]["basis"].shape for p in (a, b)] == [(8, 2), (12, 3)]


def test_names_keep_embeddings_and_heads_dense_unless_a_group_asks() -> None:
    names = ["wte.weight", "blocks.0.weight", "lm_head.weight", "score.weight", "embeddings.weight"]
    named = list(zip(names, matrices(*[(8, 12)] * 5), strict=True))
    assert projected(GaLoreAdamW(named, rank=4)) == [False, True, False, False, False]
    assert projected(GaLoreAdamW([{"params": named, "rank": 4}])) == [True] * 5


# ------------------------------------------------------------------ values from config files


def test_numpy_scalars_become_numbers_of_python() -> None:
    """A sweep over ``np.logspace`` trained, and wrote checkpoints that could not be loaded."""
    options = {"lr": np.float64(0.01), "rank": np.int64(3), "update_proj_gap": np.int32(5)}
    options |= {"scale": np.float32(0.5), "maximize": np.bool_(True)}
    model = nn.Linear(8, 8)
    made = [
        GaLoreAdamW(model.parameters(), **options),
        GaLoreAdamW([{"params": model.parameters(), **options}]),
        GaLoreAdamW(lowrank_groups(model, target_modules=["weight"], **options)),
    ]
    for optimizer in made:
        group = optimizer.param_groups[0]
        assert {k: (group[k], type(group[k])) for k in options} == {
            k: (v.item(), type(v.item())) for k, v in options.items()
        }
        runs.loaded(runs.saved(optimizer))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("lr", "1e-3", r"Invalid learning rate: '1e-3'"),  # YAML reads 1e-3 as a string
        ("rank", "128", r"rank must be a positive int or a fraction in \(0, 1\), got '128'"),
        ("update_proj_gap", "200", r"update_proj_gap must be a positive int, got '200'"),
        ("scale", "0.25", r"scale must be a finite number .*, got '0\.25'"),
        ("weight_decay", "0.1", r"Invalid weight_decay value: '0\.1'"),
        ("weight_decay", None, r"Invalid weight_decay value: None"),
        ("betas", "0.9,0.999", r"betas must be a pair, got '0\.9,0\.999'"),
        ("betas", ("0.9", 0.999), r"Invalid beta parameter at index 0: '0\.9'"),
        ("betas", (0.9,), r"betas must be a pair, got \(0\.9,\)"),
        ("eps", "1e-8", r"Invalid epsilon value: '1e-8'"),
        ("maximize", "false", r"maximize must be True or False, got 'false'"),
        ("stagger", "False", r"stagger must be True or False, got 'False'"),
        ("seed", "0", r"seed must be an int from 0 to .*, got '0'"),
        ("state_dtype", torch.bfloat16, r"state_dtype must be one of 'float32', .*torch\.bfloat16"),
        ("proj_type", ["std"], r"proj_type must be one of 'std', .*got \['std'\]"),
    ],
)
def test_strings_and_other_types_raise_at_construction(key: str, value: Any, message: str) -> None:
    weight = nn.Parameter(torch.zeros(8, 8))
    with pytest.raises(ValueError, match=message):
        GaLoreAdamW([weight], **{key: value})
    with pytest.raises(ValueError, match=message):
        GaLoreAdamW([{"params": [weight], key: value}])
