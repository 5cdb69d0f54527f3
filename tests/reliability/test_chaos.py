"""A run that is killed twenty times at random places and times, and what it has in common with one that is not."""

from __future__ import annotations

import pytest

from tests.reliability.faults import CHAOS_JOBS, chaos, draw


def check(folder, name, seed):
    job = CHAOS_JOBS[name]
    done = chaos(folder, job, draw(20, seed, terms=4, cache=job.cache))
    assert done.differing == []
    assert len(done.hits) == 20, done.hits
    assert done.steps > done.whole


def test_killed_twenty_times_a_run_ends_as_if_undisturbed(tmp_path):
    check(tmp_path, "full", seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", CHAOS_JOBS)
def test_killed_twenty_times_whatever_is_trained(tmp_path, name):
    check(tmp_path, name, seed=1)
