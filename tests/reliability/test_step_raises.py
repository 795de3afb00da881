"""A step runs out of memory before any of its operations: it can be taken again, or left out.

Each operation of torch and of the package fails in its turn, as the dispatcher meets them. Taken
again, the step ends bit for bit where it would have ended at once, whoever had taken it before.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_optim import LowRankOptimizer, methods, ops
from lowrank_optim.engine import step as engine_step
from lowrank_optim.engine.undo import Undo
from lowrank_optim.nn import convert
from lowrank_optim.ops import quant
from tests import cases
from tests.engine.races import Device
from tests.engine.snapshots import everything, same
from tests.logged import Logged
from tests.reliability.injection import Limited, OutOfMemory, Places

SHAPES = [(6, 11), (9, 5), (6, 11), (5,), ()]
"""Two alike, that are stepped as one bucket, one seen transposed, and dense ones."""
GAP = 3

EVERY = [*cases.pairs(), ("SSTAdamW", None), ("SwitchLoRAAdamW", None)]
CHEAP, PARTS = 8, 12
"""Operations that fail of a step, of some hundreds: others in every case; and sizes of memory."""


@pytest.fixture(autouse=True)
def codes_of_small_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Moments of 8 and 4 bits are codes here, small as they are."""
    monkeypatch.setattr(quant, "MIN_SIZE", 20)


def prepared(name: str, projector: str | None, steps: int, **options: Any) -> LowRankOptimizer:
    """Some steps, and the gradients of the next."""
    params = [nn.Parameter(cases.parameter(s, torch.float32, seed=7).detach()) for s in SHAPES]
    own = {} if projector is None else {"projector": projector}
    rank = cases.rank_for(projector, 3)
    groups = [{"params": params[:3], "rank": rank}, {"params": params[3:], "rank": None}]
    optimizer = cases.build(name, groups, **{**own, "weight_decay": 0.1, **options})
    for row in range(steps + 1):
        set_grads(optimizer, row)
        if row < steps:
            optimizer.step()
    return optimizer


def params_of(optimizer: LowRankOptimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def set_grads(optimizer: LowRankOptimizer, row: int, dtype: torch.dtype = torch.float32) -> None:
    for n, param in enumerate(params_of(optimizer)):
        param.grad = cases.gradients(param.shape, 1, dtype, seed=10 * row + n)[0]


def copied(optimizer: LowRankOptimizer) -> LowRankOptimizer:
    new = copy.deepcopy(optimizer)
    for a, b in zip(params_of(optimizer), params_of(new), strict=True):
        assert a.grad is not None
        b.grad = a.grad.clone()
    return new


def operations(base: LowRankOptimizer) -> list[str]:
    new, counting = copied(base), OutOfMemory()
    with counting:
        new.step()
    return counting.names


def at_each_place(base: LowRankOptimizer) -> list[int]:
    """Numbers of operations: of each line of the package, and who called it, one.

    It is that of the first, second, ... matrix or round of a loop in turn: of the 2,000 operations
    that a step of randk has, 1,900 are 20 again.
    """
    new, counting = copied(base), Places()
    with counting:
        new.step()
    found: dict[Hashable, list[int]] = {}
    for at, place in enumerate(counting.places):
        found.setdefault(place, []).append(at)
    return sorted(own[n % len(own)] for n, own in enumerate(found.values()))


def check(base: LowRankOptimizer, numbers: Sequence[int]) -> None:
    """Operations that fail, each in its turn."""
    copied(base).step()  # what is made once a process
    expected = copied(base)
    expected.step()
    wanted = everything(expected)
    assert len(numbers) >= CHEAP
    for at in numbers:
        optimizer, failing = copied(base), OutOfMemory(at)
        with pytest.raises(torch.OutOfMemoryError) as caught, failing:
            optimizer.step()
        optimizer.step()
        assert not same(everything(optimizer), wanted), (at, failing.names[at])
        assert not optimizer._retry.taken
        notes = getattr(caught.value, "__notes__", [])  # none before anything has begun
        assert all("step() again steps these alone" in note for note in notes)


def options_of(name: str, projector: str | None) -> dict[str, Any]:
    if projector is None:
        own = {"interval": 4, "freeze_steps": 1} if "Switch" in name else {}
        return own
    return {"on_refresh": "project"}


@pytest.mark.parametrize(("name", "projector"), cases.params(EVERY))
def test_operations_here_and_there(name: str, projector: str | None) -> None:
    """A step with a refresh; where factors are written, after their weight, each operation."""
    base = prepared(name, projector, GAP, **options_of(name, projector))
    operations(base)  # what is made once a process
    names = operations(base)
    every = max(1, len(names) // CHEAP)
    writes = [n for n, own in enumerate(names) if projector is None and "_foreach_copy_" in own]
    check(base, [*range(sum(map(ord, f"{name}{projector}")) % every, len(names), every), *writes])


STEPS = {"first": 0, "plain": 1, "refresh": GAP}
IN_TURN = [
    (name, projector, extra, when)
    for name, projector in EVERY
    for extra in ({}, {"state_dtype": "8bit"})
    for when in STEPS
    if not (extra and name.endswith("8bit"))  # they are so
] + [(*pair, {"on_refresh": "reset"}, "refresh") for pair in cases.pairs()]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "projector", "extra", "when"), IN_TURN, ids=str)
def test_every_operation(
    name: str, projector: str | None, extra: dict[str, Any], when: str
) -> None:
    base = prepared(name, projector, STEPS[when], **{**options_of(name, projector), **extra})
    copied(base).step()  # what is made once a process
    check(base, at_each_place(base))


@pytest.mark.parametrize("form", ["sst", "switchlora"])
def test_layers_of_factors(form: Any) -> None:
    """Their state is put together from module and optimizer for each step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 6))
    own = {"steps_per_iteration": GAP, "warmup_steps": 1} if form == "sst" else {}
    make = methods.SSTAdamW if form == "sst" else methods.SwitchLoRAAdamW
    optimizer = make(convert(model, form, rank=3), lr=1e-2, **own)
    for _ in range(2):
        model(torch.ones(2, 9)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    model(torch.ones(2, 9)).square().sum().backward()
    before, state = everything(optimizer), copy.deepcopy(optimizer.state_dict())
    counting = OutOfMemory()
    with counting:
        optimizer.step()
    wanted = everything(optimizer)

    def reset() -> None:
        optimizer.load_state_dict(state)
        for n, param in enumerate(params_of(optimizer)):
            param.data.copy_(before[f"{n}"])

    for at in range(len(form), len(counting.names), max(1, len(counting.names) // CHEAP)):
        reset()
        with pytest.raises(torch.OutOfMemoryError), OutOfMemory(at):
            optimizer.step()
        optimizer.step()
        assert not same(everything(optimizer), wanted), (at, counting.names[at])


def test_a_batch_is_left_out_after_a_step_that_raised() -> None:
    """zero_grad(), of the optimizer or by hand: the next batch is stepped by all parameters."""
    base = prepared("GaLoreAdamW", "svd", GAP)
    at = max(n for n, name in enumerate(operations(base)) if "addmm_" in name)
    for by_hand in (False, True):
        optimizer = copied(base)
        with pytest.raises(torch.OutOfMemoryError), OutOfMemory(at):
            optimizer.step()
        stepped = {n for n, own in optimizer.state.items() if own["step"] == GAP + 1}
        assert 0 < len(stepped) < len(SHAPES) and len(optimizer._retry.taken) == len(stepped)
        if by_hand:
            for param in params_of(optimizer):
                param.grad = None
        else:
            optimizer.zero_grad()
        set_grads(optimizer, 9)
        optimizer.step()
        counts = [float(optimizer.state[p]["step"]) for p in params_of(optimizer)]
        assert counts == [GAP + 1 + (p in stepped) for p in params_of(optimizer)]


def test_a_block_without_a_gradient_switches_as_a_step_is_taken_again() -> None:
    """All blocks that have one had taken the step: nobody began it for the others any more."""
    shapes = [(6, 9), (8, 5), (5,)]
    params = [nn.Parameter(cases.parameter(s, torch.float32).detach()) for s in shapes]
    groups = [{"params": params[:2], "rank": 0.5}, {"params": params[2:], "rank": None}]
    base = cases.build("FrugalAdamW", groups, projector="block", update_proj_gap=1)
    for row in range(4):
        set_grads(base, row)
        base.step()
    for row in range(4, 6):  # its turn may begin, or end
        set_grads(base, row)
        grads = [p.grad for p in params]
        params[0].grad = None

        def ready(grads: list[Tensor | None] = grads) -> LowRankOptimizer:
            new = copy.deepcopy(base)
            for param, grad in zip(params_of(new)[1:], grads[1:], strict=True):
                param.grad = grad
            return new

        counting, wanted, again = OutOfMemory(), ready(), ready()
        with counting:
            wanted.step()
        with pytest.raises(torch.OutOfMemoryError), OutOfMemory(len(counting.names) - 1):
            again.step()
        again.step()
        assert not same(everything(again), everything(wanted)), row
        params[0].grad = grads[0]
        base.step()


def test_a_first_step_makes_all_state_or_none() -> None:
    """Memory ran out as it was made: what had no gradient got none when the step was taken again.

    A later step, with that gradient, had to find room for it, and a checkpoint was without it.
    """
    params = [nn.Parameter(cases.parameter(s, torch.float32).detach()) for s in [(6, 9), (5,)]]
    groups = [{"params": params[:1], "rank": 3}, {"params": params[1:], "rank": None}]

    def ready() -> LowRankOptimizer:
        new = copy.deepcopy(cases.build("GaLoreAdamW", groups, projector="rows"))
        own = params_of(new)
        own[1].grad = torch.ones_like(own[1])
        return new

    wanted, complete, at = ready(), False, 0
    wanted.step()
    assert all(wanted.state[p] for p in params_of(wanted))
    while not complete:
        again = ready()
        with pytest.raises(torch.OutOfMemoryError), OutOfMemory(at):
            again.step()
        complete = len(again.state) == len(params_of(again))
        again.step()
        assert not same(everything(again), everything(wanted)), at
        at += 2
    assert at > 6


def test_gradients_that_were_changed_are_a_new_batch() -> None:
    """In place too: whoever took the step takes another."""
    optimizer = copied(prepared("GaLoreAdamW", "svd", 1))
    last = len(operations(optimizer)) - 2
    with pytest.raises(torch.OutOfMemoryError), OutOfMemory(last):
        optimizer.step()
    assert optimizer._retry.taken
    for param in params_of(optimizer):
        param.grad.mul_(0.5)
    optimizer.step()
    steps = [float(optimizer.state[p]["step"]) for p in params_of(optimizer)]
    assert max(steps) == 3 and min(steps) == 2


def test_what_is_too_large_to_be_copied_is_named(logged: Logged) -> None:
    """A dense embedding and a matrix: torch steps the one in several operations."""
    params = [nn.Parameter(torch.ones(300, 300)), nn.Parameter(torch.ones(8, 8))]
    groups = [{"params": [("embed", params[0])], "rank": None}, {"params": [("w", params[1])]}]
    optimizer = cases.build("GaLoreAdamW", groups)
    for param in params:
        param.grad = torch.ones(param.shape)
    base = copied(optimizer)
    operations(base)  # what is made once a process
    names = operations(base)
    partly = []
    for at in range(len(names)):
        new = copied(base)
        with pytest.raises(torch.OutOfMemoryError) as caught, OutOfMemory(at):
            new.step()
        notes = getattr(caught.value, "__notes__", [])
        assert all("w may" not in note for note in notes)
        if any("embed may have been stepped in part" in note for note in notes):
            partly.append(at)
            new.step()
            (record,) = logged.records
            assert "may have stepped embed in part" in record.getMessage()
            logged.clear()
            new.step()
            assert not logged.records
            continue
        embed = params_of(new)[0]
        stepped = float(new.state.get(embed, {}).get("step", 0)) == 1
        assert stepped or embed.eq(1).all()
    assert 3 < len(partly) < len(names) // 2


FORMATS: list[dict[str, Any]] = [{}, *({"state_dtype": x} for x in ("8bit", "bfloat16", "4bit"))]
LARGE = [
    (name, {**options, **turned}, dtype, accelerated)
    for name in ("GaLoreAdamW", "GaLoreLion", "GaLoreSGD", "GaLoreAdafactor")
    for options in FORMATS
    for turned in ({}, {"maximize": True})
    for dtype in (torch.float32, torch.bfloat16)
    for accelerated in (False, True)
]
SOME_LARGE = [
    ("GaLoreAdamW", {}, torch.float32, False),
    ("GaLoreAdamW", {}, torch.float32, True),
    ("GaLoreAdamW", {"state_dtype": "bfloat16", "maximize": True}, torch.float32, True),
    ("GaLoreAdamW", {"state_dtype": "4bit"}, torch.float32, True),
    ("GaLoreAdafactor", {}, torch.float32, True),
]
"""Torch's own step, and tiles without and with moments that are copied to be read; and no tiles."""
LARGE_SHAPES = [(300, 256), (250, 300), (70000,)]
"""Of whole blocks of codes, of blocks that are filled up, and in one piece."""


@pytest.mark.parametrize(
    ("shape", "name", "options", "dtype", "accelerated"),
    [
        pytest.param(
            shape,
            *x,
            marks=() if x in SOME_LARGE and shape == LARGE_SHAPES[0] else pytest.mark.slow,
        )
        for x in LARGE
        for shape in LARGE_SHAPES
    ],
)
def test_a_large_dense_parameter_has_its_memory_before_it_is_written(
    shape: tuple[int, ...],
    name: str,
    options: dict[str, Any],
    dtype: torch.dtype,
    accelerated: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever the memory that is left, it takes a step or none: nothing of it was copied.

    It ran out between moments and weights before. Tiles are small here, so that there are some.
    """
    if accelerated:
        cases.branching(monkeypatch, lambda _: True)
    for key in ("TILE_ELEMENTS", "ACCELERATOR_TILE_ELEMENTS"):
        monkeypatch.setattr(ops.tiles, key, 1 << 15)
    param = nn.Parameter(cases.parameter(shape, dtype).detach())
    if name == "GaLoreAdafactor" and "state_dtype" in options:
        options = {**options, "beta1": 0.9}  # squares alone have next to no moments
    base = cases.build(name, [{"params": [param], "rank": None}], weight_decay=0.1, **options)
    for row in range(2):
        set_grads(base, row, dtype)
        base.step()
    wanted = copied(base)
    wanted.step()

    def there(optimizer: LowRankOptimizer) -> list[Tensor]:
        (own,) = params_of(optimizer)
        assert own.grad is not None
        return [own, own.grad, *optimizer.state[own].values()]

    free = copied(base)
    with Limited(1 << 40, there(free)) as most:
        free.step()
    short = 0
    for part in range(PARTS):
        new = copied(base)
        with Limited(most.most * part // PARTS, there(new)):
            try:
                new.step()
            except torch.OutOfMemoryError as error:
                short += 1
                notes = " ".join(getattr(error, "__notes__", []))
                assert "stepped in part" not in notes
        if params_of(new)[0].eq(params_of(base)[0]).all():
            assert not same(everything(new), everything(base)), part
            new.step()
        assert not same(everything(new), everything(wanted)), part
    assert short > PARTS // 2


ON_ACCELERATORS: list[tuple[str, str | None, dict[str, Any], torch.dtype]] = [
    ("GaLoreAdamW", "random", {"state_dtype": "bfloat16"}, torch.float32),
    ("GaLoreAdamW", "svd", {"stochastic_rounding": True}, torch.bfloat16),
    ("FiraAdamW", "svd", {}, torch.bfloat16),
    *(
        (name, projector, options, dtype)
        for name, projector in [*cases.pairs(), ("SSTAdamW", None), ("SwitchLoRAAdamW", None)]
        for options in ({}, {"state_dtype": "4bit"})
        for dtype in (torch.float32, torch.bfloat16)
        if projector != "block"  # stepped as dense parameters are
    ),
    ("DCTAdamW", "dct", {"error_feedback": "float32"}, torch.float32),
    ("DCTAdamW", "dct", {"error_feedback": "8bit"}, torch.bfloat16),
]


@pytest.mark.parametrize(
    ("name", "projector", "options", "dtype", "when"),
    [
        pytest.param(*x, when, marks=() if n == at else pytest.mark.slow)
        for at, when in enumerate(["first", "resumed", "later"])
        for n, x in enumerate(ON_ACCELERATORS)
    ],
)
def test_a_bucket_has_its_memory_before_it_is_written(
    name: str,
    projector: str | None,
    options: dict[str, Any],
    dtype: torch.dtype,
    when: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On an accelerator, whose moments are not copied: whatever is left, it steps or it does not.

    A copy knows as little of the memory that steps take as an optimizer that resumes a run.
    """
    cases.branching(monkeypatch, lambda _: True)
    params = [nn.Parameter(cases.parameter((24, 40), dtype, seed=n).detach()) for n in range(2)]
    own = {} if projector is None else {"projector": projector}
    groups = [{"params": params, "rank": cases.rank_for(projector, 6)}]
    base = cases.build(name, groups, **{"weight_decay": 0.1, **own, **options})
    set_grads(base, 0, dtype)
    if when != "first":
        base.step()

    def ready() -> LowRankOptimizer:
        new = copied(base)
        set_grads(new, 1, dtype)
        if when == "later":
            new.step()
            set_grads(new, 2, dtype)
        return new

    def there(optimizer: LowRankOptimizer) -> list[Tensor]:
        states = [x for state in optimizer.state.values() for x in state.values()]
        return [*(x for p in params_of(optimizer) for x in (p, p.grad) if x is not None), *states]

    wanted = ready()
    with Limited(1 << 40, there(wanted)) as most:
        wanted.step()
    short = 0
    for part in range(PARTS):
        new = ready()
        before = everything(new)
        with Limited(most.most * part // PARTS, there(new)):
            try:
                new.step()
            except torch.OutOfMemoryError as error:
                short += 1
                notes = " ".join(getattr(error, "__notes__", []))
                assert "stepped in part" not in notes, part
        if not same(everything(new), everything(wanted)):
            continue
        found = everything(new)  # the state of a first step may have been made
        assert not same({key: found[key] for key in before}, before), part
        new.step()
        assert not same(everything(new), everything(wanted)), part
    assert short > PARTS // 2


@pytest.mark.parametrize("accelerated", [False, True], ids=["cpu", "accelerator"])
def test_a_copy_counts_once_it_is_made(accelerated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several formats, which an accelerator copies as words; until then nothing is put back."""
    if accelerated:
        cases.branching(monkeypatch, lambda _: True)
    start = {
        "low.exp_avg": torch.randn(3, 4),
        "low.exp_avg_sq": torch.rand(3, 4).bfloat16(),
        "low.codes": torch.randint(1, 255, (3, 4), dtype=torch.uint8),
        "odd": torch.randint(1, 255, (3,), dtype=torch.uint8),
        "host.order": torch.arange(1, 4),
    }

    def keeps(at: int) -> list[str]:
        state = {key: x.clone() for key, x in start.items()}
        counting = OutOfMemory(at)
        with pytest.raises(torch.OutOfMemoryError), Undo() as undo:
            undo.begin(state)
            with counting:
                undo.keep_all([state], state)
            for x in state.values():
                x.zero_()
            raise torch.OutOfMemoryError
        assert all(torch.equal(state[key], x) for key, x in start.items()), counting.names[at]
        return counting.names

    names = keeps(-1)
    assert len({str(x.dtype) for x in start.values()}) <= len(names)
    for at in range(len(names)):
        keeps(at)


@pytest.mark.parametrize("state_device", [None, "cpu"])
def test_moments_that_rest_on_the_host_are_not_stepped_in_part(
    state_device: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An accelerator does not copy its moments before it writes them: the note names them."""
    base = prepared("GaLoreAdamW", "svd", GAP, state_device=state_device)

    real, calls = engine_step.prepared, []

    def fails(*args: Any) -> Any:
        calls.append(args)
        if len(calls) > 1:  # the first rehearses
            raise torch.OutOfMemoryError
        return real(*args)

    with Device(lazy=True):
        optimizer = copied(base)
        before = everything(optimizer)
        with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError) as caught:
            patch.setattr(engine_step, "prepared", fails)
            optimizer.step()
        notes = " ".join(caught.value.__notes__)
        assert ("stepped in part" in notes) == (state_device is None)
        if state_device is not None:
            assert not same(everything(optimizer), before)
