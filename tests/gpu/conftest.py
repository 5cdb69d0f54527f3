"""Tests for a GPU: `pytest -m gpu`. `PREFOPT_GPU_TESTS=cpu pytest -m gpu` rehearses the same tests on a CPU.

Where PREFOPT_GPU_REPORT names a file, every test's outcome, seconds and notes are appended to it as a line of JSON
when the test ends, so that a run that is cut off keeps what it had.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.steps import save_small_model

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def device() -> str:
    """Where the tests compute."""
    if os.environ.get("PREFOPT_GPU_TESTS") == "cpu":
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU; PREFOPT_GPU_TESTS=cpu runs these tests on a CPU")
    return "cuda"


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a random Llama of four layers."""
    return save_small_model(tmp_path_factory.mktemp("small"))


@pytest.fixture
def note(record_property: Callable[[str, Any], None]) -> Callable[[str, Any], None]:
    """Keep a measured value with the test's outcome, and print it."""

    def keep(name: str, value: Any) -> None:
        record_property(name, value)
        print(f"{name}: {value}")

    return keep


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    file = os.environ.get("PREFOPT_GPU_REPORT")
    if file is None or (report.when != "call" and report.passed):
        return
    entry: dict[str, Any] = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
    entry |= dict(report.user_properties)
    if report.failed:
        entry["why"] = str(report.longrepr)[-1500:]
    with Path(file).open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(entry) + "\n")
