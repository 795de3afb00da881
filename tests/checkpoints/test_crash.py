"""kill -9 in a run and in a save, then a resume that is the run without it, to the bit."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.checkpoints import crash, kills

ROOT = Path(__file__).parents[2]


def start(*args: object) -> int:
    command = [sys.executable, "-m", "tests.checkpoints.crash", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, check=False, timeout=120).returncode


def assert_same_end(whole: Path, broken: Path) -> None:
    """Weights and state of the last checkpoints, to the bit."""
    one, two = (torch.load(f / "last.pt", weights_only=True) for f in (whole, broken))
    assert one[0] == two[0] == crash.STEPS
    for key, x in one[1].items():
        assert torch.equal(x, two[1][key])
    for n, state in one[2]["state"].items():
        for key, x in state.items():
            assert torch.equal(x, two[2]["state"][n][key]), (n, key)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["run", "save"])
@pytest.mark.parametrize("mode", ["plain", "project", "step"])
def test_killed_and_resumed(tmp_path: Path, mode: str, where: str) -> None:
    """At step 5, in the middle of backward or with half a checkpoint on the disk.

    The process gets SIGKILL, so that no handler, ``finally`` or buffer can help it.
    """
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    assert start(broken, mode, where, 5) == -signal.SIGKILL
    kept = torch.load(broken / "last.pt", weights_only=True)
    assert kept[0] == 5
    assert (broken / "last.pt.partial").exists() == (where == "save")
    assert start(broken, mode) == 0
    crash.main(whole, mode)
    assert_same_end(whole, broken)


def kill_at_random(tmp_path: Path, mode: str, kills_wanted: int, seed: int) -> None:
    """Each kill comes at a random operation, or write of a file, of what is left of the run."""
    whole = tmp_path / "whole"
    whole.mkdir()
    points = kills.run(whole, mode).now
    assert points > 50 * crash.STEPS
    draw, died, n = random.Random(seed), 0, 0
    while died < kills_wanted:
        broken = tmp_path / f"broken{n}"
        broken.mkdir()
        ends = [draw.randrange(points // (1 + i)) for i in range(min(4, kills_wanted - died))]
        died += kills.killed_until_done(broken, mode, ends)
        assert_same_end(whole, broken)
        n += 1


@pytest.mark.parametrize("mode", ["plain", "step"])
def test_killed_twice(tmp_path: Path, mode: str) -> None:
    kill_at_random(tmp_path, mode, 2, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "count"), [("plain", 34), ("project", 33), ("step", 33)])
def test_killed_a_hundred_times(tmp_path: Path, mode: str, count: int) -> None:
    """A hundred in all: in forward, in accumulation inside backward, in steps, and in saves.

    Several in a row, also before the first checkpoint; then the run ends as if there had been none.
    """
    kill_at_random(tmp_path, mode, count, seed=count)
