"""Presets against the tables of the papers and the scripts of the releases, written out here."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lowrank_optim import methods, presets
from lowrank_optim.groups import canonical
from lowrank_optim.groups.options import DEFAULTS
from lowrank_optim.nn import LOSTLinear, SLTrainLinear, convert

PRETRAIN = {  # rank, gap, scale, lr
    "galore": {
        "60m": (128, 200, 0.25, 0.01),
        "130m": (256, 200, 0.25, 0.01),
        "350m": (256, 200, 0.25, 0.01),
        "1b": (512, 200, 0.25, 0.01),
        "7b": (1024, 500, 0.25, 0.005),
    },
    "fira": {
        "60m": (128, 200, 0.25, 0.01),
        "130m": (256, 200, 0.25, 0.01),
        "350m": (256, 200, 0.25, 0.01),
        "1b": (512, 200, 0.0625, 0.01),
        "7b": (64, 500, 0.0625, 0.005),
    },
}
FRUGAL = {  # density, gap, lr, factor of the projected parameters' learning rate
    **{size: (0.25, 200, 1e-3, 1.0) for size in ("60m", "130m", "350m", "1b")},
    "7b": (0.0, 500, 5e-4, 0.3),
}
GLUE = {  # GaLore rank 4 and 8, FRUGAL
    "cola": (3e-5, 1e-5, 5e-4),
    "mnli": (1e-5, 1e-5, 5e-5),
    "mrpc": (3e-5, 2e-5, 2e-4),
    "qnli": (1e-5, 1e-5, 1e-4),
    "qqp": (1e-5, 2e-5, 5e-5),
    "rte": (1e-5, 2e-5, 2e-4),
    "sst2": (1e-5, 2e-5, 5e-5),
    "stsb": (1e-5, 3e-5, 1e-4),
}
APOLLO = {  # rank, scale
    False: {"60m": (128, 1.0), "1b": (256, 1.0), "7b": (256, 1.0)},
    True: {"60m": (1, 128.0), "130m": (1, 192.0), "7b": (1, 128.0)},
}
SST = {"opt-125m": 64, "opt-350m": 64, "opt-1.3b": 64, "llama-130m": 64, "llama-1.3b": 128}
SWITCHLORA = {"350m": 256, "1.3b": 512}
golore_mrpc = functools.partial(presets.golore_glue, total_steps=6900)
CASES: list[tuple[str, Callable[..., dict[str, Any]], tuple[Any, ...]]] = [
    *(("GaLoreAdamW", presets.galore_pretrain, (size,)) for size in PRETRAIN["galore"]),
    ("GaLoreAdamW", presets.golore_pretrain, ("60m",)),
    ("GaLoreAdamW", golore_mrpc, ("mrpc",)),
    *(("FiraAdamW", presets.fira_pretrain, (size,)) for size in PRETRAIN["fira"]),
    *(
        ("ApolloAdamW", functools.partial(presets.apollo_pretrain, mini=mini), (size,))
        for mini, sizes in APOLLO.items()
        for size in sizes
    ),
    *(("FrugalAdamW", presets.frugal_pretrain, (size,)) for size in FRUGAL),
    *(
        ("LDAdamW", functools.partial(presets.ldadam_pretrain, error_feedback=keep), ("350m",))
        for keep in (True, False)
    ),
    ("DCTAdamW", presets.dct_release, ()),
    *(("SSTAdamW", presets.sst_pretrain, (model,)) for model in SST),
    *(("SwitchLoRAAdamW", presets.switchlora_pretrain, (size,)) for size in SWITCHLORA),
    ("LisaAdamW", presets.lisa_finetune, ("llama2-7b",)),
    *(("BAdamW", presets.badam_finetune, (model,)) for model in ("llama2-7b", "llama3-8b")),
    *(("GaLoreAdamW", presets.galore_glue, (task, r)) for task in GLUE for r in (4, 8)),
    *(("FrugalAdamW", presets.frugal_glue, (task, r)) for task in GLUE for r in (8, 0)),
]
"""Every preset, and the optimizer it is for."""


def test_each_says_where_its_figures_are_from() -> None:
    """The paper, or what of the release; and then that they are not the paper's."""
    own = [f for name, f in vars(presets).items() if inspect.isfunction(f) and name[0] != "_"]
    assert len(own) >= 10
    for preset in own:
        source = (inspect.getdoc(preset) or "").partition("Source: ")[2].partition("\n\n")[0]
        first = " ".join(source.split())
        assert "arXiv:" in first, preset.__name__
        if not first.split(" (")[0].endswith("et al."):
            assert "not the" in first, f"{preset.__name__}: {first}"


@pytest.mark.parametrize("name", PRETRAIN)
def test_pretraining_is_as_in_the_tables(name: str) -> None:
    preset = {"galore": presets.galore_pretrain, "fira": presets.fira_pretrain}[name]
    for size, (rank, gap, scale, lr) in PRETRAIN[name].items():
        got = preset(size)
        assert (got["rank"], got["update_proj_gap"], got["scale"], got["lr"]) == (
            rank, gap, scale, lr
        )  # fmt: skip
        assert (got["weight_decay"], got["betas"], got["eps"]) == (0.0, (0.9, 0.999), 1e-6)
        assert (got["projector"], got["stagger"], got["on_refresh"]) == ("svd", False, "keep")
        if name == "fira":
            assert (got["alpha_mode"], got["limiter"], got["scaling"]) == (
                "release", 1.01, "column"
            )  # fmt: skip


def test_apollo_is_as_published() -> None:
    for mini, sizes in APOLLO.items():
        for size, (rank, scale) in sizes.items():
            got = presets.apollo_pretrain(size, mini=mini)
            assert (got["rank"], got["scale"], got["lr"], got["eps"]) == (rank, scale, 0.01, 1e-6)
            assert got["scale_type"] == ("tensor" if mini else "channel")
            assert (got["update_proj_gap"], got["limiter"], got["projector"]) == (
                200, 1.01, "random"
            )  # fmt: skip
    with pytest.raises(ValueError, match="no published size '130m'"):
        presets.apollo_pretrain("130m")


def test_frugal_is_as_in_the_scripts() -> None:
    for size, (density, gap, lr, factor) in FRUGAL.items():
        got = presets.frugal_pretrain(size)
        want = {"density": density, "update_proj_gap": gap, "lr": lr, "weight_decay": 0.0}
        want |= {"proj_params_lr_scale": factor, "projector": "block", "free_rule": "sign"}
        want |= {"block_order": "descending", "betas": (0.9, 0.999), "eps": 1e-8}
        assert {k: got[k] for k in want} == want


def test_glue_is_as_in_the_tables() -> None:
    for task, (rank4, rank8, frugal) in GLUE.items():
        got = [presets.galore_glue(task, rank) for rank in (4, 8)]
        assert [g["lr"] for g in got] == [rank4, rank8]
        assert [g["scale"] for g in got] == [4.0, 2.0]
        own = presets.frugal_glue(task)
        assert (own["lr"], own["free_lr_scale"], own["weight_decay"]) == (frugal, 0.1, 0.1)
        assert own["density"] == 8 / 768 and own["update_proj_gap"] == 500
        assert presets.frugal_glue(task, rank=0)["density"] == 0.0


BUILDABLE = [case for case in CASES if hasattr(methods, case[0])]


@pytest.mark.parametrize("method, preset, arguments", BUILDABLE)
def test_a_preset_makes_its_optimizer(
    method: str, preset: Callable[..., dict[str, Any]], arguments: tuple[Any, ...]
) -> None:
    """Its arguments are the optimizer's: they are in the group by our names, and it steps."""
    weight = torch.nn.Parameter(torch.zeros(2048, 2048, device="meta"))
    chosen = preset(*arguments)
    optimizer = getattr(methods, method)([weight], **chosen)
    (group,) = optimizer.param_groups
    want = canonical(chosen)  # a density is a rank
    assert {k: group[k] for k in want} == want
    small = torch.nn.Parameter(torch.zeros(6, 8))
    fits = {"rank": 2} if "rank" in chosen else {}
    optimizer = getattr(methods, method)([small], **{**chosen, **fits, "lr": 0.1})
    small.grad = torch.randn(6, 8)
    optimizer.step()
    assert float(small.detach().norm()) > 0


def test_sltrain_is_as_in_the_scripts() -> None:
    for size, rank, alpha in (
        ("60m", 128, 32),
        ("130m", 256, 16),
        ("350m", 256, 16),
        ("1b", 512, 8),
    ):
        got = presets.sltrain_pretrain(size)
        assert got == {"rank": rank, "density": 0.03, "scale": alpha}
    model = torch.nn.Sequential(torch.nn.Linear(192, 160))
    convert(model, "sltrain", **presets.sltrain_pretrain("60m"))
    layer = model[0]
    assert isinstance(layer, SLTrainLinear)
    assert (layer.s, len(layer.a), len(layer.values)) == (32 / 128, 128, int(0.03 * 192 * 160))
    with pytest.raises(ValueError, match="no published size '7b'"):
        presets.sltrain_pretrain("7b")


def test_golore_is_as_in_the_readme() -> None:
    """The switch is at 80 %, and a basis there is no longer one of singular vectors."""
    got = presets.golore_pretrain("60m")
    assert (got["rank"], got["update_proj_gap"], got["lr"]) == (128, 200, 1e-3)
    assert (got["projector"], got["random_from"], got["total_steps"]) == ("golore", 0.8, 10_000)
    tuned = golore_mrpc("MRPC")
    assert (tuned["rank"], tuned["scale"], tuned["update_proj_gap"]) == (4, 4.0, 500)
    assert (tuned["lr"], tuned["random_from"], tuned["total_steps"]) == (3e-5, 0.8, 6900)
    for unsaid in ("scale", "eps", "weight_decay"):
        assert unsaid not in got
    spans = {}
    for steps in (8, 9):
        param = torch.nn.Parameter(torch.zeros(8, 12))
        short = {**presets.golore_pretrain("60m", total_steps=10), "rank": 2, "update_proj_gap": 1}
        optimizer = methods.GaLoreAdamW([param], **short)
        grad = torch.diag_embed(torch.tensor([9.0, 8.0, 1, 1, 1, 1, 1, 1])) @ torch.eye(8, 12)
        for _ in range(steps):
            param.grad = grad.clone()
            optimizer.step()
        basis = optimizer.state[param]["basis"]
        spans[steps] = float(basis[:2].square().sum())
    assert spans[8] == pytest.approx(2.0) and spans[9] < 1.9


def test_factors_are_as_published() -> None:
    for model, rank in SST.items():
        got = presets.sst_pretrain(model)
        assert (got["rank"], got["steps_per_iteration"], got["warmup_steps"]) == (rank, 200, 20)
        assert (got["sampling"], got["negative"], got["stagger"]) == ("mixed", "clamp", False)
        assert "lr" not in got and "weight_decay" not in got
    for size, rank in SWITCHLORA.items():
        got = presets.switchlora_pretrain(size)
        want = {"lr": 0.02, "rank": rank, "interval": 40, "total_steps": 40_000, "scale": 1.0}
        want |= {"descent_ratio": 0.1, "freeze_steps": 5, "freeze_step_counter": False}
        want |= {"weight_decay": 0.0, "betas": (0.9, 0.999), "eps": 1e-8, "order": "fifo"}
        assert {k: got[k] for k in want} == want


def test_dct_is_as_the_releases_defaults() -> None:
    got = presets.dct_release()
    want = {"basis": "dct3", "ranking": "l1", "on_refresh": "keep", "update_proj_gap": 1}
    want |= {"slot_bias_correction": False, "error_feedback": None, "scale": 1.0}
    assert {k: got[k] for k in want} == want
    for required in ("lr", "weight_decay", "rank"):
        assert required not in got


def test_lost_is_what_is_quoted_and_no_more() -> None:
    got = presets.lost_pretrain("130m")
    assert got == {"gamma": 0.9, "activation": "silu"}
    model = torch.nn.Sequential(torch.nn.Linear(48, 40))
    convert(model, "lost", rank=8, density=0.1, **got)
    layer = model[0]
    assert isinstance(layer, LOSTLinear) and (layer.gamma, layer.activation) == (0.9, "silu")
    with pytest.raises(ValueError, match="no published size '60m'"):
        presets.lost_pretrain("60m")


def test_layers_and_ldadam_are_as_in_the_releases() -> None:
    for keep, rank, error in ((True, 8, "bfloat16"), (False, 256, None)):
        got = presets.ldadam_pretrain("350m", error_feedback=keep)
        assert (got["lr"], got["betas"], got["rho"]) == (1e-3, (0.908, 0.99), 0.908)
        assert (got["rank"], got["error_feedback"], got["weight_decay"]) == (rank, error, 0.0)
    got = presets.lisa_finetune("llama2-7b")
    assert (got["lr"], got["active_layers"], got["update_proj_gap"]) == (1e-5, 1, 20)
    for model, lr in (("LLaMA-2-7B", 1e-5), ("llama3-8b", 1e-6)):
        got = presets.badam_finetune(model)
        assert (got["lr"], got["active_layers"], got["update_proj_gap"]) == (lr, 1, 100)
        assert got["block_order"] == "shuffled"


@pytest.mark.parametrize("preset", {p: None for _, p, args in CASES if args})
def test_what_was_not_published_raises(preset: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match=r"no published \w+ 'palm'; there are '"):
        preset("palm")
    if "rank" in inspect.signature(preset).parameters:
        with pytest.raises(ValueError, match="no published rank 3; there are "):
            preset("cola", rank=3)


def test_a_preset_is_the_callers_own() -> None:
    """Changing one changes no other."""
    presets.fira_pretrain("60M")["rank"] = 1
    assert presets.fira_pretrain("60m")["rank"] == 128
    assert DEFAULTS["rank"] == 128
