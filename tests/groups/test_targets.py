"""How targets may be spelled, and what is said of one that matches nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lowrank_optim import lowrank_groups
from lowrank_optim.nn import convert

ALL = [
    "all-linear", "all_linear", "ALL-LINEAR", "All_Linear", "all", "ALL",
    ["all-linear"], ["all"], ("all_linear",),
]  # fmt: skip


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.small = nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(20, 8)
        self.layers = nn.ModuleList(Attention() for _ in range(12))
        self.lm_head = nn.Linear(8, 20, bias=False)


LINEARS = {f"layers.{i}.{m}.weight" for i in range(12) for m in ("q_proj", "small")}


def low(model: nn.Module, target: Any) -> set[str]:
    groups = lowrank_groups(model, rank=2, target_modules=target)
    return {n for g in groups if g.get("rank") is not None for n in g["param_names"]}


@pytest.mark.parametrize("target", ALL, ids=str)
def test_every_spelling_of_all_linear(target: Any) -> None:
    """Not a pattern: "all" would be found in ``small``."""
    assert low(Model(), target) == LINEARS


def test_all_linear_beside_another_target() -> None:
    assert low(Model(), ["lm_head", "all"]) == LINEARS | {"lm_head.weight"}


def test_a_module_called_all_is_meant_by_its_name() -> None:
    model = nn.ModuleDict({"all": nn.Linear(8, 8), "other": nn.Linear(8, 8)})
    assert low(model, "all") == {"all.weight"}
    assert low(model, "all-linear") == {"all.weight", "other.weight"}


def test_spellings_hold_for_modules_of_factors_too() -> None:
    groups = convert(Model(), "sst", rank=2, target_modules="ALL")
    assert sum(len(g.get("shapes", ())) for g in groups) == len(LINEARS)


def refused(model: nn.Module, target: Any) -> str:
    with pytest.raises(ValueError, match="matches no trainable matrix") as error:
        lowrank_groups(model, target_modules=target)
    return str(error.value)


@pytest.mark.parametrize(
    ("target", "nearest"),
    [
        ("q_porj", "layers.0.q_proj"),
        ("Small", "layers.0.small"),
        ("layer.7.q_proj", "layers.7.q_proj"),
        ("lmhead", "lm_head"),
        (["q_proj", "smal$"], "layers.0.small"),
    ],
)
def test_a_target_without_a_match_is_told_what_there_is(target: Any, nearest: str) -> None:
    """The nearest linear layer first, and one for all layers of a kind."""
    text = refused(Model(), target)
    assert f"Trainable linear layers: {nearest}" in text
    assert sum(f".{kind}" in text.partition("layers: ")[2] for kind in ("q_proj", "small")) == 2
    assert text.partition("layers: ")[2].count(",") == 2 and text.endswith(" and 22 more")


def test_at_most_ten_names_are_listed() -> None:
    model = nn.ModuleDict({letter: nn.Linear(4, 4) for letter in "abcdefghijklm"})
    listed = refused(model, "zz").partition("layers: ")[2]
    assert listed.count(",") == 9 and listed.endswith(" and 3 more")


def test_what_is_listed_can_be_trained() -> None:
    model = Model()
    model.layers.requires_grad_(False)
    assert refused(model, "q_proj").endswith("Trainable linear layers: lm_head")
    bare = nn.ParameterDict({"left": torch.ones(4, 4), "bias": torch.ones(4)})
    assert refused(bare, "lef$").endswith("Trainable matrices: left")
    assert "no parameter with two dimensions" in refused(nn.LayerNorm(4), "x")


@pytest.mark.parametrize("target", [None, 3, [3], {"q_proj"}, {"q_proj": 1}, b"q_proj"], ids=str)
def test_what_is_not_a_target_is_an_error(target: Any) -> None:
    with pytest.raises(TypeError, match="target_modules must be 'all-linear', a pattern or a list"):
        lowrank_groups(Model(), target_modules=target)


@pytest.mark.parametrize("target", ["", [], [""], ["q_proj", ""]], ids=str)
def test_a_target_that_names_nothing_is_an_error(target: Any) -> None:
    """An empty pattern is found everywhere, and no pattern nowhere."""
    with pytest.raises(ValueError, match="names nothing"):
        lowrank_groups(Model(), target_modules=target)
