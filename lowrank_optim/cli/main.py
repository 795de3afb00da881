"""The command and its subcommands."""

from __future__ import annotations

import click

from lowrank_optim.cli.check import check
from lowrank_optim.cli.errors import OneLine
from lowrank_optim.cli.fit import fit
from lowrank_optim.cli.memory import memory
from lowrank_optim.ops.__main__ import main as say_backends


@click.group(cls=OneLine, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="lowrank-optim")
def main() -> None:
    """Drop-in torch optimizers that train large models with low-rank state."""


@main.command()
def ops() -> None:
    """Say which backend serves each kind of device, and why."""
    say_backends()


main.add_command(check)
main.add_command(fit)
main.add_command(memory)
