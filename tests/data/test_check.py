"""`prefopt check` and a recipe's data, as a person has them: what was read is shown, options are taken either way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from prefopt.cli import app
from prefopt.data import DataError
from prefopt.recipe import load_data, preflight
from prefopt.recipe.arguments import parse_arguments
from tests.trainer.runs import save_model

ORCA = {"system": "Be terse.", "question": "Legs?", "chosen": "Eight.", "rejected": "Six."}
CHAT = {
    "prompt": [{"role": "user", "content": "Hi."}],
    "chosen": [{"role": "assistant", "content": "Ho."}],
    "rejected": [{"role": "assistant", "content": "No."}],
}


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)


def write(name: str, *rows: dict[str, Any]) -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text("\n".join(map(json.dumps, rows)))
    return name


def check(*words: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["check", *words], env={"COLUMNS": "300"})
    return done.exit_code, done.output


def recipe_data(data: str, *words: str) -> tuple[list[Any], str]:
    recipe = parse_arguments(
        "dpo(beta=0.1)",
        ["--model_name_or_path", save_model(Path()), "--dataset_name", data, "--eval_rows", "0", "--use_cpu", "true",
         "--output_dir", "out", *words],
    )  # fmt: skip
    with recipe.console.capture() as shown:
        rows = load_data(recipe, preflight(recipe))
    return list(rows.train), shown.get()


@pytest.mark.parametrize(
    "words",
    [
        ["orca.jsonl", "--columns", "prompt=question", "system=system"],
        ["--columns", "prompt=question", "system=system", "orca.jsonl"],
        ["--columns", "prompt=question", "orca.jsonl", "system=system"],
        ["--columns", "prompt=question system=system", "orca.jsonl"],
        ["--columns=prompt=question", "--columns=system=system", "orca.jsonl"],
        ["orca.jsonl", "--format", "orca"],
    ],
)
def test_columns_may_stand_before_the_data(words: list[str]) -> None:
    write("orca.jsonl", ORCA)
    code, shown = check(*words)
    assert code == 0, shown
    assert "'system: Be terse. | user: Legs?'" in shown


def test_a_file_with_an_equals_sign_in_its_name() -> None:
    write("a=b.jsonl", ORCA)
    assert check("--columns", "prompt=question", "a=b.jsonl")[0] == 0


def test_check_shows_what_was_read_and_what_was_not() -> None:
    code, shown = check(write("rows.jsonl", {**ORCA, "prompt": "Legs?", "id": 1}))
    assert code == 0
    assert "Columns not used: system (--columns system=system" in shown
    assert "Read as plain text: chosen, rejected, prompt. Not read: system, question, id." in shown
    assert "prompt: 'Legs?'" in shown
    assert "1 pairs, 0 that cannot be trained on." in shown


def test_check_takes_a_config_and_lists_splits() -> None:
    for name in ("easy", "hard"):
        write(f"configs/{name}/train.jsonl", {"prompt": name, "chosen": "Hi.", "rejected": "No."})
    listed = "".join(f"- config_name: {name}\n  data_files: {name}/*.jsonl\n" for name in ("easy", "hard"))
    Path("configs/README.md").write_text(f"---\nconfigs:\n{listed}---\n")
    code, shown = check("configs", "--config", "hard")
    assert code == 0, shown
    assert "prompt: 'hard'" in shown
    code, shown = check("configs")
    assert code == 1
    assert "['easy', 'hard']" in shown
    code, shown = check("configs", "--config", "easy", "--split", "test")
    assert code == 1
    assert "['train']" in shown


def test_options_are_taken_with_hyphens_and_underscores() -> None:
    write("rows.jsonl", CHAT)
    model = save_model(Path())
    for option in ("--max-length", "--max_length"):
        assert check("rows.jsonl", "--model", model, option, "64")[0] == 0


def test_a_recipe_asks_reads_and_names_like_check() -> None:
    write("orca.jsonl", ORCA)
    for more in ([], ["--dataset_streaming", "--max_steps", "1"]):
        with pytest.raises(DataError, match=r"^orca.jsonl: .*--columns prompt=question system=system"):
            recipe_data("orca.jsonl", *more)
        rows, shown = recipe_data("orca.jsonl", "--columns", "prompt=question", *more)
        assert shown.count("Columns not used: system (--columns system=system") == 1
        # The trainer, which looks again, has nothing left to name.
        assert rows == [{"prompt": "Legs?", "chosen": "Eight.", "rejected": "Six."}]
    rows, shown = recipe_data("orca.jsonl", "--format", "orca")
    assert "Read as orca" in shown
    assert rows[0]["prompt"][0] == {"role": "system", "content": "Be terse."}


def test_a_column_of_the_loss_is_not_called_unused() -> None:
    write("rows.jsonl", {**CHAT, "margin": 1.0})
    assert "margin" in recipe_data("rows.jsonl")[1]
    rows, shown = recipe_data("rows.jsonl", "--loss", "margin_dpo(beta=0.1)")
    assert "not used" not in shown
    assert rows[0]["margin"] == 1.0


def test_images_stop_a_text_model_before_it_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    write("rows.jsonl", {**CHAT, "images": []})
    assert recipe_data("rows.jsonl")[0] == [CHAT]
    write("rows.jsonl", {**CHAT, "images": ["a.png"]})
    with pytest.raises(DataError, match=r"column 'images' is filled, but .* reads only text.*--columns unused=images"):
        recipe_data("rows.jsonl")
    rows, _ = recipe_data("rows.jsonl", "--columns", "unused=images")
    assert rows[0]["chosen"] == CHAT["chosen"]
