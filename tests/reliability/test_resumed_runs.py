"""Killed and resumed is the same as not killed: weights, the objective's state and the log, bit for bit."""

from __future__ import annotations

import signal

import pytest
import torch

from tests.reliability.faults import Fault, Job, forked, prepare, result, train

JOBS = {
    "full": Job(),
    "accumulated, logged by epoch": Job(
        options={
            "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "logging_strategy": "epoch",
            "eval_strategy": "epoch",
        }
    ),
    "lora with dropout, beta_dpo": Job("beta_dpo", "lora", options={"disable_dropout": False}),
    "token budget, alpha_dpo": Job("alpha_dpo + 0.1*sft", "lora", options={"token_budget": 64}),
    "single completions, bco": Job("bco", "lora", labelled=True, options={"gradient_accumulation_steps": 2}),
    "sampled completions, hypo": Job("hypo", "lora", options={"sample_max_new_tokens": 4, "disable_dropout": False}),
    "reference that follows": Job(options={"sync_ref_model": True, "ref_model_sync_steps": 2}),
    "terms combined without conflict": Job("conflict_free(dpo + sft)", "lora"),
    "reference cache": Job("ipo", "full", cache=True),
    "padded layout, by epoch": Job(
        "simpo", "lora", options={"layout": "padded", "save_strategy": "epoch", "disable_dropout": False}
    ),
}  # fmt: skip


def check_same(folder, job, faults):
    """Train once undisturbed and once with the faults, each attempt from where the last got to; compare."""
    prepare(folder / "whole", job)
    output = folder / "output.txt"
    assert forked(lambda: train(folder / "whole", job), output=output) == 0, output.read_text()[-3000:]
    prepare(folder / "killed", job)
    for fault in faults:
        code = forked(lambda: train(folder / "killed", job), fault, output)
        assert code == (-9 if fault.signum == signal.SIGKILL else 128 + fault.signum), output.read_text()[-3000:]
    assert forked(lambda: train(folder / "killed", job), output=output) == 0, output.read_text()[-3000:]
    (weights, whole), (again, resumed) = result(folder / "whole"), result(folder / "killed")
    assert resumed["log"] == whole["log"]
    assert resumed["objective"] == whole["objective"]
    assert again.keys() == weights.keys()
    assert [name for name in weights if not torch.equal(weights[name], again[name])] == []


@pytest.mark.parametrize("name", JOBS)
def test_killed_and_stopped_and_resumed_is_as_if_it_had_not_been(tmp_path, name):
    micro = JOBS[name].options.get("gradient_accumulation_steps", 1)
    faults = [
        # In the step after the first checkpoint, before anything has been evaluated.
        Fault("within a step", 2 * micro + 1),
        # In the step after which an evaluation is due: it is put off.
        Fault("within a step", micro, signal.SIGTERM),
        Fault("completing a checkpoint", 1),
    ]
    check_same(tmp_path, JOBS[name], faults)


def test_killed_while_the_final_model_is_saved(tmp_path):
    # In the middle of an epoch, where transformers would take one more step.
    job = Job(options={"max_steps": 6})
    check_same(tmp_path, job, [Fault("saving weights", 4)])


def test_killed_before_a_batch_that_takes_the_baseline_of_the_step_before(tmp_path):
    """Nine rows leave one for the last batch of an epoch, which has no other prompt to be moved to."""
    job = Job("kto(beta=5.0)", "lora", labelled=True, rows=9, options={"learning_rate": 1e-2})
    check_same(tmp_path, job, [Fault("within a step", 11)])  # step 9, after two evaluations
