"""What options of the commands stand for: numbers, arguments, and rows of the table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click
import torch

from lowrank_optim.cli.errors import Refused, nearest
from lowrank_optim.cli.rows import CLASSES, QUARTER, WHOLE, Chosen, low_rank, usual
from lowrank_optim.integrations.arguments import parse_optim_args
from lowrank_optim.memory.autocast import AUTOCASTS
from lowrank_optim.memory.losses import LOSSES

Command = TypeVar("Command", bound=Callable[..., Any])
COUNT = click.IntRange(min=1)
FORWARD = (
    click.option("--tokens", type=COUNT, help="Of a sequence: count activations too."),
    click.option("--micro-batch", type=COUNT, help="Sequences of --tokens at once.  [default: 1]"),
    click.option("--checkpointing", is_flag=True, help="Of every layer: keep its input alone."),
    click.option(
        "--loss",
        type=click.Choice(LOSSES),
        help="With all logits; of some tokens at once; or Liger's, fused.  [default: transformers]",
    ),
    click.option("--loss-chunk", type=COUNT, help="Tokens of chunked at once.  [default: 1024]"),
    click.option(
        "--autocast",
        type=click.Choice(AUTOCASTS),
        help="Train float32 weights (--dtype float32) under torch.autocast.",
    ),
)


def forward_options(command: Command) -> Command:
    """Options of a command that counts what forward and backward need."""
    for option in reversed(FORWARD):
        command = option(command)
    return command


def number(given: str | float) -> float:
    """A positive number. nan, which is in every range of click's, is none."""
    try:
        found = float(given)
    except ValueError:
        found = 0.0
    if not 0 < found < float("inf"):
        raise click.BadParameter(f"must be a positive number, got {given}")
    return found


def share(given: str) -> int | float:
    """An int, or another number; the optimizer says which it allows."""
    try:
        return int(given)
    except ValueError:
        pass
    try:
        return float(given)
    except ValueError:
        raise click.BadParameter(
            f"must be a positive int or a fraction in (0, 1), got {given!r}"
        ) from None


def check_tokens(
    tokens: int | None,
    micro_batch: int | None,
    checkpointing: bool,
    loss: str | None,
    loss_chunk: int | None,
    autocast: str | None,
) -> None:
    """Raise for what says how activations are counted, where nothing asks for them.

    Raises:
        Refused: there is such an option.
    """
    if tokens is not None:
        return
    for flag, given in (
        ("--micro-batch", micro_batch is not None),
        ("--checkpointing", checkpointing),
        ("--loss", loss is not None),
        ("--loss-chunk", loss_chunk is not None),
        ("--autocast", autocast is not None),
    ):
        if given:
            raise Refused(f"{flag} has no effect without --tokens, which counts activations")


def check_alone(world_size: int | None, measuring: bool) -> None:
    """Raise for what is of one GPU, where figures are of one of several.

    Raises:
        Refused: there is such an option.
    """
    if world_size is None:
        return
    if measuring:
        raise Refused("--measure trains on one GPU: leave --world-size out")


def chosen(
    names: Sequence[str],
    pairs: Sequence[str],
    only: Sequence[str],
    rank: int | float | None,
    dtype: torch.dtype,
    world_size: int | None = None,
) -> list[Chosen]:
    """The rows that were asked for; of several GPUs the usual ones that train shards.

    Raises:
        Refused: a name is unknown, or an option would have no effect.
    """
    if names and only:
        raise Refused("--only is of the usual rows, and --optimizer asks for others: give one")
    if not names:
        if pairs:
            raise Refused(f"--option {pairs[0]} has no effect without --optimizer")
        rows = {row.name: row for row in usual(QUARTER if rank is None else rank, dtype)}
        if world_size is not None:
            rows = {name: row for name, row in rows.items() if name not in WHOLE}
        for name in only:
            if world_size is not None and name in WHOLE:
                raise Refused(f"--only {name!r} does not train shards: leave --world-size out")
            if name not in rows:
                raise Refused(f"--only {name!r} is no row: they are {', '.join(rows)}")
        return [row for name, row in rows.items() if not only or name in only]
    options = options_of(pairs)
    given = [f"--option {key}={options[key]}" for key in ("rank", "density") if key in options]
    if rank is not None and given:
        raise Refused(f"--rank {rank} and {given[0]} both say how much is projected: give one")
    found = []
    for name in names:
        if name not in CLASSES:
            hint = nearest(name, CLASSES) or "; --help lists them"
            raise Refused(f"--optimizer {name!r} is no class of lowrank_optim{hint}")
        own = {}
        if low_rank(CLASSES[name]) and not given:
            own["rank"] = QUARTER if rank is None else rank
        told = "".join(f" {key}={value}" for key, value in options.items())
        found.append(Chosen(f"{name}{told}", CLASSES[name], {**own, **options}))
    if rank is not None and not any("rank" in row.options for row in found):
        raise Refused(f"--rank {rank} has no effect: {', '.join(names)} has no rank")
    return found


def options_of(pairs: Sequence[str]) -> dict[str, Any]:
    """``key=value`` as arguments: numbers, booleans, None, tuples; else text.

    Raises:
        Refused: one is no such pair, or is given twice.
    """
    found: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = (part.strip() for part in pair.partition("="))
        if not (key and equals and value):
            raise Refused(f"--option must be KEY=VALUE, got {pair!r}")
        if key in found:
            raise Refused(f"--option gives {key} twice: {found[key]} and {value}")
        found[key] = value
    return parse_optim_args(found)
