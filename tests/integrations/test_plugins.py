"""axolotl's plugin and torchtitan's container, by the interfaces that the two document."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lowrank_optim import FiraAdamW, GaLoreAdamW
from lowrank_optim.integrations.axolotl import LowRankArgs, LowRankPlugin
from lowrank_optim.integrations.torchtitan import with_lowrank
from tests.integrations.test_released import not_installed  # noqa: F401  (a fixture)
from tests.integrations.trainers import (
    arguments,
    assert_equal_models,
    data,
    distance,
    model,
    trainer,
    transformers,
)

# ------------------------------------------------------------------ axolotl


class AxolotlTrainer(transformers.Trainer):
    """Calls a factory with its arguments, as axolotl's does."""

    def create_optimizer(self, model: Any = None) -> Any:
        if self.optimizer is None and self.optimizer_cls_and_kwargs is not None:
            factory, kwargs = self.optimizer_cls_and_kwargs
            self.optimizer = factory()(self.model, self.args, **kwargs)
        return super().create_optimizer(model)


def of_axolotl(cfg: dict[str, Any], args: Any) -> Any:
    plugin = LowRankPlugin()
    plugin.register(cfg)
    run = AxolotlTrainer(model=model(), args=args, train_dataset=data())
    assert plugin.add_callbacks_post_trainer(cfg, run) == []
    return run


def test_a_section_of_axolotl_trains_its_method(tmp_path: Path) -> None:
    """As Trainer does with the same method and options, to the bit."""
    section = {"method": "FiraAdamW", "projector": "dct", "target_modules": ["attn", "mlp"]}
    cfg = {"optimizer": "adamw_torch", "lowrank_optim": section}
    run = of_axolotl(cfg, arguments(tmp_path, max_steps=3))
    run.train()
    options = {k: v for k, v in section.items() if k != "method"}
    direct = trainer(arguments(tmp_path, max_steps=3), method=FiraAdamW, **options)
    direct.train()
    assert type(run.optimizer.optimizer) is FiraAdamW
    assert_equal_models(run.model, direct.model)
    assert distance(run.model, model()) > 1e-3


@pytest.mark.usefixtures("not_installed")
@pytest.mark.parametrize("optimizer", ["galore_adamw", "galore_adamw_8bit_layerwise", "sgd"])
def test_axolotls_own_names_find_this_package(optimizer: str) -> None:
    LowRankPlugin().register({"optimizer": optimizer})
    assert ("galore_torch" in sys.modules) == optimizer.startswith("galore")


@pytest.mark.parametrize(
    ("cfg", "args", "said"),
    [
        (
            {"lowrank_optim": {"method": "Galore"}},
            {},
            r"must be one of Apollo.* got 'Galore'",
        ),
        ({"lowrank_optim": "GaLoreAdamW"}, {}, r"a section of keys, .* got 'GaLoreAdamW'"),
        ({"optimizer": "lion_8bit", "lowrank_optim": {}}, {}, r"optimizer: lion_8bit and .* both"),
        ({"lowrank_optim": {}}, {"embedding_lr": 1e-5}, r"embedding_lr makes groups .*overrides"),
        ({"lowrank_optim": {"lr": 1e-3}}, {}, r"learning_rate=0.01 .* lr=0.001 .* differ"),
    ],
    ids=str,
)
def test_what_a_config_of_axolotl_may_not_say(
    tmp_path: Path, cfg: Any, args: Any, said: str
) -> None:
    fields = arguments(tmp_path)
    for key, value in args.items():  # axolotl's own arguments have them
        setattr(fields, key, value)
    with pytest.raises(ValueError, match=said):
        of_axolotl(cfg, fields)


def test_the_section_is_a_part_of_the_config() -> None:
    module, _, name = LowRankPlugin().get_input_args().rpartition(".")
    assert getattr(sys.modules[module], name) is LowRankArgs
    run = transformers.Trainer(model=model(), args=None)
    assert LowRankPlugin().add_callbacks_post_trainer({}, run) == []
    assert run.optimizer_cls_and_kwargs is None  # no section, nothing changes


# ------------------------------------------------------------------ torchtitan


class OptimizersContainer:
    """What torchtitan's says of how it finds and makes optimizers."""

    @dataclass(kw_only=True, slots=True)
    class Config:
        groups: list[tuple[str, str, dict[str, Any]]]
        by_name: dict[str, dict[str, Any]] = field(default_factory=dict)

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Callable[..., torch.optim.Optimizer]:
        known: dict[str, Callable[..., torch.optim.Optimizer]] = {"AdamW": torch.optim.AdamW}
        if name not in known:
            raise NotImplementedError(f"Optimizer {name} not added.")
        return known[name]

    def __init__(self, config: Any, part: nn.Module) -> None:
        left, made = dict(part.named_parameters()), {}
        for start, name, options in config.groups:
            names = [n for n in left if n.startswith(start)]
            params = [left.pop(n) for n in names]
            group = {"params": params, "param_names": names, "fused": True, "foreach": False}
            made.setdefault(name, []).append({**group, **options})
        self.optimizers = [
            self._resolve_optimizer_factory(name)(groups, **config.by_name.get(name, {}))
            for name, groups in made.items()
        ]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"tok_embeddings": nn.Embedding(9, 8), "wq": nn.Linear(8, 6)})


def test_torchtitan_finds_an_optimizer_by_its_name() -> None:
    """With the constructor's rank embeddings stay dense; one of a group is for all that matches."""
    container = with_lowrank(OptimizersContainer)
    for projected, in_group, for_all in (
        ({"wq.weight"}, {}, {"rank": 2}),
        ({"wq.weight", "tok_embeddings.weight"}, {"rank": 2}, {}),
    ):
        part, alone = net(), net()
        made = container(
            container.Config(
                groups=[
                    ("wq.bias", "AdamW", {"lr": 1e-2}),
                    ("", "GaLoreAdamW", {"lr": 1e-2, **in_group}),
                ],
                by_name={"GaLoreAdamW": for_all},
            ),
            part,
        )
        theirs, ours = made.optimizers
        assert type(theirs) is torch.optim.AdamW and type(ours) is GaLoreAdamW
        assert theirs.param_groups[0]["fused"] is True  # which is for torch's alone
        named = [(n, p) for n, p in alone.named_parameters() if n != "wq.bias"]
        direct = GaLoreAdamW([{"params": named, **in_group}], lr=1e-2, **for_all)
        for params, optimizer in ((part, ours), (alone, direct)):
            for n, p in enumerate(params.parameters()):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(n))
            optimizer.step()
        found = {n for n, p in part.named_parameters() if "basis" in ours.state.get(p, {})}
        assert found == projected
        for (n, a), b in zip(part.named_parameters(), alone.parameters(), strict=True):
            assert n == "wq.bias" or torch.equal(a, b)


def test_torchtitan_says_which_names_there_are_not() -> None:
    with pytest.raises(NotImplementedError, match="Galore not added"):
        with_lowrank(OptimizersContainer)._resolve_optimizer_factory("Galore")
    with pytest.raises(TypeError, match=r"dict has no _resolve_optimizer_factory.*build_optim"):
        with_lowrank(dict)
