"""``lowrank-optim memory``: what a model needs with each optimizer, beside the memory of a card.

Nothing is allocated: :func:`lowrank_optim.memory.estimate` makes the state on the meta device.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from torch import nn

from lowrank_optim.cli import measure as really
from lowrank_optim.cli.choices import (
    COUNT,
    check_alone,
    check_tokens,
    chosen,
    forward_options,
    number,
    share,
)
from lowrank_optim.cli.display import HEADER, bars, cells, gib, reading, tight
from lowrank_optim.cli.errors import Refused
from lowrank_optim.cli.models import load
from lowrank_optim.cli.plot import plot
from lowrank_optim.cli.rows import (
    CLASSES,
    QUARTER,
    Chosen,
    Column,
    Row,
    columns,
    measure,
)
from lowrank_optim.cli.tables import print_table
from lowrank_optim.memory import GIB
from lowrank_optim.memory.autocast import Autocast
from lowrank_optim.memory.losses import LOSSES, Loss
from lowrank_optim.memory.models import MODELS

WIDTH = 100
"""Columns of bars and table, where the terminal does not say how many it has."""


PER_COLUMN = {"live_gradients", "in_backward", "activations", "beside"}
PER_COLUMN |= {"step_transients", "refresh_transients", "turn"}
"""Figures that each column has of its own."""

PARAGRAPH = "\n\n".join(["Known models: " + ", ".join(MODELS), "Optimizers: " + ", ".join(CLASSES)])


@click.command(epilog=PARAGRAPH)
@click.option(
    "--model",
    required=True,
    help="A known model, a transformers config.json or its folder, or module.path:function, which "
    "returns an nn.Module or a configuration and is called on the meta device.",
)
@click.option(
    "--optimizer", "names", multiple=True, help="A class, instead of the usual rows; repeatable."
)
@click.option(
    "--option", "pairs", multiple=True, metavar="KEY=VALUE", help="Of the classes of --optimizer."
)
@click.option(
    "--only", multiple=True, metavar="ROW", help="Of the usual rows, as the table names them."
)
@click.option(
    "--rank",
    type=share,
    metavar="INT|FRACTION",
    help="An int, or a share of each matrix's smaller side.  [default: 0.25, a quarter]",
)
@click.option(
    "--budget-gib",
    type=number,
    metavar="NUMBER",
    default=24.0,
    show_default=True,
    help="Of the card.",
)
@forward_options
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    help="Of the weights of a model that is not your own.  [default: bfloat16]",
)
@click.option(
    "--in-backward",
    "modes",
    type=click.Choice(["none", "step", "project"]),
    multiple=True,
    help="Columns of this mode of attach_in_backward; repeatable.  [default: all]",
)
@click.option("--accumulation-steps", type=COUNT, help="Micro-batches of a step, in every column.")
@click.option(
    "--coords-dtype",
    "coords",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    multiple=True,
    help="Of the coordinates that project keeps, a column each.  [default: auto]",
)
@click.option(
    "--device",
    type=click.Choice(["cuda", "cpu"]),
    help="That trains: a DCT basis is kept as it is fastest there.  [default: cuda]",
)
@click.option(
    "--world-size", type=COUNT, help="GPUs among which FSDP2 shards the model: figures of each."
)
@click.option(
    "--measure", "measuring", is_flag=True, help="Train for some steps on a GPU: peaks as they are."
)
@click.option("--json", "as_text", is_flag=True, help="Print figures in bytes, and nothing else.")
@click.option(
    "--plot", "picture", type=click.Path(dir_okay=False, path_type=Path), help="Draw the bars."
)
def memory(
    model: str,
    names: tuple[str, ...],
    pairs: tuple[str, ...],
    only: tuple[str, ...],
    rank: int | float | None,
    budget_gib: float,
    tokens: int | None,
    micro_batch: int | None,
    checkpointing: bool,
    loss: Loss | None,
    loss_chunk: int | None,
    autocast: Autocast | None,
    dtype: str | None,
    modes: tuple[str, ...],
    accumulation_steps: int | None,
    coords: tuple[str, ...],
    device: str | None,
    world_size: int | None,
    measuring: bool,
    as_text: bool,
    picture: Path | None,
) -> None:
    """Say what training a model needs with each optimizer, and what fits a card.

    A peak is weights, state and what lives of the gradients at the worst moment, in GiB. Nothing is
    allocated but with --measure, and nothing is downloaded.
    """
    budget = round(budget_gib * GIB)
    check_alone(world_size, measuring)
    if measuring:
        really.check(tokens, budget, device, loss, autocast)
    if picture is not None and find_spec("matplotlib") is None:
        raise Refused("--plot needs matplotlib: pip install matplotlib")
    check_tokens(tokens, micro_batch, checkpointing, loss, loss_chunk, autocast)
    if coords and modes and "project" not in modes:
        raise Refused("--coords-dtype has no effect without --in-backward project")
    batch = None if tokens is None else (micro_batch or 1, tokens)
    forward: dict[str, Any] = {"loss": loss or LOSSES[0], "loss_chunk": loss_chunk}
    forward |= {"autocast": autocast}
    module = load(model, None if dtype is None else getattr(torch, dtype), runs=batch is not None)
    rows = _measured(
        module,
        chosen(names, pairs, only, rank, next(module.parameters()).dtype, world_size),
        columns(modes, accumulation_steps, coords, world_size),
        batch,
        checkpointing,
        device or "cuda",
        forward,
        world_size,
    )
    about = _about(model, module, rank, batch, checkpointing)
    about |= {"world_size": world_size, "device": device or "cuda"}
    about |= forward if batch is not None else dict.fromkeys(forward)
    found: really.Measured = {}
    if measuring and batch is not None:
        run = really.Run(model, dtype, batch, checkpointing, budget, **forward)
        found = really.measured(rows, run)
    if as_text:
        click.echo(json.dumps(figures(rows, about, budget, found), indent=1))
    else:
        _print(rows, about, budget, found)
    if picture is not None:
        plot(rows, _title(about), budget, picture)


def _measured(
    module: nn.Module,
    choices: Sequence[Chosen],
    asked: Sequence[Column],
    batch: tuple[int, int] | None,
    checkpointing: bool,
    device: str,
    forward: Mapping[str, Any],
    world_size: int | None,
) -> list[Row]:
    """The rows; what an optimizer warns of is said, once.

    Raises:
        Refused: an optimizer or the model does not take what was given.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a training run that this is not
            own = (batch, checkpointing, device, world_size)
            rows = measure(module, choices, asked, *own, **forward)
    except (TypeError, ValueError, NotImplementedError, RuntimeError) as error:
        raise Refused(str(error) or type(error).__name__) from error
    for note in dict.fromkeys(note for row in rows for note in row.notes):
        click.echo(f"Note: {note}", err=True)
    return rows


def _about(
    model: str,
    module: nn.Module,
    rank: int | float | None,
    batch: tuple[int, int] | None,
    checkpointing: bool,
) -> dict[str, Any]:
    """What was asked for."""
    dtypes = {str(p.dtype).removeprefix("torch.") for p in module.parameters()}
    return {
        "model": model,
        "parameters": sum(p.numel() for p in module.parameters()),
        "rank": QUARTER if rank is None else rank,
        "dtype": " and ".join(sorted(dtypes)),
        "micro_batch": None if batch is None else batch[0],
        "tokens": None if batch is None else batch[1],
        "checkpointing": checkpointing,
    }


def figures(
    rows: Sequence[Row], about: dict[str, Any], budget: float, measured: really.Measured
) -> dict[str, Any]:
    """Every figure in bytes."""
    found = []
    for row in rows:
        peaks = []
        for column, e in row.peaks.items():
            own: dict[str, Any] = {
                "in_backward": column.in_backward,
                "accumulation_steps": column.accumulation_steps,
                "coords_dtype": column.coords_dtype,
                "peak": None if e is None else e.peak,
            }
            if e is not None:
                own |= {"fits": e.fits(budget), "live_gradients": e.live_gradients}
                own |= {"activations": e.activations, "peak_at": e.peak_at, "turn": e.turn}
                own |= {"step_transients": e.step_transients}
                own |= {"refresh_transients": e.refresh_transients, "beside": dict(e.beside)}
            if (row.name, column) in measured:
                own |= {"measured": measured[row.name, column].figures()}
            peaks.append(own)
        of_all = {key: value for key, value in asdict(row.state).items() if key not in PER_COLUMN}
        called = {"optimizer": row.chosen.called, "options": dict(row.chosen.options)}
        found.append({"name": row.name, **called, **of_all, "peaks": peaks})
    return {**about, "budget": budget, "rows": found}


def _title(about: dict[str, Any]) -> str:
    rank = about["rank"]
    of = f"rank {rank}" if isinstance(rank, int) else f"rank {rank:g} of the smaller side"
    text = f"{about['model']}, {of}, {about['dtype']} weights"
    if about["world_size"]:
        text += f", each of {about['world_size']} GPU" + "s" * (about["world_size"] > 1)
    if about["tokens"]:
        text += f", {about['micro_batch']} x {about['tokens']} tokens"
        text += ", checkpointed" * about["checkpointing"]
        text += f", {about['loss']} loss" * (about["loss"] != LOSSES[0])
        text += f" of {about['loss_chunk']} tokens" * (about["loss_chunk"] is not None)
        text += f", autocast to {about['autocast']}" * (about["autocast"] is not None)
    return text


def _print(
    rows: Sequence[Row], about: dict[str, Any], budget: float, measured: really.Measured
) -> None:
    """The table, bars and what they say."""
    state = rows[0].state
    title = (
        f"{_title(about)}, beside {budget / GIB:g} GiB (figures in GiB)\n"
        f"weights {gib(state.weights)}, gradients {gib(state.gradients)} (largest "
        f"{gib(state.largest_gradient)})"
    )
    if state.world_size is None:
        title += "; peaks by mode of attach_in_backward"
    else:
        title += f", gathered by FSDP2 {gib(state.gathered or 0)}; of the first; peaks of the worst"
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH + max(len(row.name) for row in rows))
    header = [*HEADER, *(column.header for column in rows[0].peaks)]
    print_table(console, title, header, [cells(row, budget) for row in rows])
    console.print(bars(rows, budget, width=min(console.width, WIDTH)))
    console.print("\n" + reading(rows, budget) + "\n", highlight=False)
    if warning := tight(rows, budget):
        console.print(warning + "\n", style="yellow", highlight=False)
    if measured:
        print_table(console, really.title(budget), really.HEADER, really.lines(rows, measured))
