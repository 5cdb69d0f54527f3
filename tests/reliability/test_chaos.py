"""A run that is killed twenty times at random places and times, and what it has in common with one that is not."""

from __future__ import annotations

import pytest

from tests.reliability.faults import Job, chaos, draw

JOBS = {
    "full": Job("dpo", "full", cache=True, rows=26, options={"num_train_epochs": 10}),
    "lora": Job(
        "beta_dpo + 0.1*sft", "lora", rows=26,
        options={"disable_dropout": False, "token_budget": 64, "gradient_accumulation_steps": 2,
                 "per_device_train_batch_size": 2, "num_train_epochs": 10},
    ),
    "sampled": Job(
        "hypo", "lora", rows=26,
        options={"sample_max_new_tokens": 4, "disable_dropout": False, "num_train_epochs": 10},
    ),
}  # fmt: skip


def check(folder, name, seed):
    job = JOBS[name]
    done = chaos(folder, job, draw(20, seed, terms=4, cache=job.cache))
    assert done.differing == []
    assert len(done.hits) == 20, done.hits
    assert done.steps > done.whole


def test_killed_twenty_times_a_run_ends_as_if_undisturbed(tmp_path):
    check(tmp_path, "full", seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 4))
@pytest.mark.parametrize("name", JOBS)
def test_killed_twenty_times_whatever_is_trained(tmp_path, name, seed):
    check(tmp_path, name, seed)
