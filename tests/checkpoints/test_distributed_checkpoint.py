"""``torch.distributed.checkpoint``: plain, flattened, on disk, then a run that goes on exactly."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from lowrank_optim import (
    DCTAdamW,
    DCTAdamW8bit,
    FiraAdamW,
    FrugalAdamW,
    FrugalLion,
    FrugalSGD,
    GaLoreAdafactor,
    GaLoreAdamW,
    GaLoreAdamW8bit,
    GaLoreLion,
    GaLoreSGD,
    SSTAdamW,
    SSTAdamW8bit,
    SwitchLoRAAdamW,
    SwitchLoRAAdamW8bit,
    lowrank_groups,
)
from lowrank_optim.checkpoints.loaders import hold_blocks
from lowrank_optim.ops import quant
from lowrank_optim.optimizer import LowRankOptimizer
from tests import runs
from tests.pairwise import in_turns

SAVED, STEPS = 4, 9  # with a gap of 3: between refreshes, and two refreshes after
METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "adamw": (GaLoreAdamW, {}),
    "adamw bfloat16": (GaLoreAdamW, {"state_dtype": "bfloat16", "stochastic_rounding": True}),
    "adamw 8bit": (GaLoreAdamW8bit, {}),
    "lion": (GaLoreLion, {}),
    "lion 8bit": (GaLoreLion, {"state_dtype": "8bit"}),
    "sgd": (GaLoreSGD, {"momentum": 0.9}),
    "adafactor": (GaLoreAdafactor, {"beta1": 0.9}),
    "fira": (FiraAdamW, {}),
    "frugal columns": (FrugalAdamW, {"projector": "columns"}),
    "frugal rows 8bit": (FrugalLion, {"projector": "rows", "state_dtype": "8bit"}),
    "frugal randk": (FrugalAdamW, {"projector": "randk", "on_refresh": "project"}),
    "frugal svd": (FrugalSGD, {"projector": "svd", "momentum": 0.9}),
    "dct": (DCTAdamW, {"projector": "dct", "error_feedback": "4bit"}),
    "dct 8bit": (DCTAdamW8bit, {"projector": "dct", "transform": "fft", "error_feedback": "8bit"}),
    "hadamard": (GaLoreAdamW, {"projector": "hadamard", "on_refresh": "project"}),
    "sst": (SSTAdamW, {"steps_per_iteration": 3, "iterations_per_round": 2}),
    "sst active 8bit": (SSTAdamW8bit, {"steps_per_iteration": 3, "factors": "active"}),
    "switchlora": (SwitchLoRAAdamW, {"interval": 4, "freeze_steps": 2}),
    "switchlora 8bit": (SwitchLoRAAdamW8bit, {"interval": 4, "freeze_steps": 2}),
}


def make(method: str, seed: int) -> tuple[nn.Module, LowRankOptimizer]:
    """A model with every group there can be, weights by ``seed``."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(20, 12), nn.LayerNorm(12), nn.Linear(12, 9))
    cls, options = METHODS[method]
    options = dict(options)
    groups = lowrank_groups(
        model,
        rank=3,
        projector=options.pop("projector", "rsvd"),
        overrides={"2": {"rank": 0.5, "proj_type": "full", "_tags": ["late", "head"]}},
        no_decay="bias",
    )
    return model, cls(groups, lr=0.05, update_proj_gap=3, **options)


def round_trip(
    source: tuple[nn.Module, LowRankOptimizer],
    target: tuple[nn.Module, LowRankOptimizer],
    flat: bool,
    path: Path | None,
    **planner: Any,
) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    theirs = get_optimizer_state_dict(*source, options=options)
    if path is not None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.save({"o": theirs}, checkpoint_id=path)
            target_state = {"o": get_optimizer_state_dict(*target, options=options)}
            dcp.load(target_state, checkpoint_id=path, **planner)
        theirs = target_state["o"]
    set_optimizer_state_dict(*target, optim_state_dict=theirs, options=options)
    target[0].load_state_dict(source[0].state_dict())


@pytest.mark.parametrize(
    ("method", "way"),
    in_turns([*METHODS], [(False, False), (True, True), (False, True), (True, False)]),
)
def test_run_goes_on_exactly(
    method: str, way: tuple[bool, bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """State, groups and weights, into a model of other weights and an optimizer without state."""
    flat, disk = way
    monkeypatch.setattr(quant, "MIN_SIZE", 30)  # some moments in codes, some too small for them
    model, optimizer = make(method, seed=0)
    runs.train(list(model.parameters()), optimizer, range(SAVED))
    twin, resumed = make(method, seed=1)
    round_trip((model, optimizer), (twin, resumed), flat, tmp_path if disk else None)
    runs.assert_same_state(runs.entries(resumed), runs.entries(optimizer))
    mine = [dict(g, params=None) for g in optimizer.param_groups]
    theirs = [dict(g, params=None) for g in resumed.param_groups]
    for ours, read in zip(mine, theirs, strict=True):
        assert {k: read[k] for k in ours} == ours
    runs.train(list(model.parameters()), optimizer, range(SAVED, STEPS))
    runs.train(list(twin.parameters()), resumed, range(SAVED, STEPS))
    runs.assert_same(twin.parameters(), model.parameters())
    runs.assert_same_state(runs.entries(resumed), runs.entries(optimizer))


def beyond_float32() -> tuple[nn.Module, LowRankOptimizer]:
    """A run whose counters are no float32."""
    model, optimizer = make("adamw", seed=0)
    runs.train(list(model.parameters()), optimizer, range(SAVED))
    saved = optimizer.state_dict()
    for state in saved["state"].values():
        for key in state.keys() & {"step", "refresh_step"}:
            state[key] = state[key].double() + 2**24 - 1  # a multiple of the gap
    optimizer.load_state_dict(saved)
    return model, optimizer


@pytest.mark.parametrize("steps", [0, 2], ids=["new", "stepped"])
@pytest.mark.parametrize("flat", [False, True])
def test_a_run_beyond_float32_counts_goes_on_exactly(
    flat: bool, steps: int, tmp_path: Path
) -> None:
    """The reader of files fills in what an optimizer has, and 2^24 + 1 is no float32."""
    model, optimizer = beyond_float32()
    twin, resumed = make("adamw", seed=1)
    runs.train(list(twin.parameters()), resumed, range(steps))
    round_trip((model, optimizer), (twin, resumed), flat, tmp_path)
    runs.assert_same_state(runs.entries(resumed), runs.entries(optimizer))
    assert {float(own["step"]) for own in resumed.state.values()} == {2**24 - 1 + SAVED}


@pytest.mark.parametrize("whole", [False, True], ids=["its state", "the optimizer"])
def test_counts_that_a_reader_of_files_rounded_are_refused(whole: bool, tmp_path: Path) -> None:
    """Of an optimizer as it is dcp asks itself, and gets places for any number."""
    _model, optimizer = beyond_float32()
    twin, resumed = make("adamw", seed=1)
    runs.train(list(twin.parameters()), resumed, range(2))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.save({"o": optimizer}, checkpoint_id=tmp_path)
        if whole:
            dcp.load({"o": resumed}, checkpoint_id=tmp_path)
            runs.assert_same_state(runs.entries(resumed), runs.entries(optimizer))
            return
        template = resumed.state_dict()
        dcp.load({"o": template}, checkpoint_id=tmp_path)
    before = runs.entries(resumed)
    with pytest.raises(ValueError, match="in float32, which has no number beside it"):
        resumed.load_state_dict(template)
    runs.assert_same_state(runs.entries(resumed), before)


def test_the_loaders_own_first_step_changes_no_weight() -> None:
    """Loaders make the state by one step with zero gradients at lr = 0 (torchtitan does too)."""
    model, optimizer = make("adamw", seed=0)
    before = [p.detach().clone() for p in model.parameters()]
    get_optimizer_state_dict(model, optimizer)
    assert all(p in optimizer.state for p in model.parameters())
    runs.assert_same(model.parameters(), before)
    assert optimizer.param_groups[0]["lr"] == 0.05


def test_a_run_that_starts_after_the_loaders_step_still_takes_its_first_basis() -> None:
    """The zero gradient of that step says nothing about a basis: the refresh is only postponed."""
    model, optimizer = make("adamw", seed=0)
    get_optimizer_state_dict(model, optimizer)
    runs.train(list(model.parameters()), optimizer, [0])
    basis = optimizer.state[model[0].weight]["basis"]
    torch.testing.assert_close(basis.mT @ basis, torch.eye(3))


@pytest.mark.parametrize("flat", [False, True])
def test_parameters_in_another_order_are_read_by_name(flat: bool) -> None:
    """Names of the groups stay in this optimizer's order: torch brings those of the checkpoint."""
    torch.manual_seed(0)
    model, twin = (nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 9)) for _ in range(2))
    optimizer = GaLoreAdamW(model.named_parameters(), rank=3)
    runs.train(list(model.parameters()), optimizer, range(2))
    names = [name for name, _ in model.named_parameters()][::-1]
    params = dict(twin.named_parameters())
    resumed = GaLoreAdamW([(name, params[name]) for name in names], rank=3)
    round_trip((model, optimizer), (twin, resumed), flat, None)
    assert resumed.param_groups[0]["param_names"] == names
    for name, param in model.named_parameters():
        for key, x in optimizer.state[param].items():
            assert torch.equal(x, resumed.state[params[name]][key]), (name, key)


@pytest.mark.parametrize("flat", [False, True])
def test_a_checkpoint_of_another_rank_is_refused(flat: bool) -> None:
    model = nn.Linear(20, 12)
    optimizer = GaLoreAdamW(model.named_parameters(), rank=3)
    runs.train(list(model.parameters()), optimizer, range(2))
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    other = GaLoreAdamW(model.named_parameters(), rank=2)
    with pytest.raises(ValueError, match=r"fit weight in .*: rank is 3 there and 2 here"):
        set_optimizer_state_dict(model, other, state, options=options)


flattened = pytest.param(
    True,
    marks=pytest.mark.xfail(
        torch.__version__.startswith("2.6."),
        raises=KeyError,
        strict=True,
        reason="torch 2.6 raises where a flattened state lacks an entry that the optimizer has",
    ),
)
"""Of checkpoints whose optimizer had others."""


@pytest.mark.parametrize("flat", [False, flattened])
def test_a_run_without_momentum_loads_where_there_is_some(flat: bool) -> None:
    """The checkpoint's hyper-parameters win, flattened or not.

    For a key that a flattened checkpoint lacks, torch puts an empty dict in the state.
    """
    torch.manual_seed(0)
    model, twin = nn.Linear(20, 12), nn.Linear(20, 12)
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    optimizer = GaLoreSGD(model.named_parameters(), rank=3, lr=0.05)
    runs.train(list(model.parameters()), optimizer, range(2))
    resumed = GaLoreSGD(twin.named_parameters(), rank=3, lr=0.05, momentum=0.9)
    twin.load_state_dict(model.state_dict())
    state = get_optimizer_state_dict(model, optimizer, options=options)
    set_optimizer_state_dict(twin, resumed, state, options=options)
    assert resumed.param_groups[0]["momentum"] == 0.0
    runs.train(list(model.parameters()), optimizer, range(2, 5))
    runs.train(list(twin.parameters()), resumed, range(2, 5))
    runs.assert_same(twin.parameters(), model.parameters())


FORMATS = {"float32": GaLoreAdamW, "8bit": GaLoreAdamW8bit}


@pytest.mark.parametrize(
    ("saved", "flat"),
    [
        ("float32", False),
        pytest.param("float32", True, marks=flattened.marks),
        ("8bit", False),
        ("8bit", True),
    ],
)
def test_the_format_of_moments_is_the_checkpoints(saved: str, flat: bool) -> None:
    """As any hyper-parameter of a group: no bit of a moment is lost.

    Flattened, torch drops what the optimizer has no key for, so that codes come without scales.
    """
    other = next(k for k in FORMATS if k != saved)
    model, twin = nn.Linear(20, 300), nn.Linear(20, 300)
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    optimizer = FORMATS[saved]([{"params": [*model.parameters()], "rank": None}])
    runs.train(list(model.parameters()), optimizer, range(2))
    resumed = FORMATS[other]([{"params": [*twin.parameters()], "rank": None}])
    state = get_optimizer_state_dict(model, optimizer, options=options)
    if flat and saved == "8bit":
        message = "does not fit parameter 0 .* exp_avg is codes without scales there and 8bit here"
        with pytest.raises(ValueError, match=message):
            set_optimizer_state_dict(twin, resumed, state, options=options)
        return
    set_optimizer_state_dict(twin, resumed, state, options=options)
    assert resumed.param_groups[0]["state_dtype"] == saved
    runs.assert_same_state(runs.entries(resumed), runs.entries(optimizer))


@pytest.mark.parametrize("saved", FORMATS)
def test_a_format_that_groups_do_not_tell_is_refused(saved: str) -> None:
    """The parameter, the moment and both formats are named, and nothing changes.

    So a checkpoint of ``torch.optim.AdamW``, whose groups have no ``state_dtype``, and one whose
    ``state_dtype`` was edited. Once the message only listed the keys of both states.
    """
    other = next(k for k in FORMATS if k != saved)
    model = nn.Linear(20, 300)
    params = [*model.parameters()]
    optimizer = FORMATS[saved]([{"params": [*model.named_parameters()], "rank": None}])
    runs.train(params, optimizer, range(2))
    state = optimizer.state_dict()
    del state["param_groups"][0]["state_dtype"]
    resumed = FORMATS[other]([{"params": [*model.named_parameters()], "rank": None}])
    runs.train(params, resumed, range(1))
    before = runs.entries(resumed)
    message = rf"does not fit weight in .*: format of exp_avg is {saved} there and {other} here"
    with pytest.raises(ValueError, match=message):
        resumed.load_state_dict(state)
    runs.assert_same_state(runs.entries(resumed), before)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("saved", FORMATS)
def test_on_disk_another_format_is_refused(saved: str, flat: bool, tmp_path: Path) -> None:
    """What is read goes by the tensors that the optimizer has: codes never pass for floats.

    torch finds no scales in a float32 checkpoint; of one in 8 bits the groups say what the state
    should be.
    """
    other = next(k for k in FORMATS if k != saved)
    model, twin = nn.Linear(20, 300), nn.Linear(20, 300)
    optimizer = FORMATS[saved]([{"params": [*model.parameters()], "rank": None}])
    runs.train(list(model.parameters()), optimizer, range(2))
    resumed = FORMATS[other]([{"params": [*twin.parameters()], "rank": None}])
    if saved == "float32":
        with pytest.raises(CheckpointException, match=r"exp_avg_sq_scale|exp_avg_scale"):
            round_trip((model, optimizer), (twin, resumed), flat, tmp_path)
    else:
        message = "does not fit parameter 0 .* exp_avg is float32 there and 8bit here"
        with pytest.raises(ValueError, match=message):
            round_trip((model, optimizer), (twin, resumed), flat, tmp_path)


def blocks(seed: int, **options: Any) -> tuple[nn.Module, LowRankOptimizer]:
    """Four matrices of which two have moments, for three steps at a time."""
    torch.manual_seed(seed)
    model = nn.Sequential(*(nn.Linear(9, 9) for _ in range(4)))
    groups = lowrank_groups(model, density=0.5)
    own = {"update_proj_gap": 3, "block_order": "ascending", **options}
    return model, FrugalAdamW(groups, lr=0.05, **own)


def active(model: nn.Module, optimizer: LowRankOptimizer) -> list[bool]:
    return ["exp_avg" in optimizer.state[layer.weight] for layer in model]


@pytest.mark.parametrize("dtype", ["float32", "8bit"])
@pytest.mark.parametrize("flat", [False, True])
def test_on_disk_blocks_of_any_age_are_read(
    flat: bool, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint whose active blocks are not the first: all entries are made, some stay zeros.

    The reader fills in what the optimizer has, and a fresh one has moments of the first blocks
    alone: it found none of the checkpoint's, and missed two that it looked for.
    """
    monkeypatch.setattr(quant, "MIN_SIZE", 30)
    model, optimizer = blocks(0, state_dtype=dtype)
    runs.train(list(model.parameters()), optimizer, range(SAVED))
    assert active(model, optimizer) == [False, False, True, True]
    twin, resumed = blocks(1, state_dtype=dtype)
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    theirs = get_optimizer_state_dict(model, optimizer, options=options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.save({"o": theirs}, checkpoint_id=tmp_path)
        get_optimizer_state_dict(twin, resumed, options=options)  # makes the state
        assert active(twin, resumed) == [True, True, False, False]
        hold_blocks(resumed)
        state = {"o": get_optimizer_state_dict(twin, resumed, options=options)}
        dcp.load(
            state,
            checkpoint_id=tmp_path,
            planner=DefaultLoadPlanner(allow_partial_load=True),
        )
    set_optimizer_state_dict(twin, resumed, optim_state_dict=state["o"], options=options)
    twin.load_state_dict(model.state_dict())
    for step in range(SAVED, STEPS):
        runs.train(list(model.parameters()), optimizer, [step])
        runs.train(list(twin.parameters()), resumed, [step])
        runs.assert_same(twin.parameters(), model.parameters())
        runs.assert_same_state(runs.entries(resumed), runs.entries(optimizer))


@pytest.mark.parametrize("flat", [False, True])
def test_on_disk_blocks_without_their_moments_are_refused(flat: bool, tmp_path: Path) -> None:
    """Not made, and the reader says what it misses; nor passed over, where that is allowed.

    A partial load without room for the moments lost them in silence: the blocks began again.
    """
    model, optimizer = blocks(0)
    runs.train(list(model.parameters()), optimizer, range(SAVED))
    with pytest.raises(CheckpointException, match=r"exp_avg"):
        round_trip((model, optimizer), blocks(1), flat, tmp_path / "whole")
    twin, resumed = blocks(1)
    planner = DefaultLoadPlanner(allow_partial_load=True)
    with pytest.raises(ValueError, match=r"not fit 2.weight in FrugalAdamW: state is.*hold_blocks"):
        round_trip((model, optimizer), (twin, resumed), flat, tmp_path / "part", planner=planner)


@pytest.mark.parametrize("flat", [False, flattened])
def test_in_memory_blocks_of_any_age_are_read(flat: bool) -> None:
    """Nothing to prepare, unless torch reads by the entries that the optimizer has: flattened."""
    model, optimizer = blocks(0)
    runs.train(list(model.parameters()), optimizer, range(SAVED))
    twin, resumed = blocks(1)
    if flat:
        with pytest.raises(
            ValueError, match=r"not fit 2.weight in FrugalAdamW: state is.*hold_blocks"
        ):
            round_trip((model, optimizer), (twin, resumed), flat, None)
        hold_blocks(resumed)
    round_trip((model, optimizer), (twin, resumed), flat, None)
    assert active(twin, resumed) == [False, False, True, True]
    runs.train(list(model.parameters()), optimizer, range(SAVED, STEPS))
    runs.train(list(twin.parameters()), resumed, range(SAVED, STEPS))
    runs.assert_same(twin.parameters(), model.parameters())
    runs.assert_same_state(runs.entries(resumed), runs.entries(optimizer))


def test_a_whole_state_leaves_no_moments_of_the_optimizer_that_reads_it() -> None:
    """An idle block begins its turn from zeros, not from what it had learnt in another run.

    Of a whole state torch's loader keeps what the optimizer has and the checkpoint has not.
    """
    whole = StateDictOptions(full_state_dict=True)
    model, optimizer = blocks(0)
    runs.train(list(model.parameters()), optimizer, range(SAVED))
    twin, resumed = blocks(1)
    runs.train(list(twin.parameters()), resumed, range(2))
    assert active(twin, resumed) == [True, True, False, False]
    state = get_optimizer_state_dict(model, optimizer, options=whole)
    set_optimizer_state_dict(twin, resumed, state, options=whole)
    twin.load_state_dict(model.state_dict())
    assert active(twin, resumed) == [False, False, True, True]
    runs.train(list(model.parameters()), optimizer, range(SAVED, STEPS))
    runs.train(list(twin.parameters()), resumed, range(SAVED, STEPS))
    runs.assert_same(twin.parameters(), model.parameters())
    runs.assert_same_state(runs.entries(resumed), runs.entries(optimizer))
