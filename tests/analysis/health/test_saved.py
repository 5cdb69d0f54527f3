"""`prefopt health` on saved runs, and what a recipe stores for it."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from prefopt.analysis.health.saved import ended_by, examine_saved
from prefopt.cli import app
from prefopt.recipe import main, parse_arguments
from prefopt.trainer.finite import NonFiniteError
from tests.analysis.health.logs import bundled, too_hard
from tests.recipe.test_recipe import arguments, pairs_file


def health(*words):
    done = CliRunner().invoke(app, ["health", *map(str, words)], env={"COLUMNS": "400"})
    return done.exit_code, done.output


def state_file(folder, lines, **more):
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text(json.dumps({"max_steps": 24, "log_history": lines, **more}))


def findings_of(folder):
    content = json.loads((folder / "findings.json").read_text())
    assert content["version"] == 1
    return content["findings"]


def test_the_last_checkpoint_of_a_run_is_read(tmp_path):
    state_file(tmp_path / "run" / "checkpoint-4", too_hard()[:4])
    few = "4 log lines of training, too few to judge (5 are enough; --logging_steps 1 logs each step)"
    assert health(tmp_path / "run") == (0, f"{tmp_path}/run: 0 findings; {few}\n")
    state_file(tmp_path / "run" / "checkpoint-10", too_hard())
    status, text = health(tmp_path / "run", "--strict")
    assert status == 1
    assert "  serious (over_optimised, step 8): over-optimised: the chosen answers fell from -24 to -51 nats" in text
    assert health(tmp_path / "run")[0] == 0


def test_several_runs_are_read_and_one_serious_finding_is_enough(tmp_path):
    state_file(tmp_path / "good", bundled())
    state_file(tmp_path / "hard", too_hard())
    status, text = health(tmp_path / "good", tmp_path / "hard" / "trainer_state.json", "--strict")
    assert status == 1
    assert f"{tmp_path}/good: 0 findings" in text
    assert health(tmp_path / "good", "--strict")[0] == 0


def test_a_run_of_trl_needs_its_beta(tmp_path):
    lines = [{name: line[name] for name in line if not name.startswith(("ratios", "lengths"))} for line in too_hard()]
    state_file(tmp_path / "run", lines)
    assert health(tmp_path / "run", "--strict")[0] == 0
    assert health(tmp_path / "run", "--strict", "--beta", "0.1")[0] == 1


@pytest.mark.parametrize(("content", "message"), [
    (None, "it has no log_history.json, and no checkpoint with trainer_state.json"),
    ("{", "trainer_state.json cannot be read"),
    ("[1]", "has no list log_history: it is not the log of a run"),
])  # fmt: skip
def test_a_folder_without_a_log_is_named(tmp_path, content, message):
    if content is not None:
        (tmp_path / "trainer_state.json").write_text(content)
    status, text = health(tmp_path)
    assert status == 1
    assert message in text


def test_the_command_needs_no_torch(tmp_path):
    state_file(tmp_path / "run", bundled())
    code = (
        "import sys; from prefopt.cli import app\n"
        "try: app()\nfinally: print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "health", str(tmp_path / "run")], capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.endswith("0 findings\n[]\n")


def test_a_recipe_stores_its_log_and_findings_without_checkpoints(tmp_path, capsys):
    run = [*arguments(tmp_path, pairs_file(tmp_path)), "--max_steps", "6", "--learning_rate", "1e-8"]
    results = main("dpo(beta=0.1)", run)
    (finding,) = results["findings"]
    assert finding["rule"] == "learns_nothing"
    assert "Health: warning (learns_nothing, step 5)" in capsys.readouterr().out
    stored = json.loads((tmp_path / "out" / "log_history.json").read_text())
    assert [line["step"] for line in stored["log_history"] if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert "eval_loss" in stored["log_history"][-1]
    assert findings_of(tmp_path / "out") == results["findings"]
    status, text = health(tmp_path / "out", "--strict")
    assert status == 0
    assert finding["text"] in text


def test_stop_on_ends_a_recipe_which_saves_its_model(tmp_path):
    run = [*arguments(tmp_path, pairs_file(tmp_path)), "--max_steps", "12", "--learning_rate", "1e-8"]
    results = main("dpo(beta=0.1)", [*run, "--stop_on", "learns_nothing"])
    assert results["stopped_by"] == "learns_nothing"
    assert results["findings"][0]["step"] == 5
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.usefixtures("no_loss_stays")
def test_a_run_that_died_of_a_nan_says_so_later(tmp_path):
    losses = tmp_path / "losses.py"
    losses.write_text(
        "from prefopt.losses import DPO, register\n"
        "@register('breaks')\n"
        "class Breaks(DPO):\n"
        "    def per_example(self, batch):\n"
        "        return super().per_example(batch) * float('nan')\n"
    )
    run = [*arguments(tmp_path, pairs_file(tmp_path)), "--loss_file", str(losses), "--evaluate_first", "false"]
    with pytest.raises(NonFiniteError):
        main("breaks(beta=0.1)", run)
    (finding,) = findings_of(tmp_path / "out")
    assert (finding["rule"], finding["level"], finding["step"]) == ("not_finite", "serious", 0)
    status, text = health(tmp_path / "out", "--strict")
    assert status == 1
    assert f"serious (not_finite, step 0): the loss is {math.nan} at step 0" in text


@pytest.mark.parametrize(("words", "message"), [
    (["--stop_on", "serius"], "Did you mean 'serious'"),
    (["--stop_on", "serious", "--logging_strategy", "no"], "--stop_on would have no effect with --logging"),
])  # fmt: skip
def test_stop_on_is_checked_as_it_is_read(words, message):
    with pytest.raises((SystemExit, ValueError), match=message):
        parse_arguments("dpo", ["--output_dir", "unused", *words])


def test_a_log_with_strange_values_is_examined_as_far_as_it_goes(tmp_path):
    lines = [{"step": None, "loss": 2}, {"loss": [1]}, {"step": math.inf, "loss": 10**400}, {"step": 2, "loss": True}]
    settings = {"learning_rate": "x", "max_grad_norm": [], "beta": "z", "loss": 3, "fp16": "no"}
    content = {"log_history": [*lines, *bundled()], "max_steps": "many", "global_step": None, "settings": settings}
    (tmp_path / "log_history.json").write_text(json.dumps(content), encoding="utf-8")
    assert [finding.rule for finding in examine_saved(tmp_path)] == []


def test_the_finding_of_a_run_that_ended_has_no_half_sentence():
    text = str(ended_by(3, "the loss is nan at step 3. The rows of this step:"))
    assert "nan at step 3. Try:" in text
    assert "The rows" not in text
