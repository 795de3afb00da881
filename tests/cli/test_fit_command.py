"""`lowrank-optim fit`: the plan of `lowrank_optim.fit`, and bad input in one line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor, nn

from lowrank_optim import GaLoreAdamW, fit
from lowrank_optim.cli.main import main
from lowrank_optim.fitting import Plan
from lowrank_optim.memory import GIB
from tests.cases import several_gpus

pytestmark = pytest.mark.usefixtures("held_or_stepped")

HERE = "tests.cli.test_fit_command"
SMALL = ["--model", f"{HERE}:small", "--budget-gib", "0.0001"]


def small() -> nn.Module:
    """Three matrices, a vector."""
    return nn.Sequential(nn.Linear(32, 64, bias=False), nn.Linear(64, 64), nn.Linear(64, 32))


def losses(model: nn.Module) -> Iterator[Tensor]:
    for n in range(2):
        x = torch.randn(8, 32, generator=torch.Generator().manual_seed(n))
        yield model(x).square().mean()


def fails(model: nn.Module) -> Tensor:
    raise KeyError("no\nsuch thing")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["fit", *arguments], env={"COLUMNS": "160"})


def test_json_is_the_plan(tmp_path) -> None:
    """Printed, saved and read again: what fit() returns."""
    done = run(
        *SMALL, "--json", "--save", str(tmp_path / "plan.json"), "--optimizer", "GaLoreAdamW",
        "--in-backward", "none", "--in-backward", "project", "--accumulation-steps", "4",
        "--option", "update_proj_gap=7", "--multiple", "4", "--least", "8",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    expected = fit(
        small(), 0.0001, optimizers=[GaLoreAdamW], in_backward=[None, "project"],
        accumulation_steps=4, update_proj_gap=7, multiple=4, least=8, device="cuda",
    )  # fmt: skip
    assert Plan.from_json(done.stdout, small()) == expected
    assert Plan.from_json((tmp_path / "plan.json").read_text()) == expected


def test_calibrate_runs_the_model(monkeypatch) -> None:
    """Values are those of the function, not of the meta device; ranks differ by need."""
    torch.manual_seed(0)
    done = run(*SMALL, "--json", "--calibrate", f"{HERE}:losses", "--energy", "absolute")
    assert done.exit_code == 0, done.output
    torch.manual_seed(0)
    expected = fit(small(), 0.0001, calibrate=losses, energy="absolute", device="cuda")
    assert Plan.from_json(done.stdout) == expected
    assert 0 < expected.energy <= 1


def test_what_leaves_little_is_said(tmp_path: Path) -> None:
    """Of a plan with activations, on a GPU: what is left may be less than its allocator wastes."""
    config = {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 128,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    own = ["--model", str(tmp_path), "--optimizer", "GaLoreAdamW", "--in-backward", "none"]
    own += ["--state-dtype", "float32", "--tokens", "32"]

    def told(budget: float, *more: str) -> str:
        done = run(*own, "--budget-gib", f"{budget:.9f}", *more)
        assert done.exit_code == 0, done.output
        return " ".join(done.stdout.split())

    most = Plan.from_json(run(*own, "--budget-gib", "1", "--json").stdout).estimate.peak / GIB
    assert "Tight: 0.00 GiB are left. torch's allocator may waste up to 6%" in told(1.03 * most)
    assert "Tight" not in told(1.07 * most)


def test_moments_in_host_memory() -> None:
    """Their place and limit reach fit(), and the device is a GPU unless it is said."""
    own = ["--optimizer", "GaLoreAdamW", "--state-device", "cpu", "--host-gib", "0.00002"]
    own = ["--model", f"{HERE}:small", "--budget-gib", "0.00015", *own]
    done = run("--json", "--in-backward", "none", *own)
    assert done.exit_code == 0, done.output
    expected = fit(
        small(), 0.00015, optimizers=[GaLoreAdamW], in_backward=[None], state_devices=["cpu"],
        host_gib=0.00002, device="cuda",
    )  # fmt: skip
    found = Plan.from_json(done.stdout)
    assert found == expected and 0 < found.estimate.pinned <= 0.00002 * 2**30
    refused = run(*own, "--device", "cpu")
    assert refused.exit_code == 2 and "no effect where the device is a CPU" in refused.output


@several_gpus
def test_of_several_gpus() -> None:
    own = ["--optimizer", "GaLoreAdamW", "--in-backward", "none", "--state-dtype", "float32"]
    own += ["--model", f"{HERE}:small", "--budget-gib", "0.0002"]
    done = run("--json", "--world-size", "2", *own)
    assert done.exit_code == 0, done.output
    expected = fit(
        small(), 0.0002, optimizers=[GaLoreAdamW], in_backward=[None], world_size=2, device="cuda",
        state_dtypes=["float32"],
    )  # fmt: skip
    assert Plan.from_json(done.stdout) == expected and expected.world_size == 2


def test_the_table(tmp_path) -> None:
    """What to construct, the ranks, what is dense and what was given up; activations count."""
    config = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48}
    config |= {"num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = run(
        "--model", str(tmp_path), "--budget-gib", "0.0005", "--tokens", "8", "--checkpointing",
        "--loss", "fused", "--optimizer", "GaLoreAdamW", "--in-backward", "project",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    text = " ".join(done.output.split())
    assert "in 0.0005 GiB GaLoreAdamW(" in text and "without activations" not in text
    assert "model.layers.0.self_attn.q_proj.weight 7 16" in text
    assert "Dense: model.embed_tokens.weight (4.00 KiB), lm_head.weight (4.00 KiB)" in text
    assert "Given up for memory: Whole gradients" in text


REFUSED = [
    ("nothing fits 1e-05 GiB", [*SMALL[:2], "--budget-gib", "0.00001"]),
    ("Missing option '--budget-gib'", SMALL[:2]),
    ("must be a positive number", [*SMALL[:2], "--budget-gib", "nan"]),
    ("--checkpointing has no effect", [*SMALL, "--checkpointing"]),
    ("--micro-batch has no effect", [*SMALL, "--micro-batch", "2"]),
    ("--loss has no effect", [*SMALL, "--loss", "fused"]),
    ("energy='absolute' has no effect", [*SMALL, "--energy", "absolute"]),
    ("has no values", ["--model", "GPT-2", "--budget-gib", "1", "--calibrate", f"{HERE}:losses"]),
    ("--calibrate must be module.path:function", [*SMALL, "--calibrate", "losses"]),
    ("AttributeError", [*SMALL, "--calibrate", f"{HERE}:none"]),
    ("KeyError", [*SMALL, "--calibrate", f"{HERE}:fails"]),
    ("calibrate must be a function of the model", [*SMALL, "--calibrate", f"{HERE}:small"]),
    ("host_gib=1.0 has no effect", [*SMALL, "--host-gib", "1", "--state-device", "none"]),
    ("no class of them; did you mean GaLoreAdamW?", [*SMALL, "--optimizer", "GaloreAdamW"]),
    ("unexpected keyword argument 'scael'", [*SMALL, "--option", "scael=1"]),
    ("frees no gradient", [*SMALL, "--in-backward", "step", "--accumulation-steps", "2"]),
    ("fit finds ranks", [*SMALL, "--option", "rank=4"]),
    ("--dtype has no effect on a model of your own", [*SMALL, "--dtype", "float32"]),
]  # fmt: skip


@pytest.mark.parametrize("case", REFUSED, ids=lambda c: c[0][:24])
def test_what_is_refused(case) -> None:
    text, arguments = case
    done = run(*arguments)
    assert done.exit_code == 2 and len(done.output.strip().splitlines()) == 1, done.output
    assert text in done.output


def test_a_plan_that_cannot_be_saved_is_refused_before_it_is_sought(tmp_path, monkeypatch) -> None:
    """It was found, in the minutes that this may take, and lost with a traceback."""
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("lowrank_optim.cli.fit.best", lambda *_, **__: pytest.fail("sought"))
    done = run(*SMALL, "--save", str(tmp_path / "file" / "plan.json"))
    assert done.exit_code == 2 and len(done.output.strip().splitlines()) == 1, done.output
    assert "--save" in done.output and "file" in done.output


def test_a_plan_makes_the_folder_that_it_is_saved_in(tmp_path) -> None:
    done = run(*SMALL, "--optimizer", "GaLoreAdamW", "--save", str(tmp_path / "a" / "plan.json"))
    assert done.exit_code == 0, done.output
    assert Plan.from_json((tmp_path / "a" / "plan.json").read_text(), small())
