"""Tables that lose nothing in a narrow terminal: long words are broken, not cut. Imports rich alone."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text


def table(*headings: str, right: Collection[str] = (), **options: Any) -> Table:
    """A table without rows.

    Args:
        headings: of the columns.
        right: those with numbers, which are right-aligned and narrowed last.
        options: of `rich.table.Table`.
    """
    empty = Table(*(Column(name, overflow="fold") for name in headings), **options)
    for column in empty.columns:
        if column.header in right:
            column.justify, column.no_wrap = "right", True
    return empty


def print_field(console: Console, name: str, value: Text, width: int = 10) -> None:
    """Print `name  value`; a terminal continues long values below the value, a file has them in one line."""
    head = Text(f"{name:<{width}} ", style="bold")
    if not console.is_terminal:
        console.print(head.append(value), soft_wrap=True)
        return
    line = Table.grid(Column(no_wrap=True), Column(overflow="fold"))
    line.add_row(head, value)
    console.print(line)
