"""What the README and the docs claim that a machine can check: counts, snippets, links and anchors."""

from __future__ import annotations

import functools
import re
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer

from prefopt.catalogue.tables import families_line
from prefopt.losses import available, parse, presets
from prefopt.losses.registry import _LOSSES
from scripts.papers_table import counted
from tests.recipe.test_recipe import pairs_file
from tests.tiny import make_tokenizer
from tests.trainer.runs import make_pairs, save_model

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_the_families_are_the_registrys():
    assert families_line() in README, "stale: run `python scripts/write_objectives_table.py`"


def test_counts():
    assert f"{len(available())} objectives and {len(presets())} presets" in README
    for text in (README, (ROOT / "docs" / "papers.md").read_text(encoding="utf-8")):
        assert counted(text) == text, "stale: run `python scripts/papers_table.py --write`"


def test_the_readme_stays_short():
    assert len(README.splitlines()) <= 130


def snippets(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_the_loss_snippet_prints_what_it_says(capsys):
    exec(snippets(README)[0], {})
    shown = capsys.readouterr().out
    assert "1.0210" in shown
    assert "'rewards/margins': 0.15" in shown


def test_the_snippet_of_a_loss_in_a_loop_runs(capsys):
    exec(snippets(PYTHON)[0], {})
    assert "REFERENCE" in capsys.readouterr().out


@pytest.mark.parametrize("number", [1, 2, 3])
def test_the_snippets_with_a_model_run(tmp_path, monkeypatch, number):
    monkeypatch.chdir(tmp_path)
    pairs_file(tmp_path, rows=16)
    path = save_model(tmp_path)
    names = {
        "model": AutoModelForCausalLM.from_pretrained(path) if number == 1 else path,
        "tokenizer": make_tokenizer(),
        "pairs": make_pairs(16),
        "MyDPOTrainer": type("MyDPOTrainer", (DPOTrainer,), {}),
        "DPOConfig": functools.partial(DPOConfig, use_cpu=True, bf16=False),  # TRL's own asks for a GPU otherwise
    }
    exec(snippets(PYTHON)[number], names)
    if number == 1:
        assert names["model"].lm_head.weight.grad.abs().sum() > 0
        assert not names["reference"].lm_head.weight.requires_grad
    else:
        assert names["trainer"].objective is not None


def test_the_snippet_of_ones_own_loss_registers_it():
    try:
        exec(snippets(PYTHON)[4], {})
        assert str(parse("exponential")) == "exponential(beta=0.1)"
    finally:
        _LOSSES.pop("exponential", None)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ +(.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+:", target):
            continue
        name, _, anchor = target.partition("#")
        goal = (page.parent / name).resolve() if name else page
        assert goal.exists(), target
        if anchor:
            assert anchor in anchors(goal), target


def test_the_map_of_the_rooms_is_the_linters():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    floors = [floor.split(" | ") for floor in next(c["layers"] for c in contracts if c["type"] == "layers")]
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE) == [room for floor in floors for room in floor]
    picture = text.partition("```mermaid\n")[2].partition("```")[0]
    drawn = []
    for line in picture.splitlines()[1:]:
        drawn += pairwise([row.split(" & ") for row in line.strip().split(" --> ")])
    assert drawn == list(pairwise(floors))


def test_linked_code_is_where_the_link_says():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    links = re.findall(r"\[`([\w.]+)`\]\((prefopt/\S+\.py)\)", text)
    assert len(re.findall(r"^\d+\. \*\*", text, re.MULTILINE)) == 10  # ten steps
    assert len(links) > 15
    for name, file in links:
        code = (ROOT / file).read_text(encoding="utf-8")
        for part in name.split("."):
            assert re.search(rf"^ *(def|class) {part}\b", code, re.MULTILINE), f"{file} has no {name}"
