"""``TrainingArguments``: read when the optimizer is made, each with effect or an error."""

from __future__ import annotations

import copy
import inspect
import re
import sys
import tomllib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank_optim import methods
from lowrank_optim.integrations.arguments import FIELDS, parse_optim_args
from lowrank_optim.integrations.transformers import MINIMUM, trainer_optimizer
from tests.integrations.trainers import (
    assert_equal_models,
    bare,
    data,
    distance,
    model,
    trainer,
    transformers,
)

CLASSES = [
    "GaLoreAdamW", "FiraAdamW", "ApolloAdamW", "FrugalAdamW", "DCTAdamW", "SSTAdamW",
    "SwitchLoRAAdamW", "GaLoreAdafactor", "GaLoreLion", "GaLoreSGD",
]  # fmt: skip

# ------------------------------------------------------------------ read when it is made


class Trial(dict[str, Any]):
    def __init__(self, params: dict[str, Any], number: int) -> None:
        super().__init__(params)
        self.params, self.number = params, number


class Search:
    """A backend of ``hyperparameter_search``: trials are the values of the space, in turn."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.models: list[Any] = []

    def __call__(self) -> Search:
        return self

    def ensure_available(self) -> None:
        pass

    def run(self, trainer: Any, n_trials: int, direction: str, **spaces: Any) -> None:
        for n in range(n_trials):
            trainer.train(trial=Trial({key: values[n] for key, values in spaces.items()}, n))
            self.rates.append(trainer.optimizer.param_groups[0]["initial_lr"])
            self.models.append(trainer.model)


def anew(args: Any, **options: Any) -> Any:
    """A Trainer that makes its model for each run."""
    choice = trainer_optimizer(args, **options)
    return transformers.Trainer(
        model_init=lambda: model(), args=args, train_dataset=data(), optimizer_cls_and_kwargs=choice
    )


def search(monkeypatch: Any, args: Any, options: Any = None, **spaces: Any) -> Search:
    from transformers import hyperparameter_search
    from transformers.integrations import integration_utils
    from transformers.trainer_utils import HPSearchBackend

    known, backend = hyperparameter_search.ALL_HYPERPARAMETER_SEARCH_BACKENDS, Search()
    monkeypatch.setitem(known, HPSearchBackend.OPTUNA, backend)
    # so that a trial may be a dict
    monkeypatch.setattr(integration_utils, "is_wandb_available", lambda: True)
    run = anew(args, **(options or {}))
    trials = len(next(iter(spaces.values())))
    run.hyperparameter_search(
        hp_space=lambda trial: trial, backend="optuna", n_trials=trials, **spaces
    )
    return backend


def test_each_trial_of_a_search_has_its_own_rate(tmp_path: Path, monkeypatch: Any) -> None:
    """Trials are runs of their own, to the bit."""
    rates = [1e-4, 3e-3, 2e-2]
    found = search(monkeypatch, bare(tmp_path), learning_rate=rates)
    assert found.rates == rates
    for rate, trained in zip(rates, found.models, strict=True):
        alone = anew(bare(tmp_path, learning_rate=rate))
        alone.train()
        assert_equal_models(trained, alone.model)


def test_a_search_over_what_an_option_fixes_is_an_error(tmp_path: Path, monkeypatch: Any) -> None:
    with pytest.raises(ValueError, match=r"learning_rate=0\.003 .*lr=0\.01 .* differ"):
        search(monkeypatch, bare(tmp_path), {"lr": 1e-2}, learning_rate=[3e-3])


def test_layer_wise_trials(tmp_path: Path, monkeypatch: Any) -> None:
    args = bare(tmp_path, max_grad_norm=0.0)
    rates = [1e-4, 3e-3]
    ordinary = search(monkeypatch, copy.copy(args), learning_rate=rates)
    inside = search(monkeypatch, args, {"in_backward": "step"}, learning_rate=rates)
    for a, b in zip(ordinary.models, inside.models, strict=True):
        assert_equal_models(a, b)


CHANGES: dict[str, Any] = {
    "learning_rate": 3e-3,
    "weight_decay": 0.5,
    "adam_beta1": 0.5,
    "adam_beta2": 0.9,
    "adam_epsilon": 1e-2,
    "optim_args": "rank=2",
    "optim_target_modules": ["q_proj"],
    "max_grad_norm": 1e-3,
    "gradient_accumulation_steps": 3,
}


def made(args: Any, **options: Any) -> Any:
    """What an optimizer is, without its parameters."""
    optimizer = trainer(args, **options).create_optimizer()
    handle = optimizer._in_backward
    keys = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    return keys, handle.accumulation_steps, handle.max_norm


@pytest.mark.filterwarnings("ignore:mode='step' clips")
@pytest.mark.parametrize("field", CHANGES)
def test_nothing_is_frozen_at_the_call(tmp_path: Path, field: str) -> None:
    """A field changed between the call and the training is as one that was always so."""
    args = bare(tmp_path)
    never = made(args, in_backward="step")
    choice = trainer_optimizer(args, in_backward="step")
    setattr(args, field, CHANGES[field])
    always = made(args, in_backward="step")
    run = transformers.Trainer(model=model(), args=args, optimizer_cls_and_kwargs=choice)
    optimizer = run.create_optimizer()
    keys = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    handle = optimizer._in_backward
    assert (keys, handle.accumulation_steps, handle.max_norm) == always != never


# ------------------------------------------------------------------ every field has its effect


@pytest.mark.parametrize(
    "name",
    # by the fields that they take: of those of Adam all, of which others have none or some
    [
        pytest.param(
            x, marks=() if x in ("GaLoreAdamW", "SSTAdamW", *CLASSES[-3:-1]) else pytest.mark.slow
        )
        for x in CLASSES
    ],
)
def test_a_field_has_its_effect_or_is_an_error(tmp_path: Path, name: str) -> None:
    """At 1e-9 nothing moves; weights differ where a field does, unless the class refuses it."""
    method = getattr(methods, name)
    own = {"learning_rate": 1e-2, **({"optim_args": ""} if name.startswith("Frugal") else {})}

    def trained(**fields: Any) -> Any:
        run = trainer(bare(tmp_path, **{**own, **fields}), method=method)
        run.train()
        return run.model

    base, start = trained(), model()
    assert distance(trained(learning_rate=1e-9), start) < 1e-6 < 1e-4 < distance(base, start)
    assert distance(trained(weight_decay=0.5), base) > 0
    accepted = inspect.signature(method.__init__).parameters
    for field, key in (("adam_beta1", "betas"), ("adam_beta2", "betas"), ("adam_epsilon", "eps")):
        if {key, "betas"} <= accepted.keys():
            assert distance(trained(**{field: CHANGES[field]}), base) > 0, field
        else:
            said = rf"{field}=.* has no effect: {name} takes no {key} of Adam's. Leave the default"
            with pytest.raises(ValueError, match=said):
                trained(**{field: CHANGES[field]})


def test_every_field_of_an_optimizer_is_looked_at() -> None:
    """Fields that Trainer's own AdamW reads, and no other."""
    assert {f for fields in FIELDS.values() for f in fields} == {
        "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon",
    }  # fmt: skip


def test_own_step_sizes_of_adafactor(tmp_path: Path) -> None:
    """Off, as for optim="galore_adafactor"; asked for, the learning rate means nothing."""
    method = methods.GaLoreAdafactor
    group = trainer(bare(tmp_path), method=method).create_optimizer().param_groups[0]
    assert (group["relative_step"], group["scale_parameter"], group["lr"]) == (False, False, 5e-5)
    run = trainer(bare(tmp_path), method=method, relative_step=True)
    group = run.create_optimizer().param_groups[0]
    assert group["relative_step"] and group["scale_parameter"]
    with pytest.raises(ValueError, match=r"learning_rate=0\.01 .* no effect.*relative_step=True"):
        trainer(bare(tmp_path, learning_rate=1e-2), method=method, relative_step=True)


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({"learning_rate": 1e-3}, {"lr": 1e-2}),
        ({"weight_decay": 0.1}, {"weight_decay": 0.2}),
        ({"adam_beta2": 0.99}, {"betas": (0.9, 0.95)}),
        ({"adam_epsilon": 1e-6}, {"eps": 1e-7}),
        ({"learning_rate": 1e-3, "optim_args": "rank=4, lr=1e-2"}, {}),
    ],
    ids=str,
)
def test_two_values_for_one_thing_are_an_error(tmp_path: Path, fields: Any, options: Any) -> None:
    with pytest.raises(ValueError, match="differ: give one of them"):
        trainer(bare(tmp_path, **fields), **options)


def test_options_stand_where_fields_are_at_their_defaults(tmp_path: Path) -> None:
    args = bare(
        tmp_path, optim_args="rank=4, eps=1e-7, betas=[0.8, 0.95]", adam_beta2=0.95, adam_beta1=0.8
    )
    group = trainer(args, lr=1e-2, weight_decay=0.3).create_optimizer().param_groups[0]
    assert [group[k] for k in ("lr", "eps")] == [1e-2, 1e-7]
    assert tuple(group["betas"]) == (0.8, 0.95)
    decays = {
        g["weight_decay"] for g in trainer(args, weight_decay=0.3).create_optimizer().param_groups
    }
    assert decays == {0.0, 0.3}


@pytest.mark.parametrize("density", [0.0, 0.5, 1.0])
def test_any_density(tmp_path: Path, density: float) -> None:
    run = trainer(bare(tmp_path, optim_args=""), method=methods.FrugalAdamW, density=density)
    assert density in {g["rank"] for g in run.create_optimizer().param_groups}


# ------------------------------------------------------------------ optim


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "galore_adamw"])
def test_optim_that_says_the_same(tmp_path: Path, optim: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer(bare(tmp_path, optim=optim)).create_optimizer()


def test_arguments_that_were_written_for_apollo(tmp_path: Path) -> None:
    """As of ``optim="apollo_adamw"``; GaLoreAdamW would train with a scale of 128."""
    mini = "rank=1, proj=random, scale_type=tensor, scale=128, update_proj_gap=50"
    args = bare(tmp_path, optim="apollo_adamw", optim_args=mini)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        groups = trainer(args, method=methods.ApolloAdamW).create_optimizer().param_groups
    (own,) = {(g["rank"], g["projector"], g["scale_type"], g["scale"]) for g in groups if g["rank"]}
    assert own == (1, "random", "tensor", 128)
    with pytest.raises(ValueError, match=r"APOLLO's.*train with ApolloAdamW"):
        trainer(bare(tmp_path, optim_args=mini)).create_optimizer()


@pytest.mark.parametrize(
    ("optim", "method", "said"),
    [
        ("galore_adamw_8bit", "GaLoreAdamW", "means GaLoreAdamW8bit, and .* given GaLoreAdamW:"),
        ("galore_adamw", "FiraAdamW", "means GaLoreAdamW, and .* given FiraAdamW:"),
        ("apollo_adamw", "GaLoreAdamW", "means ApolloAdamW, and .* given GaLoreAdamW:"),
        ("galore_adafactor_layerwise", "GaLoreAdamW", "means GaLoreAdafactor"),
        ("galore_adamw_layerwise", "GaLoreAdamW", "give trainer_optimizer in_backward='step'"),
    ],
)
def test_optim_that_says_something_else_is_an_error(
    tmp_path: Path, optim: str, method: str, said: str
) -> None:
    with pytest.raises(ValueError, match=f"optim='{optim}' of the arguments .*{said}"):
        trainer(bare(tmp_path, optim=optim), method=getattr(methods, method))


def test_layer_wise_optim_with_layer_wise_steps(tmp_path: Path) -> None:
    args = bare(tmp_path, optim="galore_adamw_8bit_layerwise", max_grad_norm=0.0)
    for mode in ("step", "project"):
        trainer(args, method=methods.GaLoreAdamW8bit, in_backward=mode).create_optimizer()


@pytest.mark.parametrize("optim", ["sgd", "adamw_8bit", "adafactor"])
def test_optim_of_another_kind_is_said_not_to_be_used(tmp_path: Path, optim: str) -> None:
    run = trainer(bare(tmp_path, optim=optim))
    with pytest.warns(UserWarning, match=f"optim='{optim}' .* is not used: .* GaLoreAdamW") as seen:
        run.create_optimizer()
    assert len(seen) == 1


# ------------------------------------------------------------------ what may be given


def test_optim_args() -> None:
    text = "rank=0.25, update_proj_gap=100,scale=1e-1, stagger=False, betas=(0.9, 0.95)"
    text += ", projector=svd,"
    expected = {
        "rank": 0.25, "update_proj_gap": 100, "scale": 0.1, "stagger": False,
        "betas": (0.9, 0.95), "projector": "svd",
    }  # fmt: skip
    assert parse_optim_args(text) == expected
    assert parse_optim_args(dict(expected)) == expected
    json = '{"rank": 0.25, "update_proj_gap": 100, "scale": "1e-1", "stagger": false}'
    assert parse_optim_args(json).items() <= expected.items()
    # as YAML reads rank: 8, scale: 1e-1, free_rule: none
    assert parse_optim_args({"rank": 8, "scale": "1e-1", "x": "None", "y": None}) == {
        "rank": 8, "scale": 0.1, "x": None, "y": None,
    }  # fmt: skip
    for nothing in (None, "", "  ", ",", {}, "{}"):
        assert parse_optim_args(nothing) == {}


@pytest.mark.parametrize(
    ("given", "kind", "said"),
    [
        ("rank", ValueError, "key=value pairs, got 'rank'"),
        ("rank=", ValueError, "key=value pairs, got 'rank='"),
        ("=4", ValueError, "key=value pairs, got '=4'"),
        ("rank: 4", ValueError, "key=value pairs, got 'rank: 4'"),
        ("rank=4, scale", ValueError, "key=value pairs, got 'scale'"),
        ("betas=(0.9, 0.95", ValueError, r"key=value pairs, got '0\.95'"),
        ("rank=4, rank=8", ValueError, "gives rank twice: '4' and '8'"),
        ("{'rank': 4}", ValueError, "not the JSON object that it begins as: .*double quotes"),
        ('{"rank": 4', ValueError, "not the JSON object"),
        ("[4]", TypeError, r"a JSON object or a dict, got list: \[4\]"),
        (["rank=4"], TypeError, "a JSON object or a dict, got list"),
        (4, TypeError, "a JSON object or a dict, got int: 4"),
        ({4: "rank"}, TypeError, "must be strings, got 4"),
    ],
    ids=str,
)
def test_optim_args_that_cannot_be_read(tmp_path: Path, given: Any, kind: Any, said: str) -> None:
    """At the call, before anything is made."""
    args = bare(tmp_path)
    args.optim_args = given
    with pytest.raises(kind, match=said):
        trainer_optimizer(args)


@pytest.mark.parametrize("given", [{"rank": 4}, '{"rank": 4}', {"rank": "4"}], ids=str)
def test_optim_args_of_a_config_file_train(tmp_path: Path, given: Any) -> None:
    runs = [trainer(bare(tmp_path, optim_args=x, learning_rate=1e-2)) for x in ("rank=4", given)]
    for run in runs:
        run.train()
    assert_equal_models(runs[0].model, runs[1].model)


@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        (
            {"method": torch.optim.AdamW},
            TypeError,
            "method must be an optimizer class of lowrank_op",
        ),
        ({"method": "GaLoreAdamW"}, TypeError, "method must be .* got GaLoreAdamW"),
        ({"in_backward": "layerwise"}, ValueError, "None, 'project' or 'step', got 'layerwise'"),
        ({"in_backward": True}, ValueError, "None, 'project' or 'step', got True"),
    ],
    ids=str,
)
def test_what_cannot_be_is_an_error(tmp_path: Path, options: Any, kind: Any, said: str) -> None:
    with pytest.raises(kind, match=said):
        trainer_optimizer(bare(tmp_path), **options)


def test_arguments_are_the_ones_of_trainer(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="args must be TrainingArguments, got dict"):
        trainer_optimizer({"learning_rate": 1e-3})
    args = bare(tmp_path)
    args.fp16 = True
    with pytest.raises(ValueError, match=r"in_backward='step' .*fp16=True .*use bf16=True"):
        trainer_optimizer(args, in_backward="step")
    trainer_optimizer(args, in_backward="project")


@pytest.mark.parametrize("given", ["all", "ALL-LINEAR", ["all_linear"]], ids=str)
def test_spellings_of_all_linear(tmp_path: Path, given: Any) -> None:
    for args, options in (
        (bare(tmp_path, optim_target_modules=given), {}),
        (bare(tmp_path), {"target_modules": given}),
    ):
        groups = trainer(args, **options).create_optimizer().param_groups
        matrices = [g for g in groups if g["rank"] is not None]
        assert sum(p.dim() == 2 for g in matrices for p in g["params"]) == 14


@pytest.mark.parametrize("where", ["args", "options"])
def test_a_wrong_target_lists_what_there_is(tmp_path: Path, where: str) -> None:
    args = bare(tmp_path, **({"optim_target_modules": "q_porj"} if where == "args" else {}))
    run = trainer(args, **({"target_modules": "q_porj"} if where == "options" else {}))
    text = r"Trainable linear layers: model\.layers\.0\.self_attn\.q_proj, .* and 7 more"
    with pytest.raises(ValueError, match=text):
        run.create_optimizer()
    for empty in ([], ""):
        with pytest.raises(ValueError, match="names nothing"):
            trainer(bare(tmp_path), target_modules=empty).create_optimizer()


# ------------------------------------------------------------------ versions


@pytest.mark.parametrize("version", ["4.57.6", "5.0.0", "5.1.0"])
def test_a_trainer_without_factories_is_an_error(
    tmp_path: Path, monkeypatch: Any, version: str
) -> None:
    args = bare(tmp_path)
    monkeypatch.setattr(sys.modules["transformers"], "__version__", version)
    said = rf"needs transformers 5\.2 or newer.* and {re.escape(version)} is installed: pip install"
    with pytest.raises(ImportError, match=said):
        trainer_optimizer(args)


@pytest.mark.parametrize("version", ["5.2.0", "5.2.0.dev0", "5.23.0", "6.0"])
def test_later_ones_are_taken(tmp_path: Path, monkeypatch: Any, version: str) -> None:
    args = bare(tmp_path)
    monkeypatch.setattr(sys.modules["transformers"], "__version__", version)
    trainer_optimizer(args)


def test_the_package_asks_for_the_same_version() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    extras = tomllib.loads(text)["project"]["optional-dependencies"]
    asked = {x for extra in extras.values() for x in extra if x.startswith("transformers")}
    assert asked == {f"transformers>={'.'.join(map(str, MINIMUM))}"}
