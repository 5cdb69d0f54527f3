"""No table loses a character of its cells at 80 columns, which is also what a pipe gets."""

from __future__ import annotations

import ast
import io
from pathlib import Path

from rich.console import Console

import prefopt
from prefopt.data.findings import Problem, Report
from prefopt.safety.tables import table

PACKAGE = Path(prefopt.__file__).parent


def shown(renderable, width: int = 80) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width).print(renderable)
    text = stream.getvalue()
    assert max(map(len, text.splitlines())) <= width
    return text


def cells(text: str) -> list[str]:
    """The text of each column, its lines put together again without spaces."""
    lines = [[part.strip() for part in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    return ["".join(parts) for parts in zip(*lines, strict=True)]


def test_long_words_are_broken_and_numbers_are_not():
    path = "/data/preferences/hh-harmless/part-00017-of-00031-with-a-name-that-goes-on-for-longer-than-a-line.jsonl.gz"
    made = table("option", "value", "GB", right=("GB",))
    made.add_row("dataset_name", path, "1128.9")
    assert cells(shown(made)) == ["dataset_name", path, "1128.9"]


def test_row_numbers_of_a_mixture_are_whole():
    origins = {row: f"/data/hh-harmless/part-b.jsonl.gz row {row + 1000}" for row in range(5)}
    explanation = "Prompt and chosen completion are the same text. Look at how the file was made and drop these rows."
    report = Report([Problem("equal completions", "error", list(range(5)), explanation)], 2000, origins)
    text = shown(report.table())
    assert "…" not in text
    together = "".join(cells(text))
    assert all(origin.replace(" ", "") in together.replace(" ", "") for origin in origins.values())
    assert "equal" in text
    assert "error" in text


def test_every_table_of_the_package_is_made_here():
    """Except grids, which have no columns to be cut."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Table":
                assert path.name == "tables.py", f"{path}:{node.lineno}: use prefopt.safety.tables.table"
