"""Steps of tensors without data: what torch's memory tools trace is what a real run does."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from lowrank_optim import GaLoreAdamW, attach_in_backward, memory, methods
from lowrank_optim.ops import quant, quant4
from tests import cases
from tests.compare import assert_close
from tests.oracles import four_bits

SHAPES = [(12, 40), (7,), (3, 8, 24), (24, 24)]
DTYPES = (torch.float32, torch.bfloat16)
VARIANTS: list[tuple[str, str, dict[str, Any]]] = [
    *[
        (name, "svd", {"state_dtype": "8bit"})
        for name in cases.method_names()
        if "8bit" not in name
    ],
    *[(name, "svd", {"state_dtype": "4bit"}) for name in ("GaLoreAdamW", "DCTAdamW")],
    *[(name, "svd", {"state_dtype": "bfloat16"}) for name in ("GaLoreLion", "FiraAdamW")],
    ("DCTAdamW", "dct", {"error_feedback": "4bit"}),
    ("SSTAdamW", "svd", {"factors": "active", "negative": "flip"}),
    ("SSTAdamW", "svd", {"sampling": "mixed", "offload_inactive": True}),
    ("GaLoreAdamW", "svd", {"stochastic_rounding": True, "maximize": True}),
    ("GaLoreAdamW", "rsvd", {"on_refresh": "project"}),
]
KINDS = [
    *[
        (name, projector, {}, dtype)
        for name, projector, dtype in cases.in_turn(cases.pairs(), DTYPES)
    ],
    *[(*variant, DTYPES[i % 2]) for i, variant in enumerate(VARIANTS)],
]


IN_CODES = ("GaLoreAdamW", "GaLoreAdafactor", "SwitchLoRAAdamW")
"""Of moments in a subspace, of means and of factors: one in 8 bits."""


def states(
    name: str, projector: str, options: dict[str, Any], dtype: torch.dtype
) -> list[dict[str, torch.Tensor]]:
    """State of every parameter after some steps, of which the first and the last find bases."""
    params = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]
    own, count = {"on_refresh": "reset", "update_proj_gap": 2}, 3
    if name.startswith(("SST", "Switch", "LDAdam")):
        own, count = {}, 4
    optimizer = cases.build(name, params, **{"projector": projector, **own, **options})
    for _ in range(count):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
    return [optimizer.state[p] for p in params]


def layout(states: list[dict[str, torch.Tensor]]) -> list[dict[str, Any]]:
    """Shape, dtype and device of every entry, and the values of counters."""
    found = []
    for state in states:
        found.append({k: (tuple(x.shape), x.dtype, x.device) for k, x in state.items()})
        for key in ("step", "refresh_step", "clock", "host.iteration"):
            if key in state:
                assert not isinstance(state[key], FakeTensor)
                found[-1][f"value of {key}"] = float(state[key])
    return found


@pytest.mark.parametrize(
    ("name", "projector", "options", "dtype"),
    [
        pytest.param(
            *x,
            marks=pytest.mark.slow
            if cases.is_beyond(*x[:2])
            or x[1] in ("random", "golore", "hadamard", "rows")  # as svd, dct and columns
            or (x[2] == {"state_dtype": "8bit"} and x[0] not in IN_CODES)
            or (x[0].endswith("8bit") and x[0] != "GaLoreAdamW8bit")
            else (),
        )
        for x in KINDS
    ],
    ids=["-".join(map(str, x)) for x in KINDS],
)
def test_a_fake_step_is_a_real_one(
    name: str, projector: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    """Counters count, refreshes come when they are due, and every entry is where it would be."""
    real = states(name, projector, options, dtype)
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(data_ptr|FakeTensor)")
        fake = states(name, projector, options, dtype)
    assert layout(fake) == layout(real)


@pytest.mark.parametrize("name", ["GaLoreAdamW", "GaLoreAdamW8bit", "SSTAdamW", "DCTAdamW"])
def test_the_memory_tracker_of_torch_sees_our_state(name: str) -> None:
    """The bytes it finds in states are those that a real optimizer reports."""

    def trained(tracker: MemTracker | None = None) -> Any:
        model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256))
        optimizer = getattr(methods, name)(model.parameters(), rank=16)
        if tracker is not None:
            tracker.track_external(model, optimizer)
        with tracker or warnings.catch_warnings():
            model(torch.randn(4, 256)).square().mean().backward()
            optimizer.step()
            if tracker is not None:
                return tracker.get_tracker_snapshot("current")
        return memory.report(optimizer).total

    with FakeTensorMode():
        snapshot = trained(MemTracker())
    (counts,) = snapshot.values()
    (kind,) = [k for k in counts if str(k).lower().endswith(("opt", "optstate", "optimizer"))]
    counters = 256  # the tracker rounds every tensor up, counters too, and a report does not
    assert abs(counts[kind] - trained()) <= 32 * counters


@pytest.mark.parametrize("mode", ["project", "step"])
def test_inside_backward(mode: Any) -> None:
    with FakeTensorMode():
        weight = nn.Parameter(torch.randn(32, 64))
        optimizer = GaLoreAdamW([weight], rank=4)
        attach_in_backward(optimizer, mode)
        for _ in range(3):
            (torch.randn(5, 64) @ weight.T).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert float(optimizer.state[weight]["step"]) == 3


def test_tables_are_those_of_real_steps_though_a_fake_one_came_first() -> None:
    """The map of 8-bit codes was made of fake numbers, kept, and used by every step after it."""
    cpu = torch.device("cpu")
    for kept in (quant4.four_bit_map, quant4._pairs, quant4._values, quant.values_of):
        kept.cache_clear()
    with FakeTensorMode():
        weight = nn.Parameter(torch.randn(64, 128))
        optimizer = GaLoreAdamW([{"params": [weight], "rank": None}], state_dtype="4bit")
        for _ in range(2):
            weight.grad = torch.randn_like(weight)
            optimizer.step()
    for signed, own in ((True, four_bits.SIGNED), (False, four_bits.SQUARES)):
        assert_close(quant4.four_bit_map(signed, cpu), own.float())
        assert_close(quant4._pairs(signed, cpu)[18], own[[2, 1]].float())
    tables = {signed: quant.dynamic_map(signed, torch.device("cpu")) for signed in (True, False)}
    quant.dynamic_map.cache_clear()
    quant.values_of.cache_clear()
    with FakeTensorMode():
        weight = nn.Parameter(torch.randn(64, 128))
        weight.grad = torch.randn_like(weight)
        methods.GaLoreAdamW8bit([{"params": [weight], "rank": None}]).step()
    for signed, table in tables.items():
        assert torch.equal(quant.dynamic_map(signed, torch.device("cpu")), table)
