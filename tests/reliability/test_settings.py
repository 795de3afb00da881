"""Settings of torch that are of the model's arithmetic: no step follows one.

A default dtype of bfloat16, in which whole numbers end at 256, or ``torch.autocast`` around a whole
loop, change nothing of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_optim import LowRankOptimizer, attach_in_backward
from lowrank_optim.backward import comm_hook
from lowrank_optim.nn import convert, merge
from tests import cases
from tests.engine.snapshots import everything

SHAPES = [(6, 11), (13, 7), (5,)]
STEPS = 4
"""With a first basis, and one after a gap of 3."""

KINDS = [
    *cases.pairs(),
    *((name, None) for name in cases.distinct_names() if name not in cases.projecting_names()),
]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def several() -> Iterator[None]:
    half = torch.bfloat16
    with default_dtype(half), torch.autocast("cpu", half), torch.device("meta"):
        yield


SETTINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "several": several,
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "device": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


def differing(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> list[str]:
    """Names of what has other bits, or is in another format."""
    assert found.keys() == wanted.keys()
    alike = {k: x for k, x in found.items() if x.dtype == wanted[k].dtype}
    return [k for k, x in wanted.items() if k not in alike or not alike[k].equal(x)]


def made(name: str, projector: str | None) -> LowRankOptimizer:
    with torch.device("cpu"):
        params = [nn.Parameter(cases.parameter(s, torch.float32, seed=7).detach()) for s in SHAPES]
    own = {} if projector is None else {"projector": projector}
    rank = cases.rank_for(projector, 3)
    groups = [{"params": params[:2], "rank": rank}, {"params": params[2:], "rank": None}]
    return cases.build(name, groups, **{**own, "weight_decay": 0.1})


def trained(name: str, projector: str | None) -> dict[str, Tensor]:
    optimizer = made(name, projector)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for row in range(STEPS):
        for n, param in enumerate(params):
            with torch.device("cpu"):
                param.grad = cases.gradients(param.shape, 1, torch.float32, seed=10 * row + n)[0]
        optimizer.step()
    return everything(optimizer)


@pytest.mark.parametrize(("name", "projector"), cases.params(KINDS))
def test_a_step_follows_no_setting(name: str, projector: str | None) -> None:
    """Neither its numbers nor the formats of its state."""
    wanted = trained(name, projector)
    with several():
        assert not differing(trained(name, projector), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize(("name", "projector"), KINDS)
def test_nor_any_by_itself(
    name: str, projector: str | None, setting: Callable[[], AbstractContextManager[Any]]
) -> None:
    with setting():
        found = trained(name, projector)
    assert not differing(found, trained(name, projector))


@pytest.mark.parametrize(
    "setting",
    [pytest.param(x, marks=() if x is several else pytest.mark.slow) for x in SETTINGS.values()],
    ids=SETTINGS,
)
@pytest.mark.parametrize("mode", ["project", "step"])
def test_nor_does_one_inside_backward(
    mode: Any, setting: Callable[[], AbstractContextManager[Any]]
) -> None:
    """Two micro-batches a step; the first basis is of the first, and norms are of coordinates."""

    def run(around: Callable[[], AbstractContextManager[Any]]) -> dict[str, Tensor]:
        optimizer = made("GaLoreAdamW", "svd")
        params = [p for group in optimizer.param_groups for p in group["params"]]
        attach_in_backward(optimizer, mode, accumulation_steps=2, max_norm=1.0)
        for step in range(STEPS):
            for micro in range(2):
                rows = [
                    cases.gradients(p.shape, 1, torch.float32, seed=100 * step + 10 * micro + n)[0]
                    for n, p in enumerate(params)
                ]
                loss = torch.stack([(p * g).sum() for p, g in zip(params, rows, strict=True)]).sum()
                with around():
                    loss.backward()
            with around():
                optimizer.step()
            optimizer.zero_grad()
        return everything(optimizer)

    assert not differing(run(setting), run(nullcontext))


@pytest.mark.parametrize("form", ["sst", "switchlora", "sltrain", "lost"])
def test_nor_do_layers_that_are_converted(form: Any) -> None:
    """Their factors are found alike, in the format of the weight, and so is what they merge to."""

    def layers(setting: Callable[[], AbstractContextManager[Any]]) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 6))
        with setting():
            convert(model, form, rank=3)
        found = {f"converted.{key}": x.clone() for key, x in model.state_dict().items()}
        with setting():
            merge(model)
        return {**found, **model.state_dict()}

    wanted = layers(nullcontext)
    for what in ("several", "float64"):
        assert not differing(layers(SETTINGS[what]), wanted), what


class Bucket:
    """What DistributedDataParallel hands to a hook: gradients that lie in one buffer."""

    def __init__(self, params: list[nn.Parameter], grads: list[Tensor]) -> None:
        self.whole = torch.cat([grad.reshape(-1) for grad in grads])
        pieces = torch.split(self.whole, [param.numel() for param in params])
        self.grads = [x.view(p.shape) for x, p in zip(pieces, params, strict=True)]
        self.params = params

    def buffer(self) -> Tensor:
        return self.whole

    def gradients(self) -> list[Tensor]:
        return self.grads

    def parameters(self) -> list[nn.Parameter]:
        return self.params


class Sent:
    """An average over one rank."""

    def __init__(self, x: Tensor) -> None:
        self.future: torch.futures.Future[list[Tensor]] = torch.futures.Future()
        self.future.set_result([x])

    def wait(self) -> None:
        """It has arrived."""

    def get_future(self) -> torch.futures.Future[list[Tensor]]:
        return self.future


def test_nor_does_what_ranks_send(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hook of DistributedDataParallel runs where backward was called."""
    monkeypatch.setattr(comm_hook.collectives, "average_", lambda x, _: Sent(x))
    monkeypatch.setattr(comm_hook._Sender, "_group_of", lambda *_: None)
    optimizer = made("GaLoreAdamW", "svd")
    params = [p for group in optimizer.param_groups for p in group["params"]]
    grads = [cases.gradients(p.shape, 1, torch.float32)[0] for p in params]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    optimizer.step()
    send = comm_hook._Sender(optimizer).send
    wanted = send(None, Bucket(params, grads)).value()
    with SETTINGS["autocast"]():
        assert send(None, Bucket(params, grads)).value().equal(wanted)
