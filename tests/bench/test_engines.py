"""scripts/bench/engines.py: what it runs, what it refuses, what it prints."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts" / "bench"))  # scripts are no package

import engines  # noqa: E402

OPTIONS = argparse.Namespace(processes=2, steps=12, batch=8, eval_rows=21)


def value(words: list[str], name: str) -> str:
    return words[words.index(f"--{name}") + 1]


def test_runs_differ_in_the_engine_and_the_share_of_a_batch_only(tmp_path):
    alone, *others = (engines.arguments_of(OPTIONS, engine, tmp_path) for engine in engines.ENGINES)
    assert value(alone, "per_device_train_batch_size") == "8"
    for words in others:
        assert value(words, "per_device_train_batch_size") == "4"
        for name in ("dataset_name", "eval_rows", "max_steps", "seed"):
            assert value(words, name) == value(alone, name)
    ddp, zero2, zero3, fsdp2 = others
    assert not {"--fsdp", "--deepspeed"} & {*alone, *ddp}
    for words, stage in ((zero2, 2), (zero3, 3)):
        assert value(words, "deepspeed")
        config = engines.deepspeed_config(stage)
        assert config["zero_optimization"]["stage"] == stage
    assert json.loads(Path(value(zero3, "deepspeed")).read_text()) == engines.deepspeed_config(3)
    # Bare: transformers takes a value for the name of a strategy.
    assert value(fsdp2, "fsdp") == "--fsdp_config"
    assert json.loads(Path(value(fsdp2, "fsdp_config")).read_text()) == {"version": 2}


def test_a_run_under_another_engine_than_asked_for_is_no_result(monkeypatch):
    def ran_on_ddp(command, **_):
        folder = Path(value(command, "output_dir"))
        folder.mkdir(exist_ok=True)
        (folder / "results.json").write_text(json.dumps({"engine": "2 processes, DDP", "after": {}}))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(engines.subprocess, "run", ran_on_ddp)
    with pytest.raises(RuntimeError, match="fsdp2: asked for 2 processes, FSDP2, ran on 2 processes, DDP"):
        engines.measure(OPTIONS, "fsdp2")


def test_the_table_compares_with_one_process():
    row = {"accuracy": 0.75, "margin": 0.25, "processes": 2, "seconds": 61.4}
    found = {
        "one": {**row, "engine": "1 process", "loss": 0.5},
        "fsdp2": {**row, "engine": "2 processes, FSDP2", "loss": 0.500001},
    }
    assert engines.table(found).splitlines()[2:] == [
        "| 1 process | 0.500000 | 75% | 0.2500 | 61 |  |",
        "| 2 processes, FSDP2 | 0.500001 | 75% | 0.2500 | 61 | +1.0e-06 |",
    ]
