"""Every script of `examples/` trains, and the loops agree on the loss that they begin with."""

from __future__ import annotations

import math
import runpy
import sys
from pathlib import Path

import pytest

from tests.recipe.test_recipe import pairs_file
from tests.trainer.runs import save_model

ROOT = Path(__file__).parents[1]
SCRIPTS = ["own_loop", "accelerate_loop", "transformers_trainer", "lightning_module", "own_trl_trainer"]


def test_every_example_is_run():
    assert sorted(SCRIPTS) == sorted(path.stem for path in (ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_example_trains(tmp_path, monkeypatch, script):
    if script == "lightning_module":
        pytest.importorskip("lightning")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script])
    train = runpy.run_path(str(ROOT / "examples" / f"{script}.py"))["train"]
    history = train(save_model(tmp_path), pairs_file(tmp_path, rows=24), steps=4, objective="dpo(beta=0.1)")
    assert len(history) == 4
    # The policy begins as its reference, whoever scores the two.
    assert history[0] == pytest.approx(math.log(2), abs=1e-4)
    assert history[-1] != history[0]
    assert all(map(math.isfinite, history))
