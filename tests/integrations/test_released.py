"""Names of released packages: the strings of transformers, run by its Trainer."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import pickle
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lowrank_optim
from lowrank_optim.groups.keys import METHODS
from lowrank_optim.integrations import as_apollo_torch, as_galore_torch, released
from tests.integrations.trainers import (
    arguments,
    assert_equal_models,
    data,
    distance,
    model,
    transformers,
)

MODULES = tuple(released.RELEASES)


class Without:
    """A finder to which no released package is installed."""

    def __init__(self, finder: Any) -> None:
        self.finder = finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self.finder, name)

    def find_spec(self, fullname: str, *args: Any) -> Any:
        return None if fullname in MODULES else self.finder.find_spec(fullname, *args)

    def find_distributions(self, context: Any) -> Any:
        name = re.sub(r"[-_.]+", "_", context.name or "").lower()
        found = getattr(self.finder, "find_distributions", lambda context: ())
        return () if name in MODULES else found(context)


@pytest.fixture
def not_installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from transformers.utils import import_utils

    for name in [n for n in sys.modules if n.split(".")[0] in MODULES]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Without(finder) for finder in sys.meta_path])
    monkeypatch.setattr(released._FINDER, "modules", {})
    import_utils.is_galore_torch_available.cache_clear()
    assert not import_utils.is_galore_torch_available()  # which it remembers
    yield
    for name in MODULES:
        sys.modules.pop(name, None)
    import_utils.is_galore_torch_available.cache_clear()


KEYS = {"rank": 4, "update_proj_gap": 2, "scale": 0.5, "proj_type": "std"}
FIXED: dict[str, tuple[str, dict[str, Any]]] = {
    "galore_adamw": ("GaLoreAdamW", {"eps": 1e-6, "weight_decay": 0.0}),
    "galore_adamw_8bit": ("GaLoreAdamW8bit", {"eps": 1e-8, "weight_decay": 1e-2}),
    "galore_adafactor": (
        "GaLoreAdafactor",
        {"relative_step": False, "scale_parameter": False, "weight_decay": 0.0},
    ),
}
"""Classes of the strings, and what the release does where Trainer says nothing."""


def strings(folder: Path, optim: str, **fields: Any) -> Any:
    return arguments(
        folder, optim=optim, optim_target_modules=["attn", "mlp"], weight_decay=0.0,
        **{"max_grad_norm": 0.0, **fields},
    )  # fmt: skip


def split(net: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """What the strings leave dense, and what they project."""
    low = [n for n, p in net.named_parameters() if p.dim() == 2 and ("attn" in n or "mlp" in n)]
    named = dict(net.named_parameters())
    return [p for n, p in named.items() if n not in low], [named[n] for n in low]


class Each(torch.optim.Optimizer):
    """One optimizer a parameter, stepped together: layer-wise steps but for when they happen."""

    def __init__(self, optimizers: list[torch.optim.Optimizer], lr: float) -> None:
        params = [p for o in optimizers for g in o.param_groups for p in g["params"]]
        super().__init__(params, {"lr": lr})
        self.optimizers = optimizers

    def step(self, closure: Any = None) -> None:
        for optimizer in self.optimizers:
            optimizer.param_groups[0]["lr"] = self.param_groups[0]["lr"]
            optimizer.step()


def by_hand(net: nn.Module, optim: str, lr: float) -> torch.optim.Optimizer:
    name, options = FIXED[optim.removesuffix("_layerwise")]
    make = METHODS[name]
    dense, low = split(net)
    if optim == optim.removesuffix("_layerwise"):
        return make([{"params": dense, "rank": None}, {"params": low, **KEYS}], lr=lr, **options)
    each = [make([{"params": [p], "rank": None}], lr=lr, **options) for p in dense]
    each += [make([{"params": [p], **KEYS}], lr=lr, **options) for p in low]
    return Each(each, lr)


@pytest.mark.usefixtures("not_installed")
@pytest.mark.parametrize(
    ("optim", "suffix"),
    [
        pytest.param(optim, suffix, marks=pytest.mark.slow if (n + bool(suffix)) % 2 else ())
        for n, optim in enumerate(FIXED)
        for suffix in ("", "_layerwise")
    ],
)
def test_strings_train_as_classes_made_by_hand(tmp_path: Path, optim: str, suffix: str) -> None:
    """To the bit, with what is no linear layer dense; under a schedule where Trainer applies it.

    transformers 5.23 gives that of the layer-wise strings to the optimizer that does nothing.
    """
    optim += suffix
    as_galore_torch()
    fields = {"lr_scheduler_type": "constant" if suffix else "cosine"}
    net = model()
    run = transformers.Trainer(
        model=net, args=strings(tmp_path, optim, **fields), train_dataset=data()
    )
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        run.create_optimizer()
    told = [str(w.message) for w in seen if "layer-wise" in str(w.message)]
    assert bool(told) == bool(suffix) and all("in_backward='step'" in text for text in told)
    run.train()
    made = run.optimizer.optimizer
    for optimizer in made.optimizer_dict.values() if suffix else [made]:
        assert type(optimizer).__name__ == FIXED[optim.removesuffix("_layerwise")][0]
        assert isinstance(optimizer, METHODS[type(optimizer).__name__])
    dense, low = split(net)
    assert net.model.embed_tokens.weight in set(dense)
    for param in (*dense, *low):
        state = (made.optimizer_dict[param] if suffix else made).state[param]
        assert ("basis" in state) == (param in set(low))

    other = model()
    args = strings(tmp_path, "adamw_torch", **fields)
    optimizer = by_hand(other, optim, args.learning_rate)
    hand = transformers.Trainer(
        model=other, args=args, train_dataset=data(), optimizers=(optimizer, None)
    )
    hand.train()
    assert_equal_models(net, other)
    assert distance(net, model()) > 1e-3


@pytest.mark.slow
@pytest.mark.usefixtures("not_installed")
@pytest.mark.filterwarnings("ignore:the layer-wise")
def test_what_trainer_does_not_do_for_layer_wise_strings(tmp_path: Path) -> None:
    """The warning and docs/guides/by_name.md say so; a Trainer that does is a reason to change."""
    as_galore_torch()
    args = strings(tmp_path, "galore_adamw_layerwise", lr_scheduler_type="cosine")
    run = transformers.Trainer(model=model(), args=args, train_dataset=data())
    run.train()
    made = run.optimizer.optimizer
    rates = {o.param_groups[0]["lr"] for o in made.optimizer_dict.values()}
    assert rates == {args.learning_rate} and len(run.optimizer.state_dict()["state"]) == 0


@pytest.mark.usefixtures("not_installed")
def test_transformers_and_importlib_see_it() -> None:
    from transformers.utils import import_utils

    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("galore_torch")
    module = as_galore_torch()
    import galore_torch

    assert galore_torch is module and import_utils.is_galore_torch_available()
    assert importlib.util.find_spec("galore_torch") is module.__spec__
    for name in ("galore_torch", "galore-torch", "GaLore.torch"):
        assert importlib.metadata.version(name) == "1.0+lowrank.optim"
    transformers.utils.versions.require_version("galore_torch>=1.0")
    assert import_utils._is_package_available("galore_torch", return_version=True)[0]
    assert METHODS["GaLoreAdamW"] is lowrank_optim.GaLoreAdamW  # and not what stands in


def test_an_installed_package_is_left_alone() -> None:
    pytest.importorskip("galore_torch")
    before = sys.modules["galore_torch"]
    with pytest.raises(RuntimeError, match=r"galore_torch is installed \(.*pip uninstall"):
        as_galore_torch()
    assert sys.modules["galore_torch"] is before


@pytest.mark.usefixtures("not_installed")
def test_what_was_looked_for_at_import_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of transformers 4, whose answer is a constant."""
    from transformers.utils import import_utils

    monkeypatch.setattr(import_utils, "is_galore_torch_available", lambda: False)
    with pytest.raises(RuntimeError, match=r"call as_galore_torch\(\) before it is imported"):
        as_galore_torch()
    assert importlib.util.find_spec("galore_torch") is None
    monkeypatch.undo()


@pytest.mark.usefixtures("not_installed")
def test_the_arguments_of_the_release() -> None:
    module = as_galore_torch()

    def group(name: str, *args: Any, **kwargs: Any) -> Any:
        weight = nn.Parameter(torch.zeros(8, 6))
        optimizer = getattr(module, name)([weight], *args, **kwargs)
        return optimizer.param_groups[0]

    plain = group("GaLoreAdamW", 1e-2, (0.8, 0.9), correct_bias=True, no_deprecation_warning=True)
    assert [plain[k] for k in ("rank", "lr", "betas", "eps")] == [None, 1e-2, (0.8, 0.9), 1e-6]
    paged = group("GaLoreAdamW8bit", optim_bits=8, block_wise=True, is_paged=True)
    assert (paged["state_dtype"], paged["state_device"]) == ("8bit", "cpu")
    assert group("GaLoreAdamW8bit", optim_bits=32)["state_dtype"] == "8bit"
    own = group("GaLoreAdafactor")
    assert own["relative_step"] and own["scale_parameter"]
    rate = group("GaLoreAdafactor", 1e-2)
    assert not rate["relative_step"] and not rate["scale_parameter"]
    assert group("GaLoreAdafactor", 1e-2, relative_step=False)["scale_parameter"]
    with pytest.raises(TypeError, match=r"percentile_clipping.* bitsandbytes"):
        group("GaLoreAdamW8bit", percentile_clipping=5)
    with pytest.raises(TypeError, match="positional"):
        group("GaLoreAdamW", 1e-2, (0.8, 0.9), 1e-8, 0.0, True)
    with pytest.raises(ValueError, match="correct_bias=False is not supported"):
        group("GaLoreAdamW", correct_bias=False)


@pytest.mark.usefixtures("not_installed")
@pytest.mark.parametrize(
    ("optim", "name", "said"),
    [
        ("adamw_torch", "GaLoreAdamW", {"betas": (0.8, 0.95), "eps": 1e-6}),
        ("adamw_8bit", "GaLoreAdamW8bit", {"betas": (0.8, 0.95), "state_device": None}),
        ("paged_adamw_8bit", "GaLoreAdamW8bit", {"eps": 1e-6, "state_device": "cpu"}),
        ("adafactor", "GaLoreAdafactor", {"relative_step": False, "scale_parameter": False}),
    ],
)
def test_what_llama_factory_hands_on(tmp_path: Path, optim: str, name: str, said: Any) -> None:
    """It makes groups itself, one of them empty, for the arguments of another optimizer."""
    if optim.endswith("8bit"):
        pytest.importorskip("bitsandbytes")
    args = arguments(tmp_path, optim=optim)
    _, kwargs = transformers.Trainer.get_optimizer_cls_and_kwargs(args)
    weights = [nn.Parameter(torch.ones(8, 6)) for _ in range(2)]
    groups = [
        {"params": [], "weight_decay": 0.0},
        {"params": weights[:1], "weight_decay": 0.3},
        {"params": weights[1:], "weight_decay": 0.1, **KEYS, "scale": 2.0},
    ]
    optimizer = getattr(as_galore_torch(), name)(groups, **kwargs)
    assert [g["rank"] for g in optimizer.param_groups] == [None, None, 4]
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.0, 0.3, 0.1]
    group = optimizer.param_groups[2]
    assert group["lr"] == args.learning_rate and {k: group[k] for k in said} == said
    alone = getattr(as_galore_torch(), name)(groups[1:2], **kwargs)  # as layer-wise
    assert alone.param_groups[0]["rank"] is None


@pytest.mark.usefixtures("not_installed")
def test_options_are_defaults_of_the_classes_that_know_them() -> None:
    module = as_galore_torch(projector="dct", betas=(0.8, 0.95), weight_decay=0.1)
    weight = nn.Parameter(torch.zeros(8, 6))
    groups = [{"params": [weight], "rank": 2}]
    group = module.GaLoreAdamW(groups).param_groups[0]
    assert [group[k] for k in ("rank", "projector", "betas")] == [2, "dct", (0.8, 0.95)]
    assert module.GaLoreAdamW(groups, weight_decay=0.0).param_groups[0]["weight_decay"] == 0.0
    factored = module.GaLoreAdafactor(groups).param_groups[0]
    assert (factored["projector"], factored["weight_decay"]) == ("dct", 0.1)
    with pytest.raises(TypeError, match=r"takes no rank, got 4: groups say theirs.*optim_args"):
        as_galore_torch(rank=4)
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'projektor': .* projector"):
        as_galore_torch(projektor="dct")
    assert as_galore_torch().GaLoreAdamW(groups).param_groups[0]["projector"] == "rsvd"


@pytest.mark.usefixtures("not_installed")
def test_checkpoints_and_pickles_are_ours() -> None:
    """A state goes into the class itself, and comes back."""
    module = as_galore_torch()
    weight = nn.Parameter(torch.ones(8, 6))
    groups = [{"params": [weight], "rank": 2}]
    stand_in = module.GaLoreAdamW(groups)
    weight.grad = torch.randn(8, 6)
    stand_in.step()
    ours = lowrank_optim.GaLoreAdamW(groups)
    ours.load_state_dict(stand_in.state_dict())
    assert torch.equal(ours.state[weight]["basis"], stand_in.state[weight]["basis"])
    stand_in.load_state_dict(ours.state_dict())
    again = pickle.loads(pickle.dumps(stand_in))
    assert type(again) is module.GaLoreAdamW


@pytest.mark.usefixtures("not_installed")
@pytest.mark.parametrize("optim_args", ["rank=4,update_proj_gap=2", "mini"])
def test_apollo_trains_as_the_class_made_by_hand(tmp_path: Path, optim_args: str) -> None:
    """To the bit: channels, and APOLLO-Mini, whose keys transformers puts into the group."""
    keys: dict[str, Any] = {"rank": 4, "update_proj_gap": 2}
    if optim_args == "mini":
        keys = {"rank": 1, "scale_type": "tensor", "scale": 128.0}
        optim_args = ",".join(f"{key}={value}" for key, value in keys.items())
    assert importlib.metadata.version(as_apollo_torch().__name__).startswith("1.0+lowrank")
    net, other = model(), model()
    args = strings(tmp_path, "apollo_adamw", optim_args=optim_args)
    run = transformers.Trainer(model=net, args=args, train_dataset=data())
    run.train()
    assert isinstance(run.optimizer.optimizer, METHODS["ApolloAdamW"])

    dense, low = split(other)
    keys |= {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    groups = [{"params": dense, "rank": None}, {"params": low, **keys}]
    fixed = {"weight_decay": 0.0, "eps": 1e-6}  # the release's, of what Trainer does not say
    optimizer = METHODS["ApolloAdamW"](groups, lr=args.learning_rate, **fixed)
    hand = transformers.Trainer(
        model=other,
        args=strings(tmp_path, "adamw_torch"),
        train_dataset=data(),
        optimizers=(optimizer, None),
    )
    hand.train()
    for mine, theirs in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert not torch.equal(net.lm_head.weight, model().lm_head.weight)
