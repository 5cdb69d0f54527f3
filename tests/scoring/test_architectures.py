"""Every causal language model that transformers lists: in trees only where they give the padded layout's numbers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.architectures import ARCHITECTURES, examine

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "architectures.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_trees_equal_padded_rows_or_are_not_used(name):
    finding = examine(name)
    if finding.layout == "not tried":
        pytest.skip(finding.reason)
    assert finding.exact is None or finding.exact < 2e-4
    # Rounding of the sum of fifty tokens.
    assert finding.half is None or finding.half < 0.3
    assert finding.layout == "trees" or finding.reason


def test_the_page_names_its_release_and_most_architectures():
    """Releases add and drop some, so it does not have to name all."""
    assert re.search(r"With transformers \d+\.\d+", PAGE)
    lines = dict(re.findall(r"^\| (\S+) \| (trees|trees, padded|padded|not tried) \|", PAGE, re.MULTILINE))
    assert len(lines) > 100
    assert sum(layout != "not tried" for layout in lines.values()) > 0.85 * len(lines)
    assert (lines["llama"], lines["gpt_neo"], lines["jamba"]) == ("trees", "trees, padded", "padded")
