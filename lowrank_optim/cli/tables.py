"""Tables in a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text


def print_table(
    console: Console, title: str, header: Sequence[str], rows: Sequence[Sequence[str | Text]]
) -> None:
    """A table whose first column is text and whose others are figures."""
    table = Table(
        header_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for i, name in enumerate(header):
        table.add_column(name, justify="right" if i else "left", no_wrap=not i)
    for row in rows:
        table.add_row(*row)
    console.print(Text(title, "italic"))  # one of the table's own breaks where a narrow table ends
    console.print(table)
