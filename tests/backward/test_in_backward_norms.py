"""Norms of gradients applied inside backward, and what attach_in_backward may be given."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_optim import GaLoreAdamW, attach_in_backward, methods
from lowrank_optim import nn as lowrank_nn
from lowrank_optim.backward.attach import ARGUMENTS
from lowrank_optim.backward.stepped_grad import SteppedGrad
from tests import cases
from tests.compare import assert_close
from tests.pairwise import in_turns

METHODS = cases.distinct_names()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 14), nn.Linear(14, 8, bias=False)
        self.unused = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).tanh())


def make(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    model = Net().double()
    return model, cases.build(name, model.parameters(), **options)


def rows(count: int = 6, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 6, 8, dtype=torch.float64, generator=generator)


def accumulate(model: nn.Module, x: Tensor, pieces: int) -> None:
    for piece in x.chunk(pieces):
        (3 * model(piece).square().mean() / pieces).backward()


def global_norm(model: nn.Module) -> float:
    """By hand: the root of the sum of the squares of all elements."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return math.sqrt(math.fsum(float(x) ** 2 for g in grads for x in g.flatten()))


@pytest.mark.filterwarnings("ignore:mode='step' clips")
@pytest.mark.parametrize(
    ("name", "way"), in_turns([*METHODS], [(1, None), (3, 0.1), (1, 0.1), (3, None)])
)
def test_the_norm_is_that_of_whole_gradients(name: str, way: tuple[int, float | None]) -> None:
    """The twin keeps its gradients; the clipping that asks for the norm changes nothing."""
    pieces, max_norm = way
    whole, inside = make(name), make(name)
    attach_in_backward(
        inside[1], "step", accumulation_steps=pieces, max_norm=max_norm, keep_norms=True
    )
    for n, x in enumerate(rows()):
        accumulate(whole[0], x, pieces)
        expected = global_norm(whole[0])
        if max_norm is not None:
            for p in whole[0].parameters():
                nn.utils.clip_grad_norm_([p], max_norm)
        whole[1].step()
        whole[1].zero_grad()
        accumulate(inside[0], x, pieces)
        params = list(inside[0].parameters())
        norm = nn.utils.clip_grad_norm_(params, 0.05, foreach=None if n % 2 else False)
        assert_close(norm, torch.tensor(expected, dtype=norm.dtype))
        inside[1].step()
        assert all(p.grad is None for p in params)
        inside[1].zero_grad()
    for a, b in zip(whole[0].parameters(), inside[0].parameters(), strict=True):
        assert torch.equal(a, b)


def test_foreach_norms_too() -> None:
    model, optimizer = make("GaLoreAdamW")
    attach_in_backward(optimizer, "step", keep_norms=True)
    accumulate(model, rows()[0], 1)
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    single = [torch.linalg.vector_norm(g) for g in grads]
    assert all(map(torch.equal, torch._foreach_norm([*grads, torch.ones(4)]), single))
    other = torch.ones(4)
    torch._foreach_mul_([*grads, other], 0.5)
    assert other.tolist() == [0.5] * 4
    assert all(map(torch.equal, (torch.linalg.vector_norm(g) for g in grads), single))


@pytest.mark.parametrize("form", ["sst", "switchlora"])
def test_factors_that_wait_for_their_siblings_count_once(form: str) -> None:
    norms = []
    for attach in (False, True):
        torch.manual_seed(0)
        model = Net().double()
        groups = lowrank_nn.convert(model, form, rank=3, target_modules=["up", "down"])
        cls = {"sst": "SSTAdamW", "switchlora": "SwitchLoRAAdamW"}[form]
        optimizer = getattr(methods, cls)(groups, lr=1e-2)
        if attach:
            attach_in_backward(optimizer, "step", keep_norms=True)
        for x in rows(3):
            accumulate(model, x, 1)
            norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), math.inf)))
            optimizer.step()
            optimizer.zero_grad()
    assert norms[:3] == pytest.approx(norms[3:], rel=1e-12) and min(norms) > 0


def test_what_is_left_has_no_memory_and_goes_with_the_step() -> None:
    model, optimizer = make("GaLoreAdamW")
    handle = attach_in_backward(optimizer, "step", accumulation_steps=2, keep_norms=True)
    accumulate(model, rows()[0], 1)
    assert type(model.up.weight.grad) is Tensor
    accumulate(model, rows()[0], 1)
    grad = model.up.weight.grad
    assert isinstance(grad, SteppedGrad) and "SteppedGrad((14, 8), norm=" in repr(grad)
    with pytest.raises(RuntimeError, match="invalid python storage"):
        grad.untyped_storage().data_ptr()
    assert model.unused.weight.grad is None
    for use in (
        grad.isnan,
        grad.sum,
        lambda: grad + 1,
        lambda: 1 + grad,
        lambda: grad.copy_(torch.ones(14, 8)),
    ):
        with pytest.raises(NotImplementedError, match=r"keep_norms=True\): only its norm is left"):
            use()
    with pytest.raises(NotImplementedError, match=r"the 1\.0-norm"):
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, norm_type=1.0)
    handle.remove()
    assert model.up.weight.grad is None


def test_a_second_gradient_is_an_error_as_without_norms() -> None:
    model, optimizer = make("GaLoreAdamW")
    attach_in_backward(optimizer, "step", keep_norms=True)
    accumulate(model, rows()[0], 1)
    with pytest.raises(
        RuntimeError, match=r"arrived before optimizer\.step\(\).*accumulation_steps"
    ):
        accumulate(model, rows()[0], 1)


def test_a_scaler_is_the_error_it_is_without_norms() -> None:
    model, optimizer = make("GaLoreAdamW")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    attach_in_backward(optimizer, "step", keep_norms=True)
    scaler.scale(model(rows()[0]).square().mean()).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    with pytest.raises(RuntimeError, match=r"scaled by a GradScaler.*mode='project'"):
        scaler.step(optimizer)


# ------------------------------------------------------------------ arguments

BAD: dict[str, list[Any]] = {
    "mode": ["both", None, "Step", 1, ["step"]],
    "accumulation_steps": [0, -1, 2.0, True, "2", None],
    "max_norm": [0, -1.0, math.nan, True, "1.0", torch.tensor(1.0)],
    "first_basis": [1, "last"],
    "keep_norms": [1, None, "yes"],
    "coords_dtype": ["float16", torch.bfloat16, None],
    "process_group": ["world", 0, -100, torch.distributed],
}


@pytest.mark.parametrize(("key", "value"), [(k, v) for k, bad in BAD.items() for v in bad], ids=str)
def test_an_argument_out_of_range_is_an_error(key: str, value: Any) -> None:
    """It says what was given and what may be, and leaves the optimizer free."""
    _, optimizer = make("GaLoreAdamW")
    with pytest.raises(ValueError) as error:
        attach_in_backward(optimizer, **{key: value})
    assert str(error.value) == f"{key} must be {ARGUMENTS[key][1]}, got {value!r}"
    attach_in_backward(optimizer).remove()


def test_every_argument_is_in_the_table() -> None:
    own = set(inspect.signature(attach_in_backward).parameters) - {"optimizer"}
    assert own == ARGUMENTS.keys() == BAD.keys()


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (lambda m: torch.optim.AdamW(m.parameters()), r"torch\.optim\.adamw\.AdamW"),
        (lambda m: m, r".*\.Net$"),
        (lambda m: None, r"builtins\.NoneType"),
        (lambda m: GaLoreAdamW, r"<class '.*\.GaLoreAdamW'>"),
        (lambda m: [GaLoreAdamW(m.parameters())], r"builtins\.list"),
    ],
)
@pytest.mark.parametrize("mode", ["project", "step"])
def test_what_is_no_optimizer_of_this_package_is_an_error(
    given: Any, named: str, mode: Any
) -> None:
    with pytest.raises(TypeError, match="takes an optimizer of lowrank_optim.* got " + named):
        attach_in_backward(given(Net()), mode)


@pytest.mark.parametrize(
    "modes", [("project", "project"), ("step", "project"), ("project", "step")]
)
def test_two_optimizers_of_one_parameter_are_an_error(modes: Any) -> None:
    """The second would step from coordinates in the basis of the first."""
    model, optimizer = make("GaLoreAdamW")
    other = cases.build("GaLoreAdamW", model.named_parameters())
    handle = attach_in_backward(optimizer, modes[0])
    with pytest.raises(RuntimeError, match=r"another optimizer .* of up\.weight .*: remove\(\)"):
        attach_in_backward(other, modes[1])
    assert not other._optimizer_step_pre_hooks
    handle.remove()
    attach_in_backward(other, modes[1]).remove()


@pytest.mark.parametrize("mode", ["project", "step"])
@pytest.mark.parametrize("framework", ["accelerate", "lightning"])
def test_the_optimizer_inside_a_wrapper_is_meant(framework: str, mode: Any) -> None:
    runs = []
    for wrap in (False, True):
        model, optimizer = make("GaLoreAdamW")
        wrapped: Any = optimizer
        if wrap and framework == "accelerate":
            wrapped = pytest.importorskip("accelerate").Accelerator(cpu=True).prepare(optimizer)
        elif wrap:
            pytest.importorskip("lightning")
            from lightning.pytorch.core.optimizer import LightningOptimizer

            wrapped = LightningOptimizer(optimizer)
        handle = attach_in_backward(wrapped, mode)
        assert handle.optimizer is optimizer
        for x in rows(4):
            accumulate(model, x, 1)
            optimizer.step()
            optimizer.zero_grad()
        runs.append(model)
    for a, b in zip(*(m.parameters() for m in runs), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(TypeError, match=r"AcceleratedOptimizer of a torch\.optim\.adamw\.AdamW$"):
        other = torch.optim.AdamW(Net().parameters())
        attach_in_backward(pytest.importorskip("accelerate").Accelerator(cpu=True).prepare(other))
