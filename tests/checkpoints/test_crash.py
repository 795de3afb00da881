"""kill -9 in a run and in a save, then a resume that is the run without it, to the bit."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.checkpoints import crash

ROOT = Path(__file__).parents[2]


def start(*args: object) -> int:
    command = [sys.executable, "-m", "tests.checkpoints.crash", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, check=False, timeout=120).returncode


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
    one, two = (torch.load(f / "last.pt", weights_only=True) for f in (whole, broken))
    assert one[0] == two[0] == crash.STEPS
    for key, x in one[1].items():
        assert torch.equal(x, two[1][key])
    for n, state in one[2]["state"].items():
        for key, x in state.items():
            assert torch.equal(x, two[2]["state"][n][key]), (n, key)
