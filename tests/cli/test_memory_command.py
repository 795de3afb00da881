"""`lowrank-optim memory`: its figures are those of `memory.estimate`, and bad input is one line."""

from __future__ import annotations

import importlib
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, ViTForImageClassification

from lowrank_optim import GaLoreAdamW, GaLoreAdamW8bit, methods
from lowrank_optim.cli.display import gib
from lowrank_optim.cli.main import main
from lowrank_optim.cli.rows import CLASSES, USUAL, columns
from lowrank_optim.memory import GIB, estimate
from lowrank_optim.memory.models import MODELS, Known
from lowrank_optim.memory.shapes import FAMILIES, on_meta, parameter_shapes
from tests.cases import several_gpus

HERE = "tests.cli.test_memory_command"
SMALL = ["--model", f"{HERE}:small", "--rank", "8"]
GPU = {"device": "cuda"}
"""Where the command takes training to be, unless it is told."""
TINY = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
TINY |= {"num_attention_heads": 2, "vocab_size": 64}


def small() -> nn.Module:
    """Two matrices of float32, 64 by 32 and 32 by 64, and a vector."""
    return nn.Sequential(nn.Linear(32, 64, bias=False), nn.Tanh(), nn.Linear(64, 32))


def nothing() -> nn.Module:
    return nn.Tanh()


def frozen() -> nn.Module:
    return small().requires_grad_(False)


def empty() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Embedding(0, 4))


def text() -> str:
    return "a model"


def fails() -> nn.Module:
    raise KeyError("no\nsuch thing")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["memory", *arguments], env={"COLUMNS": "160"})


def figures(*arguments: str) -> dict[str, Any]:
    done = run(*arguments, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_figures_by_hand() -> None:
    """Rank 8 of two matrices of 32 by 64: bases, moments and coordinates, counted in float32."""
    said = figures(*SMALL, "--optimizer", "GaLoreAdamW", "--device", "cpu")
    (row,) = said["rows"]
    matrix, bias = 32 * 64, 32
    assert said["parameters"] == 2 * matrix + bias and said["dtype"] == "float32"
    assert row["weights"] == row["gradients"] == 4 * (2 * matrix + bias)
    assert row["basis"] == 4 * 2 * 32 * 8
    assert row["moments"] == 4 * 2 * (2 * 8 * 64 + bias)
    held = row["weights"] + row["basis"] + row["moments"] + row["other"]
    live = {(x["in_backward"], x["accumulation_steps"]): x["live_gradients"] for x in row["peaks"]}
    whole = 4 * (2 * matrix + bias)
    # of project one matrix is whole, as its basis is due, and one gradient is on its way
    coords = 4 * (8 * 64 + matrix + bias)
    assert live == {
        (None, 1): whole, ("step", 1): 4 * matrix, ("step", 2): whole + 4 * matrix,
        ("project", 2): coords + 4 * matrix,
    }  # fmt: skip
    for peak, x in zip(row["peaks"], live.values(), strict=True):
        assert peak["beside"]["backward"] >= x  # taking coordinates needs something in passing
        assert peak["beside"]["backward"] == x or peak["in_backward"] == "project"
        assert peak["peak"] == held + peak["beside"][peak["peak_at"]]
        assert peak["beside"][peak["peak_at"]] == max(peak["beside"].values())


@pytest.mark.slow
def test_every_figure_is_an_estimate() -> None:
    """All usual rows and columns, and other micro-batches and coordinates."""
    model, budget = small(), 3e-5
    asked = ("--in-backward", "project", "--in-backward", "step", "--accumulation-steps", "1")
    asked += ("--coords-dtype", "float32", "--coords-dtype", "bfloat16")
    for more in ((), asked):
        said = figures(*SMALL, "--budget-gib", str(budget), *more)
        assert said["budget"] == round(budget * GIB) and len(said["rows"]) == 10
        for row in said["rows"]:
            for peak in row["peaks"]:
                keys = ("in_backward", "accumulation_steps", "coords_dtype")
                own = {key: peak[key] for key in keys}
                if peak["peak"] is None:
                    with pytest.raises(ValueError, match="project"):
                        estimate(model, CLASSES[row["optimizer"]], **own, **row["options"], **GPU)
                    continue
                found = estimate(model, CLASSES[row["optimizer"]], **own, **row["options"], **GPU)
                assert (peak["peak"], peak["fits"]) == (found.peak, found.fits(budget * GIB))
                assert row["basis"] == found.basis and row["moments"] == found.moments
    modes = [(x["in_backward"], x["coords_dtype"]) for x in said["rows"][0]["peaks"]]
    assert modes == [("step", "auto"), ("project", "float32"), ("project", "bfloat16")]


@several_gpus
def test_one_of_several_gpus_is_an_estimate_of_it() -> None:
    """Of two rows: moments on the device, and on the host."""
    model = small()
    some = ["--only", "GaLore 8-bit", "--only", "GaLore 8-bit (moments on host)"]
    said = figures(*SMALL, "--world-size", "2", *some)
    assert said["world_size"] == 2 and len(said["rows"]) == 2
    for row in said["rows"]:
        own = {**row["options"], **GPU, "world_size": 2}
        found = estimate(model, CLASSES[row["optimizer"]], **own)
        (peak,) = row["peaks"]
        assert (peak["peak"], row["moments"]) == (found.peak, found.moments)
        assert row["weights"] == sum(p.numel() for p in model.parameters()) * 4 // 2
    assert "each of 2 GPUs" in run(*SMALL, "--world-size", "2", *some[:2]).output
    asked = ["--only", "GaLore 8-bit", "--only", "AdamW fp32", "--in-backward", "step"]
    by_name = {row["name"]: row for row in figures(*SMALL, "--world-size", "2", *asked)["rows"]}
    row = by_name["GaLore 8-bit"]
    own = {**row["options"], **GPU, "world_size": 2, "in_backward": "step"}
    found = estimate(model, CLASSES[row["optimizer"]], **own)
    assert row["peaks"][0]["peak"] == found.peak
    assert by_name["AdamW fp32"]["peaks"][0]["peak"] is None, "it has no hooks for shards"


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(x, marks=() if x in ("AdamW", "GaLoreLion") else pytest.mark.slow)
        for x in CLASSES
    ],
)
def test_every_class_has_a_row(name: str) -> None:
    """With a quarter as its rank where it takes one, and its name as the row's."""
    own: dict[str, Any] = {"rank": 0.25} if name in methods.__all__ else {}
    own |= {"outside": "turns"} if name.startswith("Lisa") else {}  # no name here has a layer
    asked = [x for key in own if key != "rank" for x in ("--option", f"{key}={own[key]}")]
    (row,) = figures(*SMALL[:2], "--optimizer", name, *asked, "--in-backward", "step")["rows"]
    found = estimate(small(), CLASSES[name], in_backward="step", **own, **GPU)
    assert row["name"].split()[0] == row["optimizer"] == name and row["options"] == own
    assert row["peaks"][0]["peak"] == found.peak


@pytest.mark.usefixtures("held_or_stepped")
def test_table_shows_the_figures_under_their_names(tmp_path: Path) -> None:
    """What does not fit says by how much; a column says its mode and its micro-batches."""
    wide = {**TINY, "hidden_size": 256, "intermediate_size": 512, "vocab_size": 64000}
    (tmp_path / "config.json").write_text(json.dumps(wide))
    arguments = ("--model", str(tmp_path), "--rank", "128", "--budget-gib", "0.2")
    arguments += ("--only", "AdamW bf16", "--only", "GaLore 8-bit")
    printed = run(*arguments).stdout
    for row in figures(*arguments)["rows"]:
        line = next(x for x in printed.splitlines() if x.strip().startswith(row["name"]))
        cells = [gib(row["basis"]), gib(row["moments"])]
        for peak in (x["peak"] for x in row["peaks"]):
            over = None if peak is None else peak - round(0.2 * GIB)
            told = "fits" if over is None or over <= 0 else f"+{gib(over)}"
            cells.append("–" if peak is None else f"{gib(peak)} {told}")
        assert re.split(r"\s{2,}", line.strip().removeprefix(row["name"]).strip()) == cells
    heads = [x.header for x in USUAL]
    first = next(x for x in printed.splitlines() if "all grads live," in x)
    second = printed.splitlines()[printed.splitlines().index(first) + 1]
    halves = zip(*(head.split("\n") for head in heads), strict=True)
    for at, head in zip((first, second), halves, strict=True):
        assert re.split(r"\s{2,}", at.strip())[-4:] == list(head)
    assert len({x.header for x in USUAL}) == 4
    asked = columns(("project", "step"), 8, ("auto", "float32"))
    assert [x.header.replace("\n", " ") for x in asked] == [
        "step, 8 micro-batches", "project, 8 micro-batches",
        "project, 8 micro-batches, float32 coords",
    ]  # fmt: skip


@pytest.mark.parametrize("budget", ["24", "0.00000001"])
def test_a_mode_that_no_row_can_take_is_not_said_to_need_more_memory(budget: str) -> None:
    """Fira uses whole gradients, and a row without a figure was "nothing fits" in 24 GiB."""
    asked = ("--in-backward", "project", "--in-backward", "step", "--budget-gib", budget)
    told = " ".join(run(*SMALL[:2], "--optimizer", "FiraAdamW", *asked).stdout.split())
    text = told.split("project, any number: ")[1]
    assert text.startswith("FiraAdamW cannot train so (–: the method needs whole gradients)")
    fits = "FiraAdamW fits" if budget == "24" else "nothing fits"
    assert f"step, 1 micro-batch: {fits}" in told


def test_colours_say_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    only = ("--model", "llama-60m", "--only", "AdamW bf16", "--budget-gib", "0.4")
    printed = run(*only).stdout
    assert re.search(r"\x1b\[32m *0\.\d\d fits\x1b", printed)
    assert re.search(r"\x1b\[31m *0\.\d\d \+0\.\d\d\x1b", printed)


def test_what_an_optimizer_warns_of_is_said_once() -> None:
    """A rank that leaves nothing out is dense, in every row."""
    done = run(*SMALL[:2], "--rank", "32", "--only", "GaLore fp32", "--only", "GaLore bf16")
    assert done.exit_code == 0
    assert done.stderr.startswith("Note: rank 32 leaves nothing out of 0.weight")
    assert done.stderr.count("\n") == 1


def test_activations_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a known model, as of its configuration; the words change with them."""
    monkeypatch.setitem(
        MODELS, "tiny", Known({**TINY, "tie_word_embeddings": False}, 0, "this file")
    )
    own = ("--model", "tiny", "--rank", "8", "--optimizer", "GaLoreAdamW8bit")
    own += ("--in-backward", "step", "--accumulation-steps", "1")
    more = ("--tokens", "64", "--micro-batch", "2", "--checkpointing")
    (peak,) = figures(*own, *more)["rows"][0]["peaks"]
    fields = {k: v for k, v in TINY.items() if k != "model_type"}
    found = estimate(
        LlamaConfig(**fields), GaLoreAdamW8bit, rank=8, in_backward="step", tokens=(2, 64),
        checkpointing=True,
    )  # fmt: skip
    # a matrix of logits in float32, and at least the input of the layer
    assert found.activations > 4 * 128 * 64 + 128 * 32 * 2
    assert (peak["peak"], peak["activations"]) == (found.peak, found.activations)
    printed = " ".join(run(*own, *more, "--loss", "chunked").stdout.split())
    assert "2 x 64 tokens, checkpointed, chunked loss" in printed and "▪ activations" in printed
    assert "Not counted is what the allocator wastes" in printed
    (without,) = figures(*own)["rows"][0]["peaks"]
    assert without["activations"] is None and (
        without["beside"]["backward"] == found.beside["backward"] - found.activations
    )


def test_what_leaves_little_is_said(tmp_path: Path) -> None:
    """Of what fits and leaves less than a GPU's allocator may waste; with activations known."""
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    own = ("--model", str(tmp_path), "--rank", "8", "--optimizer", "GaLoreAdamW")
    own += ("--in-backward", "step", "--accumulation-steps", "1")
    more = ("--tokens", "64")
    (peak,) = figures(*own, *more)["rows"][0]["peaks"]

    def told(share: float, *options: str) -> str:
        budget = ("--budget-gib", f"{share * peak['peak'] / GIB:.9f}")
        return " ".join(run(*own, *options, *budget).stdout.split())

    tight = told(1.03, *more)
    assert "Tight: GaLoreAdamW (step, 1 micro-batch) leaves 0.00 GiB. torch's allocator" in tight
    assert "about 1% with PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True: set it." in tight
    assert "GaLoreAdamW fits" in tight and "Tight" not in told(1.07, *more)


def test_losses_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of ``estimate``."""
    wide = {**TINY, "tie_word_embeddings": False, "vocab_size": 1024}
    monkeypatch.setitem(MODELS, "tiny", Known(wide, 0, "this file"))
    own = ("--model", "tiny", "--rank", "8", "--optimizer", "GaLoreAdamW8bit", "--tokens", "64")
    own += ("--in-backward", "step", "--accumulation-steps", "1")
    given = figures(*own, "--loss", "fused")
    config = LlamaConfig(**{k: v for k, v in wide.items() if k != "model_type"})
    options = {"in_backward": "step", "tokens": (1, 64), "transients": False}
    fused, whole = (
        estimate(config, GaLoreAdamW8bit, rank=8, loss=loss, **options).activations
        for loss in ("fused", "transformers")
    )
    assert given["rows"][0]["peaks"][0]["activations"] == fused < whole
    assert given["loss"] == "fused"
    more = ("--loss", "chunked", "--loss-chunk", "8", "--autocast", "float16", "--dtype", "float32")
    given = figures(*own, *more)
    asked = {"loss": "chunked", "loss_chunk": 8, "autocast": "float16"}
    found = estimate(config, GaLoreAdamW8bit, rank=8, dtype=torch.float32, **asked, **options)
    assert given["rows"][0]["peaks"][0]["activations"] == found.activations
    assert {key: given[key] for key in asked} == asked
    printed = " ".join(run(*own, *more).stdout.split())
    assert "chunked loss of 8 tokens, autocast to float16" in printed


def long() -> nn.Module:
    """A matrix whose cosines a CPU transforms, and an accelerator multiplies with."""
    return nn.Sequential(nn.Linear(512, 512, bias=False))


def test_device_is_the_one_that_trains() -> None:
    """Figures of a CPU are asked for; a card is the default."""
    arguments = ("--model", f"{HERE}:long", "--rank", "64", "--optimizer", "DCTAdamW")
    arguments += ("--in-backward", "none")
    for kind, more in (("cuda", ()), ("cuda", ("--device", "cuda")), ("cpu", ("--device", "cpu"))):
        said = figures(*arguments, *more)
        found = estimate(long(), methods.DCTAdamW, rank=64, device=kind)
        assert said["device"] == kind and said["rows"][0]["basis"] == found.basis
    matrix = 4 * 512 * 512
    assert estimate(long(), methods.DCTAdamW, rank=64, device="cuda").basis > matrix > found.basis


def test_a_configuration_of_transformers(tmp_path: Path) -> None:
    """As a file and as a folder, in the dtype that was asked for."""
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    fields = {k: v for k, v in TINY.items() if k != "model_type"}
    found = estimate(LlamaConfig(**fields), GaLoreAdamW, rank=0.25, dtype=torch.float32)
    for path in (tmp_path, tmp_path / "config.json"):
        said = figures(
            "--model", str(path), "--dtype", "float32", "--optimizer", "GaLoreAdamW",
            "--option", "state_dtype=float32", "--in-backward", "none",
        )  # fmt: skip
        (row,) = said["rows"]
        assert row["peaks"][0]["peak"] == found.peak
        assert row["options"] == {"rank": 0.25, "state_dtype": "float32"}


def test_bars_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And without matplotlib there is one line, before anything is measured."""
    png = tmp_path / "deep" / "m.png"
    done = run(*SMALL, "--only", "GaLore fp32", "--plot", str(png))
    assert done.exit_code == 0 and png.stat().st_size > 10_000
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = run(*SMALL, "--plot", str(png))
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr == "Error: --plot needs matplotlib: pip install matplotlib\n"


OPTIMIZER = [*SMALL, "--optimizer", "GaLoreAdamW"]
BAD = {
    "no model": ([], "Missing option '--model'"),
    "name": (["--model", "lama-7b"], "did you mean llama-7b?"),
    "no name": (["--model", "xyzzy"], "'xyzzy' is no known model, file or folder."),
    "budget": ([*SMALL, "--budget-gib", "-3"], "must be a positive number, got -3"),
    "nan": ([*SMALL, "--budget-gib", "nan"], "must be a positive number, got nan"),
    "rank": ([*SMALL[:2], "--rank", "-1"], "rank must be a positive int or a fraction in (0, 1)"),
    "text as rank": ([*SMALL[:2], "--rank", "x"], "must be a positive int or a fraction"),
    "rank of AdamW": ([*SMALL, "--optimizer", "AdamW"], "--rank 8 has no effect: AdamW"),
    "two ranks": ([*OPTIMIZER, "--option", "rank=4"], "--rank 8 and --option rank=4 both"),
    "class": ([*SMALL, "--optimizer", "GaLoreAdm"], "did you mean GaLoreAdamW?"),
    "option": ([*OPTIMIZER, "--option", "rnak=3"], "'rnak'; did you mean 'rank'?"),
    "value": ([*OPTIMIZER, "--option", "projector=svdd"], "svdd"),
    "pair": ([*OPTIMIZER, "--option", "scale"], "--option must be KEY=VALUE, got 'scale'"),
    "twice": ([*OPTIMIZER, "--option", "seed=1", "--option", "seed=2"], "gives seed twice: 1 and"),
    "option alone": ([*SMALL, "--option", "scale=1"], "no effect without --optimizer"),
    "row": ([*SMALL, "--only", "GaLore 2-bit"], "'GaLore 2-bit' is no row: they are AdamW fp32,"),
    "row and class": ([*OPTIMIZER, "--only", "GaLore fp32"], "give one"),
    "no parameters": (["--model", f"{HERE}:nothing"], "Tanh has no parameters"),
    "frozen": (
        ["--model", f"{HERE}:frozen"],
        "Sequential has no parameter to train: requires_grad",
    ),
    "empty": (["--model", f"{HERE}:empty"], "has a parameter without elements: 1.weight, (0, 4)"),
    "no module": (["--model", f"{HERE}:text"], "must return an nn.Module or a configuration"),
    "no function": (["--model", f"{HERE}:other"], "has no attribute 'other'"),
    "no such module": (["--model", "no_such:function"], "No module named 'no_such'"),
    "function fails": (["--model", f"{HERE}:fails"], "KeyError: 'no\\nsuch thing'"),
    "own dtype": ([*SMALL, "--dtype", "float32"], "--dtype has no effect on a model of your own"),
    "own tokens": ([*SMALL, "--tokens", "4"], "tokens needs a transformers model"),
    "micro-batch": ([*SMALL, "--micro-batch", "4"], "--micro-batch has no effect without --tokens"),
    "checkpointing": ([*SMALL, "--checkpointing"], "--checkpointing has no effect without"),
    "loss": ([*SMALL, "--loss", "fused"], "--loss has no effect without --tokens"),
    "chunk": ([*SMALL, "--loss-chunk", "8"], "--loss-chunk has no effect without --tokens"),
    "autocast": ([*SMALL, "--autocast", "bfloat16"], "--autocast has no effect without --tokens"),
    "tokens": ([*SMALL, "--tokens", "0"], "0 is not in the range x>=1"),
    "mode": ([*SMALL, "--in-backward", "all"], "'all' is not one of 'none', 'step', 'project'"),
    "coordinates": (
        [*SMALL, "--in-backward", "step", "--coords-dtype", "float32"],
        "--coords-dtype has no effect without --in-backward project",
    ),
    "no rank": ([*SMALL, "--world-size", "0"], "0 is not in the range x>=1"),
    "row of several": (
        [*SMALL, "--world-size", "2", "--only", "GaLore 4-bit"],
        "'GaLore 4-bit' does not train shards: leave --world-size out",
    ),
    "unknown": ([*SMALL, "--foo"], "No such option '--foo'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case: str) -> None:
    arguments, said = BAD[case]
    refused(run(*arguments), said)


def refused(done: Result, said: str) -> None:
    assert done.exit_code == 2 and done.stdout == "", done.output
    assert done.stderr.startswith("Error: ") and done.stderr.count("\n") == 1, done.stderr
    assert said in done.stderr and len(done.stderr) < 400
    assert isinstance(done.exception, SystemExit), "a traceback"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "cannot be read as JSON"),
        ("[1]", "it has no model_type"),
        ('{"hidden_size": 4}', "it has no model_type"),
        ('{"model_type": "lama"}', "knows no model_type 'lama'; did you mean llama?"),
        (
            json.dumps({k: v for k, v in TINY.items() if k not in ("hidden_size", "vocab_size")}),
            "the configuration of a llama model does not say hidden_size, vocab_size",
        ),
        ('{"model_type": "bert", "vocab_size": 9}', "does not say hidden_size, num_hidden_layers"),
        ('{"model_type": "gpt2", "vocab_size": 9}', "does not say n_embd, n_layer, n_head"),
        (json.dumps({**TINY, "hidden_size": "wide"}), "refused"),
        (json.dumps({**TINY, "hidden_size": -32}), "negative dimension -32"),
        (
            json.dumps({**TINY, "vocab_size": 0}),
            "without elements: model.embed_tokens.weight, (0, 32)",
        ),
        (json.dumps({**TINY, "num_attention_heads": 5}), "not a multiple of the number of"),
    ],
)
def test_bad_configurations_are_one_line(content: str, said: str, tmp_path: Path) -> None:
    """A size that is missing is none of transformers' defaults, a LLaMA-7B's."""
    (tmp_path / "config.json").write_text(content)
    refused(run("--model", str(tmp_path)), said)


def test_known_models_need_no_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other configurations and activations do, and say so."""
    only = ("--model", "ViT-B/16", "--only", "AdamW 8-bit", "--in-backward", "step")
    with_it = figures(*only)
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert figures(*only) == with_it
    refused(run(*only, "--tokens", "197"), "pip install 'lowrank-optim[transformers]'")


def test_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it says is tested with the backends, and of the wheel."""
    module = importlib.import_module("lowrank_optim.cli.main")
    monkeypatch.setattr(module, "say_backends", lambda: print("cpu, float32: native"))
    done = CliRunner().invoke(main, ["ops"])
    assert (done.exit_code, done.stdout) == (0, "cpu, float32: native\n")
    refused(CliRunner().invoke(main, ["memroy"]), "No such command 'memroy'")


# ---------------------------------------------------------------- known models


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_as_many_as_published(name: str) -> None:
    known = MODELS[name]
    assert sum(map(math.prod, parameter_shapes(known.config).values())) == known.parameters
    assert known.source and set(FAMILIES[known.config["model_type"]].fields) <= set(known.config)


def check_shapes(config: dict[str, Any]) -> None:
    fields = {k: v for k, v in config.items() if k != "model_type"}
    made = AutoConfig.for_model(config["model_type"], **fields)
    with torch.device("meta"):
        if config["model_type"] == "vit":
            model: nn.Module = ViTForImageClassification(made)
        else:
            model = AutoModelForCausalLM.from_config(made)
    theirs = [(name, tuple(p.shape)) for name, p in model.named_parameters()]
    assert [*parameter_shapes(config).items()] == theirs
    ours = on_meta(config, torch.bfloat16)
    assert [(name, tuple(p.shape)) for name, p in ours.named_parameters()] == theirs


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_of_a_family_are_those_of_transformers(family: str) -> None:
    """One layer of a model of each; all of them in the slow test."""
    config = next(k.config for k in MODELS.values() if k.config["model_type"] == family)
    check_shapes({**config, "n_layer" if "n_layer" in config else "num_hidden_layers": 1})


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_shapes_are_those_of_transformers(name: str) -> None:
    """Name by name and in its order."""
    check_shapes(MODELS[name].config)
