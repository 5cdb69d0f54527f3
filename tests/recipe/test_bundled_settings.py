"""The bundled job's settings apply to the bundled job; steps and epochs that contradict one another are told."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from prefopt.models.bundled import HUB_ID
from prefopt.recipe import main, parse_arguments
from tests.recipe.test_recipe import pairs_file
from tests.trainer.runs import save_model


@pytest.fixture(autouse=True)
def _bundled_is_tiny(monkeypatch, tmp_path):
    monkeypatch.setattr("prefopt.recipe.ready.resolve_demo_model", lambda say: Path(save_model(tmp_path)))


def test_data_of_ones_own_get_the_settings_of_any_model(tmp_path, capsys):
    recipe = parse_arguments("dpo", ["--dataset_name", "mine.jsonl"])
    assert (recipe.training.max_steps, recipe.training.learning_rate, recipe.model.use_peft) == (-1, 1e-6, False)
    assert recipe.training.save_strategy.value != "no"
    assert f"No --model_name_or_path: the bundled {HUB_ID} is trained" in capsys.readouterr().out


def test_the_bundled_job_has_its_own(capsys):
    recipe = parse_arguments("dpo", [])
    assert (recipe.training.max_steps, recipe.training.learning_rate, recipe.model.use_peft) == (16, 1e-4, True)
    assert capsys.readouterr().out == ""
    assert parse_arguments("dpo", ["--max_steps", "3"]).training.max_steps == 3


def test_the_settings_table_names_the_bundled_model(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    main("dpo", ["--dataset_name", pairs_file(tmp_path), "--dry_run"])
    shown = capsys.readouterr().out
    assert f"the bundled {HUB_ID}" in shown
    assert f"Model      {HUB_ID}, all weights" in shown


@pytest.mark.parametrize("words", [[], ["--demo"]])
def test_epochs_take_the_place_of_the_bundled_jobs_steps(words, capsys):
    training = parse_arguments("dpo", [*words, "--num_train_epochs", "3"]).training
    assert (training.num_train_epochs, training.max_steps) == (3, -1)
    assert "The bundled job's 16 steps do not apply" in capsys.readouterr().out


def config(folder: Path, **options) -> list[str]:
    (folder / "run.yaml").write_text(yaml.safe_dump(options))
    return ["--config", str(folder / "run.yaml")]


def test_the_command_line_wins_over_the_configs_steps(tmp_path, capsys):
    words = config(tmp_path, model_name_or_path="m", max_steps=100)
    training = parse_arguments("dpo", [*words, "--num_train_epochs", "3"]).training
    assert (training.num_train_epochs, training.max_steps) == (3, -1)
    assert "The config's max_steps 100 does not apply" in capsys.readouterr().out
    words = config(tmp_path, model_name_or_path="m", num_train_epochs=3)
    assert parse_arguments("dpo", [*words, "--max_steps", "2"]).training.max_steps == 2


def test_steps_and_epochs_in_one_place_are_refused(tmp_path):
    with pytest.raises(SystemExit, match="num_train_epochs would have no effect beside max_steps 5"):
        parse_arguments("dpo", ["--max_steps", "5", "--num_train_epochs", "3"])
    with pytest.raises(SystemExit, match="the config: num_train_epochs would have no effect"):
        parse_arguments("dpo", config(tmp_path, max_steps=5, num_train_epochs=3))
    parse_arguments("dpo", ["--max_steps", "-1", "--num_train_epochs", "3"])
