"""What pyproject.toml promises to an installed package."""

from __future__ import annotations

import tomllib
from importlib import metadata
from pathlib import Path

import prefopt
from prefopt.report.versions import version_of

ROOT = Path(__file__).parents[1]


def test_the_version_is_that_of_the_distribution(monkeypatch):
    name = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["name"]
    monkeypatch.setattr(metadata, "version", {name: prefopt.__version__}.__getitem__)
    assert version_of("prefopt") == prefopt.__version__
