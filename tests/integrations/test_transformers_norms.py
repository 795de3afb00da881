"""What Trainer logs as ``grad_norm`` when gradients are freed inside backward."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_optim import GaLoreAdamW, lowrank_groups
from tests.integrations.trainers import arguments, bare, data, model, trainer, transformers


def logged(run: Any) -> list[float]:
    run.train()
    return [row["grad_norm"] for row in run.state.log_history if "grad_norm" in row]


def logging(folder: Path, **more: Any) -> Any:
    return arguments(folder, logging_strategy="steps", logging_steps=1, **more)


@pytest.mark.parametrize("pieces", [1, 2])
def test_layer_wise_norms_are_those_of_the_ordinary_run(tmp_path: Path, pieces: int) -> None:
    args = logging(tmp_path, max_grad_norm=0.0, gradient_accumulation_steps=pieces)
    ordinary, inside = (logged(trainer(args, in_backward=mode)) for mode in (None, "step"))
    assert inside == pytest.approx(ordinary, rel=1e-6)
    assert len(inside) == 6 and min(inside) > 0.1


@pytest.mark.parametrize("mode", ["project", "step"])
def test_a_second_trainer_of_the_same_model(tmp_path: Path, mode: Any) -> None:
    """As in a notebook: the optimizer of the first lets go of the gradients."""
    args = logging(tmp_path, max_grad_norm=0.0, max_steps=2)
    runs = []
    for again in (False, True):
        run = trainer(args, in_backward=mode)
        if again:
            run.create_optimizer()
            first, run = run, trainer(args, in_backward=mode)
            run.model = run.model_wrapped = first.model
        runs.append(logged(run))
        runs.append([float(p.detach().norm()) for p in run.model.parameters()])
    assert runs[:2] == runs[2:]


def test_an_epoch_that_ends_in_the_middle_of_an_accumulation(tmp_path: Path) -> None:
    """12 micro-batches in steps of 5: in the last step of an epoch ``step()`` steps what waits."""
    args = logging(tmp_path, max_grad_norm=0.0, gradient_accumulation_steps=5)
    ordinary, inside = (logged(trainer(args, in_backward=mode)) for mode in (None, "step"))
    assert inside == pytest.approx(ordinary, rel=1e-6)


def clip(model: Any, limit: float) -> float:
    """Each parameter alone, and the global norm before."""
    params = [p for p in model.parameters() if p.grad is not None]
    norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in params))
    for p in params:
        nn.utils.clip_grad_norm_([p], limit)
    return norm


def test_norms_are_those_before_the_clipping_of_each_parameter(tmp_path: Path) -> None:
    """The run, written out with gradients that all wait."""
    limit = 0.05
    args = logging(tmp_path, max_grad_norm=limit, gradient_accumulation_steps=2, max_steps=4)
    with pytest.warns(UserWarning, match="clips the gradient of each parameter"):
        run = trainer(args, in_backward="step")
        norms = logged(run)
    mine, expected = model(), []
    groups = lowrank_groups(mine, rank=4, no_decay=("bias", "norm"))
    optimizer = GaLoreAdamW(
        groups, lr=1e-2, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-6, scale=0.5, update_proj_gap=2
    )
    scheduler = transformers.get_cosine_schedule_with_warmup(optimizer, 0, 4)
    loader = iter(trainer(args).get_train_dataloader())
    mine.train()
    transformers.set_seed(args.seed)
    for _ in range(4):
        pieces = [next(loader) for _ in range(2)]
        count = sum((piece["labels"][:, 1:] != -100).sum() for piece in pieces)
        for piece in pieces:
            mine(**piece, num_items_in_batch=count).loss.backward()
        expected.append(clip(mine, limit))
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    assert norms == pytest.approx(expected, rel=1e-5)
    assert min(norms) > 10 * limit
    for x, y in zip(run.model.parameters(), mine.parameters(), strict=True):
        assert torch.allclose(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("mode", "said"), [("step", 1), ("project", 0), (None, 0)])
def test_clipping_each_parameter_alone_is_said_once(tmp_path: Path, mode: Any, said: int) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        trainer(arguments(tmp_path), in_backward=mode).train()
        assert sum("clips the gradient of each" in str(x.message) for x in seen) == said
        seen.clear()
        trainer(arguments(tmp_path, max_grad_norm=0.0), in_backward=mode).train()
        assert not [x for x in seen if "clips" in str(x.message)]


class Oracle(transformers.TrainerCallback):  # type: ignore[misc]
    """The norm of a projected step, of whole gradients of a copy at the same weights.

    A matrix in its subspace counts with ``|P^T G|``, in the first step too; one whose basis is due
    in this step, and everything dense, with ``|G|``.
    """

    def __init__(self) -> None:
        self.norms: list[float] = []
        self.due = 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        copied = model()
        copied.load_state_dict(more["model"].state_dict())
        rows = torch.stack([row["input_ids"] for row in data()])
        copied(input_ids=rows, labels=rows).loss.backward()
        self.optimizer = more["optimizer"].optimizer
        self.grads = [p.grad.double() for p in copied.parameters()]
        self.params = list(more["model"].parameters())
        self.before = [dict(self.optimizer.state[p]) for p in self.params]
        self.before = [{k: v.clone() for k, v in state.items()} for state in self.before]

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        total = 0.0
        for param, grad, before in zip(self.params, self.grads, self.before, strict=True):
            after = self.optimizer.state[param]
            basis = before.get("basis", after.get("basis"))
            if before and basis is not None and before["refresh_step"] != after["refresh_step"]:
                self.due += 1
                basis = None
            total += float(self.seen(grad, basis).square().sum())
        self.norms.append(math.sqrt(total))

    @staticmethod
    def seen(grad: Tensor, basis: Tensor | None) -> Tensor:
        if basis is None:
            return grad
        rows, cols = grad.shape
        return grad @ basis.double() if rows >= cols else basis.double().T @ grad


def test_projected_norms_are_those_of_what_is_applied(tmp_path: Path) -> None:
    more = {"per_device_train_batch_size": 24, "max_steps": 5, "learning_rate": 1e-2}
    args = bare(
        tmp_path, optim_args="rank=4, update_proj_gap=3", max_grad_norm=0.0,
        logging_strategy="steps", logging_steps=1, **more,
    )  # fmt: skip
    oracle, run = Oracle(), trainer(args, in_backward="project")
    run.add_callback(oracle)
    norms = logged(run)
    assert norms == pytest.approx(oracle.norms, rel=1e-5)
    assert oracle.due > 0
    whole = logged(trainer(args))
    assert all(a < b for a, b in zip(norms[:1], whole[:1], strict=True))
