"""`prefopt new`: recipes and configs that come with the package, written to a file."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from prefopt.cli import app

ROOT = Path(__file__).parents[2]


def new(*words: str, answer: str = "") -> tuple[int, str]:
    result = CliRunner().invoke(app, ["new", *words], input=answer, env={"COLUMNS": "200"})
    return result.exit_code, result.output


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("words", "file", "source"),
    [
        (["recipe"], "dpo.py", "recipes/dpo.py"),
        (["recipe", "dpo", "--out", "mine/train.py"], "mine/train.py", "recipes/dpo.py"),
        (["config", "simpo"], "simpo.yaml", "configs/papers/simpo.yaml"),
        (["config", "configs/papers/simpo.yaml", "--out", "my.yaml"], "my.yaml", "configs/papers/simpo.yaml"),
        (["config", "dpo"], "dpo.yaml", "configs/dpo.yaml"),
        (["config", "accelerate/fsdp2"], "fsdp2.yaml", "configs/accelerate/fsdp2.yaml"),
    ],
)
def test_a_file_is_written_as_it_is(tmp_path, words, file, source):
    code, shown = new(*words)
    assert (code, shown.splitlines()[0].split(". Run")[0]) == (0, f"Wrote {file}")
    assert (tmp_path / file).read_bytes() == (ROOT / source).read_bytes()


@pytest.mark.parametrize(("answer", "code"), [("", 1), ("n\n", 1), ("y\n", 0)])
def test_an_existing_file_is_overwritten_only_by_consent(tmp_path, answer, code):
    mine = tmp_path / "dpo.py"
    mine.write_text("mine")
    assert new("recipe", answer=answer)[0] == code
    assert (mine.read_text() == "mine") == (code == 1)
    assert list(tmp_path.iterdir()) == [mine]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["config", "simp"], "error: no file in configs is called simp. Did you mean 'simpo'"),
        (["recipe", "../configs/dpo"], "error: no file in recipes is called ../configs/dpo."),
        (["config", "dpo", "--out", "."], "error: . is a folder"),
        (["config", "--out", "x.yaml"], "error: --out is for one config"),
    ],
)
def test_errors_say_what_to_do(tmp_path, words, message):
    code, shown = new(*words)
    assert code == 1
    assert message in shown
    assert list(tmp_path.iterdir()) == []


def test_configs_are_listed():
    listed = new("config")[1].split()
    assert len(listed) == len(list((ROOT / "configs").rglob("*.yaml")))
    assert {"dpo", "papers/simpo", "accelerate/zero3"} <= set(listed)
