"""Rounds on two processes: the same samples, judgements, pairs and weights as on one."""

from __future__ import annotations

import pytest

from tests.online.rounds import files, weights, words
from tests.processes import launch
from tests.trainer.runs import save_model

pytestmark = pytest.mark.distributed


def test_two_processes_end_as_one(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))
    model = save_model(tmp_path)
    for processes, batch in ((1, 4), (2, 2)):
        folder = tmp_path / str(processes)
        folder.mkdir()
        argv = words(folder, prompts=20, rounds=1, model_name_or_path=model, per_device_train_batch_size=batch)
        launcher = ("torch.distributed.run", f"--nproc_per_node={processes}")
        ended = launch(["-m", "prefopt", "rounds", "run", *argv], launcher)
        assert ended.status == 0, ended.stderr[-3000:]
    one, two = (files(tmp_path / name / "out") for name in ("1", "2"))
    assert one.keys() == two.keys()
    # What training logs is summed in another order, and held-out answers are the trained model's.
    ours = [name for name in one if name.endswith(("samples.jsonl", "judgements.jsonl", "pairs.jsonl", "counts.json"))]
    assert [name for name in ours if one[name] != two[name] and "heldout" not in name] == []
    single, both = (weights(tmp_path / name / "out", 1) for name in ("1", "2"))
    for name, value in single.items():
        assert (value - both[name]).abs().max() < 1e-5, name
