"""Models that sample and judge are loaded whole under an engine."""

from __future__ import annotations

import os

from prefopt.online.engines import is_sharded, whole_models
from prefopt.trainer import PreferenceConfig
from tests.trainer.runs import settings

EFFICIENT = "FSDP_CPU_RAM_EFFICIENT_LOADING"


def test_fsdp_does_not_leave_processes_without_weights(tmp_path, monkeypatch):
    training = PreferenceConfig(**settings(tmp_path))
    monkeypatch.setenv(EFFICIENT, "true")
    with whole_models(training):
        assert os.environ[EFFICIENT] == "false"
    assert os.environ[EFFICIENT] == "true"
    monkeypatch.delenv(EFFICIENT)
    with whole_models(training):
        assert EFFICIENT not in os.environ


def test_a_plain_run_is_not_sharded(tmp_path, monkeypatch):
    training = PreferenceConfig(**settings(tmp_path))
    assert not is_sharded(training)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert not is_sharded(training)  # one process: accelerate leaves FSDP out
    training.deepspeed_plugin = object()
    assert is_sharded(training)
