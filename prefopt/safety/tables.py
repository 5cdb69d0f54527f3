"""Tables that lose nothing in a narrow terminal: long words are broken, not cut. Imports rich alone."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from rich.table import Column, Table


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
