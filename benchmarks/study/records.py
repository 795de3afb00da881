"""Kept runs in one file that a repository can hold: who doubts a table has what it is of."""

from __future__ import annotations

import json
import lzma
import os
from pathlib import Path

from benchmarks.study.training import keep

LEFT_OUT = ("train_loss",)
"""Of each step, in no table or figure, and nine tenths of a run."""


def unpack(file: Path, out: Path) -> int:
    """Runs of ``file`` that ``out`` lacks are put there, and count as made.

    Returns:
        How many.
    """
    if not file.exists():
        return 0
    with lzma.open(file, "rt") as lines:
        records = [json.loads(line) for line in lines]
    missing = [record for record in records if not (out / f"{record['key']}.json").exists()]
    for record in missing:
        keep(record, out)
    return len(missing)


def pack(out: Path, file: Path) -> int:
    """All runs of ``out``, a line each, in the order of their keys: the same runs, the same bytes.

    Returns:
        How many.
    """
    records = [json.loads(path.read_text()) for path in sorted(out.glob("*.json"))]
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")  # a command that is ended leaves the old file
    with lzma.open(part, "wt") as lines:
        for record in records:
            kept = {name: x for name, x in record.items() if name not in LEFT_OUT}
            lines.write(json.dumps(kept, sort_keys=True) + "\n")
    os.replace(part, file)
    return len(records)
