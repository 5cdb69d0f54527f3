"""The rules inside trainers: ours and a plain `trl.DPOTrainer`, on tiny models that are made to fail."""

from __future__ import annotations

import json
import math
import random
from types import SimpleNamespace

import pytest
import torch
import trl
from datasets import Dataset
from transformers import PrinterCallback

from prefopt.analysis import HealthCallback
from prefopt.safety.errors import UsageError
from tests.analysis.health.logs import synthetic
from tests.trainer.runs import make_trainer

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "carries", "load", "works"]
PLAIN = {"trainer": trl.DPOTrainer, "config": trl.DPOConfig}


def pairs(rows: int = 120) -> Dataset:
    """Chosen answers begin with one word, rejected ones with another."""
    rng = random.Random(0)

    def words(count: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(count))

    lengths = [rng.randint(2, 5) for _ in range(rows)]
    columns = {
        "prompt": [words(3) for _ in lengths],
        "chosen": [f" Paris {words(count)}" for count in lengths],
        "rejected": [f" bridge {words(count)}" for count in lengths],
    }
    return Dataset.from_dict(columns)


def watched(folder, stop_on=(), **options):
    """A run's callback, what it said, and the trainer after training."""
    lines: list[str] = []
    callback = HealthCallback(stop_on, lines.append)
    trainer = make_trainer(folder, train_dataset=pairs(), per_device_train_batch_size=8, **options)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(callback)
    trainer.train()
    return callback, lines, trainer


@pytest.mark.parametrize("loss", ["dpo(beta=0.1)", "simpo(beta=2.0, gamma=0.5)", "kto(beta=0.1)", "sft"])
def test_healthy_runs_are_told_so(tmp_path, loss):
    callback, lines, _ = watched(tmp_path, loss=loss, max_steps=24)
    assert callback.findings == []
    assert lines == ["Health: nothing unusual in the logged numbers"]
    assert json.loads((tmp_path / "run" / "findings.json").read_text()) == {"version": 1, "findings": []}


def test_a_healthy_run_of_trl_is_told_so(tmp_path):
    _, lines, _ = watched(tmp_path, **PLAIN, max_steps=24)
    assert lines == ["Health: nothing unusual in the logged numbers"]


HARD = {"learning_rate": 0.3, "max_steps": 16}


@pytest.mark.parametrize("options", [{"loss": "dpo(beta=0.01)"}, {**PLAIN, "beta": 0.01}], ids=["ours", "trl"])
def test_an_over_optimised_run_is_told_at_once_and_named_again_at_the_end(tmp_path, options):
    callback, lines, trainer = watched(tmp_path, **HARD, **options)
    serious = [line for line in lines if "serious (over_optimised" in line]
    assert len(serious) == 2
    assert "while the margin grew to" in serious[0]
    assert "Try: --learning_rate 0.06; or --max_steps" in serious[0]
    assert serious[1].endswith("told above")
    assert callback.findings[0].step < 10
    assert trainer.state.global_step == 16
    stored = json.loads((tmp_path / "run" / "findings.json").read_text())["findings"]
    assert stored == [finding.as_object() for finding in callback.findings]


def test_stop_on_ends_training_at_the_finding(tmp_path):
    callback, lines, trainer = watched(tmp_path, ("serious",), loss="dpo(beta=0.01)", **HARD)
    assert callback.stopped_by.rule == "over_optimised"
    assert trainer.state.global_step == callback.stopped_by.step < 10
    assert f"training stops at step {trainer.state.global_step}, because stop_on has serious" in "\n".join(lines)


def test_stop_on_another_rule_does_not(tmp_path):
    callback, _, trainer = watched(tmp_path, ("learns_nothing",), loss="dpo(beta=0.01)", **HARD)
    assert callback.stopped_by is None
    assert trainer.state.global_step == 16


def test_a_run_that_learns_nothing_is_told_so(tmp_path):
    callback, _, trainer = watched(
        tmp_path, ("learns_nothing",), loss="dpo(beta=0.1)", learning_rate=1e-7, max_steps=24
    )
    assert [finding.rule for finding in callback.findings] == ["learns_nothing"]
    assert "--learning_rate 1e-6" in callback.findings[0].remedy
    assert trainer.state.global_step == 8  # a third of the run


def test_weights_that_become_nan_in_trl_are_told_at_the_next_log_line(tmp_path):
    class Spoil(PrinterCallback):
        def on_log(self, *_, **__):
            pass

        def on_step_end(self, args, state, control, model=None, **_):
            if state.global_step == 3:
                with torch.no_grad():
                    next(model.parameters()).fill_(math.nan)

    lines: list[str] = []
    trainer = make_trainer(tmp_path, **PLAIN, train_dataset=pairs())
    trainer.add_callback(Spoil())
    trainer.add_callback(HealthCallback(["not_finite"], lines.append))
    trainer.train()
    assert trainer.state.global_step == 4
    assert lines[0].startswith("Health: serious (not_finite, step 4): ")
    assert "NaN or infinite" in lines[0]


def test_an_evaluation_after_training_adds_what_it_shows():
    lines: list[str] = []
    callback = HealthCallback(say=lines.append)
    args = SimpleNamespace(learning_rate=1e-4, max_grad_norm=1.0)
    state = SimpleNamespace(max_steps=20, global_step=0, log_history=[], is_world_process_zero=True)
    callback.on_train_begin(args, state, None)
    for line in synthetic(20):
        state.global_step = line["step"]
        callback.on_log(args, state, None, logs=line)
    callback.on_train_end(args, state, None)
    assert lines == ["Health: nothing unusual in the logged numbers"]
    after = {"eval_loss": 0.5, "eval_ratios/chosen": -60.0, "eval_logps/chosen": -310.0}
    callback.on_log(args, state, None, logs=after)
    assert lines[1].startswith("Health: warning (chosen_falls, step 20): the held-out chosen answers lost 60 nats")


def test_other_processes_are_silent():
    lines: list[str] = []
    callback = HealthCallback(say=lines.append)
    args = SimpleNamespace(learning_rate=1e-4)
    state = SimpleNamespace(max_steps=20, global_step=1, log_history=[], is_world_process_zero=False)
    callback.on_train_begin(args, state, None)
    callback.on_log(args, state, None, logs={"loss": math.nan})
    callback.on_train_end(args, state, None)
    assert callback.findings
    assert lines == []


def test_a_resumed_run_knows_the_lines_before_it():
    args = SimpleNamespace(learning_rate=1e-4)
    earlier = synthetic(30, ratios__chosen=lambda done: -30 * done)
    state = SimpleNamespace(max_steps=30, global_step=30, log_history=earlier, is_world_process_zero=True)
    callback = HealthCallback(say=lambda line: None)
    callback.on_train_begin(args, state, None)
    assert [finding.rule for finding in callback.findings] == ["chosen_falls"]


@pytest.mark.parametrize(("stop_on", "message"), [
    (["over_optimized"], "'over_optimized', which is no level and no rule. Did you mean 'over_optimised'"),
    ("serious", r"a list of names, as in stop_on=\('serious',\)"),
])  # fmt: skip
def test_names_that_do_not_exist_are_refused(stop_on, message):
    with pytest.raises(UsageError, match=message):
        HealthCallback(stop_on)
