"""Trials in optuna's study: handed out once, continued after a kill, pruned below the median."""

from __future__ import annotations

from pathlib import Path

import pytest

from prefopt.recipe.sweep.plan import Range, SweepPlan
from prefopt.safety.errors import UsageError

pytest.importorskip("optuna")

from prefopt.recipe.sweep import study as study_module
from prefopt.recipe.sweep.study import Study

AXES = {"loss": ("dpo", "ipo"), "learning_rate": Range(1e-5, 1e-3, log=True), "rank": Range(4, 64, whole=True)}


def plan(folder: Path, method="tpe", trials=12, axes=None, prune=False, seed=0) -> SweepPlan:
    measures = {"accuracy": "maximize"}
    return SweepPlan({}, axes or AXES, folder, Path("s.yaml"), method, trials, measures, prune, (0,), seed)


def value(setting) -> float:
    return setting["rank"] - 1e4 * setting["learning_rate"] + (setting["loss"] == "ipo")


def run(study: Study, most: int = 100) -> list[dict]:
    settings = []
    while len(settings) < most and (trial := study.next()) is not None:
        settings.append(trial.setting)
        study.finish(trial, "finished", {"accuracy": value(trial.setting)}, "")
    return settings


def test_a_search_continued_after_a_kill_draws_what_an_unbroken_one_draws(tmp_path):
    whole = run(Study(plan(tmp_path / "whole")))
    assert len(whole) == 12
    broken = Study(plan(tmp_path / "broken"))
    begun = run(broken, most=10)
    left = broken.next()  # the process is killed in this trial
    again = Study(plan(tmp_path / "broken"))
    again.enqueue()
    rest = run(again)
    assert rest[0] == left.setting
    assert begun + rest == whole
    assert [trial.state for trial in again.trials()] == ["finished"] * 12
    assert all(type(setting["rank"]) is int for setting in whole)


def test_a_grid_is_run_once_with_its_values_as_they_are(tmp_path):
    axes = {"lora_target_modules": (["q", "v"], "all-linear"), "bf16": (True, False), "warmup_steps": (1, None)}
    study = Study(plan(tmp_path, "grid", 8, axes))
    study.enqueue()
    study.enqueue()  # once more: nothing is queued twice
    trials = []
    while (trial := study.next()) is not None:
        trials.append(trial)
        study.finish(trial, "failed" if trial.number == 3 else "finished", {"accuracy": 1.0}, "why")
    assert [trial.setting for trial in trials] == plan(tmp_path, "grid", 8, axes).grid()
    assert [trial.setting for trial in study.trials()] == plan(tmp_path, "grid", 8, axes).grid()
    assert [trial.state for trial in study.trials()].count("failed") == 1
    assert study.trials()[3].message == "why"


def test_another_sweep_in_the_folder_is_refused_and_more_trials_are_not(tmp_path):
    run(Study(plan(tmp_path, trials=2)))
    with pytest.raises(UsageError, match=r"other settings \(search_seed: 0, now 1\)"):
        Study(plan(tmp_path, trials=2, seed=1))
    assert len(run(Study(plan(tmp_path, trials=3)))) == 1


def test_what_changed_is_named_by_option():
    old = {"base": {"max_steps": 2, "loss": "dpo"}, "axes": {"beta": [1]}, "prune": False}
    new = {"base": {"max_steps": 3, "bf16": True, "loss": "dpo"}, "axes": {"beta": [1]}, "prune": True}
    changed = study_module._changes(old, new)
    assert changed == "max_steps: 2, now 3; bf16: not set, now true; prune: false, now true"


def test_a_file_in_place_of_the_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="cannot be the folder of a sweep"):
        Study(plan(tmp_path / "file"))


def test_a_trial_below_the_median_of_earlier_ones_is_to_stop(tmp_path):
    study = Study(plan(tmp_path, prune=True))
    for final in (0.5, 0.6, 0.7):
        trial = study.next()
        assert not trial.report(2, final)
        study.finish(trial, "finished", {"accuracy": final}, "")
    worse = study.next()
    assert worse.report(2, 0.55)
    study.finish(worse, "pruned", {"accuracy": 0.55}, "stopped")
    assert not study.next().report(2, 0.65)
    assert study.trials()[3].state == "pruned"


def test_a_missing_optuna_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(UsageError, match=r"prefopt-trainer\[sweep\]"):
        Study(plan(tmp_path))
