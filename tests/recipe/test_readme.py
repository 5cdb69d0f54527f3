"""What the README says that a machine can check."""

from __future__ import annotations

import re
from pathlib import Path

from prefopt.catalogue.tables import losses_table
from prefopt.losses import parse
from prefopt.losses.registry import _LOSSES

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def test_the_table_of_objectives_is_the_registrys():
    assert losses_table() in README, "stale: run `python scripts/write_objectives_table.py`"


def snippets() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_loss_snippet_prints_what_it_says(capsys):
    exec(snippets()[0], {})
    shown = capsys.readouterr().out
    assert "1.0210" in shown
    assert "'rewards/margins': 0.15" in shown


def test_the_snippet_of_ones_own_loss_registers_it():
    try:
        exec(snippets()[2], {})
        assert str(parse("exponential")) == "exponential(beta=0.1)"
    finally:
        _LOSSES.pop("exponential", None)


def test_every_linked_file_exists():
    root = Path(__file__).parents[2]
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (root / target).exists(), target
