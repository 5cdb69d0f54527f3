"""The job that a newcomer runs, with the real model, so marked slow. What it learns: tests/docs/test_start.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from prefopt.recipe import main

pytestmark = pytest.mark.slow


def test_the_bundled_job_repeats_exactly(tmp_path):
    weights = []
    for name in ("first", "second"):
        folder: Path = tmp_path / name
        main("dpo(beta=0.1)", ["--output_dir", str(folder), "--max_steps", "2", "--eval_rows", "0"])
        weights.append(load_file(folder / "adapter_model.safetensors"))
    assert weights[0].keys() == weights[1].keys()
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])
    assert any(weights[0][name].abs().sum() > 0 for name in weights[0] if "lora_B" in name)
