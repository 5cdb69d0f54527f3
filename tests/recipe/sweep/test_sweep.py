"""Sweeps of a tiny model: a trial is what a run alone is, failures are recorded, kills are survived."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from typer.testing import CliRunner

from prefopt.cli import app
from prefopt.recipe import main
from prefopt.recipe.sweep import SweepCall, run_sweep
from prefopt.recipe.sweep import loop as loop_module
from prefopt.safety.errors import UsageError
from tests.recipe.test_recipe import pairs_file
from tests.trainer.runs import save_model

pytest.importorskip("optuna")

LOSSES = ["dpo(beta=0.1)", "simpo"]


def config(folder: Path, sweep: dict, **options) -> str:
    base = {
        "model_name_or_path": save_model(folder), "dataset_name": pairs_file(folder), "max_steps": 3,
        "per_device_train_batch_size": 4, "logging_steps": 1, "save_strategy": "no", "gradient_checkpointing": False,
        "output_dir": str(folder / "sweep"), **options,
    }  # fmt: skip
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({**base, "sweep": sweep}, sort_keys=False))
    return str(path)


def sweep_of(path: str) -> tuple[dict, str]:
    """The results, and what was printed."""
    console = Console(record=True, width=200, file=open(os.devnull, "w"))  # noqa: SIM115
    return run_sweep(SweepCall(path), console), console.export_text()


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """Two losses, each with a learning rate that works and one that does not."""
    folder = tmp_path_factory.mktemp("swept")
    path = config(
        folder, {"axes": {"loss": LOSSES, "learning_rate": [1e-3, 1e30]}}, use_peft=True, lora_r=4, eval_answers=2
    )
    return folder, path, *sweep_of(path)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next(folder.glob("*model.safetensors")))


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("trial", [0, 2])
def test_a_trial_has_the_weights_of_the_same_run_alone(swept, tmp_path, trial):
    """The second good one comes after a trial that failed, and shares its model and its reference."""
    folder = swept[0] / "sweep" / f"trial-{trial:03d}" / "seed-0"
    main("sft", ["--config", str(folder / "config.yaml"), "--output_dir", str(tmp_path / "alone")])
    assert same(weights(folder), weights(tmp_path / "alone"))
    assert json.loads((tmp_path / "alone" / "results.json").read_text())["loss"].startswith(
        ("dpo", "simpo")[trial // 2]
    )


def test_failed_trials_are_recorded_and_the_sweep_goes_on(swept):
    _, _, results, shown = swept
    assert [trial["state"] for trial in results["trials"]] == ["finished", "failed", "finished", "failed"]
    assert results["trials"][1]["message"].startswith("the loss is finite at step 1, but its gradient")
    assert "Trial 1 failed: the loss is finite at step 1" in shown


def test_measures_are_the_same_for_every_loss(swept):
    """DPO logs log-ratios, so its measures can be read off its own evaluation; SimPO logs none and has them too."""
    folder, _, results, _ = swept
    own = json.loads((folder / "sweep" / "trial-000" / "seed-0" / "results.json").read_text())["after"]
    dpo, simpo = (results["trials"][number]["measures"] for number in (0, 2))
    assert dpo["chosen"] == pytest.approx(own["eval_ratios/chosen"], abs=1e-4)
    assert dpo["margin"] == pytest.approx(own["eval_ratios/chosen"] - own["eval_ratios/rejected"], abs=1e-4)
    assert dpo["accuracy"] == pytest.approx(own["eval_rewards/accuracies"])
    assert simpo.keys() == dpo.keys()
    assert simpo["margin"] != dpo["margin"]
    assert simpo["kl"] != dpo["kl"]
    assert min(simpo["kl"], dpo["kl"]) > 0


def test_the_best_is_named_with_its_config_and_command(swept):
    folder, _, results, shown = swept
    best = yaml.safe_load((folder / "sweep" / "best.yaml").read_text())
    setting = results["trials"][results["best"]]["setting"]
    assert (best["loss"], best["learning_rate"], best["seed"]) == (setting["loss"], 1e-3, 0)
    assert f"Best by accuracy: trial {results['best']} (loss={setting['loss']} learning_rate=0.001)" in shown
    assert "One seed: the interval is over held-out pairs alone." in shown
    assert f"prefopt train --config {folder}/sweep/best.yaml" in shown
    with (folder / "sweep" / "results.csv").open() as file:
        assert [row["state"] for row in csv.DictReader(file)] == ["finished", "failed", "finished", "failed"]


def test_the_page_compares_what_the_sweep_compared(swept):
    folder, _, results, shown = swept
    assert f"Page: {folder}/sweep/compare.html" in shown
    compared = json.loads((folder / "sweep" / "compare.json").read_text())
    text = json.dumps(compared)
    for trial in (0, 2):
        assert str(results["trials"][trial]["measures"]["margin"]) in text
    assert "Reward against KL" in (folder / "sweep" / "compare.html").read_text()
    assert "reference_cache" not in (folder / "sweep" / "compare.md").read_text()


def test_a_finished_sweep_is_not_trained_again(swept, monkeypatch):
    _, path, results, _ = swept
    monkeypatch.setattr(loop_module, "run_once", None)
    again, shown = sweep_of(path)
    assert again == results
    assert "Continuing the sweep" in shown


def test_what_cannot_be_trained_is_told_before_anything_is(tmp_path):
    losses = ["dpo(beta=0.1)", "dpo(beta=-1)", "nonsense"]
    path = config(tmp_path, {"axes": {"loss": losses}})
    with pytest.raises(UsageError) as error:
        sweep_of(path)
    message = str(error.value)
    assert "2 of 3 settings" in message
    assert "loss=dpo(beta=-1): " in message
    assert "loss=nonsense: " in message
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(("option", "message"), [("eval_rows", "held-out rows, and there are none")])
def test_a_sweep_needs_heldout_rows(tmp_path, option, message):
    with pytest.raises(UsageError, match=message):
        sweep_of(config(tmp_path, {"axes": {"loss": LOSSES}}, **{option: 0}))


def test_a_launched_sweep_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="without accelerate launch"):
        sweep_of(config(tmp_path, {"axes": {"loss": LOSSES}}))


def test_a_dry_run_lists_the_trials_and_makes_nothing(tmp_path):
    path = config(tmp_path, {"axes": {"loss": LOSSES}})
    result = CliRunner().invoke(app, ["sweep", path, "--dry_run", "--set", "max_steps=5"])
    assert result.exit_code == 0, result.output
    assert "dpo(beta=0.1)" in result.output
    assert "nothing was trained" in result.output
    assert not (tmp_path / "sweep").exists()


def test_pruned_trials_stop_early(tmp_path):
    rates = [3e-3, 2e-3, 1e-3, 0.0]
    sweep = {"axes": {"learning_rate": rates}, "measures": ["chosen_nll"], "prune": "median"}
    path = config(tmp_path, sweep, loss="sft", max_steps=4, eval_strategy="steps", eval_steps=2)
    results, shown = sweep_of(path)
    assert [trial["state"] for trial in results["trials"]] == ["finished"] * 3 + ["pruned"]
    assert "stopped at step 2: worse than the median" in shown
    assert results["best"] == 0


def stopped_in(path: str, trial: int, monkeypatch) -> None:
    """A sweep that Ctrl-C stops as a trial begins."""
    original = loop_module.run_once

    def stop(options, folder, *rest):
        if f"trial-{trial:03d}" in str(folder):
            raise KeyboardInterrupt
        return original(options, folder, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(loop_module, "run_once", stop)
        console = Console(record=True, width=300, file=open(os.devnull, "w"))  # noqa: SIM115
        with pytest.raises(KeyboardInterrupt):
            run_sweep(SweepCall(path), console)
    assert f"To continue: prefopt sweep {path}" in console.export_text()


def test_ctrl_c_says_how_to_continue_and_finished_trials_are_reused(tmp_path, monkeypatch):
    path = config(tmp_path, {"axes": {"loss": LOSSES}}, max_steps=1)
    stopped_in(path, 1, monkeypatch)
    result = tmp_path / "sweep" / "trial-000" / "seed-0" / "sweep_run.json"
    before = result.stat().st_mtime_ns
    results, _ = sweep_of(path)
    assert [trial["state"] for trial in results["trials"]] == ["finished", "finished"]
    assert result.stat().st_mtime_ns == before


# ---- processes -----------------------------------------------------------------------------------------------------


def started(path: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "prefopt", "sweep", path], stdout=subprocess.DEVNULL)


@pytest.mark.slow
@pytest.mark.parametrize("saves", ["no", "steps"])
def test_a_sweep_killed_in_a_trial_ends_as_an_unbroken_one(tmp_path, saves):
    """With checkpoints the trial resumes; without them it starts again."""
    options = {"max_steps": 40, "save_strategy": saves, "learning_rate": 1e-3}
    options |= {"save_steps": 5} if saves == "steps" else {}
    (tmp_path / "broken").mkdir()
    path = config(tmp_path / "broken", {"axes": {"loss": [*LOSSES, "ipo(beta=0.1)"]}}, **options)
    process = started(path)
    log = tmp_path / "broken" / "sweep" / "trial-001" / "seed-0" / "log.txt"
    while process.poll() is None and not (log.exists() and "step 12/40" in log.read_text()):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    first = tmp_path / "broken" / "sweep" / "trial-000" / "seed-0" / "sweep_run.json"
    before = first.stat().st_mtime_ns
    results, _ = sweep_of(path)
    assert first.stat().st_mtime_ns == before
    if saves == "steps":
        assert "Resuming from" in log.read_text()
    (tmp_path / "whole").mkdir()
    whole, _ = sweep_of(config(tmp_path / "whole", {"axes": {"loss": [*LOSSES, "ipo(beta=0.1)"]}}, **options))
    for one, other in zip(results["trials"], whole["trials"], strict=True):
        assert one["measures"] == other["measures"]
        folder = f"sweep/trial-{one['trial']:03d}/seed-0"
        assert same(weights(tmp_path / "broken" / folder), weights(tmp_path / "whole" / folder))


@pytest.mark.slow
def test_two_processes_share_the_trials(tmp_path, monkeypatch):
    """As with two GPUs; here both are the same CPU."""
    path = config(tmp_path, {"axes": {"loss": [*LOSSES, "ipo(beta=0.1)", "kto"]}})
    monkeypatch.setattr(loop_module, "devices", lambda: ["", ""])
    results, shown = sweep_of(path)
    assert "2 devices" in shown
    assert [trial["state"] for trial in results["trials"]] == ["finished"] * 4
