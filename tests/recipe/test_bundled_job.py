"""The job that a newcomer runs, with the real model: minutes on a CPU, so marked slow."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from prefopt.recipe import main

pytestmark = pytest.mark.slow


def test_the_bundled_job_teaches_the_rule(tmp_path):
    results = main("dpo(beta=0.1)", ["--output_dir", str(tmp_path)])
    before, after = results["answers_before"], results["answers_after"]
    assert results["before"]["eval_loss"] == pytest.approx(0.693147, abs=1e-4)
    assert results["after"]["eval_rewards/accuracies"] >= 0.90
    assert after["rule_rate"] - before["rule_rate"] >= 0.60
    assert after["empty"] == 0
    assert (tmp_path / "adapter_model.safetensors").exists()


def test_the_bundled_job_repeats_exactly(tmp_path):
    weights = []
    for name in ("first", "second"):
        folder: Path = tmp_path / name
        main("dpo(beta=0.1)", ["--output_dir", str(folder), "--max_steps", "2", "--eval_rows", "0"])
        weights.append(load_file(folder / "adapter_model.safetensors"))
    assert weights[0].keys() == weights[1].keys()
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])
    assert any(weights[0][name].abs().sum() > 0 for name in weights[0] if "lora_B" in name)
