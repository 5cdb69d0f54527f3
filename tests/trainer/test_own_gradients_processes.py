"""`conflict_free`, `pair_normalized` and learned losses on two processes step as one with the same batch."""

from __future__ import annotations

import json

import pytest
import torch

from tests.processes import torchrun
from tests.trainer.own_gradients_processes import LOSSES, main
from tests.trainer.runs import save_model

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own-gradients")
    save_model(folder)
    main(folder, 8)
    torchrun("tests.trainer.own_gradients_processes", str(folder), "4")
    return [json.loads((folder / f"{processes}.json").read_text()) for processes in (1, 2)]


@pytest.mark.parametrize("name", LOSSES)
def test_two_processes_step_as_one(runs, name):
    alone, together = (found[name] for found in runs)
    assert (together["world"], together["wrapped"], together["same"]) == (2, "DistributedDataParallel", True)
    assert alone["world"] == 1
    assert alone["moved"] > 0.05
    ours, theirs = torch.tensor(together["weights"]), torch.tensor(alone["weights"])
    assert float((ours - theirs).abs().max()) < 1e-4 * alone["moved"]
    for mine, reference in zip(together["log"], alone["log"], strict=True):
        for key in set(reference) - {"epoch", "learning_rate"}:
            assert mine[key] == pytest.approx(reference[key], rel=1e-4, abs=1e-5), key
    if name.startswith("learned"):
        assert any(entry.endswith("log_beta") and alone["log"][-1][entry] != 0 for entry in alone["log"][-1])
    if name != "learned" and not name.startswith("normalised"):
        assert any(key.startswith("conflict/") for key in alone["log"][-1])
