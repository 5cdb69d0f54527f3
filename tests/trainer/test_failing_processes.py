"""When one process fails, the run ends with what it said, and long before the others give up waiting for it."""

from __future__ import annotations

import pytest

from tests.processes import launch
from tests.trainer.runs import require, save_model

pytestmark = pytest.mark.distributed

SAYS = {
    "an error": "RuntimeError: a row that cannot be computed",
    "a loss that is not finite": "NonFiniteError: the loss is inf at step 1",
}


@pytest.mark.parametrize(
    ("engine", "fault"),
    [
        ("ddp", "an error"),
        ("ddp", "a loss that is not finite"),
        ("zero3", "an error"),
    ],
)
def test_a_run_ends_when_one_process_fails(tmp_path, engine, fault):
    require(engine)
    save_model(tmp_path)
    ended = launch(["-m", "tests.trainer.failing_processes", str(tmp_path), engine, fault], timeout=900)
    # It ended within the timeout: gloo itself would wait for half an hour.
    assert ended.status != 0
    assert SAYS[fault] in ended.stderr
