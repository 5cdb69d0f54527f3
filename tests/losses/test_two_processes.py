"""Objectives whose examples act on one another: two processes, each with its own examples, equal one with all of them.

One pair of processes goes through every expression. Values are compared as means over processes, and gradients as DDP
averages them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from prefopt.losses import parse
from tests.losses.cases import CASES, make_batch, random_rows
from tests.losses.two_processes import WEIGHT, gradients_of, state_after

ROOT = Path(__file__).parents[2]
EXPRESSIONS = [case.expression for case in CASES]


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> dict[str, dict[str, list[float]]]:
    folder = tmp_path_factory.mktemp("two")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    (folder / "expressions.json").write_text(json.dumps(EXPRESSIONS))
    command = [sys.executable, "-m", "tests.losses.two_processes", str(folder)]
    workers = [
        subprocess.Popen([*command, str(rank)], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    errors = [worker.communicate(timeout=900)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], errors
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_two_processes_equal_one(together, expression):
    batch = make_batch(random_rows(6), weight=WEIGHT, requires_grad=True)
    loss, gradients = gradients_of(expression, batch)
    result = together[expression]
    # An online baseline is a mean over the samples of one process, by definition.
    if expression == "kl_online":
        assert result["loss"] == pytest.approx(float(loss))
        return
    assert result["loss"] == pytest.approx(float(loss), rel=1e-9, abs=1e-12)
    torch.testing.assert_close(
        torch.tensor(result["gradients"], dtype=torch.float64), gradients, rtol=1e-8, atol=1e-11
    )


@pytest.mark.parametrize("expression", [text for text in EXPRESSIONS if parse(text).state_dict()])
def test_two_processes_end_in_the_state_of_one(together, expression):
    expected = state_after(expression, make_batch(random_rows(6), weight=WEIGHT))
    assert together[expression]["state"] == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_evaluations_may_leave_a_process_with_fewer_examples_or_none(together, expression):
    batch = make_batch(random_rows(6), weight=WEIGHT)
    with torch.no_grad():
        loss = float(parse(expression).double().eval()(batch).loss)
    # An online baseline is a mean over the samples of one process.
    if expression != "kl_online":
        assert together[expression]["uneven"] == pytest.approx([loss, loss], rel=1e-9, abs=1e-12)
