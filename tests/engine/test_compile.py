"""``torch.compile`` of code that steps an optimizer: one graph, the numbers of the eager loop."""

from __future__ import annotations

import copy
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._functorch.config
import torch._inductor.config
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.optim.optimizer import register_optimizer_step_post_hook

from lowrank_optim import GaLoreAdamW, LowRankOptimizer, attach_in_backward, methods
from lowrank_optim.nn import convert
from tests import cases, runs
from tests.pairwise import in_turns, paired

NAMES = cases.distinct_names()
GAP = 2
STEPS = 7
Loop = Callable[[], list[Tensor]]
SKIPS = hasattr(torch._dynamo, "skip_frame")
"""Whether torch can be told to leave a frame alone, and why; 2.6 breaks twice, in its own words."""
BOUNDARY = (2, 1 if SKIPS else 2)
REASON = "with a closure, hooks or tensor subclasses" if SKIPS else "_step_eagerly"
inductor = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="Inductor needs a C++ compiler"
)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """No graph of another test, and none left behind."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 12))


def modules(name: str) -> tuple[nn.Module, LowRankOptimizer]:
    """A model of factors: its steps write parameters that have no gradient."""
    model = net()
    if name == "sst":
        groups = convert(model, "sst", rank=4)
        return model, methods.SSTAdamW(groups, lr=1e-2, steps_per_iteration=GAP)
    groups = convert(model, "switchlora", rank=4)
    return model, methods.SwitchLoRAAdamW(groups, lr=1e-2, interval=2, freeze_steps=1)


def made(name: str, **options: Any) -> tuple[nn.Module, LowRankOptimizer]:
    model = net()
    return model, cases.build(name, model.parameters(), **{"update_proj_gap": GAP, **options})


def rows(count: int = STEPS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(4, 12, generator=generator) for _ in range(count)]


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - x.flip(-1)).square().mean()


def around(model: nn.Module, optimizer: LowRankOptimizer) -> Loop:
    """Gradients changed and weights read before the step, and weights read after it."""
    params = list(model.parameters())

    def loop() -> list[Tensor]:
        for p in params:
            if p.grad is not None:
                p.grad.mul_(0.5)
        before = [2 * p.detach() for p in params]
        optimizer.step()
        return before + [2 * p.detach() for p in params]

    return loop


def alone(_: nn.Module, optimizer: LowRankOptimizer) -> Loop:
    """Nothing but the step, of which Inductor makes no C++ that has to be compiled."""

    def loop() -> list[Tensor]:
        optimizer.step()
        return []

    return loop


def train(
    model: nn.Module, optimizer: LowRankOptimizer, loop: Loop, count: int = STEPS
) -> list[list[Tensor]]:
    """What the loop returns at each step, its gradients, and the weights at the end."""
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    seen = []
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a scheduler that does not see the steps
        warnings.filterwarnings("ignore", "Skipping serialization of")  # torch 2.6, of its own
        for x in rows(count):
            loss_of(model, x).backward()
            out = [x.clone() for x in loop()]
            grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
            seen.append(out + grads)
            scheduler.step()
            optimizer.zero_grad()
    return [*seen, [p.detach().clone() for p in model.parameters()]]


def assert_compiles_once(
    make: Callable[[], tuple[nn.Module, LowRankOptimizer]],
    backend: str,
    graphs: int = 1,
    loop: Callable[[nn.Module, LowRankOptimizer], Loop] = around,
) -> None:
    """Bitwise the eager loop, state included, in one graph without a break."""
    model, optimizer = make()
    expected, state = train(model, optimizer, loop(model, optimizer)), runs.entries(optimizer)
    model, optimizer = make()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(loop(model, optimizer), backend=counter, fullgraph=True)
    for got, want in zip(train(model, optimizer, compiled), expected, strict=True):
        runs.assert_same(got, want)
    runs.assert_same_state(runs.entries(optimizer), state)
    assert counter.frame_count == graphs
    assert not counters["graph_break"]


ALIKE = ("FrugalLion", "FrugalSGD", "BAdamW", "GaLoreAdamW8bit", "ApolloAdamW")
"""Whose rules, residuals and layers are those of others."""
IN_TURN = [
    [("eager", "native"), ("aot_eager", "reference")],
    [("eager", "reference"), ("aot_eager", "native")],
]


@pytest.mark.parametrize(
    ("name", "backend", "ops"),
    [
        pytest.param(
            name, *both, marks=pytest.mark.slow if (i // 2 + n) % 2 or name in ALIKE else ()
        )
        for i, name in enumerate(NAMES)
        for n, both in enumerate(IN_TURN[i % 2])
    ],
)
def test_one_graph_and_the_numbers_of_the_eager_loop(
    name: str, backend: str, ops: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every method, over more than two refreshes, a learning rate that changes at every step.

    ``aot_eager`` hands the op copies of the parameters, and copies them back at the end.
    """
    monkeypatch.setenv("LOWRANK_OPTIM_BACKEND", ops)
    assert_compiles_once(lambda: made(name), backend)


@pytest.mark.parametrize(
    ("name", "backend"), in_turns(["sst", "switchlora"], ["eager", "aot_eager"])
)
def test_parameters_without_gradient_that_a_step_writes(name: str, backend: str) -> None:
    """W0 and the inactive factors, read in the same graph before and after."""
    model, optimizer = modules(name)
    frozen = [p for p in model.parameters() if not p.requires_grad]
    start = [p.clone() for p in frozen]
    train(model, optimizer, around(model, optimizer))
    assert any(not torch.equal(a, b) for a, b in zip(frozen, start, strict=True))
    assert_compiles_once(lambda: modules(name), backend)


@pytest.mark.slow
@inductor
@pytest.mark.parametrize(
    # by default Inductor has a step of DCTAdamW alone, the last test of this file
    "name",
    [
        "GaLoreAdamW",
        *(pytest.param(x, marks=pytest.mark.slow) for x in ("DCTAdamW8bit", "switchlora")),
    ],
)
def test_inductor(name: str) -> None:
    """The default backend, which gives the op the parameters themselves."""
    make = (lambda: modules(name)) if name == "switchlora" else (lambda: made(name))
    assert_compiles_once(make, "inductor")


@pytest.mark.parametrize(
    ("backend", "dtype", "dynamic"),
    paired(["eager", "aot_eager"], [torch.float32, torch.bfloat16], [None, True]),
)
def test_parameters_of_every_kind(backend: str, dtype: torch.dtype, dynamic: bool | None) -> None:
    """Batches, scalars, transposed and sliced storage: a copy of one is stepped as itself is."""
    ends = []
    counter = CompileCounterWithBackend(backend)
    for compiled in (False, True):
        params = list(runs.parameters(dtype).values())
        generator = torch.Generator().manual_seed(3)
        base = torch.randn(20, 30, generator=generator).to(dtype)
        params += [nn.Parameter(base[:8, :12].clone().mT), nn.Parameter(base[2:12, 3:17])]
        rounding = dtype == torch.bfloat16
        optimizer = cases.build("FiraAdamW", params, stochastic_rounding=rounding)
        step: Any = optimizer.step
        if compiled:
            step = torch.compile(step, backend=counter, fullgraph=True, dynamic=dynamic)
        for n in range(STEPS):
            runs.set_grads(params, n)
            step()
        states = [x for entry in runs.entries(optimizer) for x in entry.values()]
        ends.append([*params, base, *states])
    runs.assert_same(*ends)
    assert counter.frame_count == 1


def test_a_learning_rate_that_is_a_tensor() -> None:
    assert_compiles_once(lambda: made("FiraAdamW", lr=torch.tensor(1e-2)), "aot_eager")


def test_a_parameter_that_gets_a_gradient_later() -> None:
    """Another graph, as another list of gradients goes into it; the state is there from step 1."""

    def make() -> tuple[nn.Module, LowRankOptimizer]:
        model, optimizer = made("GaLoreAdamW")
        model.register_parameter("late", nn.Parameter(torch.ones(4, 6)))
        model.count = 0
        optimizer.add_param_group({"params": [model.late], "rank": 2})

        def forward(model: Any, args: Any, out: Tensor) -> Tensor:
            model.count += 1
            return out + model.late.square().sum() if model.count > 4 else out

        model.register_forward_hook(forward)
        return model, optimizer

    assert_compiles_once(make, "aot_eager", graphs=2)


def in_one(model: nn.Module, optimizer: LowRankOptimizer) -> Callable[[Tensor], Tensor]:
    """All that a training loop does with a batch."""

    def step(x: Tensor) -> Tensor:
        loss = loss_of(model, x)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


@pytest.mark.parametrize(
    ("name", "backend"),
    in_turns(["GaLoreAdamW", "FrugalAdamW", "SSTAdamW8bit"], ["eager", "aot_eager"]),
)
def test_forward_backward_and_step_in_one_graph(name: str, backend: str) -> None:
    """Where Dynamo traces ``backward()``: ``param.grad`` gets its value when the step is over."""
    if not hasattr(torch._dynamo.config, "trace_autograd_ops"):
        pytest.skip("this torch cannot trace backward()")
    ends = []
    counter = CompileCounterWithBackend(backend)
    for compiled in (False, True):
        model, optimizer = made(name)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        step = in_one(model, optimizer)
        if compiled:
            step = torch.compile(step, backend=counter, fullgraph=True)
        losses = []
        for x in rows():
            with torch._dynamo.config.patch(trace_autograd_ops=True):
                losses.append(step(x))
            scheduler.step()
        assert all(p.grad is None for p in model.parameters())
        ends.append([*losses, *model.parameters(), *(s["step"] for s in runs.entries(optimizer))])
    runs.assert_same(*ends)
    assert counter.frame_count == 1 and not counters["graph_break"]


def test_forward_and_backward_compiled_apart() -> None:
    """The usual loop: a compiled model, a compiled step, ``backward()`` between them."""
    ends = []
    counter = CompileCounterWithBackend("aot_eager")
    for compiled in (False, True):
        model, optimizer = made("GaLoreAdamW")
        run: Any = model
        step: Any = optimizer.step
        if compiled:
            run = torch.compile(model, backend=counter, fullgraph=True)
            step = torch.compile(step, backend=counter, fullgraph=True)
        ends.append(train(run, optimizer, lambda step=step: step() or [])[-1])
    runs.assert_same(*ends)
    assert counter.frame_count == 2


def boundaries(optimizer: LowRankOptimizer, loop: Loop, model: nn.Module) -> tuple[int, int]:
    """Graphs and breaks of the loop compiled, both after the first step and after the last."""
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(loop, backend=counter)
    seen = []

    def counted() -> list[Tensor]:
        out = compiled()
        seen.append((counter.frame_count, sum(counters["graph_break"].values())))
        return out

    train(model, optimizer, counted)
    assert len(set(seen)) == 1
    return seen[0]


@pytest.mark.parametrize("what", ["closure", "hook", "global hook"])
def test_what_runs_code_of_others_is_one_boundary(what: str) -> None:
    """A hook or a closure may change tensors that the graph reads: then the step is not in it."""
    weights = []
    for compiled in (False, True):
        model, optimizer = made("GaLoreAdamW")
        average = torch.zeros_like(model[0].weight)

        def after(*_: Any, model: nn.Module = model, average: Tensor = average) -> None:
            average.lerp_(model[0].weight.detach(), 0.5)

        given = (after,) if what == "closure" else ()

        def loop(
            model: nn.Module = model, optimizer: Any = optimizer, average: Tensor = average,
            given: Any = given,
        ) -> list[Tensor]:  # fmt: skip
            before = 2 * average
            optimizer.step(*given)
            return [before, 2 * average, 2 * model[0].weight.detach()]

        handle = None
        if what == "hook":
            optimizer.register_step_post_hook(after)
        elif what == "global hook":
            handle = register_optimizer_step_post_hook(after)
        try:
            if compiled:
                assert boundaries(optimizer, loop, model) == BOUNDARY
                torch._dynamo.reset()
                with pytest.raises(Exception, match=REASON):
                    torch.compile(loop, backend="eager", fullgraph=True)()
            else:
                train(model, optimizer, loop)
        finally:
            if handle is not None:
                handle.remove()
        weights.append([*model.parameters(), average])
    runs.assert_same(*weights)


def assert_one_boundary(make: Callable[[], tuple[Any, LowRankOptimizer]]) -> None:
    """Compiled code leaves its graph at the step alone, and trains as eager code does."""
    ends = []
    for compiled in (False, True):
        model, optimizer = make()
        count = torch.zeros(())

        def loop(optimizer: Any = optimizer, count: Tensor = count) -> list[Tensor]:
            count.add_(1)
            optimizer.step()
            return [count * 2]

        if compiled:
            assert boundaries(optimizer, loop, model) == BOUNDARY
        else:
            train(model, optimizer, loop)
        ends.append(list(model.parameters()))
    runs.assert_same(*ends)


@pytest.mark.parametrize("mode", ["project", "step"])
def test_inside_backward_is_one_boundary(mode: Any) -> None:
    """Gradients are coordinates or gone, and the optimizer has hooks."""

    def attached() -> tuple[Any, LowRankOptimizer]:
        model, optimizer = made("GaLoreAdamW")
        attach_in_backward(optimizer, mode)
        return model, optimizer

    assert_one_boundary(attached)


def test_a_subclass_of_parameter_is_one_boundary() -> None:
    """What its operations do, a compiler would have to be told."""

    class Marked(nn.Parameter):
        pass

    def marked() -> tuple[Any, LowRankOptimizer]:
        model, _ = made("GaLoreAdamW")
        for layer in (model[0], model[2]):
            layer.weight = Marked(layer.weight.detach().clone())
        return model, cases.build("GaLoreAdamW", model.parameters())

    assert_one_boundary(marked)


def test_checkpoints_groups_and_copies_of_a_compiled_optimizer() -> None:
    """Loaded state is used by the same graph; a new group is a new graph, and so is a copy."""
    ends = []
    counter = CompileCounterWithBackend("eager")
    graphs = []
    for compiled in (False, True):
        model, optimizer = made("GaLoreAdamW")
        wrap: Any = lambda f: f  # noqa: E731
        if compiled:
            wrap = lambda f: torch.compile(f, backend=counter, fullgraph=True)  # noqa: E731
        step = wrap(around(model, optimizer))
        seen = train(model, optimizer, step, 4)
        graphs.append(counter.frame_count)
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        seen += train(model, optimizer, step, 4)
        graphs.append(counter.frame_count)
        model.append(nn.Linear(12, 12))
        optimizer.add_param_group({"params": model[-1].parameters(), "rank": 3})
        step = wrap(around(model, optimizer))
        seen += train(model, optimizer, step, 4)
        twin, other = copy.deepcopy((model, optimizer))
        seen += train(twin, other, wrap(around(twin, other)), 4)
        seen += train(model, optimizer, step, 2)
        ends.append([x for out in seen for x in out])
    runs.assert_same(*ends)
    assert graphs[2:] == [1, 1]
    assert counter.frame_count == 3


def test_two_optimizers_in_one_graph() -> None:
    ends = []
    counter = CompileCounterWithBackend("aot_eager")
    for compiled in (False, True):
        model = net()
        first = cases.build("GaLoreAdamW", model[0].parameters())
        second = cases.build("FrugalAdamW", model[2].parameters())

        def loop(first: Any = first, second: Any = second) -> None:
            first.step()
            second.step()

        step = torch.compile(loop, backend=counter, fullgraph=True) if compiled else loop
        for x in rows():
            loss_of(model, x).backward()
            step()
            model.zero_grad()
        ends.append(list(model.parameters()))
    runs.assert_same(*ends)
    assert counter.frame_count == 1


def test_groups_replaced_by_others_are_seen() -> None:
    """Frameworks assign ``param_groups``: never a step of parameters that are not there."""
    model, optimizer = made("GaLoreAdamW")
    step = torch.compile(optimizer.step, backend="eager", fullgraph=True)
    loss_of(model, rows()[0]).backward()
    step()
    optimizer.param_groups = [dict(group) for group in optimizer.param_groups]
    step()  # other groups, the same parameters
    twins = runs.copies(model.parameters())
    optimizer.param_groups = [{**optimizer.param_groups[0], "params": twins}]
    for twin, p in zip(twins, model.parameters(), strict=True):
        twin.grad = p.grad.clone()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="param_groups was replaced"):
        step()
    step()
    runs.assert_same(model.parameters(), before)
    assert all(not torch.equal(a, b) for a, b in zip(twins, before, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_the_op_changes_what_its_schema_says(name: str) -> None:
    """Parameters and no gradient; the optimizer's own parameters only if they are what is given."""
    model, optimizer = made(name)
    params = list(model.parameters())
    runs.set_grads(params, 0)
    optimizer.step()
    values, grads = [p.detach().clone() for p in params], [p.grad.clone() for p in params]
    before = [p.detach().clone() for p in params]
    held = [p.grad for p in params]
    arguments = (optimizer._traced.name, values, grads, list(range(len(params))), True)
    tests = ("test_schema", "test_faketensor")
    op = torch.ops.lowrank_optim.step_.default
    assert torch.library.opcheck(op, arguments, test_utils=tests) == dict.fromkeys(tests, "SUCCESS")
    runs.assert_same(params, before)
    assert all(p.grad is grad for p, grad in zip(params, held, strict=True))
    optimizer = cases.build(name, params)
    op(optimizer._traced.name, values, grads, list(range(len(params))), True)
    runs.assert_same(params, before)
    optimizer = cases.build(name, params)
    optimizer.step()
    runs.assert_same(params, values)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_step_that_raises(backend: str) -> None:
    """Gradients stay enabled, the parameters where they are, and the next step is the first."""
    model, optimizer = made("GaLoreAdamW")
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(around(model, optimizer), backend=counter, fullgraph=True)
    group, params = optimizer.param_groups[0], list(model.parameters())
    places = [p.data_ptr() for p in params]
    loss_of(model, rows()[0]).backward()
    grads = [p.grad for p in params]
    gap, group["update_proj_gap"] = group["update_proj_gap"], "never"
    with pytest.raises(ValueError, match="never"):
        compiled()
    assert torch.is_grad_enabled()
    assert [p.data_ptr() for p in params] == places
    assert all(p.grad is g for p, g in zip(params, grads, strict=True))
    group["update_proj_gap"] = gap
    optimizer.zero_grad()
    twin, plain = made("GaLoreAdamW")
    expected = train(twin, plain, around(twin, plain))
    for got, want in zip(train(model, optimizer, compiled), expected, strict=True):
        runs.assert_same(got, want)


def test_an_optimizer_that_is_gone() -> None:
    name = GaLoreAdamW([nn.Parameter(torch.zeros(3, 4))], lr=1e-2, rank=2)._traced.name
    with pytest.raises(RuntimeError, match="does not exist any more"):
        torch.ops.lowrank_optim.step_(name, [], [], [], True)


def test_inductor_of_a_step_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default backend, with a basis at every step that is found inside the op.

    Nothing is compiled beside this process, nor looked for in a cache, whose key is all of Triton.
    """
    keys = {"transform": "fft", "update_proj_gap": 1}
    monkeypatch.setattr(torch._inductor.config, "compile_threads", 1)
    monkeypatch.setattr(torch._inductor.config, "fx_graph_cache", False)
    monkeypatch.setattr(torch._functorch.config, "enable_autograd_cache", False)
    assert_compiles_once(lambda: made("DCTAdamW", **keys), "inductor", loop=alone)
