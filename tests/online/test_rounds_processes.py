"""Rounds on two processes: the same samples, judgements, pairs or groups, and weights as on one."""

from __future__ import annotations

import pytest

from tests.online.rounds import files, same_weights, weights, words
from tests.processes import launch
from tests.trainer.runs import save_model

pytestmark = pytest.mark.distributed


def test_two_processes_that_train_on_groups_end_as_one(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))
    model = save_model(tmp_path)
    for processes, batch in ((1, 4), (2, 2)):
        folder = tmp_path / str(processes)
        folder.mkdir()
        options = {"model_name_or_path": model, "per_device_train_batch_size": batch}
        options |= {"loss": "gvpo(beta=0.1)", "pairs": "groups(equal=False)"}
        argv = words(folder, prompts=20, rounds=1, **options)
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


def test_a_run_whose_processes_are_killed_ends_as_one_that_is_not(tmp_path, monkeypatch):
    """First the main process, in the middle of a line, then the other one, in training; the same command continues."""
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))
    model = save_model(tmp_path)
    options = {"judges": "tests.online.rounds:longer", "pairs": "tournament", "prompts": 20, "samples": 5}

    def run(name: str, rank: int = 0, event: int = 0) -> int:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        argv = words(folder, model_name_or_path=model, per_device_train_batch_size=2, max_steps=2, **options)
        command = ["-m", "tests.online.killed_processes", str(rank), str(event), str(folder), *argv]
        ended = launch(command)
        assert event or ended.status == 0, ended.stderr[-3000:]
        return ended.status

    run("whole")
    events = [int((tmp_path / "whole" / f"events-{rank}").read_text()) for rank in (0, 1)]
    assert run("killed", 0, 3) != 0
    unfinished = next((tmp_path / "killed" / "out").rglob("*samples.jsonl")).read_bytes()
    assert unfinished.endswith(b'{"schema": "prefopt.sam')
    assert run("killed", 1, events[1] - 2) != 0
    assert run("killed") == 0
    one, other = (files(tmp_path / name / "out") for name in ("whole", "killed"))
    assert [name for name in one if one[name] != other.get(name)] == []
    assert one.keys() == other.keys()
    for number in (1, 2):
        assert same_weights(*(weights(tmp_path / name / "out", number) for name in ("whole", "killed")))
