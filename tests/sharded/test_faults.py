"""Ranks that are killed, stop or raise: nobody waits for ever, and the last checkpoint is whole."""

from __future__ import annotations

import copy
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.nn.parallel import DistributedDataParallel

import lowrank_optim
from lowrank_optim.engine.sharded import alike, finding, phases
from tests.sharded import restarts, training
from tests.sharded.ranks import GROUP_TIMEOUT, Outcome, Ranks, World
from tests.sharded.training import Trained

Worlds = Callable[[int], Ranks]
ROOT = Path(__file__).parents[2]
SAVED, DUE = 3, 3
"""The checkpoint that is there, and the step that dies: every basis is due then."""
AT_ONCE = replace(restarts.CASE, options={**restarts.CASE.options, "stagger": False})
PATIENCE = 3.0
"""Seconds that a group waits for a rank that has stopped."""
AT_LAST = GROUP_TIMEOUT / 2
"""Seconds within which a rank has raised, however busy the machine, that did not wait for all of
the time of its group."""


@pytest.fixture
def doomed() -> Iterator[Ranks]:
    """A world that ends with its job."""
    world = Ranks(2)
    yield world
    world.close()


def begun(world: World, folder: Path) -> Trained:
    """Some steps, and their checkpoint; every basis is due at the next."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    trained = Trained(AT_ONCE, world)
    for step in range(SAVED):
        trained.step(step)
    restarts.save(trained, folder, SAVED)
    return trained


def arm(owner: Any, name: str, when: str, how: int = signal.SIGKILL) -> None:
    """This process ends, or stops, in its next call of a function: before its part or after it."""
    real = getattr(owner, name)

    def last(*args: Any, **kwargs: Any) -> None:
        if when == "after":
            real(*args, **kwargs)
        os.kill(os.getpid(), how)

    setattr(owner, name, last)


def in_a_hurry() -> None:
    """From now on a message waits for the other rank no longer than it has to.

    Not before: where a machine is busy, a rank that nothing has met may be as late.
    """
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=PATIENCE), dist.group.WORLD)  # type: ignore[attr-defined]


def tell(folder: Path, **found: Any) -> None:
    """What the rank that is left saw: its world has no answer of all ranks."""
    (folder / "seen").write_text(json.dumps(found))


def told(folder: Path, outcome: Outcome) -> Any:
    """What :func:`tell` kept; where the rank that is left came to no such end, how it ended."""
    assert (folder / "seen").exists(), outcome.errors[0]
    return json.loads((folder / "seen").read_text())


def same(a: Any, b: Any) -> bool:
    (weights, states), (weights0, states0) = a, b
    pairs = [(weights[k][0], weights0[k][0]) for k in weights0]
    for name, own in states0.items():
        assert own.keys() == states[name].keys()
        pairs += [(states[name][k][0], own[k][0]) for k in own]
    return all(torch.equal(x, y) for x, y in pairs)


def lost_in_a_step(world: World, folder: Path, kind: str, when: str, stops: bool) -> None:
    trained = begun(world, folder)
    step, kept, began = -1, True, time.monotonic()
    try:
        for step in (DUE, DUE + 1):
            trained.backward(step)
            if stops:  # what closes no connection is told by time alone
                in_a_hurry()
            if step == DUE and world.rank == 1:
                arm(dist, kind, when, signal.SIGSTOP if stops else signal.SIGKILL)
            before, began = trained.held(), time.monotonic()
            trained.optimizer.step()
    except Exception as error:
        kept = same(trained.held(), before)
        notes = getattr(error, "__notes__", [])
        seconds = time.monotonic() - began
        tell(folder, text=str(error), notes=notes, seconds=seconds, step=step, kept=kept)


IN_A_STEP = [
    (kind, when, False)
    for kind in ("all_reduce", "all_to_all_single", "broadcast")
    for when in ("before", "after")
]


def check_resumes(ranks: Worlds, folder: Path) -> None:
    """From the checkpoint that was there to the weights of a run that nothing has met."""
    assert restarts.last(folder) == folder / f"step-{SAVED:06d}"
    (folder / "whole").mkdir()
    whole = ranks(2).run("whole", due_at_once, folder=folder / "whole").checked()
    again = ranks(2).run("again", due_at_once, folder=folder).checked()
    for name, x in whole[0].items():
        assert torch.equal(again[0][name], x), name


def due_at_once(world: World, folder: Path) -> Any:
    return restarts.train(world, folder, case=AT_ONCE)


@pytest.mark.parametrize(
    ("kind", "when", "stops"),
    [
        pytest.param(*row, marks=[] if row == ("broadcast", "before", False) else pytest.mark.slow)
        for row in (*IN_A_STEP, ("broadcast", "before", True), ("all_reduce", "before", True))
    ],
)
def test_a_rank_that_is_lost_in_a_step(
    kind: str, when: str, stops: bool, doomed: Ranks, ranks: Worlds, tmp_path: Path
) -> None:
    """Whoever is left raises within the time of its group, and has not taken half a step."""
    args = {"folder": tmp_path, "kind": kind, "when": when, "stops": stops}
    if stops:
        doomed.grace = PATIENCE  # it never answers
    outcome = doomed.run("lost", lost_in_a_step, **args)
    assert outcome.failed
    found = told(tmp_path, outcome)
    assert found["seconds"] < AT_LAST, found
    if found["step"] == DUE:
        assert found["kept"] and "on rank 0 of 2" in found["notes"][0], found
    check_resumes(ranks, tmp_path)


def lost_in_a_save(world: World, folder: Path, what: str) -> None:
    trained = begun(world, folder)
    trained.step(SAVED)
    if world.rank == 1:
        where, when = what.split()
        if where == "write":
            arm(FileSystemWriter, "write_data", when)
        else:
            arm(sys.modules[__name__], "gathered", when)
    began = time.monotonic()
    try:
        if what.startswith("write"):
            restarts.save(trained, folder, SAVED + 1)
        else:
            gathered(trained, folder)
    except BaseException as error:  # of torch.distributed.checkpoint it is one
        tell(folder, text=str(error), seconds=time.monotonic() - began)


def gathered(trained: Trained, folder: Path) -> None:
    """A whole state on rank 0, under a temporary name and then its own."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    assert trained.model is not None
    state = get_optimizer_state_dict(trained.model, trained.optimizer, options=options)
    if dist.get_rank() == 0:
        torch.save(state, folder / "partial.pt")
        os.replace(folder / "partial.pt", folder / "whole.pt")


@pytest.mark.slow
@pytest.mark.parametrize("what", ["write before", "write after", "gather before"])
def test_a_rank_that_is_killed_in_a_save(
    what: str, doomed: Ranks, ranks: Worlds, tmp_path: Path
) -> None:
    """The others raise, and the checkpoint before is the last one."""
    outcome = doomed.run(what, lost_in_a_save, folder=tmp_path, what=what)
    assert outcome.failed
    assert told(tmp_path, outcome)["seconds"] < AT_LAST
    assert not (tmp_path / "whole.pt").exists()
    check_resumes(ranks, tmp_path)


def lost_over_another(world: World, folder: Path) -> None:
    """As above, into the folder of the checkpoint before."""
    trained = begun(world, folder)
    trained.step(SAVED)
    if world.rank == 1:
        arm(FileSystemWriter, "write_data", "before")
    dcp.save(restarts.state_of(trained), checkpoint_id=folder / f"step-{SAVED:06d}")


@pytest.mark.slow
def test_a_folder_that_is_written_over_is_a_mixture(
    doomed: Ranks, ranks: Worlds, tmp_path: Path
) -> None:
    """Why a save needs a folder of its own: torch reads one rank's new shards and another's old."""
    assert doomed.run("over", lost_over_another, folder=tmp_path).failed
    found = ranks(2).run("read", read, folder=tmp_path).checked()
    runs = ranks(2).run("weights", weights_after).checked()
    for (step, weights), (before, after), is_new in zip(found, runs, (True, False), strict=True):
        assert step == SAVED
        for name, (x, _) in (after if is_new else before).items():
            assert torch.equal(weights[name][0], x)
            assert not torch.equal(before[name][0], after[name][0])


def read(world: World, folder: Path) -> Any:
    trained = Trained(AT_ONCE, world)
    return restarts.resume(trained, folder), trained.weights()


def weights_after(world: World) -> Any:
    """Before the step that was being saved, and after it."""
    trained, out = Trained(AT_ONCE, world), []
    for step in range(SAVED + 1):
        trained.step(step)
        out.append(trained.weights())
    return out[-2:]


# ---------------------------------------------------------------- restarts


def launched(folder: Path, dies_at: int) -> None:
    """By torchrun, on two ranks that may be restarted once."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "--max-restarts", "1", "--monitor-interval", "0.2", "-m", "tests.sharded.restarts",
        str(folder), str(dies_at),
    ]  # fmt: skip
    # a restarted rank must not read the addresses of those before it, which torchrun keeps
    own = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=own, timeout=300, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def uninterrupted(ranks: Worlds, size: int, folder: Path) -> Any:
    folder.mkdir()
    return ranks(size).run("whole", restarts.train, folder=folder).checked()[0]


@pytest.mark.slow
def test_torchrun_restarts_from_the_last_checkpoint(ranks: Worlds, tmp_path: Path) -> None:
    """A rank kills itself in step 7: the weights are those of a run that nothing has met."""
    folder = tmp_path / "run"
    folder.mkdir()
    launched(folder, 7)
    assert (folder / "died").exists()
    weights = torch.load(folder / "weights.pt", weights_only=True)
    for name, x in uninterrupted(ranks, 2, tmp_path / "whole").items():
        assert torch.equal(weights[name], x), name


@pytest.mark.parametrize("size", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_with_another_number_of_ranks(
    size: int, doomed: Ranks, ranks: Worlds, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    assert doomed.run("dies", restarts.train, folder=folder, dies_at=7).failed
    assert restarts.last(folder) == folder / "step-000006"
    weights = ranks(size).run("goes on", restarts.train, folder=folder).checked()[0]
    for name, x in uninterrupted(ranks, 2, tmp_path / "whole").items():
        assert float((weights[name] - x).abs().max()) <= training.WEIGHTS, name


# ---------------------------------------------------------------- asynchronous saves


def _copies() -> bool:
    x = torch.ones(1)
    return bool(BlockingAsyncStager().stage({"x": x})["x"].data_ptr() != x.data_ptr())


COPIES = _copies()
"""Whether ``dcp.async_save`` copies what lies on the host: not by torch 2.6."""


class Late(FileSystemWriter):
    """Writes when it is allowed to."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.go = threading.Event()

    def write_data(self, plan: Any, planner: Any) -> Any:
        assert self.go.wait(PATIENCE * 10)
        return super().write_data(plan, planner)


def saved_late(world: World, folder: Path) -> bool:
    """Whether a save that is written after three more steps has the state of its own."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    trained = Trained(restarts.CASE, world)
    for step in range(4):
        trained.step(step)
    expected = trained.held()
    # messages of a save and of a step must not meet in one group
    apart = dist.new_group(backend="gloo")
    writer = Late(folder)
    state = restarts.state_of(trained)
    state = state if COPIES else copy.deepcopy(state)
    saving: Any = dcp.async_save(state, storage_writer=writer, process_group=apart)
    for step in range(4, 7):
        trained.step(step)
    assert not same(trained.held(), expected)
    writer.go.set()
    saving.result(timeout=PATIENCE * 10)
    dist.barrier()
    os.replace(folder, folder.with_name("step-000004")) if world.rank == 0 else None
    dist.barrier()
    again = Trained(restarts.CASE, world)
    assert restarts.resume(again, folder.parent) == 4
    return same(again.held(), expected)


def test_an_asynchronous_save_is_of_its_step(ranks: Worlds, tmp_path: Path) -> None:
    """State is updated in place and shards are views: what is saved has to be a copy."""
    assert all(ranks(2).run("late", saved_late, folder=tmp_path / "late").checked())


# ---------------------------------------------------------------- ranks that raise alone


def out_of_memory(*_: Any, **__: Any) -> None:
    raise torch.OutOfMemoryError("tried to allocate 7 GiB")


def raising_alone(world: World, replicas: bool, fails: bool) -> Any:
    """What each rank is told, whether its state is as it was, and a second try of that step."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    if replicas:
        return raising_replicas(world, fails)
    # with biases, which no refresh is of
    trained, out = Trained(replace(AT_ONCE, only=()), world), []
    for step in range(DUE + 2):
        trained.backward(step)
        if step == DUE and fails:
            before, real = trained.held(), finding.finding
            if world.rank == 1:
                finding.finding = out_of_memory  # type: ignore[assignment]
            out.append(error_of(trained.optimizer))
            finding.finding = real
            out.append(same(trained.held(), before))
        trained.optimizer.step()
    return [*out, trained.held()]


def raising_amid_a_step(world: World) -> Any:
    """Memory runs out on one rank as it writes its last weights: no other rank waits for that."""
    logging.disable(logging.WARNING)
    trained, calls, wanted = Trained(replace(AT_ONCE, only=()), world), 0, 0
    real = phases._add_block_

    def add(*args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == wanted:
            out_of_memory()
        real(*args)

    phases._add_block_ = add
    try:
        trained.step(0)
        count, wanted = calls, 2 * calls * world.rank
        trained.backward(1)
        before = trained.held()
        found = error_of(trained.optimizer)
        after = trained.held()
        again = error_of(trained.optimizer) if world.rank else None
    finally:
        phases._add_block_ = real
    return count, found, again, before, after


def test_a_rank_that_raises_alone_takes_no_other_step(ranks: Worlds) -> None:
    """Its messages would meet those of the step before; that step is put back, as of one process.

    A try again stepped those twice that had taken it.
    """
    (_, fine, *_), (count, found, again, before, after) = (
        ranks(2).run("alone", raising_amid_a_step).checked()
    )
    assert fine[0] == "" and count > 1
    kind, _, notes, _ = found
    assert kind == "OutOfMemoryError"
    taken, of = map(int, re.findall(r"\d+", notes[0])[:2])
    assert taken == of - 1 >= count - 1
    assert "on rank 1 of 2" in notes[0] and "end the run, and go on from a checkpoint" in notes[0]
    kind, text, _, _ = again
    assert kind == "RuntimeError" and "raised on rank 1 of 2 amid what ranks do together" in text
    (weights, states), (weights0, states0) = before, after
    kept = [name for name in weights if torch.equal(weights[name][0], weights0[name][0])]
    assert len(kept) == 1  # all of it is as it was
    old, new = states[kept[0]], states0[kept[0]]
    assert all(torch.equal(x, new[key][0]) for key, (x, _) in old.items())


def error_of(optimizer: torch.optim.Optimizer) -> Any:
    began = time.monotonic()
    try:
        optimizer.step()
    except Exception as error:
        notes = getattr(error, "__notes__", [])
        return type(error).__name__, str(error), notes, time.monotonic() - began
    return "", "", [], 0.0


def raising_replicas(world: World, fails: bool) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20, bias=False), nn.Linear(20, 8, bias=False)).double()
    ddp = DistributedDataParallel(model)
    own = {"lr": 0.01, "rank": 3, "update_proj_gap": DUE, "stagger": False}
    optimizer = lowrank_optim.GaLoreAdamW(model.named_parameters(), on_refresh="project", **own)
    out = []

    def held() -> Any:
        named = dict(model.named_parameters())
        states = {
            k: {n: (x.clone(), None) for n, x in optimizer.state[p].items()}
            for k, p in named.items()
        }
        return {k: (p.detach().clone(), None) for k, p in named.items()}, states

    for step in range(DUE + 2):
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(10 * step + world.rank)
        x = torch.randn(6, 12, generator=generator, dtype=torch.float64)
        ddp(x).square().mean().backward()
        if step == DUE and fails:
            before, real = held(), alike.finding
            if world.rank == 1:
                alike.finding = out_of_memory  # type: ignore[assignment]
            out.append(error_of(optimizer))
            alike.finding = real
            out.append(same(held(), before))
        optimizer.step()
    return [*out, held()]


@pytest.mark.parametrize("replicas", [False, True])
def test_what_one_rank_raises_all_raise(replicas: bool, ranks: Worlds) -> None:
    """At once, with its rank and text; nothing has changed, and the step can be tried again."""
    args = {"replicas": replicas}
    values = ranks(2).run("raises", raising_alone, fails=True, **args).checked()
    kinds = [kind for (kind, *_), _, _ in values]
    assert kinds == ["RuntimeError", "OutOfMemoryError"]
    for (_, text, notes, seconds), kept, _ in values:
        said = " ".join([text, *notes])
        assert re.search(r"rank 1 could not refresh \S+: OutOfMemoryError: tried to allo", said)
        assert kept and seconds < 20
    never = ranks(2).run("never raises", raising_alone, fails=False, **args).checked()
    for (*_, held), (expected,) in zip(values, never, strict=True):
        assert same(held, expected)
