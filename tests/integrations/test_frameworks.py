"""accelerate, Lightning, torchtitan-style containers, EMA: the real libraries."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lowrank_optim import GaLoreAdamW, attach_in_backward
from tests import cases
from tests.compare import assert_close
from tests.pairwise import in_turns

NAMES = cases.method_names()


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 12))


def rows(count: int = 12) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(4, 12, generator=generator) for _ in range(count)]


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - x.flip(-1)).square().mean()


def plain(pieces: int = 1, max_norm: float | None = None, name: str = "GaLoreAdamW") -> nn.Module:
    """The loop that every framework is to reproduce."""
    model = net()
    optimizer = cases.build(name, model.parameters())
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for n, x in enumerate(rows()):
        (loss_of(model, x) / pieces).backward()
        if (n + 1) % pieces == 0:
            if max_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return model


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize(("name", "pieces"), in_turns(cases.distinct_names(), [1, 3]))
def test_accelerate(name: str, pieces: int) -> None:
    """``prepare`` reads the state and loads it back before the first step."""
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=pieces)
    model = net()
    optimizer = cases.build(name, model.parameters())
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    wrapped, prepared, scheduler = accelerator.prepare(model, optimizer, scheduler)
    for x in rows():
        with accelerator.accumulate(wrapped):
            accelerator.backward(loss_of(wrapped, x))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(wrapped.parameters(), 0.05)
            prepared.step()
            scheduler.step()
            prepared.zero_grad()
    assert equal(model, plain(pieces, 0.05, name))


@pytest.mark.parametrize("mode", ["project", "step"])
def test_accelerate_inside_backward(mode: Any) -> None:
    """Attached before ``prepare``, which replaces the groups by those it reads back."""
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = net()
    optimizer = cases.build("GaLoreAdamW", model.parameters())
    attach_in_backward(optimizer, mode, accumulation_steps=2, first_basis="boundary")
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    wrapped, prepared, scheduler = accelerator.prepare(model, optimizer, scheduler)
    for x in rows():
        with accelerator.accumulate(wrapped):
            accelerator.backward(loss_of(wrapped, x))
            prepared.step()
            scheduler.step()
            prepared.zero_grad()
    for a, b in zip(model.parameters(), plain(2).parameters(), strict=True):
        assert_close(a, b)


def lightning_module(manual: bool, mode: str | None = None) -> Any:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()
            self.automatic_optimization = not manual

        def training_step(self, batch: Tensor, index: int) -> Any:
            loss = loss_of(self.net, batch)
            if not manual:
                return loss
            optimizer, scheduler = self.optimizers(), self.lr_schedulers()
            self.manual_backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            return None

        def configure_optimizers(self) -> Any:
            optimizer = cases.build("GaLoreAdamW", self.net.parameters())
            if mode is not None:
                attach_in_backward(optimizer, mode)
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    return Module()


def fit(module: Any, **options: Any) -> Any:
    lightning = pytest.importorskip("lightning")
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(rows(), batch_size=None))
    return trainer


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", [None, "project", "step"])
def test_lightning_manual(mode: str | None) -> None:
    module = lightning_module(True, mode)
    fit(module)
    assert equal(module.net, plain())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("pieces", [1, 3])
def test_lightning_automatic(pieces: int) -> None:
    """Its closure runs backward inside ``step``; clipping and accumulation are its own."""
    module = lightning_module(False)
    fit(module, accumulate_grad_batches=pieces, gradient_clip_val=0.05)
    reference = plain(pieces, 0.05)
    for a, b in zip(module.net.parameters(), reference.parameters(), strict=True):
        assert_close(a, b)


@pytest.mark.filterwarnings("ignore")
def test_lightning_automatic_inside_backward_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="manual optimization"):
        module = lightning_module(False)
        configure = module.configure_optimizers

        def attached() -> Any:
            optimizers, schedulers = configure()
            attach_in_backward(optimizers[0])
            return optimizers, schedulers

        module.configure_optimizers = attached
        fit(module)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_lightning_mixed_precision(precision: str) -> None:
    """Clipping under ``16-mixed`` too, where its plugin unscales and asks the optimizer first."""
    from lightning.pytorch.plugins.precision import MixedPrecision

    module = lightning_module(False)
    options: dict[str, Any] = {"precision": precision}
    if precision == "16-mixed":  # its own scaler would be that of CUDA
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        options = {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}
    fit(module, gradient_clip_val=0.05, **options)
    dtype = torch.bfloat16 if precision == "bf16-mixed" else torch.float16
    model = net()
    optimizer = cases.build("GaLoreAdamW", model.parameters())
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, enabled=dtype == torch.float16)
    for x in rows():
        with torch.autocast("cpu", dtype):
            loss = loss_of(model, x)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        optimizer.zero_grad()
    for a, b in zip(module.net.parameters(), model.parameters(), strict=True):
        assert_close(a, b)


class Container:
    """What torchtitan does: groups by regular expression, first match wins; state made by a step.

    That first step has zero gradients and lr = 0, so that a checkpoint can be loaded into it.
    """

    def __init__(self, model: nn.Module, patterns: dict[str, dict[str, Any]], cls: Any) -> None:
        groups: dict[str, dict[str, Any]] = {
            p: {"params": [], "param_names": [], **k} for p, k in patterns.items()
        }
        for name, param in model.named_parameters():
            pattern = next(p for p in patterns if re.search(p, name))
            groups[pattern]["params"].append(param)
            groups[pattern]["param_names"].append(name)
        self.optimizer = cls(list(groups.values()))

    def init_state(self) -> None:
        rates = [g["lr"] for g in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
            for param in group["params"]:
                param.grad = torch.zeros_like(param)
        self.optimizer.step()
        for group, lr in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = lr
        self.optimizer.zero_grad()


@pytest.mark.parametrize("attach", [False, True])
def test_the_initialising_step_of_torchtitan(attach: bool) -> None:
    """It changes no weight, and a checkpoint loaded after it continues to the bit."""
    patterns = {r"^0\.weight": {"rank": 4, "lr": 1e-2}, r".": {"lr": 3e-3}}
    runs = []
    for interrupted in (False, True):
        model = net()
        box = Container(model, patterns, GaLoreAdamW)
        if attach:
            attach_in_backward(box.optimizer)
        start = [p.detach().clone() for p in model.parameters()]
        box.init_state()
        assert all(torch.equal(p, s) for p, s in zip(model.parameters(), start, strict=True))
        for n, x in enumerate(rows()):
            if interrupted and n == 5:
                weights, state = model.state_dict(), box.optimizer.state_dict()
                model = net(seed=9)
                box = Container(model, patterns, GaLoreAdamW)
                box.init_state()
                model.load_state_dict(weights)
                box.optimizer.load_state_dict(state)
            loss_of(model, x).backward()
            box.optimizer.step()
            box.optimizer.zero_grad()
        runs.append(model)
    assert equal(*runs)


@pytest.mark.parametrize("mode", ["project", "step"])
def test_ema_of_the_weights(mode: Any) -> None:
    """``swa_utils`` copies the model and averages weights that change inside backward."""
    averages = []
    for attach in (False, True):
        model = net()
        optimizer = cases.build("GaLoreAdamW", model.parameters())
        if attach:
            attach_in_backward(optimizer, mode)
        ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        for x in rows():
            loss_of(model, x).backward()
            optimizer.step()
            ema.update_parameters(model)
            optimizer.zero_grad()
        averages.append(ema.module)
        assert not equal(ema.module, model)
    assert equal(*averages)
