"""A step that raises leaves everything as it was, and can be taken again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lowrank_optim import GaLoreAdamW, LowRankOptimizer, ops
from lowrank_optim.nn import convert
from tests import cases
from tests.engine.snapshots import everything, same
from tests.pairwise import in_turns

GAP = 3
"""Of :func:`cases.build`: the step after this many refreshes, moves moments and then steps."""


def prepared(name: str, projector: str, steps: int, **options: Any) -> LowRankOptimizer:
    """One matrix after a number of steps, with the gradient of the next."""
    weight = nn.Parameter(cases.gradients((6, 11), 1, seed=9, dtype=torch.float32)[0])
    own = {"projector": projector, "on_refresh": "project", **options}
    optimizer = cases.build(name, [weight], **own)
    grads = cases.gradients((6, 11), steps + 1, dtype=torch.float32)
    for grad in grads[:-1]:
        weight.grad = grad
        optimizer.step()
    weight.grad = grads[-1]
    return optimizer


class Fault(Exception):
    """Raised on purpose."""


def patched(monkeypatch: pytest.MonkeyPatch, on_call: Callable[[str], None]) -> None:
    """Let every op that a step calls tell, before it runs."""

    def telling(name: str, op: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            on_call(name)
            return op(*args, **kwargs)

        return call

    for name, op in vars(ops).items():
        if callable(op) and not isinstance(op, type) and not name.startswith("_"):
            monkeypatch.setattr(ops, name, telling(name, op))


METHODS = [
    *[(name, projector, {}) for name, projector in cases.pairs() if projector != "block"],
    *[(name, "svd", {}) for name in ("SSTAdamW", "SwitchLoRAAdamW", "SSTAdamW8bit")],
    ("SSTAdamW", "svd", {"negative": "flip", "factors": "active"}),
    ("SwitchLoRAAdamW", "svd", {"interval": 4, "freeze_steps": 1}),
    *[("DCTAdamW", "dct", {"error_feedback": kept}) for kept in ("float32", "bfloat16", "4bit")],
    ("FiraAdamW", "rsvd", {"on_refresh": "reset"}),
    ("GaLoreAdamW", "columns", {"on_refresh": "reset", "state_dtype": "bfloat16"}),
]


@pytest.mark.parametrize(
    "steps",
    # a step that refreshes calls what a plain one does, and more
    [pytest.param(1, marks=pytest.mark.slow), GAP],
    ids=["plain", "refresh"],
)
@pytest.mark.parametrize(
    ("name", "projector", "options"),
    cases.params(METHODS),
    ids=[f"{a}-{b}-{c}" for a, b, c in METHODS],
)
def test_a_fault_in_any_op_changes_nothing(
    name: str, projector: str, options: dict[str, Any], steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Raised before each op in turn, up to the first that has written the weights.

    The step is then taken again, and ends bit for bit where it would have ended at once.
    """
    if name in ("SSTAdamW", "SSTAdamW8bit", "SwitchLoRAAdamW"):
        options = {"on_refresh": "reset", **options}
    expected = prepared(name, projector, steps, **options)
    start = expected.param_groups[0]["params"][0].detach().clone()
    calls: list[str] = []
    written: list[bool] = []

    def note(op: str) -> None:
        calls.append(op)
        written.append(not expected.param_groups[0]["params"][0].equal(start))

    with monkeypatch.context() as patch:
        patched(patch, note)
        expected.step()
    count = written.index(True) if True in written else len(calls)
    assert count, calls
    for fatal in range(count):
        optimizer = prepared(name, projector, steps, **options)
        before, left = everything(optimizer), [fatal]

        def fail(op: str, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise Fault(op)

        with monkeypatch.context() as patch:
            patched(patch, fail)
            with pytest.raises(Fault) as caught:
                optimizer.step()
        assert not same(everything(optimizer), before), (fatal, calls[fatal])
        assert caught.value.__notes__ == [
            f"0 of 1 parameters had taken this step of {name}; the others are as they were. step() "
            "again steps these alone, zero_grad() leaves them out"
        ]
        optimizer.step()
        assert not same(everything(optimizer), everything(expected)), (fatal, calls[fatal])


@pytest.mark.parametrize("error", [Fault, KeyboardInterrupt])
@pytest.mark.parametrize("name", ["GaLoreAdamW", "FrugalAdamW", "DCTAdamW", "SSTAdamW"])
def test_a_fault_after_a_refresh_takes_it_back(
    name: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever writes a projector may have it raise; a user may press Ctrl-C."""
    projector = {"FrugalAdamW": "randk", "DCTAdamW": "dct"}.get(name, "svd")
    optimizer = prepared(name, projector, GAP, on_refresh="reset")
    before = everything(optimizer)
    (item,) = optimizer._items(optimizer.param_groups[0])
    cls = type(item.subspace)
    original = cls.refresh_

    def refresh_(*args: Any) -> Any:
        original(*args)
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(cls, "refresh_", refresh_)
        with pytest.raises(error):
            optimizer.step()
    assert not same(everything(optimizer), before)


def test_a_block_that_fails_takes_its_turn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks had been switched, and their clock had ticked, before the step that failed."""

    def made() -> LowRankOptimizer:
        weights = [nn.Parameter(torch.ones(4, 6)) for _ in range(2)]
        optimizer = cases.build("FrugalAdamW", weights, projector="block", rank=0.5)
        for step in range(GAP + 1):
            if step == GAP:
                break
            for w in weights:
                w.grad = torch.full_like(w, 1.0 + step)
            optimizer.step()
        for w in weights:
            w.grad = torch.full_like(w, 9.0)
        return optimizer

    expected, optimizer = made(), made()
    expected.step()
    before = everything(optimizer)

    def fail(op: str) -> None:
        raise Fault(op)

    with monkeypatch.context() as patch:
        patched(patch, fail)
        with pytest.raises(Fault):
            optimizer.step()
    assert not same(everything(optimizer), before)
    optimizer.step()
    assert not same(everything(optimizer), everything(expected))


def test_a_note_says_how_far_a_step_came(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices of two shapes: the first bucket has stepped when the second fails."""
    weights = [nn.Parameter(torch.ones(4, 6)), nn.Parameter(torch.ones(5, 7))]
    optimizer = GaLoreAdamW(weights, rank=2, projector="svd")
    for w in weights:
        w.grad = torch.ones_like(w)
    calls = 0

    def fail(op: str) -> None:
        nonlocal calls
        calls += op == "lift_add_"
        if calls == 2:
            raise Fault

    with monkeypatch.context() as patch:
        patched(patch, fail)
        with pytest.raises(Fault) as caught:
            optimizer.step()
    assert caught.value.__notes__[0].startswith("1 of 2 parameters had taken this step")
    assert [bool((w == 1).all()) for w in weights] == [False, True]


# ------------------------------------------------------------------ what can be foreseen


def sparse(optimizer: LowRankOptimizer) -> None:
    optimizer.param_groups[-1]["params"][-1].grad = torch.ones(6, 11).to_sparse()


def edited(optimizer: LowRankOptimizer) -> None:
    optimizer.param_groups[-1]["state_dtype"] = "bfloat16"


def invalid(optimizer: LowRankOptimizer) -> None:
    optimizer.param_groups[-1]["on_refresh"] = "sometimes"


def converted(optimizer: LowRankOptimizer) -> None:
    param = optimizer.param_groups[-1]["params"][-1]
    param.data = param.data.double()


def mixed_dtypes(optimizer: LowRankOptimizer) -> None:
    param = optimizer.param_groups[-1]["params"][-1]
    param.grad = None
    param.data = param.data.double()
    param.grad = torch.ones_like(param)


FORESEEN: dict[str, tuple[Callable[[LowRankOptimizer], None], type[Exception], str]] = {
    "sparse": (sparse, RuntimeError, "does not support sparse gradients"),
    "edited": (edited, ValueError, "state_dtype was 'float32' and is 'bfloat16'"),
    "invalid": (invalid, ValueError, "on_refresh must be one of"),
    "converted": (
        converted, RuntimeError, "torch.float32 on cpu, which is .* torch.float64 on cpu now",
    ),
    "mixed dtypes": (
        mixed_dtypes, RuntimeError, "torch.float32 on cpu, which is .* torch.float64 on cpu now",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "what"), in_turns(cases.method_names(), list(FORESEEN)))
def test_what_can_be_foreseen_is_told_before_anything_changes(name: str, what: str) -> None:
    """Of the last group, after others that could have been stepped."""
    spoil, error, message = FORESEEN[what]
    if spoil is edited and name.endswith("8bit"):
        message = "state_dtype was '8bit' and is 'bfloat16'"
    weights = [nn.Parameter(torch.ones(6, 11)) for _ in range(3)]
    optimizer = cases.build(name, [{"params": weights[:2]}, {"params": weights[2:]}])
    grads = [torch.randn(6, 11) for _ in weights]
    for _ in range(2):
        for w, g in zip(weights, grads, strict=True):
            w.grad = g.clone()
        optimizer.step()
    spoil(optimizer)
    before = everything(optimizer)
    with pytest.raises(error, match=message):
        optimizer.step()
    assert not same(everything(optimizer), before)


def test_a_factor_without_its_counterpart_is_told_before_anything_changes() -> None:
    """The dense bias was stepped, in silence, before the module was looked at."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    from lowrank_optim import SwitchLoRAAdamW

    optimizer = SwitchLoRAAdamW(convert(model, "switchlora", rank=2), lr=1e-2)
    model(torch.randn(3, 8)).sum().backward()
    (b,) = [p for n, p in model.named_parameters() if n.startswith("1.") and "B" in n.upper()][:1]
    b.grad = None
    before = everything(optimizer)
    with pytest.raises(RuntimeError, match="its counterpart has none"):
        optimizer.step()
    assert not same(everything(optimizer), before)
