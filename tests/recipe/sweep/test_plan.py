"""The config of a sweep: what it says, and what is refused with which words."""

from __future__ import annotations

import pytest
import yaml

from prefopt.recipe.sweep.plan import read_plan
from prefopt.safety.errors import UsageError

BASE = {"model_name_or_path": "m", "dataset_name": "d.jsonl"}


def config(folder, sweep, **base) -> str:
    path = folder / "sweep.yaml"
    options = {**BASE, **base, **({} if sweep is None else {"sweep": sweep})}
    path.write_text(yaml.safe_dump(options, sort_keys=False))
    return str(path)


def test_a_grid_has_every_combination_in_the_order_of_the_config(tmp_path):
    axes = {"loss": ["dpo", "ipo"], "learning_rate": {"low": "1e-5", "high": 1e-3, "log": True, "points": 3}}
    plan = read_plan(config(tmp_path, {"axes": axes, "seeds": 2}, output_dir="runs/mine"))
    assert plan.grid() == [
        {"loss": loss, "learning_rate": rate} for loss in ("dpo", "ipo") for rate in (1e-5, 1e-4, 1e-3)
    ]
    assert (plan.trials, plan.seeds, str(plan.folder)) == (6, (0, 1), "runs/mine")
    assert plan.options(plan.grid()[0], 1) == {**BASE, "loss": "dpo", "learning_rate": 1e-5, "seed": 1}
    assert plan.measures == {"accuracy": "maximize"}


def test_a_search_is_checked_at_every_value_and_both_ends(tmp_path):
    axes = {"loss": ["dpo", "ipo"], "learning_rate": {"low": 1e-5, "high": 1e-3, "log": True}}
    plan = read_plan(config(tmp_path, {"axes": axes, "method": "tpe", "trials": 9}))
    assert plan.settings_to_check() == [
        {"loss": "dpo", "learning_rate": 1e-5},
        {"loss": "ipo", "learning_rate": 1e-5},
        {"loss": "dpo", "learning_rate": 1e-3},
    ]


def test_a_range_of_whole_numbers_is_checked_with_whole_numbers(tmp_path):
    section = {"axes": {"gradient_accumulation_steps": {"low": 1, "high": 4}}, "method": "random", "trials": 2}
    settings = read_plan(config(tmp_path, section)).settings_to_check()
    assert [type(setting["gradient_accumulation_steps"]) for setting in settings] == [int, int]


def test_changes_replace_options_and_the_seed_of_the_base_is_used(tmp_path):
    plan = read_plan(config(tmp_path, {"axes": {"loss": ["dpo", "ipo"]}}, seed=7, max_steps=9), {"max_steps": 2})
    assert plan.options({"loss": "dpo"}, 7)["max_steps"] == 2
    assert plan.seeds == (7,)


LOSSES = {"loss": ["dpo", "ipo"]}
REFUSED = {
    "no section": (None, {}, "has no such section"),
    "unknown key": ({"axis": LOSSES}, {}, "no key 'axis'. Did you mean 'axes'"),
    "nothing varies": ({}, {}, "nothing varies"),
    "eval_loss": ({"axes": LOSSES, "measures": {"eval_loss": "minimize"}}, {}, "every loss has its own unit"),
    "loss": ({"axes": LOSSES, "measures": "loss"}, {}, "loss cannot compare trials"),
    "rewards": (
        {"axes": LOSSES, "measures": ["eval_rewards/accuracies"]},
        {},
        "no measure 'eval_rewards/accuracies'. Rewards are each loss's own",
    ),
    "direction": ({"axes": LOSSES, "measures": {"accuracy": "up"}}, {}, "must be maximize or minimize, got 'up'"),
    "both": ({"axes": LOSSES}, {"loss": "dpo"}, "is also an option of the base"),
    "data": ({"axes": {"dataset_name": ["a", "b"]}}, {}, "compared on the same rows"),
    "seed axis": ({"axes": {"seed": [1, 2]}}, {}, "seeds are listed under sweep: seeds"),
    "two seeds": ({"axes": LOSSES, "seeds": 2}, {"seed": 1}, "the base has a seed as well"),
    "same seeds": ({"axes": LOSSES, "seeds": [1, 1]}, {}, "a list of different ones"),
    "twice": ({"axes": {"loss": ["dpo", "dpo"]}}, {}, "dpo is listed twice"),
    "no list": ({"axes": {"loss": "dpo"}}, {}, "must be a list of values"),
    "grid of a range": ({"axes": {"learning_rate": {"low": 1, "high": 2}}}, {}, "add points: N to the range"),
    "log": ({"axes": {"beta": {"low": 0, "high": 1, "log": True}}}, {}, "low must be above 0 where log is true"),
    "ends": ({"axes": {"beta": {"low": 2, "high": 1}}}, {}, "low must be below high"),
    "number": ({"axes": {"beta": {"low": "x", "high": 1}}}, {}, "must be a finite number, got 'x'"),
    "trials": ({"axes": LOSSES, "method": "tpe"}, {}, "needs trials: N"),
    "grid trials": ({"axes": LOSSES, "trials": 3}, {}, "the grid has 2"),
    "method": ({"axes": LOSSES, "method": "bayes"}, {}, "one of grid, random, tpe"),
    "prune": ({"axes": LOSSES, "prune": "median"}, {}, "needs evaluations during training"),
    "prune two": (
        {"axes": LOSSES, "prune": "median", "measures": ["accuracy", "margin"]},
        {"eval_strategy": "steps"},
        "needs one measure",
    ),
    "demo": ({"axes": LOSSES}, {"demo": True}, "leave model and data out"),
    "resume": ({"axes": LOSSES}, {"resume_from_checkpoint": "x"}, "resumes by itself"),
    "one number in two spellings": ({"axes": {"learning_rate": ["1e-3", 0.001]}}, {}, "0.001 is listed twice"),
    "kl": ({"axes": LOSSES, "measures": ["accuracy", "kl"]}, {}, "add eval_answers: 32 to the config"),
    "prune by kl": (
        {"axes": LOSSES, "measures": "kl", "prune": "median"},
        {"eval_answers": 8, "eval_strategy": "steps"},
        "smallest before any training",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_named(tmp_path, case):
    sweep, base, message = REFUSED[case]
    with pytest.raises(UsageError) as error:
        read_plan(config(tmp_path, sweep, **base))
    assert message in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UsageError, match="there is no such file"):
        read_plan(str(tmp_path / "none.yaml"))
