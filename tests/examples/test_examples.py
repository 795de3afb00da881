"""The scripts of examples/ on a tiny model: a run that was killed goes on as if it had not been."""

from __future__ import annotations

import importlib
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
SCRIPTS = ("train_loop", "train_trainer", "train_sft")
STEPS, SAVED, KILLED = 6, 3, 5
"""Of a run; the last whole checkpoint before it is killed, and the step in which it is."""
CONFIG = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2,
    "num_attention_heads": 2, "vocab_size": 288, "tie_word_embeddings": False,
    "attention_dropout": 0.2,  # so that the state of the random generator has a say
}  # fmt: skip


class Killed(BaseException):
    """What no script catches."""


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    """Of a run with gaps of 2 steps, and epochs of 5 of its 12 sequences."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    text = tmp_path / "text.py"
    text.write_text('def f(x):\n    """Two of x."""\n    return 2 * x\n\n\n' * 4)
    given = {"model": tmp_path, "data": text, "rank": 8, "tokens": 40, "micro-batches": 2}
    given |= {"steps": STEPS, "save-every": SAVED, "warmup": 2, "lr": 1e-2, "gap": 2}
    return [str(x) for key, value in given.items() for x in (f"--{key}", value)]


def tensors(found: Any, at: str = "") -> dict[str, Any]:
    """Every leaf of nested dicts and lists, by its path."""
    if isinstance(found, dict | list | tuple):
        pairs = found.items() if isinstance(found, dict) else enumerate(found)
        return {k: v for key, x in pairs for k, v in tensors(x, f"{at}/{key}").items()}
    return {at: found}


def assert_same(a: Any, b: Any) -> None:
    left, right = tensors(a), tensors(b)
    assert left.keys() == right.keys()
    for key, x in left.items():
        y = right[key]
        same = torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
        assert same, key


def test_the_loop_goes_on_to_the_bit(
    script: Any, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses, weights, moments, bases, schedule, place in the data and random state."""
    loop, outputs = script("train_loop"), (tmp_path / "whole", tmp_path / "cut")
    whole = loop.main([*options, "--output", str(outputs[0])])
    assert len(whole) == STEPS and whole[-1] < whole[0] - 0.1

    def killed_in(step: int, loss: float, lr: float) -> float:
        if step == KILLED:
            raise Killed
        return loss

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(loop, "report", killed_in)
        loop.main([*options, "--output", str(outputs[1])])
    with monkeypatch.context() as patch, pytest.raises(Killed):  # and while it saves step 6
        patch.setattr(loop.os, "fsync", lambda _: (_ for _ in ()).throw(Killed))
        loop.main([*options, "--output", str(outputs[1])])
    assert (outputs[1] / "checkpoint.partial").exists()
    assert loop.main([*options, "--output", str(outputs[1])]) == whole[SAVED:]
    ends = [torch.load(output / "checkpoint.pt") for output in outputs]
    assert ends[0]["step"] == STEPS and ends[0]["seen"] == 2 * STEPS
    assert any(key.endswith("/basis") for key in tensors(ends[0]["optimizer"]))
    assert_same(*ends)
    assert loop.main([*options, "--output", str(outputs[1])]) == []  # nothing is left to do


def test_the_loop_ends_at_a_loss_that_is_not_finite(script: Any) -> None:
    with pytest.raises(SystemExit, match="step 3: the loss is nan"):
        script("train_loop").report(3, float("nan"), 1e-3)


def test_every_sequence_is_seen_once_an_epoch(script: Any) -> None:
    """In another order each time."""
    sequence, data = script("train_loop").sequence, torch.arange(7)[:, None]
    epochs = [[int(sequence(data, 7 * e + i, seed=1)) for i in range(7)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(7)) and epochs[0] != epochs[1]


def test_the_rate_rises_and_falls_to_a_tenth(script: Any) -> None:
    rate = script("train_loop").rate
    assert [rate(step, 4, 12) for step in (0, 3, 4, 8, 12)] == pytest.approx(
        [0.25, 1, 1, 0.55, 0.1]
    )


def test_a_checkpoint_that_is_not_whole_is_passed_over(script: Any, tmp_path: Path) -> None:
    """Trainer writes its state last; 10 comes after 9."""
    for n in (9, 10, 11):
        (tmp_path / f"checkpoint-{n}").mkdir()
        if n < 11:
            (tmp_path / f"checkpoint-{n}" / "trainer_state.json").write_text("{}")
    last = script("shared").last_checkpoint
    assert last(tmp_path) == str(tmp_path / "checkpoint-10") and last(tmp_path / "none") is None


def test_bytes_stand_for_text(script: Any, tmp_path: Path) -> None:
    """Of a model without a tokenizer: every text comes back, and no id is beyond 257."""
    tokenizer = script("shared").load_tokenizer(str(tmp_path))
    text = "naïve \t–\n" + bytes(range(128)).decode()
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode()) and max(ids) <= 256
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    cut = script("shared").windows(["ab", "c"], tokenizer, 2)
    assert tokenizer.decode(cut.flatten()) == "ab<eof>c" and cut.shape == (2, 2)
    with pytest.raises(SystemExit, match="5 tokens are less than one sequence of 6"):
        script("shared").windows(["ab", "c"], tokenizer, 6)


@pytest.mark.parametrize("name", [*SCRIPTS, "shared"])
def test_each_is_read_in_one_sitting(name: str) -> None:
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 150


# ---------------------------------------------------------------- minutes


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train_trainer", "train_sft"])
def test_trainers_go_on_to_the_bit(
    name: str, script: Any, options: list[str], tmp_path: Path
) -> None:
    """Losses, norms, learning rates and weights: Trainer's checkpoints have all that they need."""
    if name == "train_sft":
        pytest.importorskip("trl")
        options = [*options, "--tokens", "64"]
    main = script(name).main

    class Steps(transformers.TrainerCallback):
        def __init__(self, end: int) -> None:
            self.end, self.taken = end, list[int]()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.taken.append(state.global_step)
            if state.global_step == self.end:
                raise Killed

    whole = main([*options, "--output", str(tmp_path / "whole")])
    cut = [*options, "--output", str(tmp_path / "cut")]
    with pytest.raises(Killed):
        main(cut, callbacks=[Steps(KILLED)])
    (tmp_path / "cut" / f"checkpoint-{KILLED}").mkdir()  # as if it was killed while it saved
    steps = Steps(-1)
    resumed = main(cut, callbacks=[steps])
    assert steps.taken == [*range(SAVED + 1, STEPS + 1)]  # not from the beginning
    assert_same(whole.model.state_dict(), resumed.model.state_dict())
    assert_same(whole.optimizer.state_dict(), resumed.optimizer.state_dict())
    kept = ("step", "loss", "grad_norm", "learning_rate")
    logs = [
        [{k: row[k] for k in kept} for row in run.state.log_history if "grad_norm" in row]
        for run in (whole, resumed)
    ]
    assert len(logs[0]) == STEPS and logs[0] == logs[1]
    assert logs[0][-1]["loss"] < logs[0][0]["loss"] - 0.1


@pytest.mark.slow
def test_the_loop_survives_sigkill(options: list[str], tmp_path: Path) -> None:
    """As anybody runs it: a process of its own, that ends without a word."""
    command = [sys.executable, str(EXAMPLES / "train_loop.py"), *options, "--output"]
    subprocess.run([*command, tmp_path / "whole"], check=True, capture_output=True)
    with subprocess.Popen([*command, tmp_path / "cut"], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        for line in run.stdout:
            if line.split()[:2] == ["step", str(SAVED + 1)]:
                run.send_signal(signal.SIGKILL)
                break
    assert run.returncode == -signal.SIGKILL
    done = subprocess.run([*command, tmp_path / "cut"], check=True, capture_output=True, text=True)
    assert f"goes on after step {SAVED}" in done.stdout
    assert_same(*(torch.load(tmp_path / name / "checkpoint.pt") for name in ("whole", "cut")))


@pytest.mark.slow
@pytest.mark.parametrize("more", [("llama-7b",), ("Mistral-7B", "--rank", "512")], ids=" ".join)
def test_what_the_scripts_say_fits_24_gib(more: tuple[str, ...], script: Any) -> None:
    """With activations; what a step, a refresh and the allocator take in passing has 1 GiB."""
    from lowrank_optim import GaLoreAdamW8bit
    from lowrank_optim.memory import GIB, estimate
    from lowrank_optim.memory.models import MODELS

    args = script("shared").options(None).parse_args(["--model", *more])
    found = estimate(
        transformers.AutoConfig.for_model(**MODELS[args.model].config), GaLoreAdamW8bit,
        rank=args.rank, in_backward="project", accumulation_steps=2, tokens=args.tokens,
        checkpointing=True,
    )  # fmt: skip
    assert found.fits(23 * GIB), found
