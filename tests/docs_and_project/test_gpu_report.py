"""``make gpu`` where there is no GPU: its sections on a CPU, its clocks and counters replaced."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from benchmarks import timing
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import (
    checks,
    kernels,
    memory,
    no_sync,
    report,
    times,
    train7b,
    variants,
    waiting,
    whole,
)  # fmt: skip
from benchmarks.gpu.report import Section
from benchmarks.gpu.settings import full, quick, tiny
from benchmarks.matrices import dense_shapes, linear_shapes, weights
from lowrank_optim import LowRankOptimizer, methods
from lowrank_optim.memory.models import MODELS

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ROOT = Path(__file__).parents[2]


# ------------------------------------------------------------------------------ the command


def test_without_a_gpu_it_says_so_and_fails(capsys: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """One plain sentence, no report that could be taken for one, and no green job."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr()
    assert said.err.strip() == command.NO_GPU and not said.out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bad", [None, "checks"])
def test_a_failure_ends_no_later_section(bad: str | None, tmp_path: Path, monkeypatch: Any) -> None:
    """All sections are asked for, and the status is 1 only if one of them failed."""
    ran = []

    def apart(name: str, args: Any) -> tuple[Section, bool]:
        ran.append(name)
        section = Section(name, name.title())
        if name == bad:
            section.failed("It broke.")
        return section, True

    monkeypatch.setattr(command, "apart", apart)
    status = command.main(["--device", "cpu", "--tiny", "--out", str(tmp_path)])
    assert ran == list(command.SECTIONS) and status == (1 if bad else 0)
    page = (tmp_path / "report.md").read_text()
    assert ("1 of 9 sections failed: Checks." in page) == bool(bad)
    assert ("All 9 sections passed." in page) != bool(bad)
    assert "python -m benchmarks.gpu --device cpu --tiny" in page


def test_a_section_that_dies_leaves_its_last_words(tmp_path: Path) -> None:
    """A fault of the device ends its process: how it ended is the failure."""
    path = tmp_path / "section.json"
    words = "import os; os.write(1, b'an illegal access'); os._exit(7)"
    die = [sys.executable, "-S", "-c", words]
    found, in_time = command.ended("times", die, path, 60)
    assert in_time and not found.ok and "ended with 7" in found.failures[0]
    assert "an illegal access" in found.failures[0]
    slow = [sys.executable, "-S", "-c", "import time; time.sleep(60)"]
    assert "took longer than 0 s" in command.ended("times", slow, path, 0.2)[0].failures[0]
    report.dump(Section("times", "Times", notes=["kept"]), path)
    assert command.ended("times", die, path, 60)[0].notes == ["kept"]


CUT = """
import sys, time
from pathlib import Path
from benchmarks.gpu import report
import signal
signal.signal(signal.SIGTERM, report.cut_off)
def work(section, settings):
    rows = section.table("Figures", ("", "ms"))
    rows.append(("a", "1.50"))
    try:
        print("measuring", flush=True)
        time.sleep(60)
    except Exception:
        rows.append(("b", "an error of what is measured, and on it goes"))
report.dump(report.run_section("times", "Times", work, None), Path(sys.argv[1]))
"""


@pytest.mark.slow
def test_a_section_that_is_cut_off_keeps_what_it_found(tmp_path: Path) -> None:
    """By the hours that a section has, and where somebody ends this process."""
    path = tmp_path / "section.json"
    cut = [sys.executable, "-c", CUT, str(path)]
    for own in (True, False):
        path.unlink(missing_ok=True)
        before = signal.signal(signal.SIGTERM, report.cut_off)
        timer = threading.Timer(8, os.kill, (os.getpid(), signal.SIGTERM))
        try:
            if own:
                timer.start()
            found, in_time = command.ended("times", cut, path, 60 if own else 8)
        finally:
            timer.cancel()
            signal.signal(signal.SIGTERM, before)
        assert in_time != own and found.tables[0].rows == [("a", "1.50")]
        assert found.failures == ["The section was cut off: what is missing was not reached."]


def test_the_time_that_is_left_is_said(tmp_path: Path, monkeypatch: Any) -> None:
    """Nobody waits for sections that would be cut off as well; what was found is written."""
    ran = []

    def apart(name: str, args: Any) -> tuple[Section, bool]:
        ran.append(name)
        return Section(name, name.title()), name != "checks"

    monkeypatch.setattr(command, "apart", apart)
    command.main(["--device", "cpu", "--tiny", "--out", str(tmp_path)])
    assert ran == ["build", "checks"] and (tmp_path / "report.md").exists()


@pytest.mark.slow
def test_the_command_on_a_cpu(tmp_path: Path) -> None:
    """Every section passes, and what it compared is in both reports."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--tiny", "--out", tmp_path],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    page = (tmp_path / "report.md").read_text()
    assert done.returncode == 0, page
    everything = json.loads((tmp_path / "report.json").read_text())
    data = {s["name"]: s["data"] for s in everything["sections"]}
    assert list(data) == list(command.SECTIONS)
    assert data["build"]["build"] == ["built"] and data["checks"]["counts"]["passed"] == 1
    assert {name.split()[0] for name in data["no_sync"]} == set(methods.__all__)
    sizes = tiny(CPU).sizes
    assert len(data["times"]) == 2 * len(sizes)
    for title, found in data["times"].items():
        assert all(len(t) == 5 for kind in found.values() for t in kind.values())
        if "no refresh" in found["ms"]:
            continue
        assert set(times.STEPS) | {times.FUSED, times.FLOOR} <= set(found["ms"]), title
        assert {"bitsandbytes AdamW8bit", "bitsandbytes PagedAdamW8bit"} <= set(found["ms"])
    ours = {name for name in data["kernels"] if name.startswith("FiraAdamW: ")}
    assert {"FiraAdamW: residual_factors_", "FiraAdamW: lift_add_scaled_"} <= ours
    assert all(len(x["ms"]) == 5 and x["bytes"] > 0 for x in data["kernels"].values())
    for size in sizes:
        rows = [k.partition(": ")[2] for k in data["memory"] if k.startswith(f"{size.name}: ")]
        assert {"AdamW bf16", "GaLore 8-bit, mode='step'", "GaLore 8-bit, mode='project'"} <= {
            *rows
        }
    assert all(x["measured"] > 0 and x["estimated"] > 0 for x in data["memory"].values())
    assert [len(x["losses"]) for x in data["train7b"].values()] == [20]
    assert data["train7b"].keys() == {"project"} and data["train7b_step"].keys() == {"step"}
    assert data["whole"].keys() >= {*whole.STEPS, times.FUSED}
    for title in ("Build: passed", "Tests: passed", "A 7B model under 24 GiB: passed"):
        assert f"## {title}" in page


# ------------------------------------------------------------------------------ the report


def test_what_was_found_before_an_error_is_kept() -> None:
    """Tables, then the error with its traceback, and each failure with its first line in bold."""

    def work(section: Section, settings: object) -> None:
        section.add("Figures", ("", "ms"), [("a", "1.50")])
        section.notes.append("b is not installed: not compared.")
        section.failed("c raised.")
        raise RuntimeError("no kernel image")

    found = report.run_section("times", "Times", work, None)
    assert not found.ok and found.seconds > 0
    about = {"gpu": "A card", "versions": {"torch": "2"}, "commit": "abc"}
    page = report.markdown(about, [found, Section("x", "Others")], "make gpu")
    lines = page.splitlines()
    assert lines[2] == "1 of 2 sections failed: Times."
    for line in (
        "## Times: FAILED", "## Others: passed", "| a  | 1.50 |", "**c raised.**",
        "- b is not installed: not compared.", "**The section stopped with RuntimeError.**",
        "RuntimeError: no kernel image",
    ):  # fmt: skip
        assert line in lines, line
    assert page.count("```") == 2
    assert lines.index("| a  | 1.50 |") < lines.index("**c raised.**")
    assert any("in work" in line for line in lines)


def test_sections_cross_processes(tmp_path: Path) -> None:
    section = Section("times", "Times", data={"ms": {"a": [1.0]}}, seconds=2.0)
    section.add("Figures", ("", "ms"), [("a", "1")])
    report.dump(section, tmp_path / "a.json")
    assert report.load(tmp_path / "a.json") == section


def test_the_machine_is_named(monkeypatch: Any) -> None:
    """Card, capability, memory, driver and toolkit, beside what every benchmark says."""
    card = SimpleNamespace(
        name="A card", major=8, minor=9, total_memory=24 << 30, multi_processor_count=128
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.version, "cuda", "12.9")
    ran = SimpleNamespace(stdout="570.1\n")
    monkeypatch.setattr(report.subprocess, "run", lambda *a, **k: ran)
    monkeypatch.setattr(report, "environment", lambda: {"commit": "abc", "cpu": "x"})
    found = report.machine(CUDA)
    wanted = {"gpu": "A card", "capability": "8.9", "memory_gib": 24.0, "driver": "570.1",
              "toolkit": "12.9", "multiprocessors": 128, "commit": "abc"}  # fmt: skip
    assert wanted.items() <= found.items() and "torch" in found["versions"]

    def absent(*args: Any, **kwargs: Any) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(report.subprocess, "run", absent)
    assert report.driver() == "unknown"


# ------------------------------------------------------------------------------ tests


JUNIT = """<testsuites><testsuite>
<testcase classname="a" name="one"/>
<testcase classname="a" name="two"><failure message="assert 1 == 2">a trace</failure></testcase>
<testcase classname="a" name="three"><error message="fixture">a trace</error></testcase>
<testcase classname="a" name="four"><skipped message="native: no nvcc">x</skipped></testcase>
<testcase classname="a" name="five"><skipped message="native: no nvcc">x</skipped></testcase>
</testsuite></testsuites>"""


def test_tests_are_counted_and_failures_kept(tmp_path: Path) -> None:
    (tmp_path / "j.xml").write_text(JUNIT)
    section = Section("checks", "Tests")
    checks.judge(section, checks.read(tmp_path / "j.xml"), 1, "output")
    assert section.data["counts"] == {"passed": 1, "failed": 1, "error": 1, "skipped": 2}
    assert section.notes == ["2 skipped: native: no nvcc."]
    assert section.failures == [
        "a::two failed.\nassert 1 == 2\na trace", "a::three error.\nfixture\na trace",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("cases", "status", "says"),
    [([], 5, "No test passed."), ([checks.Case("a", "passed", "")], 3, "ended with status 3")],
)
def test_no_test_is_no_success(cases: list[checks.Case], status: int, says: str) -> None:
    section = Section("checks", "Tests")
    checks.judge(section, cases, status, "the output")
    assert says in section.failures[0] and "the output" in section.failures[0]


# ------------------------------------------------------------------------------ waiting


def test_waits_are_found_with_their_places(monkeypatch: Any) -> None:
    """The error names the first place, warnings all; an error of another kind is not a wait."""
    modes = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    message = "called a synchronizing CUDA operation"

    def step() -> None:
        if modes[-1] == "error":
            try:
                raise RuntimeError(message)
            finally:
                torch.linalg.inv(torch.zeros(2, 2))  # what undoing may raise in its turn
        for line in (11, 22, 22):
            warnings.warn_explicit(message, UserWarning, str(no_sync.PACKAGE / "a.py"), line)

    monkeypatch.setattr(no_sync, "begun", lambda *args: step)
    settings = full(CUDA)
    assert no_sync.waits("GaLoreAdamW", {}, 1, settings) == [
        "outside the package", "lowrank_optim/a.py:11", "lowrank_optim/a.py:22",
    ]  # fmt: skip
    assert modes == ["error", 0, "warn", 0]
    monkeypatch.setattr(no_sync, "begun", lambda *args: lambda: torch.linalg.inv(torch.zeros(2, 2)))
    with pytest.raises(torch.linalg.LinAlgError):
        no_sync.waits("GaLoreAdamW", {}, 1, settings)
    monkeypatch.setattr(no_sync, "begun", lambda *args: lambda: None)
    assert no_sync.waits("GaLoreAdamW", {}, 1, settings) == []


def test_the_place_is_the_innermost_of_the_package() -> None:
    try:
        methods.GaLoreAdamW([torch.zeros(2, 2, requires_grad=True)], lr=-1.0, rank=1)
    except ValueError as error:
        assert no_sync.place(error.__traceback__).startswith("lowrank_optim/groups/")


@pytest.mark.parametrize("gap", [1, no_sync.NEVER])
def test_what_finds_no_basis_shows_nothing(gap: int, monkeypatch: Any) -> None:
    """A group without a rank is dense, and dense steps wait for nothing: the section was blind."""
    honest = variants.ours

    def dense(name: str, groups: Any, *args: Any, **options: Any) -> Any:
        return honest(name, [{**own, "rank": None} for own in groups], *args, **options)

    settings = tiny(CPU)
    no_sync.begun("GaLoreAdamW", {"projector": "svd"}, gap, settings)
    monkeypatch.setattr(variants, "ours", dense)
    with pytest.raises(AssertionError, match="no matrix was projected"):
        no_sync.begun("GaLoreAdamW", {"projector": "svd"}, gap, settings)


def test_waits_that_the_documentation_does_not_list_are_failures(monkeypatch: Any) -> None:
    """A step waits nowhere, a refresh where the status of its own factorisation is read."""
    eigh = "lowrank_optim/subspaces/randomized.py:12 eigh"
    found = {1: [eigh], no_sync.NEVER: []}
    monkeypatch.setattr(no_sync, "waits", lambda name, options, gap, settings: found[gap])
    section = Section("no_sync", "")
    no_sync.run(section, tiny(CPU))
    assert {row[1:] for row in section.tables[0].rows} == {("no wait", eigh)}
    failed = {text.partition(":")[0] for text in section.failures}
    assert {"DCTAdamW", "GaLoreAdamW svd", "FrugalAdamW columns", "SSTAdamW"} <= failed
    assert not failed & {"GaLoreAdamW", "FiraAdamW", "GaLoreAdamW rsvd", "FrugalAdamW rsvd"}
    assert any("docs/performance.md" in text and eigh in text for text in section.failures)
    found[1] = ["lowrank_optim/engine/refresh.py:3 refreshing_"]
    section = Section("no_sync", "")
    no_sync.run(section, tiny(CPU))
    assert len(section.failures) == len(section.tables[0].rows)
    found[1], found[no_sync.NEVER] = [], ["b.py:2"]
    section = Section("no_sync", "")
    no_sync.run(section, tiny(CPU))
    assert "DCTAdamW: a step without a refresh waits at b.py:2." in section.failures


def test_places_are_those_of_the_package() -> None:
    """What is allowed exists; else a function that was renamed would fail on a GPU first."""
    for place in (*waiting.FACTORISATIONS, *waiting.RESTART, *waiting.SPECTRAL):
        file, _, function = place.partition(" ")
        assert f"def {function}" in (no_sync.PACKAGE / file).read_text(encoding="utf-8")


# ------------------------------------------------------------------------------ times


class Event:
    """Of a stream whose clock is what ``work`` set it to."""

    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = Event.now

    def elapsed_time(self, end: Event) -> float:
        return end.at - self.at


def test_a_device_is_timed_by_its_events(monkeypatch: Any) -> None:
    """Not by the host, which returns before the device is done."""
    waited = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)

    def work() -> None:
        Event.now += 12.5

    assert timing.device_clock(CUDA)(work) == 12.5
    assert len(waited) == 2  # an empty queue before, the end of the work after
    assert timing.host_clock(CUDA)(work) < 1000 and len(waited) == 3
    assert timing.device_clock(CPU) is timing.host_clock(CPU) is timing.milliseconds
    ticks = iter(range(100))
    took = timing.interleaved({"a": work, "b": work}, 5, clock=lambda work: next(ticks))
    assert sorted(took["a"] + took["b"]) == list(range(2, 12))


def test_a_peer_that_raises_leaves_the_weights_whole() -> None:
    """It is a sentence; ours is a failure. galore-torch may raise with weights replaced."""
    params = weights([(6, 4)], torch.float32)
    before = params[0].detach().clone()

    class Breaks:
        def step(self) -> None:
            params[0].grad = None
            params[0].data = torch.zeros(6, 2)
            raise RuntimeError("no binary\nof it")

    section, works, make = Section("times", ""), dict[str, Any](), cast(Any, Breaks)
    for _ in range(2):
        times.tried(section, works, params, "theirs", make, theirs=True)
    assert section.ok and section.notes == ["theirs raised RuntimeError (no binary): not timed."]
    times.tried(section, works, params, "ours", make)
    assert not section.ok and not works
    assert torch.equal(params[0], before) and params[0].grad is not None


def test_what_a_peer_leaves_behind_is_put_back() -> None:
    """galore-torch's AdamW8bit leaves a projected gradient, which the next peer cannot use."""
    params = weights([(6, 4)], torch.float32)
    before, grad = params[0].detach().clone(), params[0].grad
    seen: list[tuple[int, ...]] = []

    class Projects:
        def step(self) -> None:
            assert params[0].grad is not None
            seen.append(tuple(params[0].grad.shape))
            params[0].grad = None
            params[0].data = torch.zeros(6, 2)
            params[0].grad = torch.zeros(6, 2)

    section, works, make = Section("times", ""), dict[str, Any](), cast(Any, Projects)
    times.tried(section, works, params, "theirs", make, theirs=True)
    works["theirs"]()
    assert section.ok and not section.notes and seen == [(6, 4)] * 2
    assert torch.equal(params[0], before) and params[0].grad is grad


def test_what_compiles_for_a_minute_is_left_out_by_quick(monkeypatch: Any) -> None:
    seen: list[set[str]] = []
    makers = {"torchao AdamW8bit": None, "bitsandbytes AdamW8bit": None}
    monkeypatch.setattr(variants, "peers", lambda: (dict(makers), []))
    monkeypatch.setattr(times, "steps", lambda *args: seen.append({*args[-1]}))
    monkeypatch.setattr(times, "refreshes", lambda *args: None)
    for settings in (full(CPU), quick(CPU)):
        section = Section("times", "")
        times.run(section, settings)
        told = any("torchao AdamW8bit is not timed" in text for text in section.notes)
        assert told != settings.compiled
    assert seen == [{*makers}] * 2 + [{"bitsandbytes AdamW8bit"}] * 2


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (2, 3, 5)])
@pytest.mark.parametrize("full", [True, False])
def test_any_basis_takes_the_place_of_singular_vectors(shape: Any, full: bool) -> None:
    """For a first step, and not after it; vectors are orthonormal on both sides."""
    honest, x = torch.linalg.svd, torch.randn(shape)
    shapes = [own.shape for own in honest(x, full_matrices=full)]
    with times.any_basis():
        u, s, v = torch.linalg.svd(x, full_matrices=full)
    assert [own.shape for own in (u, s, v)] == shapes
    for q in (u, v.mT):
        torch.testing.assert_close(q.mT @ q, torch.eye(q.shape[-1]).expand_as(q.mT @ q))
    k = s.shape[-1]
    found = (u.mT @ x @ v.mT)[..., :k, :k]
    assert not torch.allclose(found, torch.diag_embed(s), atol=0.1)
    assert torch.linalg.svd is honest


def test_a_size_without_exact_refreshes_begins_with_any_basis(monkeypatch: Any) -> None:
    """Ours and theirs: seven singular value decompositions of a 7B take a minute of a card."""
    seen: list[bool] = []
    honest = torch.linalg.svd
    monkeypatch.setattr(times, "tried", lambda *args, **kw: seen.append(torch.linalg.svd is honest))
    monkeypatch.setattr(times, "measure", lambda *args: None)
    for exact in (True, False):
        size = replace(tiny(CPU).trained, exact=exact)
        times.steps(Section("times", ""), tiny(CPU), size, {"theirs": cast(Any, object)})
    count = len(times.STEPS) + 1
    assert seen == [True] * count + [False] * count


def test_kernels_are_those_of_a_step_with_what_they_must_move() -> None:
    """Fira's factors of 8 columns; the calls are those that the step makes, each once."""
    params = weights([(16, 8)], torch.float32)
    optimizer = variants.ours("FiraAdamW", params, 4, kernels.NEVER, weight_decay=0.1)
    optimizer.step()
    with kernels.Calls() as calls:
        optimizer.step()
    assert {"column_norms": 2, "residual_factors_": 1, "lift_add_scaled_": 1}.items() <= {
        op: len(made) for op, made in calls.found.items()
    }.items()
    least = kernels.least_of(calls.found["lift_add_scaled_"])
    # W twice, G, the basis, update, low and columns
    assert least.bytes >= 4 * (3 * 128 + 16 * 4 + 2 * 4 * 8 + 8)
    assert least.flops == 128 * (2 * 4 + 6)
    before = params[0].detach().clone()
    assert len(kernels.timed(tiny(CPU), calls.found["lift_add_scaled_"])) == 5
    assert not torch.equal(before, params[0])  # the calls were made


def test_a_whole_model_has_what_is_dense_too(monkeypatch: Any) -> None:
    """As many numbers as LLaMA-7B is published with; ours project its matrices and nothing else."""
    hidden, mlp, layers, _ = full(CPU).trained.shape
    dense = dense_shapes(hidden, layers, full(CPU).vocab)
    shapes = [*linear_shapes(hidden, mlp) * layers, *dense]
    assert sum(map(math.prod, shapes)) == MODELS["llama-7b"].parameters
    assert [len(x) for x in dense].count(1) == 65 and dense.count((32000, 4096)) == 2

    seen: dict[tuple[int, ...], set[bool]] = {}
    sizes: set[int] = set()

    def measured(settings: Any, make: Any) -> dict[str, float]:
        optimizer = make()
        optimizer.step()
        sizes.add(sum(p.numel() for g in optimizer.param_groups for p in g["params"]))
        for param in optimizer.state if isinstance(optimizer, LowRankOptimizer) else ():
            is_projected = "refresh_step" in optimizer.state[param]
            seen.setdefault(tuple(param.shape), set()).add(is_projected)
        return {"first": 1.0, "ms": 1.0, "host_ms": 1.0, "state": 1.0}

    def theirs(params: Any, rank: int, gap: int) -> Any:
        return torch.optim.AdamW(params)

    monkeypatch.setattr(whole, "measured", measured)
    monkeypatch.setattr(variants, "peers", lambda: ({whole.PEERS[0]: theirs}, []))
    section, settings = Section("whole", ""), replace(tiny(CPU), vocab=40)
    whole.run(section, settings)
    assert section.ok and [*section.data] == [times.FUSED, *whole.STEPS, *whole.PEERS]
    hidden, mlp, layers, _ = settings.trained.shape
    matrices, dense = linear_shapes(hidden, mlp), dense_shapes(hidden, layers, settings.vocab)
    assert sizes == {sum(map(math.prod, [*matrices * layers, *dense]))}
    assert seen == {x: {True} for x in matrices} | {x: {False} for x in dense}


def test_what_is_not_installed_is_one_line(monkeypatch: Any) -> None:
    monkeypatch.setattr(variants, "peer", lambda module, name: None)
    found, missing = variants.peers()
    assert not found and len(missing) == len(variants.PEERS)
    assert "bitsandbytes PagedAdamW8bit is not installed: not compared." in missing


# ------------------------------------------------------------------------------ memory, training


def test_memory_is_the_peak_beyond_the_start(monkeypatch: Any) -> None:
    counters = {"memory_allocated": 100, "max_memory_allocated": 350}
    for name, value in counters.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    calls = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append("wait"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: calls.append("reset"))
    assert memory.peak(CUDA, lambda: calls.append("work")) == 250
    assert calls == ["wait", "reset", "work", "wait"]
    monkeypatch.setattr(memory, "allocations", lambda work: SimpleNamespace(peak=7))
    assert memory.peak(CPU, lambda: None) == 7


def test_every_basis_has_its_turn_where_gradients_are_projected(monkeypatch: Any) -> None:
    """Else the worst step, of which the estimate is, is not among those that are measured."""
    settings, given, said = full(CPU), [], []
    monkeypatch.setattr(memory, "build", lambda *args: None)
    monkeypatch.setattr(memory, "train", lambda *args, **own: given.append(own))
    monkeypatch.setattr(
        memory, "estimate", lambda *args, **own: said.append(own) or SimpleNamespace(peak=1)
    )
    size = settings.sizes[0]
    for case in memory.cases(Section("memory", ""), size, settings.dtype):
        memory.trained(settings, size, case)
        memory.estimated(settings, size, case)
    assert len(given) == len(said) > 0
    assert all(own["device"] == CPU for own in said)
    for run, own in zip(given, said, strict=True):
        assert run.get("update_proj_gap") == own.get("update_proj_gap")
        if run["in_backward"] == "project":
            assert run["steps"] > run["update_proj_gap"]  # turns are less than the gap


def test_a_process_has_its_workspace_before_a_peak_is_measured(monkeypatch: Any) -> None:
    """Products were made, once, and not within the first row."""
    memory._warm.cache_clear()
    calls: list[str] = []
    monkeypatch.setattr(
        memory, "trained", lambda settings, size, case: calls.append(case[0] or "warm")
    )
    monkeypatch.setattr(memory, "peak", lambda device, work: [calls.append("peak"), work()])
    settings = full(CPU)
    for name in ("a", "b"):
        memory.measured(settings, settings.sizes[0], (name, None, {}, None))
    memory._warm.cache_clear()
    assert calls == ["warm", "peak", "a", "peak", "b"]


def test_no_memory_left_is_a_row_and_other_errors_failures(monkeypatch: Any) -> None:
    errors = iter([torch.OutOfMemoryError("x"), RuntimeError("y"), None])

    def measured(*args: Any) -> int:
        if (error := next(errors)) is not None:
            raise error
        return 3 << 30

    chosen = [("a", None, {}, None), ("b", None, {}, "step"), ("c", None, {}, "project")]
    settings = full(CPU)
    monkeypatch.setattr(memory, "cases", lambda section, size, dtype: chosen)
    monkeypatch.setattr(memory, "measured", measured)
    monkeypatch.setattr(memory, "estimated", lambda *args: 2 << 30)
    section = Section("memory", "")
    memory.run(section, SimpleNamespace(sizes=settings.sizes[:1], tokens=8, dtype=settings.dtype))
    assert section.tables[0].rows == [
        ("a", "out of memory", "2.00", ""), ("c, mode='project'", "3.00", "2.00", "1.500"),
    ]  # fmt: skip
    assert (
        len(section.failures) == 1 and "b, mode='step' raised RuntimeError" in (section.failures[0])
    )


def training(losses: list[float], peak: int = 1) -> train7b.Training:
    return train7b.Training("step", losses, [1.0] * len(losses), peak, 1)


def test_a_run_is_judged() -> None:
    """Finite losses that fall, under the cap."""
    falling = [10.0 - 0.1 * i for i in range(20)]
    assert train7b.judged(training(falling, peak=24), cap=24) == []
    assert "do not fall" in train7b.judged(training(falling[::-1]), cap=24)[0]
    assert "do not fall" in train7b.judged(training([1.0] * 20), cap=24)[0]
    assert "not finite" in train7b.judged(training([*falling[:-1], float("nan")]), cap=24)[0]
    assert "above the cap" in train7b.judged(training(falling, peak=25), cap=24)[0]


def test_the_allocator_gets_the_cap_and_no_more(monkeypatch: Any) -> None:
    """torch takes a device for it by its index, and refuses one that has none."""
    given = []
    card = SimpleNamespace(total_memory=80 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda x, device: given.append((x, device))
    )
    for device, index in ((CUDA, 3), (torch.device("cuda", 1), 1)):
        with train7b.capped(device, 24 << 30):
            assert given == [(0.3, index)]
        assert given == [(0.3, index), (1.0, index)]
        given.clear()


def test_the_real_sizes_are_those_that_are_promised() -> None:
    settings = full(CUDA)
    assert [s.name for s in settings.sizes] == ["llama-1b", "llama-7b"]
    trained = settings.trained
    assert (trained.shape[2], trained.rank, settings.steps) == (32, 1024, 20)
    assert settings.cap == 24 << 30 and settings.dtype == torch.bfloat16
