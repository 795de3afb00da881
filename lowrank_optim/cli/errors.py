"""One line for what cannot be done, and exit code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import click


class Refused(click.ClickException):
    """What was given cannot be used; its message is printed in one line."""

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


def nearest(given: str, known: Iterable[str]) -> str:
    """What to try in place of an unknown name: the end of a message."""
    names = {name.lower(): name for name in known}
    found = difflib.get_close_matches(given.lower(), names, 1, cutoff=0.4)
    return f"; did you mean {names[found[0]]}?" if found else ""


@contextmanager
def _one_line() -> Iterator[None]:
    try:
        yield
    except click.exceptions.NoArgsIsHelpError:
        raise
    except click.UsageError as error:
        raise Refused(error.format_message()) from error


class OneLine(click.Group):
    """A group whose wrong arguments are one line, without the usage before it."""

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **extra: Any,
    ) -> click.Context:
        """Read the group's own arguments."""
        with _one_line():
            return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command, which reads its own."""
        with _one_line():
            return super().invoke(ctx)
