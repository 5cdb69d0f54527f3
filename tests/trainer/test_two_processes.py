"""Two real processes over gloo log and learn what one process does with the same global batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.processes import torchrun
from tests.trainer.runs import require, save_model


def launch(
    folder: Path,
    processes: int,
    loss: str,
    per_device: int,
    engine: str = "ddp",
    kind: str = "full",
    budget: Any = None,
) -> dict[str, Any]:
    save_model(folder)
    arguments = (str(folder), loss, str(per_device), engine, kind, str(budget))
    torchrun("tests.trainer.two_processes", *arguments, processes=processes)
    found: dict[str, Any] = json.loads((folder / f"{processes}.json").read_text())
    assert found["world"] == processes
    if processes > 1:
        assert found["wrapped"] == ("DistributedDataParallel" if engine == "ddp" else "DeepSpeedEngine")
    # What the numbers below are equal in: packed trees, and a head that never holds whole logits.
    assert (found["masks"], found["chunked"]) == ("packed", True)
    return found


def assert_same(together: dict[str, Any], alone: dict[str, Any], loose: tuple[str, ...] = ()) -> None:
    for mine, reference in zip(together["log"], alone["log"], strict=True):
        for name in set(reference) - {"epoch", "learning_rate", "mismatched_ratios", "kto/mismatched_ratios"}:
            rel = 5e-2 if name in loose else 1e-4
            assert mine[name] == pytest.approx(reference[name], rel=rel, abs=1e-5), name


def test_two_processes_equal_one(tmp_path):
    loss = "dpo + 0.1*sft(nll='token')"
    assert_same(launch(tmp_path, 2, loss, 4), launch(tmp_path, 1, loss, 8))


def test_two_processes_estimate_kto_as_one_does(tmp_path):
    # The moved completions of its baseline come from other prompts in smaller batches: the estimate differs.
    loss = "kto(beta=0.5) + 0.1*sft(nll='sum')"
    together, alone = launch(tmp_path, 2, loss, 4), launch(tmp_path, 1, loss, 8)
    exact = {"num_tokens", "lengths/chosen", "lengths/rejected"}
    assert_same(together, alone, loose=tuple(set(alone["log"][0]) - exact))


@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3"])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_engines_and_token_budgets_change_nothing(tmp_path, engine, kind):
    """The two processes cut their batches into different numbers of parts, and exchange gradients once a step."""
    require(engine)
    loss = "dpo + 0.1*sft + 0.1*tdpo"
    alone = launch(tmp_path, 1, loss, 8, kind=kind)
    assert_same(launch(tmp_path, 2, loss, 4, engine, kind, budget=50), alone)
