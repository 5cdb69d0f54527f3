"""Update the table of problems in docs/data.md from prefopt/data/problems.py.

    python scripts/write_problems_table.py

The text between `<!-- problems -->` and `<!-- end -->` is replaced. A test fails while the page is out of date.
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

from prefopt.data.problems import KINDS

PAGE = Path(__file__).resolve().parents[1] / "docs" / "data.md"
BLOCK = re.compile(r"<!-- problems -->\n.*?<!-- end -->", re.DOTALL)
COLUMN = re.compile(r"\b(prompt|chosen|rejected|completion)\b")
HEADINGS = {"error": "Errors stop the run", "warning": "Warnings keep the row", "info": "Notes"}


def table() -> str:
    """Every problem, its meaning and its cure, by severity. Problems that differ in a column's name share a row."""
    groups: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for name, kind in KINDS.items():
        groups[kind.severity, _of_any_column(name, kind.explanation), _of_any_column(name, kind.advice)].append(name)
    parts = []
    for severity, heading in HEADINGS.items():
        parts += [f"### {heading}", "", "| problem | what it means | what to do |", "|---|---|---|"]
        for (of, explanation, advice), names in groups.items():
            if of != severity:
                continue
            if len(names) == 1:
                explanation, advice = KINDS[names[0]].explanation, KINDS[names[0]].advice
            listed = "<br>".join(f"`{name}`" for name in names)
            parts.append(f"| {listed} | {_cell(explanation)} | {_cell(advice)} |")
        parts.append("")
    return "\n".join(parts).rstrip()


def _of_any_column(name: str, text: str) -> str:
    """A problem's text with COLUMN for the column in the problem's name."""
    if (column := COLUMN.search(name)) is None:
        return text
    return re.sub(rf"(?<=['=]){column[0]}(?=['.])|(?<=--columns ){column[0]}(?==)", "COLUMN", text)


def _cell(text: str) -> str:
    # Templates, JSON and escapes are code: {{ bos_token }}, [{"role": ...}], \n.
    text = re.sub(r"(\[\{.*?\}\]|\{[{%].*?[%}]\})", r"`\1`", text)
    return text.replace("|", r"\|").replace(r"\n\n", r"\\n\\n")


def rewritten(text: str) -> str:
    """The page with its table as the code has it."""
    return BLOCK.sub(lambda _: f"<!-- problems -->\n\n{table()}\n\n<!-- end -->", text)


if __name__ == "__main__":
    PAGE.write_text(rewritten(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
