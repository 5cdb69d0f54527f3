"""Samples of a model that training has sharded: those of the whole model, and training goes on."""

from __future__ import annotations

import importlib.util
import json

import pytest

from tests.processes import WRAPPERS, torchrun
from tests.trainer.runs import save_model


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_a_sharded_model_draws_the_samples_of_the_whole_one(tmp_path, engine):
    if engine == "zero3" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    save_model(tmp_path)
    torchrun("tests.generation.sharded_processes", str(tmp_path), engine)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["wrapper"] == WRAPPERS[engine]
    assert len(set(results["sharded"])) > 10
    assert results["sharded"] == results["whole"] == results["again"]
