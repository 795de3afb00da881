"""Moments in host memory: the numbers of moments on the device, and copies that never race.

The CPU plays the accelerator, with memory and queues of its own (:mod:`tests.engine.races`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from lowrank_optim import (
    DCTAdamW,
    FrugalAdamW,
    GaLoreAdamW,
    LowRankOptimizer,
    attach_in_backward,
    lowrank_groups,
    methods,
)
from lowrank_optim.engine.state import moving_keys
from lowrank_optim.memory import estimate, report
from lowrank_optim.memory.reporting import staging_bytes
from lowrank_optim.nn import convert
from lowrank_optim.ops import devices, queues
from lowrank_optim.stores import STORES
from tests import cases, runs
from tests.backward import nets
from tests.engine.races import Device
from tests.engine.watch import Watch
from tests.pairwise import in_turns, paired

NAMES = [name for name in cases.method_names() if not name.endswith("8bit")]  # a default alone
SHAPES = (6, 10), (6, 10), (2, 6, 8), (7,)
"""Two that are stepped together, a batch, and one that is not projected."""
STEPS = range(4)
Made = tuple[list[nn.Parameter], LowRankOptimizer]
HOST = {"state_device": "cpu"}


def make(name: str, **options: Any) -> Made:
    generator = torch.Generator().manual_seed(1)
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    return params, cases.build(name, params, rank=3, update_proj_gap=2, **options)


def moments(optimizer: LowRankOptimizer) -> list[Tensor]:
    """All that rests."""
    return [
        optimizer.state[item.param][key]
        for group in optimizer.param_groups
        for item in optimizer._items(group)
        for key in moving_keys(item, optimizer._strategies(group))
        if key in optimizer.state.get(item.param, {})
    ]


def read(device: Device, optimizer: LowRankOptimizer) -> None:
    """The host looks at what is its own, as whoever saves a checkpoint."""
    for x in moments(optimizer):
        device.host(x)


def train(device: Device, made: Made, steps: range = STEPS) -> None:
    for number in steps:
        runs.train(*made, [number])
        read(device, made[1])


def same(a: Made, b: Made) -> None:
    runs.assert_same(a[0], b[0])
    runs.assert_same_state(runs.entries(a[1]), runs.entries(b[1]))


def plain(made: Callable[..., Made], lazy: bool = False, **options: Any) -> Made:
    """A run with the moments on the device."""
    with Device(lazy=lazy) as device:
        found = made(**options)
        train(device, found)
        assert not device.copies and not found[1]._staging.nbytes
    return found


WAYS = [
    (state_dtype, lazy, ("keep", "reset", "project")[(i + lazy) % 3])
    for i, state_dtype in enumerate(STORES)
    for lazy in (False, True)
]


@pytest.mark.parametrize(("name", "way"), in_turns(NAMES, WAYS))
def test_numbers_are_those_of_moments_on_the_device(name: str, way: tuple[str, bool, str]) -> None:
    """To the bit, however the queues of a device take turns; tensors of the host stay the same."""
    state_dtype, lazy, on_refresh = way
    options = {"state_dtype": state_dtype, "on_refresh": on_refresh}
    if name.startswith("LDAdam"):  # it has no other
        options["on_refresh"] = "project"
    expected = plain(make, lazy, name=name, **options)
    with Device(lazy=lazy) as device:
        found = make(name, **options, **HOST)
        train(device, found, STEPS[:2])
        first = moments(found[1])
        train(device, found, STEPS[2:])
        blocks = {id(x) for x in moments(found[1])} != {id(x) for x in first}
        assert not blocks or name.startswith(("Frugal", *cases.WHOLE_LAYERS))
    assert not device.races and not device.stalls
    assert device.copies >= 2 * len(STEPS) * len(first) or blocks
    same(found, expected)


MORE: dict[str, Callable[..., Made]] = {
    "blocks": lambda **own: make("FrugalAdamW", projector="block", **own),
    "blocks-random": lambda **own: make(
        "FrugalAdamW", projector="block", block_order="random", on_refresh="reset", **own
    ),
    "error-feedback": lambda **own: make("DCTAdamW", error_feedback="float32", **own),
    "error-feedback-4bit": lambda **own: make("DCTAdamW", error_feedback="4bit", **own),
    "two-sided": lambda **own: make("FiraAdamW", proj_type="full", on_refresh="project", **own),
    "momentum-none": lambda **own: make("GaLoreSGD", momentum=0.0, **own),
    "maximize": lambda **own: make("GaLoreAdamW", maximize=True, **own),
    "rounded": lambda **own: make(
        "GaLoreAdamW", state_dtype="bfloat16", stochastic_rounding=True, on_refresh="project", **own
    ),
    "pools": lambda **own: make("SwitchLoRAAdamW", interval=2, freeze_steps=1, **own),
    "sst-active": lambda **own: make("SSTAdamW", factors="active", offload_inactive=False, **own),
}


@pytest.mark.parametrize(("kind", "lazy"), in_turns([*MORE], [False, True]))
def test_numbers_of_every_kind_of_state(kind: str, lazy: bool) -> None:
    expected = plain(MORE[kind], lazy)
    with Device(lazy=lazy) as device:
        found = MORE[kind](**HOST)
        train(device, found)
    assert not device.races
    assert (device.copies > 0) == (kind != "momentum-none")
    same(found, expected)


def layers(method: str, **options: Any) -> Made:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 12))
    own = {"steps_per_iteration": 2}
    if method == "switchlora":
        own = {"interval": 2, "freeze_steps": 1}
    groups = convert(model, method, rank=3, **own)
    cls = methods.SwitchLoRAAdamW if method == "switchlora" else methods.SSTAdamW
    return [p for p in model.parameters() if p.requires_grad], cls(groups, lr=1e-2, **options)


@pytest.mark.parametrize("state_dtype", ["float32", "8bit"])
@pytest.mark.parametrize("method", ["sst", "switchlora"])
def test_numbers_of_layers_of_factors(method: str, state_dtype: str) -> None:
    expected = plain(layers, method=method, state_dtype=state_dtype)
    with Device() as device:
        found = layers(method, state_dtype=state_dtype, **HOST)
        train(device, found)
    assert device.copies and not device.races
    runs.assert_same(found[0], expected[0])
    runs.assert_same_state(runs.entries(found[1]), runs.entries(expected[1]))


# ---------------------------------------------------------------- checkpoints and edits


@pytest.mark.parametrize(
    ("name", "state_dtype", "there"),
    paired(["GaLoreAdamW", "DCTAdamW", "SwitchLoRAAdamW"], [*STORES], [None, "cpu"]),
)
def test_a_run_goes_on_with_either_setting(name: str, state_dtype: str, there: str | None) -> None:
    """Through a file, bit for bit; where moments lie is what the run that loads asks for."""
    options: dict[str, Any] = {"state_dtype": state_dtype, "on_refresh": "project"}
    if name == "DCTAdamW":
        options["error_feedback"] = "8bit"
    expected = plain(make, name=name, **options)
    for here in (None, "cpu"):
        if here is there is None:
            continue
        with Device() as device:
            first = make(name, **options, state_device=here)
            train(device, first, STEPS[:2])
            params = runs.copies(first[0])
            fresh = cases.build(name, params, rank=3, update_proj_gap=2, **options)
            fresh.param_groups[0]["state_device"] = there
            runs.resumed(first[1], fresh)
            assert fresh.param_groups[0]["state_device"] == there
            count = device.copies
            train(device, (params, fresh), STEPS[2:])
            assert (device.copies > count) == (there == "cpu")
        assert not device.races
        same((params, fresh), expected)


@pytest.mark.parametrize("projector", ["svd", "block"])
def test_a_state_by_name_goes_to_the_other_setting(projector: str) -> None:
    """As ``torch.distributed.checkpoint`` reads and writes it, idle blocks included."""
    with Device() as device:
        made = []
        for where in ("cpu", None, "cpu"):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 6))
            named = model.named_parameters()
            options = {"density": 0.5, "projector": projector, "state_device": where}
            optimizer = FrugalAdamW(named, update_proj_gap=2, **options)
            if made:
                set_optimizer_state_dict(model, optimizer, get_optimizer_state_dict(*made[-1]))
                model.load_state_dict(made[-1][0].state_dict())
            else:
                train(device, ([*model.parameters()], optimizer), range(3))
            device.forget()
            made.append((model, optimizer))
        before = [runs.entries(optimizer) for _, optimizer in made]
        for other in before[1:]:
            runs.assert_same_state(other, before[0])
        for model, optimizer in made:
            device.forget()
            train(device, ([*model.parameters()], optimizer), range(3, 6))
        same(*[([*model.parameters()], optimizer) for model, optimizer in made[:2]])
        same(*[([*model.parameters()], optimizer) for model, optimizer in made[1:]])


def test_an_edit_of_the_key_is_obeyed_from_the_next_step_on() -> None:
    """To the host and back to the device in mid-run; a pickle, a copy and a new group too."""
    expected = plain(make, name="GaLoreAdamW")
    with Device() as device:
        found = make("GaLoreAdamW")
        for step_, where in enumerate(["cpu", None, "cpu", "cpu"]):
            found[1].param_groups[0]["state_device"] = where
            device.forget()
            count = device.copies
            train(device, found, range(step_, step_ + 1))
            assert (device.copies > count) == (where == "cpu")
        assert not device.races
        same(found, expected)
        params, twin = copy.deepcopy(found)
        train(device, (params, twin), range(4, 5))
        train(device, found, range(4, 5))
        same((params, twin), found)
        one = nn.Parameter(torch.ones(6, 8))
        found[1].add_param_group({"params": [one], "rank": 2, "state_device": None})
        assert [g["state_device"] for g in found[1].param_groups] == ["cpu", None]


@pytest.mark.parametrize("value", ["cuda", "host", torch.device("cpu"), True])
def test_other_places_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="state_device must be one of None, 'cpu', got"):
        make("GaLoreAdamW", state_device=value)


def test_what_no_graph_can_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="capturable=True is not possible: state_device='cpu'"):
        make("GaLoreAdamW", capturable=True, **HOST)
    with pytest.raises(ValueError, match=r"'is_paged'.*state_device='cpu' keeps moments in host"):
        GaLoreAdamW([{"params": [nn.Parameter(torch.ones(4, 8))], "rank": 2, "is_paged": True}])


def test_on_the_host_itself_it_changes_nothing() -> None:
    """A CPU's state is beside its parameter already."""
    found, expected = make("GaLoreAdamW", **HOST), make("GaLoreAdamW")
    for made in (found, expected):
        runs.train(*made, STEPS)
    same(found, expected)
    assert found[1]._staging.nbytes == 0 and report(found[1]).host == 0


# ---------------------------------------------------------------- inside backward


@pytest.mark.parametrize(
    ("mode", "max_norm", "lazy"), paired(["project", "step"], [None, 0.1], [False, True])
)
def test_inside_backward(mode: Any, max_norm: float | None, lazy: bool) -> None:
    """Moments come and go while backward runs; refreshes before a clipped step take them too."""
    made = []
    for where in (None, "cpu"):
        with Device(lazy=lazy) as device:
            model, optimizer = nets.make(
                "GaLoreAdamW", on_refresh="project", update_proj_gap=3, state_device=where
            )
            attach_in_backward(optimizer, mode=mode, max_norm=max_norm)
            for batch in nets.batches(5):
                nets.loss_of(model, batch).backward()
                optimizer.step()
                optimizer.zero_grad()
                read(device, optimizer)
            assert (device.copies > 0) == (where == "cpu") and not device.races
            made.append(([*model.parameters()], optimizer))
    same(*made)


def test_a_single_parameter_is_back_when_its_step_returns() -> None:
    with Device() as device:
        params, optimizer = make("GaLoreAdamW", **HOST)
        for number in range(3):
            runs.set_grads(params, number)
            for param in params:
                optimizer.step_param(param)
                read(device, optimizer)
    assert device.copies and not device.races


def test_a_compiled_step_is_the_same_step() -> None:
    expected = plain(make, name="GaLoreAdamW")
    with Device() as device:
        found = make("GaLoreAdamW", **HOST)
        compiled = torch.compile(lambda: found[1].step(), backend="eager")
        for number in STEPS:
            runs.set_grads(found[0], number)
            compiled()
            read(device, found[1])
    assert device.copies and not device.races
    same(found, expected)


# ---------------------------------------------------------------- what meets what


class Async(queues.AtOnce):
    """Copies that nobody waits for, as of pinned memory."""

    def copy_(self, into: Tensor, source: Tensor) -> None:
        into.copy_(source, non_blocking=True)


@pytest.mark.parametrize("name", ["GaLoreAdamW", "FiraAdamW", "DCTAdamW8bit", "SwitchLoRAAdamW"])
def test_no_op_meets_the_host_s_moments(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host waits no more often in a step, and nothing else copies what rests."""
    monkeypatch.setattr(queues, "beside", lambda device: Async())
    monkeypatch.setattr(queues, "current", lambda device: Async())
    monkeypatch.setattr(devices, "HOST_MEMORY", frozenset())
    looks = []
    for where in (None, "cpu"):
        params, optimizer = make(name, state_device=where, on_refresh="project")
        optimizer._make_state()
        with Watch(optimizer, *(moments(optimizer) if where else [])) as seen:
            for number in range(4):
                with torch._C.DisableTorchFunction():
                    runs.set_grads(params, number)
                optimizer.step()
        looks.append(seen.where)
    assert looks[0] == looks[1]


# ---------------------------------------------------------------- memory


class Model(nn.Module):
    """Alike matrices, a large table, vectors, and a layer apart."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(90, 48)
        self.blocks = nn.ModuleList(nn.Linear(48, 64) for _ in range(3))
        self.down = nn.Linear(64, 48, bias=False)


COUNTED: list[tuple[Any, dict[str, Any]]] = [
    (GaLoreAdamW, {"rank": 8}),
    (GaLoreAdamW, {"rank": 40, "state_dtype": "8bit"}),
    (DCTAdamW, {"rank": 8, "error_feedback": "8bit", "transform": "matmul"}),
    (FrugalAdamW, {"density": 0.5}),
    (methods.SwitchLoRAAdamW, {"rank": 8}),
]


@pytest.mark.parametrize(("counted", "in_backward"), in_turns(COUNTED, [None, "step"]))
def test_memory_is_exact(counted: tuple[Any, dict[str, Any]], in_backward: Any) -> None:
    """Moments count on the host, two buffers on the device, and the sum is that of no setting."""
    model, (cls, options) = Model(), counted
    groups = lambda model: [dict(g) for g in lowrank_groups(model)]  # noqa: E731
    options = {**options, "groups": groups} if cls is GaLoreAdamW else options
    on_gpu = {"in_backward": in_backward, "device": "cuda", **options}
    before, found = estimate(model, cls, **on_gpu), estimate(model, cls, **on_gpu, **HOST)
    own = {k: v for k, v in options.items() if k != "groups"}
    with Device(lazy=True):
        given = groups(model) if "groups" in options else model.named_parameters()
        optimizer = cls(given, **own, **HOST)
        if in_backward:
            attach_in_backward(optimizer, mode="step")
        for _ in range(3):
            loss = sum(p.square().sum() for p in model.parameters())
            assert isinstance(loss, Tensor)
            loss.backward()
            optimizer.step()
        held = report(optimizer)
        resting = sum(x.nbytes for x in moments(optimizer))
    assert (found.basis, found.moments, found.other) == held
    assert (found.host, found.staging) == (held.host, held.staging)
    assert found.state == before.state and found.staging > 0 == before.staging
    assert found.host - before.host == resting > 0
    blocks = found.rounding - before.rounding
    assert found.peak == before.peak - resting + found.staging + blocks
    assert f"{held.host:,} of it in host memory; staging {held.staging:,}" in str(held)


def test_buffers_are_of_the_largest_block() -> None:
    """They never shrink, and the first set has the smaller ones: told before any other came."""
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(32, 64, bias=False))
    own = {"density": 0.5, "update_proj_gap": 1, "block_order": "ascending", **HOST}
    found = estimate(model, FrugalAdamW, device="cuda", transients=False, **own)
    with Device(lazy=True):
        optimizer = FrugalAdamW(model.named_parameters(), **own)
        for _ in range(4):
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            optimizer.step()
        held, told = report(optimizer), staging_bytes(optimizer)
    assert found.staging == held.staging == told == 2 * 2 * 4 * 32 * 64
