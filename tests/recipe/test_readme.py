"""What the README says that a machine can check."""

from __future__ import annotations

from pathlib import Path

from prefopt.cli import losses_table

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def test_the_table_of_objectives_is_the_registrys():
    assert losses_table() in README, "stale: paste the output of `prefopt losses --markdown` into README.md"
