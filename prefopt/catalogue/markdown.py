"""Markdown tables, for the docs and for model cards. Imports the standard library alone."""

from __future__ import annotations

from collections.abc import Sequence

BAR = r"\|"
"""A vertical bar inside a table cell."""


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; cells are Markdown already."""
    lines = [f"| {' | '.join(headings)} |", "|" + " --- |" * len(headings)]
    # A bar would end the cell, in code too.
    lines += [f"| {' | '.join(cell.replace('|', BAR) for cell in row)} |" for row in rows]
    return "\n".join(lines)
