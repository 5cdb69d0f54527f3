"""What the teaching pages say of the code: messages, losses, snippets."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

from datasets import Dataset
from typer.testing import CliRunner

from prefopt.cli import app
from prefopt.data import kind, normalise, validate
from prefopt.losses import parse
from prefopt.losses.registry import _LOSSES
from tests.tiny import make_tokenizer

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
OF_OTHERS = (
    "The following values were not passed to",
    "Did you mean",
    "PREFOPT_VERBOSE=1",
    "error:",
)


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def first_cells(text: str) -> list[str]:
    return [cell for cell in re.findall(r"^\| (.*?) \|", text, re.MULTILINE) if cell != "what you see"]


def texts_of_the_code() -> str:
    """Every string of the package, with {} where an f-string puts a value."""
    texts = []
    for file in (ROOT / "prefopt").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
                texts.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)


def test_the_messages_of_the_page_about_trouble_are_the_codes():
    quoted = [text for cell in first_cells(page("trouble.md")) for text in re.findall(r"`([^`]+)`", cell)]
    assert len(quoted) > 35
    code = texts_of_the_code()
    for text in quoted:
        assert text in OF_OTHERS or text in code, f"docs/trouble.md quotes a message that no code prints: {text}"


def test_every_loss_of_the_decision_page_exists():
    text = page("which-loss.md")
    expressions = re.findall(r"`((?:[a-z_]+(?:\([^`]*\))?)(?: \+ [^`]+)?)`", text)
    arguments = {"margin", "beta", "desirable_weight", "undesirable_weight", "loss", "chosen_score", "rejected_score"}
    parsed = [parse(expression) for expression in expressions if expression not in arguments]
    assert len(parsed) > 50


def test_the_rows_of_the_page_about_data_are_read_as_it_says():
    rows = [json.loads(text) for text in re.findall(r"```json\n(.*?)\n```", page("data.md"), re.DOTALL)]
    kinds = []
    for row in rows:
        dataset = normalise(Dataset.from_list([row]))
        kinds.append(kind(dataset))
        assert validate(dataset, tokenizer=make_tokenizer(), max_length=512).ok, row
    assert kinds == ["pair", "pair", "pair", "unpaired", "group"]


def test_losses_called_free_of_a_reference_are():
    line = re.search(r"losses without one: (.*?)\. Or", page("which-loss.md"))
    assert line is not None
    for name in re.findall(r"`(\w+)`", line[1]):
        assert not parse(name).needs.frozen, name


def test_the_class_of_the_page_works_from_a_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(re.findall(r"```python\n(.*?)```", page("own-loss.md"), re.DOTALL)[0], encoding="utf-8")
    try:
        for names in (["squared_hinge(beta=0.3)"], []):
            shown = CliRunner().invoke(app, ["losses", "--loss_file", str(file), *names])
            assert shown.exit_code == 0, shown.output
            assert "squared_hinge" in shown.output
    finally:
        _LOSSES.pop("squared_hinge", None)


def test_the_snippets_about_a_loss_of_ones_own_run_in_order(capsys):
    snippets = re.findall(r"```python\n(.*?)```", page("own-loss.md"), re.DOTALL)
    scope: dict[str, object] = {}
    try:
        for snippet in snippets:
            if "prefopt.recipe" not in snippet:  # trains: tests/docs/test_start.py
                exec(snippet, scope)
        assert "0.7225" in capsys.readouterr().out
    finally:
        _LOSSES.pop("squared_hinge", None)
