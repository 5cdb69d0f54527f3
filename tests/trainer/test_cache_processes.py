"""The reference cache on two real processes over gloo, with whole weights (DDP) and sharded ones (ZeRO-3)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.processes import torchrun
from tests.trainer.cache_processes import run
from tests.trainer.runs import make_pairs, require, save_model

pytestmark = pytest.mark.distributed

WRAPPER = {"ddp": "DistributedDataParallel", "zero3": "DeepSpeedEngine"}
ROWS = 32  # two completions of each of the 16 examples


def launch(folder: Path, engine: str, kind: str, *caches: str) -> list[dict]:
    """Runs one after the other, each with the cache of that name."""
    require(engine)
    save_model(folder)
    torchrun("tests.trainer.cache_processes", str(folder), engine, kind, *caches)
    results = json.loads((folder / "results.json").read_text())
    for result in results:
        assert (result["world"], result["wrapped"]) == (2, WRAPPER[engine])
        first, second = result["calls"]
        assert len(first) == len(second)
    return results


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("engine", ["ddp", "zero3"])
def test_each_row_is_computed_by_one_process_in_one_epoch_of_one_run(tmp_path, engine, kind):
    without, first, second = launch(tmp_path, engine, kind, "off", "kept", "kept")
    assert sum(first["misses"]) == ROWS
    assert second["misses"] == [0, 0]
    assert second["calls"] == [[], []]
    alone = run(tmp_path, "plain", kind, "kept", per_device_train_batch_size=8)
    assert (alone["world"], alone["misses"], alone["name"]) == (1, [0], first["name"])
    for result in (first, second, alone):
        assert result["losses"] == pytest.approx(without["losses"], rel=1e-5)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_what_one_process_computed_serves_sharded_weights(tmp_path, kind):
    require("zero3")
    save_model(tmp_path)
    whole = run(tmp_path, "plain", kind, "whole", per_device_train_batch_size=8)
    assert whole["misses"] == [ROWS]
    run(tmp_path, "plain", kind, "part", per_device_train_batch_size=8, train_dataset=make_pairs(16).select(range(11)))
    without, hit, partly = launch(tmp_path, "zero3", kind, "off", "whole", "part")
    assert (hit["misses"], hit["name"]) == ([0, 0], whole["name"])
    # Unequal shares of what is missing, yet no process calls the model more often than the other.
    assert sum(partly["misses"]) == ROWS - 22
    assert partly["misses"][0] != partly["misses"][1]
    for result in (hit, partly):
        assert result["losses"] == pytest.approx(without["losses"], rel=1e-5)
