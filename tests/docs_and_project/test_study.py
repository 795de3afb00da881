"""The study: its instrument fails when it is broken, and its command repeats nothing."""

from __future__ import annotations

import inspect
import json
import math
import subprocess
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from benchmarks import common
from benchmarks.bytes_task import Shape, load_text, make_model
from benchmarks.study import acceptance, report, training
from benchmarks.study.__main__ import parse
from benchmarks.study.acceptance import Measured, facts, measure
from benchmarks.study.progress import Runner
from benchmarks.study.published import NO_DATA, RECIPES
from benchmarks.study.recipes import METHODS, Case, Method, restart
from benchmarks.study.records import pack, unpack
from benchmarks.study.search import SEARCH_SEED, beside, search
from benchmarks.study.sets import (
    RELATIONS,
    ablations,
    at_most,
    equal_bytes,
    held_bytes,
    methods,
    with_rank,
)
from benchmarks.study.sizes import SIZES, Size
from benchmarks.study.training import Place, Trial, kept, rate, run, train
from lowrank_optim import presets
from lowrank_optim.groups import canonical

MICRO = Size(
    Shape(hidden=32, mlp=64, layers=1, heads=2, batch=8, context=32),
    steps=100, rank=8, small_rank=1, gap=25, windows=32,
)  # fmt: skip
ADAMW = Case("AdamW", "adamw")
WINDOW = torch.randint(256, (2, 33), generator=torch.Generator().manual_seed(0))
SHOWN = Measured(
    adamw={3e-4: 3.16, 1e-3: 2.63, 3e-3: 2.2, 1e-2: 1.98, 3e-2: 1.99, 1e-1: 2.47},
    sgd=2.3,
    frozen=3.2,
    galore={2: 2.5, 8: 2.3, 32: 2.1},
    full=[1.98, 1.99, 2.0],
    lora=[2.3, 2.32, 2.31],
    rates={"AdamW": 1e-2, "SGD": 0.3, "frozen": 1e-2, "LoRA": 1e-2},
)
BROKEN = {
    0: {"frozen": 1.98},
    1: {"adamw": {**SHOWN.adamw, 1e-3: 1.99}},
    2: {"sgd": 1.99},
    3: {"lora": [2.3, 1.98, 2.31]},
    4: {"galore": {2: 2.5, 8: 2.1, 32: 2.3}},
    5: {"full": [1.8, 2.0, 2.2]},
}


def test_facts_hold_on_losses_that_show_them():
    assert all(fact.holds for fact in facts(SHOWN))


@pytest.mark.parametrize("number", BROKEN)
def test_each_fact_fails_alone(number):
    """Spread is in every margin, so a wide one may fail others too."""
    found = facts(replace(SHOWN, **BROKEN[number]))
    assert not found[number].holds
    assert number == 5 or sum(not fact.holds for fact in found) == 1


def test_a_best_rate_at_the_end_of_the_grid_is_no_fact():
    cut = {lr: loss for lr, loss in SHOWN.adamw.items() if lr <= 1e-2}
    assert not facts(replace(SHOWN, adamw=cut))[1].holds


def test_a_loss_that_is_no_number_is_no_fact():
    assert not facts(replace(SHOWN, frozen=math.nan))[0].holds


FLOORS = {"adamw": 2.0, "sgd": 2.3, "frozen": 2.5, "lora": 2.3, "galore": 2.3}
BEST = {"adamw": 1e-2, "sgd": 0.3, "frozen": 3e-2, "lora": 1e-2, "galore": 1e-2}


def landscape(trial):
    """A bowl around each method's best rate, with what seeds add, and GaLore's rank."""
    method = trial.case.method
    rank = trial.case.options["rank"] if method == "galore" else 1
    bowl = 0.3 * math.log10(trial.lr / BEST[method]) ** 2
    return FLOORS[method] + bowl + 0.01 * (trial.seed % 3) - 0.1 * math.log2(rank)


def test_a_landscape_of_known_facts_passes():
    assert all(fact.holds for fact in facts(measure(MICRO, landscape)))


def test_frozen_matrices_that_train_are_seen():
    """The instrument broken on purpose: where matrices are to be frozen AdamW trains them."""

    def broken(trial):
        return landscape(replace(trial, case=ADAMW) if trial.case.method == "frozen" else trial)

    found = facts(measure(MICRO, broken))
    assert [fact.holds for fact in found] == [False, True, True, True, True, True]


def test_runs_of_two_steps_are_seen(monkeypatch):
    """Real runs, and too short to show anything: no fact of methods holds."""
    monkeypatch.setattr(acceptance, "SEEDS", (0, 1))
    short = replace(MICRO, steps=2, windows=2)
    found = facts(measure(short, lambda trial: train(trial)["final_loss"]))
    assert not any(found[i].holds for i in (0, 1, 3, 4, 5))


@pytest.mark.slow
def test_the_small_size_is_a_test_bed(tmp_path):
    """What the command runs first, for real."""
    torch.set_num_threads(1)
    size = SIZES["small"]
    found = facts(measure(size, lambda trial: run(trial, tmp_path)["final_loss"]))
    assert [fact.claim for fact in found if not fact.holds] == []


def test_frozen_matrices_stay_and_the_rest_moves():
    model = make_model(MICRO.shape, 0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    made = METHODS["frozen"].make(model, 1e-2, MICRO)
    model(WINDOW).backward()
    made.optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if "proj" not in n}


# ---------------------------------------------------------------- searches


def test_rates_of_the_ladder():
    rates = [1e-3]
    for _ in range(4):
        rates.append(beside(rates[-1], up=True))
    assert rates == [1e-3, 3e-3, 1e-2, 3e-2, 1e-1]
    assert [beside(lr, up=False) for lr in rates[1:]] == rates[:-1]


@pytest.mark.parametrize("best", [1e-4, 3e-3, 3e-2])
def test_a_search_ends_with_its_best_inside(best):
    found = search(MICRO, ADAMW, lambda trial: abs(math.log(trial.lr / best)))
    assert found.best == best and found.inside
    assert min(found.losses) < best < max(found.losses)


def test_a_search_says_when_it_found_no_inside():
    found = search(MICRO, ADAMW, lambda trial: trial.lr)
    assert not found.inside and found.best == min(found.losses)


# ---------------------------------------------------------------- runs


def test_a_run_is_named_by_all_it_depends_on():
    trial = Trial(MICRO, ADAMW, 1e-3, 0)
    others = [
        replace(trial, lr=2e-3),
        replace(trial, seed=1),
        replace(trial, case=Case("AdamW", "adamw", {"eps": 1e-6})),
        replace(trial, case=Case("AdamW", "sgd")),
        replace(trial, size=replace(MICRO, gap=26)),
        replace(trial, size=replace(MICRO, shape=replace(MICRO.shape, batch=7))),
    ]
    assert len({trial.key(), *(other.key() for other in others)}) == 7
    assert replace(trial, case=Case("another name", "adamw")).key() == trial.key()


def test_a_kept_run_is_not_made_again_and_the_same_seed_is_the_same_run(tmp_path, monkeypatch):
    trial = Trial(replace(MICRO, steps=3), Case("GaLore", "galore"), 1e-2, 0)
    first = run(trial, tmp_path)
    assert train(trial)["train_loss"] == first["train_loss"]
    assert train(replace(trial, seed=1))["train_loss"] != first["train_loss"]
    monkeypatch.setattr(training, "train", lambda *_: pytest.fail("made again"))
    assert run(trial, tmp_path)["final_loss"] == first["final_loss"]
    assert [p.name for p in tmp_path.iterdir()] == [f"{trial.key()}.json"]


def test_looks_at_losses_may_be_rare(tmp_path):
    trial = Trial(replace(MICRO, steps=7, validate_every=5), Case("GaLore", "galore"), 1e-2, 0)
    often, rarely = train(trial), train(trial, place=Place(read_every=4))
    for key in ("train_loss", "validation", "final_loss", "state_bytes", "text"):
        assert rarely[key] == often[key]
    broken = Trial(replace(MICRO, steps=7), Case("SGD", "sgd"), 1e30, 0)
    assert train(broken, place=Place(read_every=4))["final_loss"] == math.inf


@pytest.mark.slow  # compiles
@pytest.mark.parametrize("method", ["galore", "sst", "switchlora", "lora"])
def test_a_compiled_run_is_the_same_but_for_rounding(method):
    trial = Trial(replace(MICRO, steps=8, gap=3), Case(method, method, {"rank": 4}), 1e-3, 0)
    eager, compiled = train(trial), train(trial, place=Place(compiled=True))
    assert "compiled" in compiled["environment"] and "compiled" not in eager["environment"]
    for name in ("train_loss", "final_loss"):
        torch.testing.assert_close(torch.tensor(compiled[name]), torch.tensor(eager[name]))
    assert compiled["state_bytes"] == eager["state_bytes"]


@pytest.mark.slow  # starts two processes that import torch
def test_runs_beside_each_other_are_those_after_each_other(tmp_path):
    trials = [Trial(replace(MICRO, steps=2, windows=1), ADAMW, lr, 0) for lr in (1e-3, 1e-2, 1e-1)]
    with Runner(tmp_path, Console(quiet=True), jobs=2) as runner:
        found = runner.each(runner.loss, trials)
    assert found == [train(trial)["final_loss"] for trial in trials] and len({*found}) == 3
    assert all(kept(trial, tmp_path) for trial in trials)


def test_a_copy_of_the_library_is_the_text(tmp_path):
    for i in range(60):
        (tmp_path / f"{i:02}.py").write_text(f"x = {i:02}\n" * 10)
    here, there = load_text(), load_text(tmp_path)
    assert len(there.train) + len(there.held) == 60 * 70
    assert there.digest == load_text(tmp_path).digest != here.digest


def test_seconds_of_a_run_on_a_gpu_are_those_of_a_cpu(tmp_path):
    trial = Trial(replace(MICRO, steps=4, windows=1), ADAMW, 1e-2, SEARCH_SEED)
    record = train(trial)
    record["environment"] = {**record["environment"], "device": "a card"}
    (tmp_path / f"{trial.key()}.json").write_text(json.dumps(record))
    assert math.isnan(report.on_cpu(record, trial.size, tmp_path)["cpu_seconds"][-1])
    seconds = training.seconds_a_step(trial.size, ADAMW, tmp_path)
    assert report.on_cpu(record, trial.size, tmp_path)["cpu_seconds"] == [0, 4 * seconds]
    assert "a card" in report.provenance([report.read(ADAMW, trial.size, [0], tmp_path)])


def test_a_kept_run_of_another_text_is_refused(tmp_path):
    trial = Trial(replace(MICRO, steps=2, windows=1), ADAMW, 1e-2, 0)
    runner = Runner(tmp_path, Console(quiet=True))
    assert runner.loss(trial) == runner.loss(trial)
    record = kept(trial, tmp_path)
    training.keep({**record, "text": "0123456789"}, tmp_path)
    with pytest.raises(ValueError, match=r"is of the text 0123456789, .*--stdlib"):
        runner.loss(trial)


def test_files_of_runs_are_no_change_of_the_code(tmp_path, monkeypatch):
    """A study writes its own, and what it runs is the commit all the same."""
    monkeypatch.setattr(common, "ROOT", tmp_path)
    assert common._commit() == "unknown"
    for name in ("runs.xz", "code.py"):
        (tmp_path / name).write_text("1")
    who = ("-c", "user.name=a", "-c", "user.email=a@b.example")
    for words in (("init", "-q"), ("add", "."), (*who, "commit", "-qm", "1")):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    clean = common._commit()
    (tmp_path / "runs.xz").write_text("2")
    assert common._commit() == clean and len(clean) == 10
    (tmp_path / "code.py").write_text("2")
    assert common._commit() == f"{clean}-dirty"


def test_a_run_that_is_ended_leaves_nothing(tmp_path):
    def stop(step, loss):
        raise KeyboardInterrupt

    trial = Trial(replace(MICRO, steps=3), ADAMW, 1e-2, 0)
    with pytest.raises(KeyboardInterrupt):
        run(trial, tmp_path, stop)
    assert not list(tmp_path.iterdir()) and kept(trial, tmp_path) is None


def test_runs_go_from_machine_to_machine_in_one_file(tmp_path, monkeypatch):
    trial, broken = (Trial(replace(MICRO, steps=2), ADAMW, lr, 0) for lr in (1e-2, 1e30))
    made, file = [run(x, tmp_path / "here") for x in (trial, broken)], tmp_path / "kept" / "runs.xz"
    assert pack(tmp_path / "here", file) == 2
    monkeypatch.setattr(training, "train", lambda *_: pytest.fail("made again"))
    assert unpack(file, tmp_path / "there") == 2
    for record, x in zip(made, (trial, broken), strict=True):
        del record["train_loss"]
        assert run(x, tmp_path / "there") == json.loads(json.dumps(record))
    assert unpack(file, tmp_path / "there") == unpack(tmp_path / "none", tmp_path / "there") == 0
    first = file.read_bytes()
    pack(tmp_path / "there", file)
    assert file.read_bytes() == first


def test_a_run_that_breaks_is_kept_as_infinite(tmp_path):
    trial = Trial(replace(MICRO, steps=5), Case("SGD", "sgd"), 1e30, 0)
    assert run(trial, tmp_path)["final_loss"] == math.inf
    assert kept(trial, tmp_path)["final_loss"] == math.inf


def test_state_of_adamw_is_two_numbers_a_parameter():
    params = sum(p.numel() for p in make_model(MICRO.shape, 0).parameters())
    tensors = len(list(make_model(MICRO.shape, 0).parameters()))
    assert held_bytes(ADAMW, MICRO) == 8 * params + 4 * tensors


BADAM = Case("BAdam", "badam")


def test_state_is_that_of_the_largest_turn():
    """Ten steps are two turns of five, and at the end of a turn nothing is held."""
    held = train(Trial(replace(MICRO, steps=10, windows=2), BADAM, 1e-3, 0))["state_bytes"]
    model = make_model(MICRO.shape, 0)
    embedding, every = model.embed_tokens.weight.numel(), sum(p.numel() for p in model.parameters())
    assert 8 * embedding <= held < 8 * every


def test_clipping_sees_layers_whose_turn_comes_later(monkeypatch):
    model, clip, norms = make_model(MICRO.shape, 0), torch.nn.utils.clip_grad_norm_, []

    def spied(params, most):
        found = clip(params, most)
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        norms.append(float(torch.nn.utils.get_total_norm(grads)))
        return found

    monkeypatch.setattr(training, "make_model", lambda shape, seed: model)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spied)
    size = replace(MICRO, steps=10, windows=2, clip=1e-3)
    train(Trial(size, BADAM, 1e-3, 0))
    assert len(norms) == 10 and max(norms) <= 1e-3 * (1 + 1e-5)


def test_schedule():
    size = replace(MICRO, steps=100)
    rates = [rate(step, size) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == 1.0 and rates[55] == pytest.approx(0.55)
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)


# ---------------------------------------------------------------- recipes and sets


@pytest.mark.parametrize("case", methods(MICRO), ids=lambda case: case.name)
def test_every_method_learns(case):
    """Three steps on one batch, at a rate that no method is broken by."""
    if case.method == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    model = make_model(MICRO.shape, 0)
    made = METHODS[case.method].make(model, 3e-3, MICRO, **case.options)
    losses = []
    for step in range(4):
        loss = model(WINDOW)
        losses.append(loss.item())
        loss.backward()
        made.optimizer.step()
        made.optimizer.zero_grad()
        made.after(step + 1)
    assert losses[-1] < losses[0]


def test_golore_turns_to_random_bases_at_80_percent():
    """The search that is made of a gradient is exact before, and none of it after."""
    size = replace(MICRO, steps=10, gap=1)
    model = make_model(size.shape, 0)
    made = METHODS["golore"].make(model, 3e-3, size, rank=4)
    weight = model.layers[0].q_proj.weight
    used = []
    for _ in range(size.steps):
        model(WINDOW).backward()
        top = torch.linalg.svd(weight.grad).Vh[:4]  # of a square one, as in the release
        made.optimizer.step()
        used.append(float((top @ made.optimizer.state[weight]["basis"]).square().sum()) / 4)
        made.optimizer.zero_grad()
    assert min(used[:8]) > 0.999 and max(used[8:]) < 0.9


def test_lost_has_the_activation_of_the_paper_or_none():
    for case in methods(MICRO):
        if case.method == "lost":
            model = make_model(MICRO.shape, 0)
            METHODS["lost"].make(model, 3e-3, MICRO, **case.options)
            found = {module.activation for module in model.modules() if hasattr(module, "gamma")}
            assert found == {None if "no" in case.name else "silu"}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_python_that_makes_what_was_published(name):
    """It runs as printed once what no source says is filled in."""
    recipe = RECIPES[name]
    with torch.device("meta"):
        model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.Linear(2048, 2048)])})
    before = {p.data_ptr for p in model.parameters()}
    text = recipe.code()
    for key in recipe.unsaid:
        assert f"{key}=...,  # not in any source" in text
    fills = {"rank": "64", "density": "0.05"}
    for key in (*recipe.unsaid, "lr"):
        text = text.replace(f"{key}=...", f"{key}={fills.get(key, '1e-3')}")
    known = {"model": model}
    exec(text, known)
    settings = recipe.preset(**recipe.arguments)
    if recipe.dense is None:
        (group,) = known["optimizer"].param_groups
        assert type(known["optimizer"]).__name__ == recipe.taker
        assert {k: group[k] for k in canonical(settings)} == canonical(settings)
    else:
        layer = model["layers"][0]
        assert {p.data_ptr for p in model.parameters()} != before and layer.method == recipe.taker
        assert known["optimizer"].param_groups[0]["lr"] == recipe.dense.get("lr", 1e-3)


def test_every_paper_with_a_preset_has_a_recipe():
    """Those of GLUE are of papers that have another."""
    own = {name for name, f in vars(presets).items() if inspect.isfunction(f)}
    printed = {recipe.preset.__name__ for recipe in RECIPES.values()}
    assert own - printed == {name for name in own if name.endswith("_glue")}
    for recipe in RECIPES.values():
        assert "Source: " in recipe.text() and recipe.text().endswith(NO_DATA)
        assert "Raises" not in recipe.text() and ">>>" not in recipe.text()


@pytest.mark.parametrize(
    "beside", [["--set", "rank"], ["--seeds", "3"], ["--page", "x.md"], ["--device", "cuda"]]
)
def test_a_recipe_runs_nothing_and_says_so(beside, capsys):
    assert parse(["--recipe", "galore-60m"]).recipe == "galore-60m"
    with pytest.raises(SystemExit):
        parse(["--recipe", "galore-60m", *beside])
    assert f"runs nothing: {beside[0]} would have no effect" in capsys.readouterr().err


def test_turns_are_drawn_by_the_seed_of_the_run():
    def first(seed):
        torch.manual_seed(seed)
        model = make_model(MICRO.shape, 0)
        METHODS["badam"].make(model, 1e-3, MICRO)
        return model.embed_tokens.weight.requires_grad

    with torch.random.fork_rng(devices=[]):
        drawn = [first(seed) for seed in range(12)]
        assert drawn == [first(seed) for seed in range(12)]
    assert len({*drawn}) == 2


def test_the_factor_of_apollo_follows_its_rank():
    """Its square is m/r, at which a channel's step is of the size of AdamW's."""
    for case in methods(MICRO):
        if case.method == "apollo":
            made = METHODS["apollo"].make(make_model(MICRO.shape, 0), 1e-3, MICRO, **case.options)
            (group,) = [g for g in made.optimizer.param_groups if g["rank"] is not None]
            assert group["scale"] == MICRO.shape.hidden / case.options["rank"]
            assert (group["scale_type"] == "tensor") == (case.name == "APOLLO-Mini")


def test_a_restart_keeps_the_function_and_forgets_the_moments():
    model = make_model(MICRO.shape, 0)
    made = METHODS["lora"].make(model, 1e-2, MICRO, rank=4)
    for _ in range(2):
        model(WINDOW).backward()
        made.optimizer.step()
        made.optimizer.zero_grad()
    before = model(WINDOW).item()
    restart(model, made.optimizer)
    assert model(WINDOW).item() == pytest.approx(before, abs=1e-5)
    factors = [p for n, p in model.named_parameters() if "lora_" in n]
    assert not any(p in made.optimizer.state for p in factors)
    assert all(not p.any() for n, p in model.named_parameters() if n.endswith("lora_B"))


def test_equal_bytes_are_the_most_that_fit():
    cases = equal_bytes(MICRO)
    budget = held_bytes(next(c for c in cases if c.name == "GaLore"), MICRO)
    for case in cases[1:]:
        rank = case.options["rank"]
        more = with_rank(case, rank + (1 / 32 if isinstance(rank, float) else 1))
        assert held_bytes(case, MICRO) <= budget
        assert held_bytes(more, MICRO) > budget or case.method == "frugal"
    assert at_most(cases[-1], MICRO, 0) is None
    assert "APOLLO-Mini" not in {case.name for case in cases}  # its rank is 1 at any budget


def test_blocks_are_counted_in_their_largest_turn():
    """Not in the first: a run of blocks at equal bytes holds at most what it is given."""
    blocks = next(case for case in equal_bytes(MICRO) if case.name == "FRUGAL, block")
    size = replace(MICRO, gap=10, steps=60)
    record = train(Trial(size, blocks, 1e-3, 0))
    assert (
        record["state_bytes"]
        == held_bytes(blocks, size)
        > held_bytes(blocks, replace(size, steps=1))
    )


def test_relations_name_cases_that_there_are():
    """Cases at equal bytes are those at equal rank."""
    for size in SIZES.values():
        names = {"quarter": size.rank // 4, "double": size.rank * 2}
        for relation in RELATIONS:
            every = ablations if relation.set_name == "ablations" else methods
            known = {case.name for case in every(size)}
            assert relation.better.format(**names) in known
            assert relation.worse.format(**names) in known


# ---------------------------------------------------------------- reports


def line(name, losses):
    records = {
        seed: {
            "final_loss": loss,
            "validation": [[0, 5.5], [10, loss]],
            "cpu_seconds": [0.0, 0.2],
            "state_bytes": 2048,
        }
        for seed, loss in enumerate(losses)
    }
    return report.Line(Case(name, "galore", {"rank": 8}), {1e-3: 3.0, 3e-3: 2.0, 1e-2: 3.0},
                       True, records)  # fmt: skip


def test_differences_are_of_pairs():
    """Seeds that are hard for both cancel."""
    one, two = line("AdamW", [2.0, 3.0, 4.0]), line("Fira", [1.9, 2.9, 3.9])
    cells = report.row(two, one)
    assert cells[3:6] == ["2.900 ± 1.000", "+0.100 ± 0.000", "3"]
    assert cells[6:] == ["2", "20"]
    missing = report.Line(Case("SST", "sst"))
    assert report.row(missing, one)[2] == report.NOT_RUN
    text = report.section([one, two, missing])
    assert "Not run yet: SST." in text and "2.900 ± 1.000" in text


@pytest.mark.parametrize(
    "fira, said",
    [
        ([1.9, 2.91, 3.9], "reproduced"),
        ([2.1, 3.11, 4.1], "not reproduced"),
        ([1.9, 3.2, 3.9], "not told apart"),
        ([1.9], "not tested yet"),
    ],
)
def test_verdicts(fira, said):
    relation = next(r for r in RELATIONS if r.better == "Fira")
    lines = [line("GaLore", [2.0, 3.0, 4.0]), line("Fira", fira)]
    assert report.verdict(relation, lines, MICRO, None)[-1] == said


@pytest.mark.parametrize(
    "switched, said",
    [
        ([2.01, 3.0, 4.01], "reproduced"),
        ([2.10, 3.11, 4.1], "not reproduced"),
        ([2.01, 3.07, 4.02], "not told apart"),
        ([2.01], "not tested yet"),
    ],
)
def test_near_is_a_tenth_of_what_lora_is_behind(switched, said):
    """Within it with both errors, beyond it with both, or neither can be said."""
    relation = next(r for r in RELATIONS if r.better == "SwitchLoRA")
    lines = [line("AdamW", [2.0, 3.0, 4.0]), line("SwitchLoRA", switched)]
    assert report.verdict(relation, lines, MICRO, (0.5, 0.01))[-1] == said
    assert report.verdict(relation, lines, MICRO, None)[-1] == "not tested yet"


def test_a_table_is_put_between_its_markers_and_nowhere_else(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "a\n<!-- study: one -->\nold\n<!-- end -->\nb\n<!-- study: two -->\n<!-- end -->\n"
    )
    for _ in range(2):
        report.place(page, "one", r"new \1")
    text = page.read_text()
    assert text.startswith("a\n<!-- study: one -->\n\nnew \\1\n\n<!-- end -->\nb\n")
    assert text.endswith("<!-- study: two -->\n<!-- end -->\n") and "old" not in text
    with pytest.raises(ValueError, match="three"):
        report.place(page, "three", "x")


def test_methods_are_data():
    assert all(isinstance(method, Method) and len(method.grid) == 3 for method in METHODS.values())
