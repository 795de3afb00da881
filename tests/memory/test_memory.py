"""Estimates against what real optimizers hold, to the byte, and against published figures."""

from __future__ import annotations

import ast
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import AutoModelForCausalLM

import lowrank_optim
from benchmarks.common import LLAMA_SHAPES, llama, llama_config
from lowrank_optim import (
    DCTAdamW,
    FiraAdamW,
    GaLoreAdafactor,
    GaLoreAdamW,
    GaLoreAdamW8bit,
    GaLoreLion,
    GaLoreSGD,
    attach_in_backward,
    lowrank_groups,
)
from lowrank_optim.cli.display import gib, reading
from lowrank_optim.cli.rows import ACCUMULATED, LIVE, PROJECT, STEP, USUAL, measure, usual
from lowrank_optim.groups.names import turn_of, uid_of
from lowrank_optim.memory import GIB, Estimate, estimate, report
from lowrank_optim.memory.models import MODELS
from lowrank_optim.memory.shapes import on_meta
from lowrank_optim.tensors.matrix import PROJ_TYPES


class Model(nn.Module):
    """Every kind of parameter: tied, frozen, 0-d to 4-d, wide, tall, square, a batch of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(50, 24)
        self.up = nn.Linear(24, 40)
        self.square = nn.Linear(40, 40)
        self.down = nn.Linear(40, 24, bias=False)
        self.frozen = nn.Linear(24, 24).requires_grad_(False)
        self.experts = nn.Parameter(torch.randn(3, 16, 20))
        self.conv = nn.Conv2d(6, 12, 3)
        self.gain = nn.Parameter(torch.ones(()))
        self.lm_head = nn.Linear(24, 50, bias=False)
        self.lm_head.weight = self.embed_tokens.weight
        self.register_buffer("table", torch.zeros(1000))


def stepped(optimizer: torch.optim.Optimizer, model: nn.Module) -> torch.optim.Optimizer:
    generator = torch.Generator().manual_seed(0)
    for param in model.parameters():
        if param.requires_grad:
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
    optimizer.step()
    return optimizer


def check(model, optimizer_class, groups=None, **options):
    """The estimate, after asserting that it is what a real step leaves behind."""
    found = estimate(model, optimizer_class, groups=groups, transients=False, **options)
    params = model.named_parameters() if groups is None else groups(model)
    held = report(stepped(optimizer_class(params, **options), model))
    assert (found.basis, found.moments, found.other) == held
    assert (found.host, held.staging) == (held.host, 0)
    assert found.state == held.total > 0
    return found


CLASSES = {
    "adamw": (GaLoreAdamW, {}),
    "adamw-bf16": (GaLoreAdamW, {"state_dtype": "bfloat16"}),
    "adamw-8bit": (GaLoreAdamW8bit, {}),
    "adafactor": (GaLoreAdafactor, {}),
    "adafactor-beta1": (GaLoreAdafactor, {"beta1": 0.9}),
    "lion": (GaLoreLion, {}),
    "sgd": (GaLoreSGD, {}),
    "sgd-momentum": (GaLoreSGD, {"momentum": 0.9}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("name", CLASSES)
def test_state_is_exact(name, proj_type, dtype):
    optimizer_class, options = CLASSES[name]
    check(Model().to(dtype), optimizer_class, rank=8, proj_type=proj_type, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "rank"), [((1024, 1024), 128), ((1000, 3), 2), ((77, 150), 16)])
def test_cosines_are_those_of_the_device(shape, rank, dtype):
    """A model on a CPU was estimated as on an accelerator: a matrix of 4 MiB in place of 48 KiB."""
    model = nn.Sequential(nn.Linear(*reversed(shape), bias=False)).to(dtype)
    here = check(model, DCTAdamW, rank=rank)
    with torch.device("meta"):
        away = nn.Sequential(nn.Linear(*reversed(shape), bias=False, dtype=dtype))
    accelerated = estimate(away, DCTAdamW, rank=rank)
    assert accelerated == estimate(model, DCTAdamW, rank=rank, device="cuda")
    assert here == estimate(away, DCTAdamW, rank=rank, device="cpu", transients=False)
    assert accelerated.basis == 4 * (rank + min(shape) ** 2)  # every rank here is worth products
    modes = [
        estimate(x, DCTAdamW, rank=rank, update_proj_gap=5, in_backward="project", device="cpu")
        for x in (model, away)
    ]
    assert modes[0] == modes[1]


def test_the_host_is_other_memory_on_a_gpu_alone():
    """A CPU was said to keep moments in host memory, with buffers beside, which it does not."""
    model = Model()
    check(model, GaLoreAdamW, rank=8, state_device="cpu")
    here = estimate(model, GaLoreAdamW, rank=8, state_device="cpu")
    assert here == estimate(model, GaLoreAdamW, rank=8) and here.host == here.staging == 0
    there = estimate(model, GaLoreAdamW, rank=8, state_device="cpu", device="cuda")
    assert there.host > 0 and there.staging > 0 and there.pinned >= there.host


def test_device_must_be_one():
    with pytest.raises(ValueError, match=r"device must be None or one of torch's.*'gpu'"):
        estimate(Model(), GaLoreAdamW, device="gpu")


def test_state_is_exact_with_groups():
    """Groups are made from the real model, so overrides by name and several ranks count."""
    groups = partial(
        lowrank_groups,
        rank=4,
        target_modules=["up", "square", "embed"],
        overrides={"square": {"rank": 0.5, "proj_type": "full"}, "conv": {"rank": 2}},
    )
    by_groups = check(Model(), GaLoreAdamW, groups=groups)
    square = (40 + 40) * 20  # both bases of the full projection
    others = (24 + 24 + 12) * 4 - 12 * 2  # up, the tied embedding; the convolution at rank 2
    assert by_groups.basis == 4 * (square + others)
    assert by_groups.basis != estimate(Model(), GaLoreAdamW, rank=4).basis


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("optimizer_class", "options"),
    [
        (torch.optim.AdamW, {}),
        (torch.optim.AdamW, {"amsgrad": True}),
        (torch.optim.SGD, {"momentum": 0.9}),
        (torch.optim.RMSprop, {"centered": True}),
    ],
)
def test_torch_optimizers_are_exact(optimizer_class, options, dtype):
    """Their own step runs on the meta device: moments in the parameters' dtype, as torch has it."""
    check(Model().to(dtype), optimizer_class, **options)


def test_adamw_8bit_is_exact():
    """Also the two maps of 1 KiB that all tensors share, which count as "other", apart."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 63), nn.Linear(63, 65))  # 4096, 4032 …
    found = estimate(model, "adamw-8bit", transients=False)
    optimizer = stepped(bitsandbytes.optim.AdamW8bit(model.parameters()), model)
    dtypes = [optimizer.state[layer.weight]["state1"].dtype for layer in model]
    assert dtypes == [torch.uint8, torch.float32, torch.float32]
    assert (found.basis, found.moments, found.other) == report(optimizer)
    assert found.other == 2 * 256 * 4


def test_nothing_is_allocated_and_the_model_is_left_alone():
    with torch.device("meta"):
        on_meta = Model()
    here = estimate(Model(), GaLoreAdamW, rank=8)
    assert estimate(on_meta, GaLoreAdamW, rank=8, device="cpu") == here
    model = Model()
    params = [(p, p.data_ptr(), p._version) for p in model.parameters()]
    for optimizer in (GaLoreAdamW, torch.optim.AdamW, "adamw-8bit"):
        estimate(model, optimizer)
    assert all(p.grad is None for p in model.parameters())
    assert [(p, p.data_ptr(), p._version) for p, _, _ in params] == params


def test_weights_gradients_and_peak():
    """Tied weights once, buffers never, gradients of trainable parameters alone."""
    model = Model()
    trainable = [p.numel() for p in model.parameters() if p.requires_grad]
    frozen = sum(p.numel() for p in model.frozen.parameters())
    live = estimate(model, GaLoreAdamW, rank=8)
    freed = estimate(model, GaLoreAdamW, rank=8, in_backward="step")
    assert live.weights == freed.weights == 4 * (sum(trainable) + frozen)
    assert live.gradients == 4 * sum(trainable)
    assert live.largest_gradient == 4 * 40 * 40
    assert live.beside["backward"] == live.gradients
    assert freed.beside["backward"] == live.largest_gradient
    assert live.beside["step"] == live.gradients + live.step_transients
    assert live.peak == live.weights + live.state + max(live.beside.values())
    assert freed.fits(freed.peak) and not freed.fits(freed.peak - 1)


def test_a_scalar_parameter_keeps_its_counter_apart_from_its_moments():
    """A 0-d parameter's ``step`` has the parameter's shape, and was counted as a moment."""
    gain = nn.Parameter(torch.ones(()))
    for optimizer in (GaLoreAdamW([gain]), torch.optim.AdamW([gain])):
        gain.grad = torch.ones(())
        optimizer.step()
        assert report(optimizer) == (0, 8, 4)


def test_errors():
    with pytest.raises(ValueError, match="in_backward must be None, 'project' or 'step', got 'al"):
        estimate(Model(), GaLoreAdamW, in_backward="all")
    with pytest.raises(ValueError, match="use mode='step'"):
        estimate(Model(), FiraAdamW, rank=4, in_backward="project")
    with pytest.raises(ValueError, match="'project' is not for AdamW"):
        estimate(Model(), torch.optim.AdamW, in_backward="project")
    with pytest.raises(ValueError, match="tokens needs a transformers model"):
        estimate(Model(), GaLoreAdamW, tokens=8)
    with pytest.raises(ValueError, match="adamw-4bit"):
        estimate(Model(), "adamw-4bit")
    with pytest.raises(TypeError, match="lr"):
        estimate(Model(), "adamw-8bit", lr=1e-3)


# ---------------------------------------------------------------- activations


@pytest.mark.parametrize(
    ("mode", "checkpointing", "dtype"),
    [  # every pair of two meets
        ("project", True, torch.float32), ("step", False, torch.bfloat16),
        (None, True, torch.bfloat16), (None, False, torch.float32),
        ("project", False, torch.bfloat16), ("step", True, torch.float32),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.slow  # of the modes test_in_backward.py has peaks, of none test_peaks.py
def test_peak_with_activations_is_what_torch_counts(mode, checkpointing, dtype):
    """Against MemTracker on the real model and hooks: two micro-batches, every step of a gap.

    What each holds before it is known: weights and state.
    """
    config = llama(64, 172, 4, 2, vocab_size=256)
    options = {"rank": 4, "update_proj_gap": 2}
    found = estimate(
        config, GaLoreAdamW, in_backward=mode, accumulation_steps=2, tokens=(4, 64),
        checkpointing=checkpointing, dtype=dtype, transients=False, **options,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = GaLoreAdamW(model.named_parameters(), **options)
    batch = torch.zeros((4, 64), dtype=torch.long)

    def micro_batch():
        model(input_ids=batch, labels=batch).loss.backward()

    micro_batch()
    optimizer.step()  # bases and moments
    optimizer.zero_grad()
    if mode is not None:
        attach_in_backward(optimizer, mode, accumulation_steps=2)
    cpu, peaks = torch.device("cpu"), []
    for _ in range(2 if mode == "project" else 1):
        tracker = MemTracker()
        tracker.track_external(model, optimizer, batch)
        with tracker:
            before = tracker.get_tracker_snapshot("current")[cpu]["Total"]
            micro_batch()
            tracker.reset_mod_stats()
            micro_batch()
        peaks.append(tracker.get_tracker_snapshot("peak")[cpu]["Total"] - before)
        if mode != "step":
            optimizer.step()
            optimizer.zero_grad()
    peak = max(peaks)
    predicted = found.live_gradients + found.activations
    assert predicted == pytest.approx(peak, rel=0.02)


def test_in_backward_peaks_add_up():
    """LLaMA-60M by hand: what each mode leaves alive of the gradients."""
    config = llama_config("llama-60m")
    options = {"rank": 128, "update_proj_gap": 20, "device": "cpu"}
    parts = {
        (mode, steps): estimate(
            config,
            GaLoreAdamW,
            in_backward=mode,
            accumulation_steps=steps,
            transients=False,
            **options,
        )
        for mode in (None, "step", "project")
        for steps in (1, 4)
    }
    live = {key: found.live_gradients for key, found in parts.items()}
    whole = 2 * 58_073_600
    coords = 8 * (4 * 128 * 512 + 3 * 128 * 1376) * 2  # bfloat16, as products of it
    dense = 2 * (58_073_600 - 8 * (4 * 512 * 512 + 3 * 512 * 1376))
    embedding, mlp = 2 * 32000 * 512, 2 * 512 * 1376
    worst = worst_of_a_gap(config, 20, 128)
    assert worst > 2 * (mlp - 2 * 128 * 1376)  # more than one matrix of a layer
    assert live[None, 1] == whole
    assert live[None, 4] == live["step", 4] == whole + embedding
    assert live["step", 1] == embedding
    assert live["project", 1] == coords + dense + worst + mlp
    assert live["project", 4] == coords + dense + worst + embedding
    in_float32 = estimate(
        config,
        GaLoreAdamW,
        in_backward="project",
        coords_dtype="float32",
        transients=False,
        **options,
    )
    assert in_float32.live_gradients > live["project", 1] + coords - worst
    assert "(coordinates, dense ones" in str(parts["project", 4])
    assert "freed inside backward" in str(parts["step", 1])
    assert "freed" not in str(parts["step", 4])


def worst_of_a_gap(config, gap: int, rank: int) -> int:
    """Bytes more than coordinates that whole gradients take, by following every matrix's refreshes.

    From the definition alone: due when ``step - offset`` enters a new multiple of the gap.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    shapes = [(uid_of(n), p.shape) for n, p in model.named_parameters()]
    sizes = {
        n: 2 * (s[0] * s[1] - rank * max(s))
        for n, s in shapes
        if len(s) == 2 and 32000 not in s
    }  # fmt: skip
    last, worst = dict.fromkeys(sizes, 0), 0
    for step in range(1, 3 * gap):
        offset = {n: int(gap * turn_of(n)) for n in sizes}
        due = [n for n in sizes if (step - offset[n]) // gap > (last[n] - offset[n]) // gap]
        last.update(dict.fromkeys(due, step))
        worst = max(worst, sum(sizes[n] for n in due))
    return worst


# ---------------------------------------------------------------- published figures

# From the configurations in GaLore's repository: rank, parameters (M), linear (M), and in GB, with
# every float in bfloat16: weights, Adam's states, GaLore's bases, all of GaLore's states.
PUBLISHED = {
    "llama-60m": (128, 58.07, 25.30, 0.116, 0.232, 0.007, 0.164),
    "llama-130m": (256, 134.11, 84.93, 0.268, 0.536, 0.033, 0.343),
    "llama-350m": (256, 367.97, 302.38, 0.736, 1.472, 0.088, 0.653),
    "llama-1b": (512, 1339.08, 1207.91, 2.678, 5.356, 0.352, 2.085),
    "llama-7b": (1024, 6738.42, 6476.01, 13.477, 26.954, 1.879, 9.405),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=pytest.mark.slow if "m" in x[6:] else ()) for x in LLAMA_SHAPES],
)
def test_published_sizes(name):
    """The shapes and the accounting of the GaLore paper's models, recomputed from its configs."""
    rank, params, linear, weights, adam, basis, galore = PUBLISHED[name]
    config = llama_config(name)
    hidden, mlp, layers, _ = LLAMA_SHAPES[name]
    assert layers * hidden * (4 * hidden + 3 * mlp) / 1e6 == pytest.approx(linear, abs=0.005)
    full = estimate(config, torch.optim.AdamW, transients=False)
    low = estimate(config, GaLoreAdamW, rank=rank, state_dtype="bfloat16", transients=False)
    assert full.weights / 2e6 == pytest.approx(params, abs=0.005)
    assert full.weights / 1e9 == pytest.approx(weights, abs=0.0005)
    assert full.moments / 1e9 == pytest.approx(adam, abs=0.0005)
    assert low.basis / 1e9 == pytest.approx(basis, abs=0.0005)
    assert low.state / 1e9 == pytest.approx(galore, abs=0.0005)


def test_tied_embeddings_of_a_configuration_count_once():
    config = llama_config("llama-60m")
    apart = estimate(config, GaLoreAdamW, rank=128, transients=False)
    config.tie_word_embeddings = True
    tied = estimate(config, GaLoreAdamW, rank=128, transients=False)
    embedding = 32000 * 512
    assert apart.weights - tied.weights == 2 * embedding
    assert apart.moments - tied.moments == 2 * 4 * embedding  # two dense moments in float32


@pytest.fixture(scope="module")
def rows():
    module = on_meta(MODELS["llama-7b"].config, torch.bfloat16)
    chosen = usual(1024, torch.bfloat16)
    return {row.name: row for row in measure(module, chosen, USUAL)}


@pytest.mark.slow
def test_llama_7b(rows):
    """GiB: the ingredients of the 24 GB claim, recomputed from the paper's configuration."""
    figures = {
        name: [round(x / GIB, 2) for x in (row.state.weights, row.state.basis, row.state.state)]
        for name, row in rows.items()
    }
    assert figures == {
        "AdamW bf16": [12.55, 0.0, 25.10],
        "AdamW 8-bit": [12.55, 0.0, 12.75],
        "GaLore fp32": [12.55, 1.75, 15.77],
        "GaLore bf16": [12.55, 1.75, 8.76],
        "GaLore 8-bit": [12.55, 1.75, 5.31],
        "GaLore 8-bit (moments on host)": [12.55, 1.75, 5.31],
        "GaLore 4-bit": [12.55, 1.75, 3.61],
        "FRUGAL 8-bit": [12.55, 0.0, 3.13],
        # of bases there are indices, and one for all matrices of a width
        "DCT fp32": [12.55, 0.0, 14.02],
        "DCT 8-bit": [12.55, 0.0, 3.56],
    }
    largest = {row.peaks[STEP].largest_gradient for row in rows.values()}
    assert largest == {32000 * 4096 * 2}  # the embedding, 0.24 GiB


@pytest.mark.slow
def test_what_fits_24_gib(rows):
    """No optimizer with all gradients live: weights and gradients alone are 25.1 GiB."""
    budget = 24 * GIB
    assert all(row.state.weights + row.state.gradients > budget for row in rows.values())
    fit = {
        kind: [n for n, row in rows.items() if (e := row.peaks[kind]) and e.fits(budget)]
        for kind in USUAL
    }
    galore = ["GaLore 8-bit", "GaLore 8-bit (moments on host)", "GaLore 4-bit"]
    stepped = ["GaLore bf16", *galore, "FRUGAL 8-bit", "DCT 8-bit"]
    assert fit == {LIVE: [], STEP: stepped, ACCUMULATED: [], PROJECT: galore}
    text = reading(list(rows.values()), budget)
    assert "With all gradients live, nothing fits in 24 GiB" in text
    assert f"{', '.join(stepped[:-1])} and DCT 8-bit fit;" in text
    assert "all live until the last micro-batch, and nothing fits." in text
    assert f"a refresh waits for, and {', '.join(galore[:-1])} and GaLore 4-bit fit" in text
    assert "5.32 GiB" in text
    without = [row for name, row in rows.items() if "host" not in name]
    assert "a refresh waits for, and GaLore 8-bit and GaLore 4-bit fit" in reading(without, budget)
    assert "3.42 GiB" in reading(without, budget)
    assert "GaLore bf16 and GaLore 8-bit fit;" in reading(list(rows.values())[:5], budget)
    wider = reading(without, 27 * GIB)
    assert "GaLore bf16, GaLore 8-bit and GaLore 4-bit fit (" in wider
    assert "nothing fits (" in reading(list(rows.values()), 8 * GIB)


README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
SECTION = README.split("## What fits 24 GiB")[1].split("\n## ")[0]
PROSE = " ".join(SECTION.split())
"""The same, wherever its lines end."""


@pytest.mark.slow
def test_readme_table_is_what_is_estimated(rows):
    """Every figure, to its last digit; what fits is bold, and nothing else."""
    assert "`lowrank-optim memory --model llama-7b --rank 1024 --budget-gib 24`" in SECTION
    lines = [line.strip("|").split("|") for line in SECTION.splitlines() if line.startswith("|")]
    _, _, *body = [[cell.strip() for cell in line] for line in lines]
    assert [name for name, *_ in body] == list(rows)[:7]
    for name, *figures in body:
        row = rows[name]
        sizes = [gib(x) if x else "–" for x in (row.state.basis, row.state.moments)]
        peaks = [(gib(e.peak), e.fits(24 * GIB)) if e else ("–", 0) for e in row.peaks.values()]
        assert figures == [*sizes, *(f"**{x}**" if fits else x for x, fits in peaks)]
    live = rows["AdamW bf16"].state
    assert f"Weights take {gib(live.weights)} and gradients {gib(live.gradients)}." in PROSE


@pytest.mark.slow
def test_readme_recommends_what_fits(rows):
    """The lines under the table are a configuration of the table, in a column where it fits."""
    (snippet,) = re.findall(r"```python\n(.*?)```", SECTION.split("\n### ")[0], re.S)
    calls = {
        node.func.id: {k.arg: ast.literal_eval(k.value) for k in node.keywords}
        for node in ast.walk(ast.parse(snippet))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    attached, (name, options) = calls.pop("attach_in_backward"), *calls.items()
    own = {k: v for k, v in options.items() if k not in ("lr", "weight_decay")}
    row = next(
        n for n, row in rows.items() if row.chosen.called == name and row.chosen.options == own
    )
    peak = rows[row].peaks[{"step": STEP, "project": PROJECT}[attached["mode"]]]
    assert peak.fits(24 * GIB)
    assert f"{gib(peak.peak)} GiB" in PROSE
    assert f"{gib(24 * GIB - peak.peak)} GiB" in PROSE
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(llama_config("llama-7b"), dtype=torch.bfloat16)
    found = estimate(
        model, getattr(lowrank_optim, name), in_backward=attached["mode"], accumulation_steps=8,
        **own,
    )  # fmt: skip
    assert found == peak


@pytest.mark.slow
def test_readme_tokens_that_fit():
    """With the activations of checkpointed layers, in the recommended configuration."""
    for tokens, loss in ((3072, "transformers"), (4096, "transformers"), (4096, "chunked"),
                         (4096, "fused")):  # fmt: skip
        found = estimate(
            llama_config("llama-7b"), GaLoreAdamW8bit, rank=1024, in_backward="project",
            accumulation_steps=2, tokens=tokens, checkpointing=True, loss=loss,
        )  # fmt: skip
        if loss == "transformers":
            said = rf"{tokens:,} [^()]*{'fit' if found.fits(24 * GIB) else 'do not'}"
        else:
            assert found.fits(24 * GIB)
            said = rf"unless [^()]*{loss}[^()]*"
        assert re.search(rf"{said} \({gib(found.peak)}\)", PROSE)


@pytest.mark.parametrize(
    ("budget", "known", "tight"),
    [
        (0.99, {}, False),
        (1.0, {}, True),
        (1.059, {}, True),
        (1.061, {}, False),
        (1.03, {"activations": None}, False),  # they come on top
        (1.03, {"rounding": 0}, False),  # a CPU's allocator has no blocks
    ],
)
def test_what_leaves_less_than_an_allocator_wastes(
    budget: float, known: dict[str, Any], tight: bool
) -> None:
    """Six hundredths of a peak, as a GPU showed."""
    found = Estimate(
        weights=600, gradients=300, largest_gradient=100, live_gradients=300, basis=20, moments=60,
        other=10, **{"rounding": 10, "activations": 50, **known}, beside={"backward": 300},
    )  # fmt: skip
    assert found.is_tight(budget * found.peak) is tight


@pytest.mark.parametrize("rank", [None, 64])
def test_weights_with_gaps_are_estimated_with_their_copy(rank: int | None) -> None:
    """On a GPU kernels and products write a copy, which is there at the peak of a step."""
    peaks = []
    for gaps in (False, True):
        model = nn.Module()
        own = torch.empty(1024, 512, 2, device="meta")[..., 0]
        model.w = nn.Parameter(own if gaps else own.contiguous())
        own_groups = [{"params": [model.w], "rank": rank}]
        given = {"groups": lambda _, own=own_groups: own, "device": "cuda", "weight_decay": 0.1}
        peaks.append(estimate(model, GaLoreAdamW, **given).peak)
    copy = 4 * 1024 * 512
    assert peaks[0] + copy // 2 < peaks[1] <= peaks[0] + copy
    if rank is None:
        assert peaks[1] == peaks[0] + copy
