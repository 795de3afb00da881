"""Keys of groups and of constructors: misspelt, of another method or package, a trainer's."""

from __future__ import annotations

import copy
import inspect
import re
import warnings
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import nn

from lowrank_optim import (
    PROJECTORS,
    DCTAdamW,
    FiraAdamW,
    FrugalAdamW,
    GaLoreAdafactor,
    GaLoreAdamW,
    GaLoreLion,
    GaLoreSGD,
    LowRankOptimizer,
    Projector,
    SSTAdamW,
    SwitchLoRAAdamW,
    lowrank_groups,
    methods,
    stores,
    subspaces,
    transports,
)
from lowrank_optim.groups import keys
from lowrank_optim.groups.keys import ALIASES, FOREIGN, SCHEDULED, TORCH_FLAGS, TRAINERS, known_keys
from lowrank_optim.groups.options import DEFAULTS, Options, ProjectorOptions
from lowrank_optim.groups.values import CHOICES, VALUES
from lowrank_optim.nn import CONVERTERS, FORMS, Factored, convert, register_form
from lowrank_optim.stores import STORES
from lowrank_optim.transports import TRANSPORTS
from tests import runs

CLASSES = [getattr(methods, name) for name in methods.__all__]
every_class = pytest.mark.parametrize("cls", CLASSES, ids=methods.__all__)


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.ones(shape or (12, 10)))


def rank_of(cls: type[LowRankOptimizer]) -> Any:
    return 0.5 if "density" in inspect.signature(cls).parameters else 4


def group(cls: type[LowRankOptimizer], **keys: Any) -> dict[str, Any]:
    return {"params": [weight()], "rank": rank_of(cls), **keys}


def documented() -> dict[str, str]:
    """Options, and the default that the docstring of each says."""
    text = "\n".join(map(inspect.getsource, (Options, ProjectorOptions)))
    entries = re.findall(r'^    (\w+): [^\n]+\n    """(.*?)"""', text, re.S | re.M)
    return {key: said[1] for key, text in entries if (said := re.search(SAID, text))}


SAID = r'\(default: "?([^\s;,")]+)'


def test_the_default_of_every_option_is_the_one_that_its_docstring_says() -> None:
    """Those that a projector reads had none."""
    own = {f.name: f.default for cls in PROJECTORS.values() for f in fields(cls)}
    expected = {**own, **DEFAULTS}
    wanted = ProjectorOptions.__annotations__ | Options.__annotations__
    assert documented() == {key: str(expected[key]) for key in wanted}


# ------------------------------------------------------------------ misspelt


@every_class
@pytest.mark.parametrize("second", [False, True])
def test_a_misspelt_group_key_names_class_group_and_nearest_key(cls: Any, second: bool) -> None:
    groups = [group(cls)] * second + [group(cls, projecter="svd")]
    message = (
        f"{cls.__name__}: unknown group key 'projecter' in group {int(second)}; "
        "did you mean 'projector'?"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        cls(groups)
    optimizer = cls([group(cls)])
    before = copy.deepcopy(optimizer.state_dict()), len(optimizer.param_groups)
    with pytest.raises(ValueError, match="unknown group key 'projecter' in group 1"):
        optimizer.add_param_group(group(cls, projecter="svd"))
    assert (optimizer.state_dict(), len(optimizer.param_groups)) == before


@every_class
def test_a_misspelt_argument_names_class_and_nearest_argument(cls: Any) -> None:
    message = f"{cls.__name__}() got an unexpected keyword argument 'rnak'; did you mean 'rank'?"
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        cls([weight()], rnak=4)


def test_where_nothing_is_near_the_keys_are_listed() -> None:
    with pytest.raises(
        ValueError, match=r"'xyzzy' in group 0; keys are betas, capturable, eps, .*weight_deca"
    ):
        GaLoreAdamW([group(GaLoreAdamW, xyzzy=1)])
    with pytest.raises(TypeError, match=r"argument 'xyzzy'; keys are amsgrad, betas, .*'_'"):
        GaLoreAdamW([weight()], xyzzy=1)


def test_lowrank_groups_knows_the_keys_of_all_methods() -> None:
    model = nn.Sequential(nn.Linear(12, 10))
    message = r"^lowrank_groups\(\) got an unexpected keyword argument 'projecter'; did .*'projec"
    with pytest.raises(TypeError, match=message):
        lowrank_groups(model, rank=2, projecter="svd")
    message = r"^lowrank_groups: unknown group key 'rnak' in the override of '0'; did .* 'rank'\?"
    with pytest.raises(ValueError, match=message):
        lowrank_groups(model, rank=2, overrides={"0": {"rnak": 3}})
    with pytest.raises(TypeError, match=r"'target_module'; did you mean 'target_modules'\?"):
        lowrank_groups(model, target_module="0")
    with pytest.raises(TypeError, match="'params'"):
        lowrank_groups(model, params=[])


@pytest.fixture(autouse=True)
def package_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Classes that other tests made in this process are registered too."""
    monkeypatch.setattr(keys, "METHODS", dict(zip(methods.__all__, CLASSES, strict=True)))


def test_every_key_of_every_class_has_a_check() -> None:
    """A new argument without one would be read as it comes."""
    checked = {*VALUES, *CHOICES, "rank", "density", "lr", "betas", "eps"}
    checked |= {"weight_decay", "momentum"}
    for cls in CLASSES:
        assert cls.group_keys() - checked - {*cls.extra_keys} == set(), cls.__name__
    assert known_keys() - checked == {"form", "shapes", "indices"}


def test_the_constructor_of_a_wrapper_adds_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning makes its wrapper a subclass of what it wraps: ``optimizer=`` was a known key."""
    registered: dict[str, Any] = {}
    monkeypatch.setattr(keys, "METHODS", registered)

    class Wrapper:
        def __init__(self, optimizer: Any) -> None:
            pass

    for cls in CLASSES:
        registered[cls.__name__] = type(f"Wrapped{cls.__name__}", (Wrapper, cls), {})
        assert registered[cls.__name__].group_keys() == cls.group_keys()
    assert "optimizer" not in known_keys()


# ------------------------------------------------------------------ of another method

OTHERS: list[tuple[type[LowRankOptimizer], str, Any, str]] = [
    (GaLoreAdamW, "interval", 20, "SwitchLoRAAdamW, SwitchLoRAAdamW8bit read 'interval'"),
    (GaLoreAdamW, "free_rule", "sign", r"FrugalAdamW, FrugalAdamW8bit, FrugalLion and 1 more read"),
    (
        FiraAdamW,
        "error_feedback",
        "8bit",
        r"DCTAdamW, DCTAdamW8bit, LDAdamW and \d+ more read 'error_feedback'",
    ),
    (
        GaLoreAdamW,
        "limiter",
        1.01,
        r"ApolloAdamW, ApolloAdamW8bit, FiraAdamW and \d+ more read 'limiter'",
    ),
    (GaLoreLion, "eps", 1e-8, r"ApolloAdamW, ApolloAdamW8bit, BAdamW and \d+ more read 'eps'"),
    (GaLoreAdamW, "momentum", 0.9, "FrugalSGD, GaLoreSGD read 'momentum'"),
    (GaLoreAdamW, "sampling", "topr", "SSTAdamW, SSTAdamW8bit read 'sampling'"),
    (GaLoreAdamW, "clip_threshold", 1.0, "GaLoreAdafactor reads 'clip_threshold'"),
]


@pytest.mark.parametrize(("cls", "key", "value", "message"), OTHERS)
def test_a_key_of_another_method_names_who_reads_it(
    cls: Any, key: str, value: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=f"'{key}' in group 0.*{message}"):
        cls([group(cls, **{key: value})])
    with pytest.raises(TypeError, match=f"keyword argument '{key}'"):
        cls([weight()], **{key: value})


def test_keys_of_a_projector_go_with_it() -> None:
    message = "unknown group key 'oversample' in group 0: projector='rsvd' reads 'oversample'"
    with pytest.raises(ValueError, match=message):
        GaLoreAdamW([group(GaLoreAdamW, projector="svd", oversample=4)])
    assert GaLoreAdamW([group(GaLoreAdamW, oversample=4)]).param_groups[0]["oversample"] == 4
    made = GaLoreAdamW([group(GaLoreAdamW, projector="dct", transform="fft")])
    assert made.param_groups[0]["transform"] == "fft"


@pytest.mark.parametrize("method", ["sst", "switchlora"])
def test_groups_of_converted_modules_are_for_their_own_optimizer(method: str) -> None:
    """Their factors would be trained as weights of their own, side by side with each other."""
    groups = convert(nn.Sequential(nn.Linear(12, 10)), method, rank=2)
    with pytest.raises(ValueError, match="GaLoreAdamW: unknown group key"):
        GaLoreAdamW(groups)


@pytest.mark.parametrize("cls", [SSTAdamW, SwitchLoRAAdamW])
def test_an_option_without_a_meaning_warns_once(cls: Any) -> None:
    message = rf"{cls.__name__} does not use .*update_proj_gap=7 \(\w+ .*\): leave it out"
    with pytest.warns(UserWarning, match=message) as caught:
        optimizer = cls([group(cls)], update_proj_gap=7, projector="svd")
        optimizer.add_param_group(group(cls))
    assert len(caught) == 1 and "projector='svd'" in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cls([group(cls)])
        cls(cls([group(cls)]).param_groups)


# ------------------------------------------------------------------ of other packages


@pytest.mark.parametrize(
    "keys",
    [
        {"rank": 1, "proj": "random", "scale_type": "tensor", "scale": 128,
         "update_proj_gap": 200, "proj_type": "std"},  # APOLLO-Mini, and LLaMA-Factory's
        {"rank": 4, "proj": "random", "scale_type": "channel", "update_proj_gap": 200,
         "scale": 1.0, "proj_type": "std", "betas": (0.9, 0.999), "eps": 1e-8},  # transformers
    ],
)  # fmt: skip
@pytest.mark.parametrize("cls", [GaLoreAdamW, FiraAdamW, FrugalAdamW])
def test_groups_of_apollo_are_refused(cls: Any, keys: dict[str, Any]) -> None:
    """They trained, at 128 times the scale that was meant."""
    message = (
        rf"{cls.__name__}: 'scale_type', 'proj' in group 1 are APOLLO's, whose scale "
        rf"{keys['scale']} .*rank, update_proj_gap, proj_type and scale"
    )
    with pytest.raises(ValueError, match=message):
        cls([{"params": [weight(3)]}, {"params": [weight()], **keys}])
    with pytest.raises(ValueError, match="'scale_type' in the constructor is APOLLO's"):
        cls([weight()], scale_type="tensor")
    model = nn.Sequential(nn.Linear(8, 8))
    for made in (
        lowrank_groups(model, scale_type="tensor"),
        lowrank_groups(model, overrides={"0": {"proj": "random"}}),
    ):
        with pytest.raises(ValueError, match=r"'\w+' in group 0 is APOLLO's"):
            cls(made)


@pytest.mark.parametrize("key", FOREIGN)
def test_keys_of_other_packages_have_a_remedy(key: str) -> None:
    message = (
        f"'{key}' in group 0: it is (bitsandbytes|Muon|pytorch_optimizer|Q-GaLore|LDAdam)'s?; "
    )
    with pytest.raises(ValueError, match=message):
        GaLoreAdamW([group(GaLoreAdamW, **{key: True})])
    with pytest.raises(TypeError, match=rf"GaLoreAdamW\(\) got .*'{key}': it is "):
        GaLoreAdamW([weight()], **{key: True})


@pytest.mark.parametrize("alias", ALIASES)
def test_released_names_are_for_groups_and_constructors_say_ours(alias: str) -> None:
    ours = ALIASES[alias][0]
    cls = next(c for c in CLASSES if ours in c.group_keys())
    if alias in inspect.signature(cls).parameters:
        return
    with pytest.raises(TypeError, match=f"argument '{alias}'; here it is '{ours}'"):
        cls([weight()], **{alias: 1})


def test_groups_of_pytorch_optimizer_galore_are_read() -> None:
    keys = {"rank": 4, "update_proj_gap": 50, "scale": 0.5, "projection_type": "right"}
    found = GaLoreAdamW([{"params": [weight()], **keys}]).param_groups[0]
    assert found["proj_type"] == "right" and found["scale"] == 0.5


# ------------------------------------------------------------------ torch's own


@every_class
@pytest.mark.parametrize("flag", TORCH_FLAGS)
def test_flags_of_torch_are_understood_or_refused(cls: Any, flag: str) -> None:
    """None and the value that is true here change nothing; the other is refused with a reason."""
    true, why = TORCH_FLAGS[flag]
    plain = cls([group(cls)]).param_groups[0].keys()
    for value in (None, true):
        assert cls([group(cls)], **{flag: value}).param_groups[0].keys() == plain
        assert cls([group(cls, **{flag: value})]).param_groups[0].keys() == plain
    message = f"{cls.__name__}: {flag} must be None or {true}, got {not true}: {why}; leave it out"
    for params, own in (([weight()], {flag: not true}), ([group(cls, **{flag: not true})], {})):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            cls(params, **own)


def test_groups_of_torch_adamw_are_taken_over() -> None:
    """All of its keys, a scheduler's too: a drop-in may be made from the optimizer it replaces."""
    adamw = torch.optim.AdamW([weight()], lr=0.02, betas=(0.8, 0.9), weight_decay=0.3)
    torch.optim.lr_scheduler.OneCycleLR(adamw, max_lr=0.1, total_steps=10)
    taken = GaLoreAdamW(adamw.param_groups, rank=4).param_groups[0]
    for key in ("lr", "betas", "eps", "weight_decay", "maximize", "initial_lr", "max_lr"):
        assert taken[key] == adamw.param_groups[0][key]
    assert not TORCH_FLAGS.keys() & taken.keys()


@every_class
def test_an_optimizer_can_be_made_from_the_groups_of_one_of_its_class(cls: Any) -> None:
    first = cls([group(cls)])
    again = cls(first.param_groups)
    assert again.param_groups[0] == first.param_groups[0]


@pytest.mark.parametrize("key", [*TRAINERS, *SCHEDULED, "_mine", "_tag"])
def test_keys_of_trainers_and_your_own_stay_where_they_are(key: str) -> None:
    optimizer = GaLoreAdamW([group(GaLoreAdamW, **{key: 0.5})])
    assert optimizer.param_groups[0][key] == 0.5
    runs.loaded(runs.saved(optimizer))
    model = nn.Sequential(nn.Linear(8, 8))
    assert lowrank_groups(model, rank=2, overrides={"0.weight": {key: 0.5}})[0][key] == 0.5


def test_a_checkpoint_with_keys_of_another_time_still_loads() -> None:
    params = list(runs.parameters().values())
    optimizer = GaLoreAdamW(params, rank=3)
    runs.train(params, optimizer, range(2))
    old = copy.deepcopy(optimizer.state_dict())
    old["param_groups"][0] |= {"foreach": None, "fused": True, "long_gone": 3}
    del old["param_groups"][0]["flatten"]
    twin = GaLoreAdamW(runs.copies(params), rank=3)
    twin.load_state_dict(old)
    runs.assert_same_state(runs.entries(twin), runs.entries(optimizer))
    assert twin.param_groups[0]["flatten"] is False


# ------------------------------------------------------------------ before anything is read


class Untouched:
    """Parameters that must not be asked for."""

    def __iter__(self) -> Any:
        raise AssertionError("params were read")


@every_class
@pytest.mark.parametrize(
    "options",
    [
        {"lr": torch.tensor([1e-3, 1e-3])},
        {"lr": -1.0},
        {"weight_decay": -1.0},
        {"rnak": 3},
        {"amsgrad": True},
        {"seed": -1},
        {"projector": "qr"},
    ],
    ids=str,
)
def test_hyper_parameters_are_checked_before_params_are_read(cls: Any, options: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        cls(Untouched(), **options)


@pytest.mark.parametrize("share", [0, 1.0])
def test_a_density_that_another_method_cannot_have_is_called_one(share: float) -> None:
    """A group's density is its rank, which nobody gave here."""
    group = {"params": [nn.Parameter(torch.zeros(8, 16))], "density": share}
    with pytest.raises(ValueError, match=r"got \d\.0; FRUGAL alone takes a density of 0 or 1"):
        GaLoreAdamW([group])


def test_so_are_those_of_one_method() -> None:
    cases: list[tuple[Any, dict[str, Any]]] = [
        (SwitchLoRAAdamW, {"interval": 3}),
        (SwitchLoRAAdamW, {"scale": 0.0}),
        (DCTAdamW, {"ranking": "l3"}),
        (FrugalAdamW, {"density": 2.0}),
        (GaLoreSGD, {"nesterov": True}),
        (GaLoreAdafactor, {"relative_step": False, "warmup_init": True}),
    ]
    for cls, options in cases:
        with pytest.raises(ValueError):
            cls(Untouched(), **options)


def a_form(name: str) -> None:
    register_form(name)(type("Other", (Factored,), {}))


@pytest.mark.parametrize(
    ("registry", "name", "register"),
    [
        pytest.param(FORMS, "sst", a_form, id="form"),
        pytest.param(CONVERTERS, "switchlora", a_form, id="converter"),
        pytest.param(
            STORES, "8bit", lambda name: stores.register(name, STORES["float32"]), id="store"
        ),
        pytest.param(
            TRANSPORTS, "keep", lambda name: transports.register(name)(print), id="transport"
        ),
        pytest.param(
            PROJECTORS, "svd", lambda name: subspaces.register(name)(Projector), id="projector"
        ),
    ],
)
def test_a_name_that_is_taken_is_not_given_to_another(
    registry: dict[str, Any], name: str, register: Callable[[str], object]
) -> None:
    before = dict(registry)
    with pytest.raises(ValueError, match=f"named '{name}' is registered already"):
        register(name)
    assert registry == before
