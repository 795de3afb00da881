"""`lowrank-optim memory --measure` where no GPU is: all but the counters of the device."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from benchmarks.allocations import allocations
from lowrank_optim import GaLoreAdamW8bit
from lowrank_optim.cli import measure
from lowrank_optim.cli.main import main
from lowrank_optim.cli.measure import Found, Job
from lowrank_optim.engine.undo import SMALL
from lowrank_optim.memory import GIB, LAYOUTS, estimate, measuring
from lowrank_optim.memory.measuring import Peak

transformers = pytest.importorskip("transformers")

CPU = torch.device("cpu")
CONFIG = {
    "model_type": "llama", "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2,
    "num_attention_heads": 4, "vocab_size": 512, "tie_word_embeddings": False,
}  # fmt: skip
MIB = 2**20


def meter(work: Callable[[], object]) -> Peak:
    """Of a CPU."""
    return Peak(allocations(work).peak, 0)


@pytest.fixture
def told(tmp_path: Path) -> Job:
    """GaLore in 8 bits on a tiny LLaMA of float32."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return {
        "model": str(tmp_path), "dtype": "float32", "budget": GIB, "shape": [1, 32],
        "optimizer": "GaLoreAdamW8bit", "options": {"rank": 16, "betas": [0.9, 0.99]},
        "checkpointing": True, "in_backward": None, "accumulation_steps": 1, "coords_dtype": "auto",
        "autocast": None, "loss": "transformers", "loss_chunk": None,
    }  # fmt: skip


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card of 16 GiB, as far as torch says."""
    card = SimpleNamespace(name="Card", total_memory=16 * GIB, major=8, minor=9)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("lowrank_optim.ops.devices._capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["memory", *arguments, "--measure"], env={"COLUMNS": "160"})


def test_without_a_gpu_it_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = run("--model", "llama-60m", "--tokens", "64")
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr == f"Error: {measure.NO_GPU}\n"


@pytest.mark.usefixtures("gpu")
def test_of_a_cpu_it_is_one_line() -> None:
    """The estimates would be of another basis than what is measured."""
    done = run("--model", "llama-60m", "--tokens", "64", "--device", "cpu")
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr == (
        "Error: --measure trains on a GPU, and --device cpu asks for the estimates of another: "
        "leave it out\n"
    )


@pytest.mark.usefixtures("gpu")
def test_of_another_loss_it_is_one_line() -> None:
    done = run("--model", "llama-60m", "--tokens", "64", "--loss", "fused")
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr == (
        "Error: --measure trains with the loss of transformers or with chunked, and --loss fused "
        "asks for the estimates of another: leave one out\n"
    )
    done = run("--model", "llama-60m", "--tokens", "64", "--loss", "chunked", "--autocast",
               "bfloat16", "--dtype", "float32")  # fmt: skip
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr == (
        "Error: --measure trains under --autocast with the loss of transformers alone: leave "
        "--loss out\n"
    )


@pytest.mark.usefixtures("gpu")
def test_without_tokens_it_is_one_line() -> None:
    done = run("--model", "llama-60m")
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr == (
        "Error: --measure has no effect without --tokens: a real step has activations\n"
    )


@pytest.mark.parametrize(
    ("mode", "steps"),
    [(None, 1), *(pytest.param(*x, marks=pytest.mark.slow) for x in (("step", 1), ("project", 2)))],
    ids=["none", "step", "project"],
)
def test_real_steps_hold_what_is_estimated(mode: Any, steps: int, told: Job) -> None:
    """On a CPU, where the counters are the profiler's: within the temporaries of a step.

    A host copies small weights before it writes them, one at a time.
    """
    found = measure.one({**told, "in_backward": mode, "accumulation_steps": steps}, CPU, meter)
    assert not found.error and found.peak is not None, found.error
    expected = estimate(
        transformers.AutoConfig.for_model(**CONFIG), GaLoreAdamW8bit, rank=16, in_backward=mode,
        accumulation_steps=steps, tokens=(1, 32), checkpointing=True, dtype=torch.float32,
    )  # fmt: skip
    assert 0.97 < found.peak.allocated / expected.peak < 1.25 + 4 * SMALL / expected.peak


def test_chunks_of_the_loss_are_trained_with(told: Job) -> None:
    """Logits of 32 tokens in place of 512: the peak is below that of all, as the estimate is.

    A dense step is the worst moment then, whose native kernel on a CPU holds less than a GPU's.
    """
    config = {**CONFIG, "vocab_size": 4096}
    (Path(told["model"]) / "config.json").write_text(json.dumps(config))
    own: Any = {"loss": "chunked", "loss_chunk": 32}
    found = measure.one({**told, **own, "shape": [1, 512], "in_backward": "step"}, CPU, meter)
    assert not found.error and found.peak is not None, found.error
    chunked, whole = (
        estimate(
            transformers.AutoConfig.for_model(**config), GaLoreAdamW8bit, rank=16,
            in_backward="step", tokens=(1, 512), checkpointing=True, dtype=torch.float32, **loss,
        ).peak
        for loss in (own, {})
    )  # fmt: skip
    assert 0.85 < found.peak.allocated / chunked < 1.25 + 4 * SMALL / chunked
    assert found.peak.allocated < 0.8 * whole


def test_the_steps_are_those_that_are_asked_for(told: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Micro-batches, their shape, mode, dtype of coordinates, checkpointing, options and cap."""
    seen: dict[str, Any] = {"losses": [], "steps": 0}
    loss_by, attach = measuring.loss_by, measuring.attach_in_backward

    def loss(kind: Any, model: Any, batch: Any, chunk: Any) -> Any:
        seen["losses"].append(tuple(batch["input_ids"].shape))
        seen["checkpointed"] = model.model.gradient_checkpointing
        assert (kind, chunk) == ("chunked", 4)
        return loss_by(kind, model, batch, chunk)

    def attached(optimizer: Any, mode: str, **own: Any) -> Any:
        seen.update(optimizer=optimizer, mode=mode, **own)
        optimizer.register_step_post_hook(lambda *_: seen.update(steps=seen["steps"] + 1))
        return attach(optimizer, mode, **own)

    def capped(device: torch.device, cap: int) -> Any:
        seen["cap"] = cap
        return measuring.capped(device, cap)

    monkeypatch.setattr(measuring, "loss_by", loss)
    monkeypatch.setattr(measuring, "attach_in_backward", attached)
    monkeypatch.setattr(measure, "capped", capped)
    own: Any = {"in_backward": "project", "accumulation_steps": 2, "coords_dtype": "float32"}
    own |= {"loss": "chunked", "loss_chunk": 4}
    found = measure.one({**told, **own, "shape": [2, 8]}, CPU, lambda work: Peak(1, work() or 2))
    assert found == (Peak(1, 2), "")
    assert seen["losses"] == [(2, 8)] * 2 * measuring.STEPS and seen["steps"] == measuring.STEPS
    assert (seen["mode"], seen["accumulation_steps"]) == ("project", 2)
    assert seen["coords_dtype"] == "float32" and seen["cap"] == GIB and seen["checkpointed"]
    groups = seen["optimizer"].param_groups
    assert {(g["rank"], g["betas"], g["state_dtype"]) for g in groups} == {
        (16, (0.9, 0.99), "8bit")
    }
    assert {p.dtype for g in groups for p in g["params"]} == {torch.float32}


def test_what_goes_wrong_is_the_answer_of_its_row(told: Job, monkeypatch: Any) -> None:
    """Of the allocator, of a model, of an optimizer, and of a package that is not there."""

    def full(work: Callable[[], object]) -> Peak:
        raise torch.OutOfMemoryError("12 GiB")

    assert measure.one(told, CPU, full) == (None, "out of memory")
    bad = {**told, "options": {"rank": -1}}
    assert (measure.one(bad, CPU, meter).error).startswith("ValueError: rank must be a positive")
    gone = measure.one({**told, "model": "no-model"}, CPU, meter).error
    assert gone.startswith("Refused: --model 'no-model' is no known model") and "\n" not in gone
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    missing = measure.one({**told, "optimizer": "adamw-8bit", "options": {}}, CPU, meter).error
    assert missing == (
        "ImportError: adamw-8bit is measured with bitsandbytes: pip install bitsandbytes"
    )


def test_a_model_that_does_not_fit_is_out_of_memory(told: Job, monkeypatch: Any) -> None:
    """Not a fault of its configuration."""

    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("12 GiB")

    monkeypatch.setattr("lowrank_optim.cli.models.model_of", full)
    assert measure.one(told, CPU, meter) == (None, "out of memory")


def test_every_layout_has_an_optimizer() -> None:
    assert measuring.REAL.keys() == LAYOUTS.keys()


@pytest.mark.slow
def test_the_optimizer_of_a_layout_exists() -> None:
    for name in LAYOUTS:
        pytest.importorskip(measuring.REAL[name][2])
        assert measuring.real(name).__name__ == measuring.REAL[name][1]


def test_a_process_says_what_it_found_or_its_last_words(told: Job) -> None:
    """It is told by stdin; what others print before does not matter."""
    script = "import json, sys; x = json.load(sys.stdin); print('hello'); print(json.dumps({}))"

    def found(end: str) -> Found:
        return measure.in_process(told, (sys.executable, "-S", "-c", script.format(end)))

    assert found('{"peak": [x["budget"], 7], "error": ""}') == (Peak(GIB, 7), "")
    assert found('{"peak": None, "error": "out of memory"}') == (None, "out of memory")
    died = "import os; os.write(2, b'a\\nan illegal access\\n'); os._exit(7)"
    got = measure.in_process(told, (sys.executable, "-S", "-c", died))
    assert got == (None, "the process ended with 7: an illegal access")
    silent = measure.in_process(told, (sys.executable, "-S", "-c", "print(3)"))
    assert silent == (None, "the process ended with 0: it said nothing")


@pytest.mark.usefixtures("gpu")
def test_the_table_and_the_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured beside estimated, in percent; that the card is smaller than the budget is said."""
    asked: list[Job] = []
    answers: dict[str | None, Any] = {
        None: (Peak(300 * MIB, 400 * MIB), ""),
        "step": (None, "out of memory"),
    }

    def answer(job: Job) -> Found:
        asked.append(json.loads(json.dumps(job)))
        return Found(*answers[job["in_backward"]])

    monkeypatch.setattr(measure, "in_process", answer)
    wide = {**CONFIG, "hidden_size": 512, "vocab_size": 32000, "num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(wide))
    own = ("--model", str(tmp_path), "--optimizer", "GaLoreAdamW8bit", "--rank", "64")
    own += ("--accumulation-steps", "1", "--in-backward", "none", "--in-backward", "step")
    own += ("--tokens", "64", "--checkpointing", "--budget-gib", "24", "--dtype", "bfloat16")
    done = run(*own, "--json")
    assert done.exit_code == 0, done.output
    assert done.stderr.startswith("Note: Card has 16.00 GiB, less than the budget of 24.00: ")
    assert "Measuring GaLoreAdamW8bit, step, 1 micro-batch ...\n" in done.stderr
    (row,) = json.loads(done.stdout)["rows"]
    first, second = row["peaks"]
    assert first["measured"] == {"allocated": 300 * MIB, "reserved": 400 * MIB}
    assert second["measured"] == {"error": "out of memory"}
    assert [job["in_backward"] for job in asked] == [None, "step"]
    assert asked[0] == {
        "model": str(tmp_path), "dtype": "bfloat16", "budget": 24 * GIB, "shape": [1, 64],
        "optimizer": "GaLoreAdamW8bit", "options": {"rank": 64}, "checkpointing": True,
        "in_backward": None, "accumulation_steps": 1, "coords_dtype": "auto",
        "autocast": None, "loss": "transformers", "loss_chunk": None,
    }  # fmt: skip
    printed = run(*own).stdout.split("Measured in 3 steps under a cap of 24 GiB")[1]
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    over = f"{100 * (300 * MIB / first['peak'] - 1):+.1f} %"
    name, peaks = "GaLoreAdamW8bit", [f"{x['peak'] / GIB:.2f}" for x in (first, second)]
    assert f"{name} all grads live, 1 micro-batch {peaks[0]} 0.29 {over} 0.39" in lines
    assert f"{name} step, 1 micro-batch {peaks[1]} out of memory" in lines


@pytest.mark.slow
def test_a_real_process_without_a_gpu_is_an_error_of_its_row(told: Job) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    found = measure.in_process(told)
    assert found.peak is None and "CUDA" in found.error and "process ended" not in found.error
