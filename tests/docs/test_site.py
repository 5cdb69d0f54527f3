"""The site of the documentation: what can be checked without building it (CI builds it with --strict)."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from scripts.write_problems_table import rewritten

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))


class _Loader(yaml.SafeLoader):
    """Reads mkdocs.yml without its Python functions."""


_Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: None)
CONFIG: dict[str, Any] = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), _Loader)


def _names(entries: Any) -> list[str]:
    if isinstance(entries, str):
        return [entries]
    values = entries.values() if isinstance(entries, dict) else entries
    return [name for entry in values for name in _names(entry)]


def test_every_page_is_in_the_navigation_once():
    named = [name for name in _names(CONFIG["nav"]) if not name.startswith("project/")]
    assert sorted(named) == sorted(page.relative_to(DOCS).as_posix() for page in PAGES), "mkdocs.yml: nav"


def test_lists_are_lists_in_the_site_too():
    """Unlike GitHub, Python's Markdown needs an empty line before a list."""
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        lines = text.splitlines()
        for before, line in pairwise(lines):
            if re.match(r"([-*]|\d+\.) ", line):
                assert not before or re.match(r"([-*]|\d+\.) | {2,}", before), f"{page.name}: {line}"


def test_the_table_of_problems_is_the_codes():
    text = (DOCS / "data.md").read_text(encoding="utf-8")
    assert rewritten(text) == text, "stale: run `python scripts/write_problems_table.py`"


def test_nothing_is_loaded_from_elsewhere():
    assert CONFIG["theme"]["font"] is False
    shipped = CONFIG["extra"]["polyfills"] + CONFIG["extra_css"]
    assert all((DOCS / name).exists() for name in shipped)
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"!\[[^]]*\]\(https?:", text), f"{page.name}: a picture from elsewhere"
        assert "```mermaid" not in text, f"{page.name}: the theme loads mermaid from elsewhere"
