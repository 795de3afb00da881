"""What each test of torch's optimizer suite asks, asked of an ``OptimizerInfo`` of ours.

The names are those of ``TestOptimRenewed`` in torch's ``test/test_optim.py``; the bodies are ours.
Where torch compares within rounding and ours are the same to the bit, the bit is asked.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from tests import runs
from tests.compare import assert_close

Info = Any
BODIES: dict[str, Callable[[Info, str], None]] = {}

NOT_ASKED: dict[str, str] = {
    "test_forloop_goes_right_direction_multigpu": "needs two GPUs",
    "test_mixed_device_dtype": "needs two GPUs; compares `foreach` and `fused` with a loop",
    **dict.fromkeys(
        [
            "test_foreach_matches_forloop",
            "test_set_default_dtype_works_with_foreach",
            "test_foreach_large_tensor",
            "test_peak_memory_foreach",
            "test_fused_matches_forloop",
            "test_fused_large_tensor",
            "test_fused_does_not_step_if_foundinf",
            "test_fused_error_on_params_on_meta",
            "test_fused_cpu_matches_cuda",
            "test_defaults_changed_to_foreach",
        ],
        "there is one implementation: `foreach` and `fused` are accepted and choose nothing; "
        "backends are compared by tests/ops",
    ),
    "test_rosenbrock_sparse": "sparse gradients are refused, as by torch.optim.AdamW",
    "test_complex": "complex parameters are refused when the optimizer is made",
    "test_complex_2d": "complex parameters are refused when the optimizer is made",
    "test_second_order_optims_return_consistent_types": "of LBFGS alone",
    "test_state_dict_with_cuda_params": "needs a GPU: tests/ops/test_gpu.py",
    "test_cpu_load_state_dict": "needs a GPU: tests/ops/test_gpu.py",
}
"""Tests of torch's file that have no body here, and why."""

BY_TORCH = (
    "test_optim_infos_do_not_specify_global_cliquey_kwargs",
    "test_errors",
    "test_forloop_goes_right_direction",
)
"""Those that need torch's registry, or seconds."""


def body(function: Callable[[Info, str], None]) -> Callable[[Info, str], None]:
    BODIES[function.__name__] = function
    return function


def each(info: Info, device: str) -> Iterator[dict[str, Any]]:
    """Keyword arguments of every input, new ones at every call."""
    for given in info.optim_inputs_func(device=device):
        yield dict(given.kwargs)


class Problem:
    """torch's own: ``|W x + b|^2`` of (10, 5), of one x or of several."""

    def __init__(self, device: str, contiguous: bool = True, inputs: int = 1) -> None:
        x = torch.randn(10, 5, 2, device=device)
        self.weight = nn.Parameter(x[..., 0].contiguous() if contiguous else x[..., 0])
        self.bias = nn.Parameter(torch.randn(10, 2, device=device)[..., 0])
        self.x = torch.randn(5, inputs, device=device)
        self.params = [self.weight, self.bias]

    def copy(self) -> Problem:
        other = copy.copy(self)
        other.params = [nn.Parameter(p.detach().clone()) for p in self.params]
        other.weight, other.bias = other.params
        return other

    def loss(self) -> Tensor:
        return (self.weight @ self.x + self.bias[:, None]).square().sum()

    def backward(self) -> Tensor:
        for p in self.params:
            p.grad = None
        loss = self.loss()
        loss.backward()
        return loss

    def falls(self, optimizer: Optimizer, schedulers: Any = (), maximize: bool = False) -> None:
        """Twenty steps; half of them by a closure."""
        first = float(self.loss().detach())
        for i in range(20):
            loss = optimizer.step(self.backward) if i % 2 else self.backward()
            if i % 2 == 0:
                optimizer.step()
            for scheduler in schedulers:
                scheduler.step(*[loss] if isinstance(scheduler, ReduceLROnPlateau) else [])
        assert (float(self.loss().detach()) > first) == maximize


def two(info: Info, device: str) -> Iterator[tuple[Any, list[Tensor]]]:
    """An optimizer of every input with two parameters and gradients."""
    for kwargs in each(info, device):
        params: list[Tensor] = [nn.Parameter(torch.randn(6, 8, device=device)) for _ in range(2)]
        for p in params:
            p.grad = torch.rand_like(p)
        yield info.optim_cls(params, **kwargs), params


@body
def test_optim_infos_do_not_specify_global_cliquey_kwargs(info: Info, device: str) -> None:
    flags = {"foreach", "fused", "differentiable"}
    assert not any(kwargs.keys() & flags for kwargs in each(info, device))


@body
def test_errors(info: Info, device: str) -> None:
    for error in info.optim_error_inputs_func(device=device, dtype=torch.float32):
        given = error.optimizer_error_input
        kind = pytest.warns if issubclass(error.error_type, Warning) else pytest.raises
        with kind(error.error_type, match=error.error_regex):
            info.optim_cls(given.params, **given.kwargs)


@body
def test_forloop_goes_right_direction(info: Info, device: str) -> None:
    for contiguous in (True, False):
        for makers in ((), *info.scheduler_inputs):
            for kwargs in each(info, device):
                problem = Problem(device, contiguous)
                optimizer = info.optim_cls(problem.params, **kwargs)
                schedulers = [make(optimizer) for make in makers]
                problem.falls(optimizer, schedulers, kwargs.get("maximize", False))


@body
def test_param_group_with_lrscheduler_goes_right_direction(info: Info, device: str) -> None:
    own = next(each(info, device))
    for makers in info.scheduler_inputs:
        problem = Problem(device)
        groups = [{"params": [problem.weight]}, {"params": [problem.bias], "lr": 0.01}]
        optimizer = info.optim_cls(groups, **own)
        problem.falls(optimizer, [make(optimizer) for make in makers])


@body
def test_tensor_lr(info: Info, device: str) -> None:
    for kwargs in each(info, device):
        # of one input gradients have one direction, and others of a basis are of rounding, which
        # a tensor in the place of a number has otherwise
        problem = Problem(device, inputs=7)
        twin = problem.copy()
        lr = 2.0**-9  # the same number in float32
        one = info.optim_cls(problem.params, **{**kwargs, "lr": lr})
        other = info.optim_cls(twin.params, **{**kwargs, "lr": torch.tensor(lr)})
        for _ in range(5):
            for p, o in ((problem, one), (twin, other)):
                p.backward()
                o.step()
            for a, e in zip(twin.params, problem.params, strict=True):
                assert_close(a, e)


@body
def test_param_groups_weight_decay(info: Info, device: str) -> None:
    for kwargs in each(info, device):
        problem = Problem(device)
        groups = [
            {"params": [problem.weight], **kwargs},
            {"params": [problem.bias], **kwargs, "weight_decay": 0.0},
        ]
        problem.falls(info.optim_cls(groups), maximize=kwargs.get("maximize", False))


@body
def test_param_groups_lr(info: Info, device: str) -> None:
    for kwargs in each(info, device):
        problem = Problem(device)
        other = nn.Parameter(torch.randn(2, device=device))
        kept = other.detach().clone()
        groups = [{"params": problem.params, **kwargs}, {"params": [other]}]
        optimizer = info.optim_cls(groups, lr=1e-28)
        other.grad = torch.rand_like(other)
        problem.falls(optimizer, maximize=kwargs.get("maximize", False))
        assert torch.equal(other, kept)


@body
def test_step_is_noop_when_params_have_no_grad(info: Info, device: str) -> None:
    for kwargs in each(info, device):
        params = [torch.randn(2, 3, device=device) for _ in range(2)]
        before = [p.clone() for p in params]
        optimizer = info.optim_cls(params, **kwargs)
        loss = optimizer.step(lambda: torch.ones(1, device=device))
        assert torch.equal(loss.cpu(), torch.ones(1))
        runs.assert_same(params, before)


@body
def test_step_is_noop_for_zero_grads(info: Info, device: str) -> None:
    for kwargs in each(info, device):
        for shape in ((5, 1), (6, 4), (5,)):
            param = nn.Parameter(torch.randn(shape, device=device))
            before = param.detach().clone()
            optimizer = info.optim_cls([param], **{**kwargs, "weight_decay": 0.0})
            param.grad = torch.zeros_like(param)
            optimizer.step()
            assert torch.equal(param, before)


@body
def test_optimizer_can_be_printed(info: Info, device: str) -> None:
    for optimizer, _ in two(info, device):
        assert repr(optimizer).startswith(f"{info.name} (\nParameter Group 0\n")


def without_names(state_dict: dict[str, Any]) -> dict[str, Any]:
    groups = [
        {k: v for k, v in g.items() if k not in ("param_names", "uids")}
        for g in state_dict["param_groups"]
    ]
    return {**state_dict, "param_groups": groups}


def assert_same_tree(actual: Any, expected: Any, at: str = "") -> None:
    """The same keys and values, tensors to the bit."""
    assert type(actual) is type(expected), at
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys(), at
        for key in expected:
            assert_same_tree(actual[key], expected[key], f"{at}[{key!r}]")
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected), at
        for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
            assert_same_tree(a, e, f"{at}[{i}]")
    elif isinstance(expected, Tensor):
        assert actual.dtype == expected.dtype and actual.device == expected.device, at
        assert torch.equal(actual, expected), at
    else:
        assert actual == expected, at


@body
def test_state_dict_deterministic(info: Info, device: str) -> None:
    """Two optimizers of either kind of names go on alike from one state_dict.

    With names where the saved one had none, draws are of the names from there on: that the
    state_dict loads is ``test_can_load_from_to_named_state_dict``.
    """
    for kwargs in each(info, device):
        for named, named_copy in ((False, False), (True, True), (True, False)):
            problem = Problem(device)
            optimizer = info.optim_cls(given(problem.params, named), **kwargs)
            for _ in range(6):
                problem.backward()
                optimizer.step()
            twin = problem.copy()
            other = info.optim_cls(given(twin.params, named_copy), **kwargs)
            other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            for _ in range(6):
                for p, o in ((problem, optimizer), (twin, other)):
                    p.backward()
                    o.step()
                runs.assert_same(twin.params, problem.params)
            one, two = (without_names(o.state_dict()) for o in (optimizer, other))
            assert_same_tree(two, one)
            other.param_groups.extend(other.param_groups)
            repeated = without_names(other.state_dict())["param_groups"]
            assert_same_tree(repeated[-1], one["param_groups"][-1])


def given(params: list[Tensor], named: bool) -> Any:
    return [(f"name{i}", p) for i, p in enumerate(params)] if named else params


def conv_net(device: str) -> tuple[nn.Module, Callable[[nn.Module, Optimizer], None]]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2), nn.BatchNorm2d(6)).to(device)
    x = torch.rand(1, 4, 16, 16, device=device)

    def advance(module: nn.Module, optimizer: Optimizer) -> None:
        optimizer.zero_grad()
        module(x).square().sum().backward()
        optimizer.step()

    return model, advance


@body
def test_can_load_older_state_dict(info: Info, device: str) -> None:
    """Without the keys that came later: the run goes on as with them, at their defaults."""
    for kwargs in each(info, device):
        model, advance = conv_net(device)
        optimizer = info.optim_cls(model.parameters(), **kwargs)
        for _ in range(3):
            advance(model, optimizer)
        old = copy.deepcopy(optimizer.state_dict())
        for group in old["param_groups"]:
            for flag in info.not_og_supported_flags:
                group.pop(flag, None)
        twin = copy.deepcopy(model)
        other = info.optim_cls(twin.parameters(), **kwargs)
        other.load_state_dict(old)
        advance(twin, other)
        advance(model, optimizer)
        runs.assert_same(twin.parameters(), model.parameters())


@body
def test_can_load_from_to_named_state_dict(info: Info, device: str) -> None:
    for kwargs in each(info, device):
        for named, named_copy in ((a, b) for a in (False, True) for b in (False, True)):
            model, advance = conv_net(device)

            def params(wanted: bool, model: nn.Module = model) -> Any:
                return model.named_parameters() if wanted else model.parameters()

            optimizer = info.optim_cls(params(named), **kwargs)
            for _ in range(3):
                advance(model, optimizer)
            other = info.optim_cls(params(named_copy), **kwargs)
            other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            advance(model, other)
            if named or named_copy:
                names = other.state_dict()["param_groups"][0]["param_names"]
                assert names == ["0.weight", "0.bias", "1.weight", "1.bias"]


@body
def test_save_load_equality_with_weights_only(info: Info, device: str) -> None:
    """What ``torch.save`` writes comes back through the unpickler that runs no code."""
    for kwargs in each(info, device):
        for named in (False, True):
            problem = Problem(device)
            optimizer = info.optim_cls(given(problem.params, named), **kwargs)
            for _ in range(3):
                optimizer.step(problem.backward)
            want = optimizer.state_dict()
            assert_same_tree(runs.through_a_file(want), want)


@body
def test_load_nontensor_step(info: Info, device: str) -> None:
    for optimizer, params in two(info, device):
        for _ in range(3):
            optimizer.step()
        state_dict = copy.deepcopy(optimizer.state_dict())
        for state in state_dict["state"].values():
            state["step"] = state["step"].item()
        optimizer.load_state_dict(state_dict)
        optimizer.step()
        assert all(int(optimizer.state[p]["step"]) == 4 for p in params)


def mark(optimizer: Optimizer) -> None:
    optimizer.state["test"] = 1  # type: ignore[index]


def unmark(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    state_dict["marked"] = state_dict["state"].pop("test", None) is not None
    return state_dict


@body
def test_state_dict_pre_hook(info: Info, device: str) -> None:
    for optimizer, _ in two(info, device):
        optimizer.register_state_dict_pre_hook(mark)
        assert optimizer.state_dict()["state"]["test"] == 1


@body
def test_state_dict_post_hook(info: Info, device: str) -> None:
    for optimizer, _ in two(info, device):
        optimizer.register_state_dict_post_hook(unmark)
        assert not optimizer.state_dict()["marked"]


@body
def test_state_dict_pre_post_hook(info: Info, device: str) -> None:
    for optimizer, _ in two(info, device):
        optimizer.register_state_dict_pre_hook(mark)
        optimizer.register_state_dict_post_hook(unmark)
        got = optimizer.state_dict()
        assert "test" not in got["state"] and got["marked"]


def in_place(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    state_dict["param_groups"][0]["lr"] = 0.002


def in_a_copy(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    other = copy.deepcopy(state_dict)
    other["param_groups"][0]["lr"] = 0.003
    return other


def after(optimizer: Optimizer) -> None:
    optimizer.state["seen"] = optimizer.param_groups[0]["lr"]  # type: ignore[index]


@body
def test_load_state_dict_pre_hook_and_prepend(info: Info, device: str) -> None:
    for optimizer, _ in two(info, device):
        saved = optimizer.state_dict()
        optimizer.register_load_state_dict_pre_hook(in_place)
        optimizer.load_state_dict(saved)
        assert optimizer.param_groups[0]["lr"] == 0.002
        optimizer.register_load_state_dict_pre_hook(in_a_copy, prepend=True)
        optimizer.load_state_dict(saved)
        assert optimizer.param_groups[0]["lr"] == 0.002  # the first hook came second


@body
def test_load_state_dict_post_hook(info: Info, device: str) -> None:
    for optimizer, _ in two(info, device):
        optimizer.register_load_state_dict_post_hook(after)
        optimizer.load_state_dict(optimizer.state_dict())
        assert optimizer.state["seen"] == optimizer.param_groups[0]["lr"]


@body
def test_load_state_dict_pre_post_hook(info: Info, device: str) -> None:
    for optimizer, _ in two(info, device):
        optimizer.register_load_state_dict_pre_hook(in_a_copy)
        optimizer.register_load_state_dict_post_hook(after)
        optimizer.load_state_dict(optimizer.state_dict())
        assert optimizer.state["seen"] == 0.003


def count_hooks(info: Info, device: str, register: str) -> None:
    for optimizer, _ in two(info, device):
        calls = []
        handle = getattr(optimizer, register)(lambda *args, calls=calls: calls.append(args[0]))
        optimizer.step()
        optimizer.step()
        assert calls == [optimizer] * 2
        handle.remove()
        optimizer.step()
        assert len(calls) == 2


@body
def test_step_post_hook(info: Info, device: str) -> None:
    count_hooks(info, device, "register_step_post_hook")


@body
def test_step_pre_hook(info: Info, device: str) -> None:
    count_hooks(info, device, "register_step_pre_hook")


@body
def test_step_all_hooks(info: Info, device: str) -> None:
    """Global, then local; and the reverse after the step. A torch optimizer beside it alike."""
    for optimizer, params in two(info, device):
        calls: list[int] = []
        other = SGD(params, lr=1e-3)
        handles = [
            register_optimizer_step_pre_hook(lambda *_, calls=calls: calls.append(0)),
            register_optimizer_step_post_hook(lambda *_, calls=calls: calls.append(5)),
        ]
        for o in (optimizer, other):
            handles += [
                o.register_step_pre_hook(lambda *_, calls=calls: calls.append(1)),
                o.register_step_post_hook(lambda *_, calls=calls: calls.append(2)),
            ]
        try:
            for n, o in enumerate((optimizer, other, optimizer), start=1):
                o.step()
                assert calls == [0, 1, 2, 5] * n
        finally:
            for handle in handles:
                handle.remove()
        optimizer.step()
        assert len(calls) == 12


@body
def test_deepcopy_copies_all_public_attrs(info: Info, device: str) -> None:
    for optimizer, _ in two(info, device):
        for _ in range(3):
            optimizer.step()
        twin = copy.deepcopy(optimizer)
        public = {k for k in vars(optimizer) if not k.startswith("_")}
        assert {k for k in vars(twin) if not k.startswith("_")} == public


@body
def test_non_empty_state(info: Info, device: str) -> None:
    for kwargs in each(info, device):
        model = nn.Linear(5, 5, device=device)
        optimizer = info.optim_cls(model.parameters(), **kwargs)
        model(torch.rand(2, 5, device=device)).sum().backward()
        optimizer.step()
        assert len(optimizer.state) == 2 and all(optimizer.state.values())
