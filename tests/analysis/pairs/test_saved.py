"""`prefopt health RUN --pairs DATA` on a run of a recipe, and the table against the log's own numbers."""

from __future__ import annotations

import json
import re

import pytest
from typer.testing import CliRunner

from prefopt.analysis.pairs.saved import load_pairs
from prefopt.cli import app
from prefopt.recipe import main
from tests.recipe.test_recipe import arguments, pairs_file


def health(*words):
    done = CliRunner().invoke(app, ["health", *map(str, words)], env={"COLUMNS": "400"})
    return done.exit_code, done.output


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run with an adapter, and its pairs."""
    folder = tmp_path_factory.mktemp("pairs")
    file = pairs_file(folder)
    words = [*arguments(folder, file), "--max_steps", "3", "--use_peft", "--lora_target_modules", "all-linear"]
    main("dpo(beta=0.1)", [*words, "--learning_rate", "1e-2"])
    return folder / "out", file


def test_a_run_is_loaded_with_its_own_loss_and_ranks_pairs(run):
    folder, file = run
    loaded = load_pairs(folder, str(file))
    assert str(loaded.loss) == "dpo(beta=0.1, label_smoothing=0.0)"
    table = loaded.table()
    assert len(table) == len(loaded.rows)
    assert float(table.margins.abs().max()) > 0  # the adapter is on, and off in the reference
    assert table.push_at_start.tolist() == pytest.approx([0.1] * len(table))


def test_the_command_prints_the_measures_and_a_verdict(run):
    folder, file = run
    status, text = health(folder, "--pairs", file, "--entanglement")
    assert status == 0, text
    assert re.search(r"pairs of .*: accuracy \d\.\d\d, Brier score 0\.\d{3}, expected calibration error", text)
    assert "a step of dpo(beta=0.1, label_smoothing=0.0) on one of" in text


def test_the_command_fits_spectra(run):
    status, text = health(run[0], "--spectra")
    assert status == 0, text
    assert re.search(r"spectra of \d+ layers: median power-law exponent \d+\.\d\d \(before: ", text)


@pytest.mark.parametrize(("words", "message"), [
    (["--entanglement"], "name some with --pairs"),
    (["--pairs", "FILE", "--loss", "sft"], "nothing to rank pairs by"),
])  # fmt: skip
def test_what_cannot_be_looked_at_is_refused(run, words, message):
    folder, file = run
    status, text = health(folder, *(str(file) if word == "FILE" else word for word in words))
    assert status == 1
    assert message in text


def test_a_log_without_a_loss_asks_for_it(run, tmp_path):
    _, file = run
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": []}))
    status, text = health(tmp_path, "--pairs", file)
    assert status == 1
    assert "name it with --loss" in text
