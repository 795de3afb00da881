"""``lowrank-optim fit``: the best plan under a budget, printed or saved."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from torch import nn

from lowrank_optim.cli.choices import COUNT, check_tokens, forward_options, number, options_of
from lowrank_optim.cli.display import gib, remedy
from lowrank_optim.cli.errors import Refused, nearest
from lowrank_optim.cli.models import imported, load
from lowrank_optim.cli.tables import print_table
from lowrank_optim.engine.summary import binary
from lowrank_optim.fitting import Plan
from lowrank_optim.fitting import fit as best
from lowrank_optim.groups.keys import METHODS
from lowrank_optim.memory import GIB
from lowrank_optim.memory.autocast import Autocast
from lowrank_optim.memory.losses import LOSSES, Loss
from lowrank_optim.memory.models import MODELS
from lowrank_optim.stores import STORES


@click.command(epilog="Known models: " + ", ".join(MODELS))
@click.option(
    "--model",
    required=True,
    help="A known model, a transformers config.json or its folder, or module.path:function, which "
    "returns an nn.Module or a configuration; it is called on the meta device, or as it is with "
    "--calibrate.",
)
@click.option("--budget-gib", type=number, metavar="NUMBER", required=True, help="Of the device.")
@click.option(
    "--host-gib", type=number, metavar="NUMBER", help="For moments in host memory.  [default: all]"
)
@forward_options
@click.option("--accumulation-steps", type=COUNT, default=1, show_default=True)
@click.option(
    "--optimizer", "names", multiple=True, help="Of those to choose from, best first; repeatable."
)
@click.option(
    "--option", "pairs", multiple=True, metavar="KEY=VALUE", help="Of every optimizer; repeatable."
)
@click.option(
    "--in-backward",
    "modes",
    type=click.Choice(["none", "project", "step"]),
    multiple=True,
    help="Of those to choose from; repeatable.  [default: all]",
)
@click.option(
    "--state-dtype",
    "stores",
    type=click.Choice(list(STORES)),
    multiple=True,
    help="Of those to choose from, best first; repeatable.  [default: all]",
)
@click.option(
    "--state-device",
    "places",
    type=click.Choice(["none", "cpu"]),
    multiple=True,
    help="Where moments may lie: on the device (none) or in host memory; repeatable.  "
    "[default: both]",
)
@click.option(
    "--calibrate",
    metavar="MODULE:FUNCTION",
    help="A function of the model that yields losses: ranks go where gradients need them.",
)
@click.option(
    "--energy",
    type=click.Choice(["relative", "absolute"]),
    help="How --calibrate weighs matrices.  [default: absolute]",
)
@click.option("--multiple", type=COUNT, default=8, show_default=True, help="Of which ranks are.")
@click.option("--least", type=COUNT, help="The smallest rank.  [default: --multiple]")
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    help="Of the weights of a model that is not your own.  [default: bfloat16]",
)
@click.option("--device", type=click.Choice(["cuda", "cpu"]), help="That trains.  [default: cuda]")
@click.option(
    "--world-size",
    type=COUNT,
    help="GPUs among which FSDP2 shards the model: the budget is each's.",
)
@click.option("--json", "as_text", is_flag=True, help="Print the plan as JSON, and nothing else.")
@click.option(
    "--save", type=click.Path(dir_okay=False, path_type=Path), help="Write the plan as JSON."
)
def fit(
    model: str,
    budget_gib: float,
    host_gib: float | None,
    tokens: int | None,
    micro_batch: int | None,
    checkpointing: bool,
    loss: Loss | None,
    loss_chunk: int | None,
    autocast: Autocast | None,
    accumulation_steps: int,
    names: tuple[str, ...],
    pairs: tuple[str, ...],
    modes: tuple[str, ...],
    stores: tuple[str, ...],
    places: tuple[str, ...],
    calibrate: str | None,
    energy: str | None,
    multiple: int,
    least: int | None,
    dtype: str | None,
    device: str | None,
    world_size: int | None,
    as_text: bool,
    save: Path | None,
) -> None:
    """Find the best optimizer, mode, format of moments and ranks that a budget has room for.

    Without --calibrate nothing is allocated, and nothing is downloaded.
    """
    check_tokens(tokens, micro_batch, checkpointing, loss, loss_chunk, autocast)
    for name in names:
        if name not in METHODS:
            raise Refused(f"--optimizer {name!r} is no class of them{nearest(name, METHODS)}")
    losses = None if calibrate is None else imported("--calibrate", calibrate)
    module = load(
        model,
        None if dtype is None else getattr(torch, dtype),
        runs=tokens is not None,
        with_values=losses is not None,
    )
    _make_folder(save)
    plan = _planned(
        module,
        budget_gib,
        tokens=None if tokens is None else (micro_batch or 1, tokens),
        checkpointing=checkpointing,
        loss=loss or LOSSES[0],
        loss_chunk=loss_chunk,
        autocast=autocast,
        accumulation_steps=accumulation_steps,
        optimizers=list(names) or None,
        in_backward=[None if mode == "none" else mode for mode in modes] or None,
        state_dtypes=list(stores) or None,
        state_devices=[None if place == "none" else place for place in places] or None,
        calibrate=losses,
        energy=energy,
        multiple=multiple,
        least=least,
        host_gib=host_gib,
        device=device or "cuda",
        world_size=world_size,
        **options_of(pairs),
    )
    if save is not None:
        try:
            save.write_text(plan.to_json() + "\n", encoding="utf-8")
        except OSError as error:
            raise Refused(f"--save {save}: {error}") from error
    if as_text:
        click.echo(plan.to_json())
    else:
        _print(model, plan)


def _make_folder(save: Path | None) -> None:
    """That of ``--save``: a plan may take minutes, and would be lost.

    Raises:
        Refused: it cannot be made.
    """
    try:
        if save is not None:
            save.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused(f"--save {save}: {error}") from error


def _planned(module: nn.Module, budget_gib: float, **asked: Any) -> Plan:
    """The plan.

    Raises:
        Refused: nothing fits, or what was given cannot be used.
    """
    known = (TypeError, ValueError, NotImplementedError, RuntimeError)
    expected = known if asked["calibrate"] is None else (Exception,)  # code of the user's
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a training run that this is not
            return best(module, budget_gib, **asked)
    except expected as error:
        kind = "" if isinstance(error, known) else f"--calibrate: {type(error).__name__}: "
        raise Refused(kind + (str(error) or type(error).__name__)) from error


def _print(model: str, plan: Plan) -> None:
    """What to construct, the ranks, and what was given up."""
    lines = str(plan).split("\n")
    console = Console()
    rows: dict[int, list[str]] = {}
    for name, rank in plan.ranks.items():
        rows.setdefault(rank, []).append(name)
    print_table(
        console,
        f"{model} in {plan.budget / GIB:.6g} GiB\n{lines[0]}\n{lines[1]}",
        ["first matrix", "matrices", "rank"],
        [[rows[rank][0], str(len(rows[rank])), str(rank)] for rank in sorted(rows, reverse=True)],
    )
    for word, sizes in (("Dense", plan.dense), ("Frozen", plan.frozen)):
        if sizes:
            listed = ", ".join(f"{name} ({binary(size)})" for name, size in sizes.items())
            console.print(f"{word}: {listed}", highlight=False)
    if plan.energy is not None:
        console.print(f"Energy of gradients captured: {plan.energy:.1%}", highlight=False)
    for text in plan.gave_up:
        console.print(f"Given up for memory: {text}.", highlight=False)
    if plan.estimate.is_tight(plan.budget):
        spare = gib(plan.budget - plan.estimate.peak)
        console.print(f"Tight: {spare} GiB are left. {remedy()}", style="yellow", highlight=False)
