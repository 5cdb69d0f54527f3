"""How far it is from the trainer's loss to the model: few enough frames to follow with a finger."""

from __future__ import annotations

import traceback
from pathlib import Path

import pytest

import prefopt
from tests.trainer.runs import make_trainer

OURS = str(Path(prefopt.__file__).parent)


@pytest.mark.parametrize("layout", ["auto", "padded"])
def test_at_most_eight_of_our_frames_from_compute_loss_to_the_forward_pass(tmp_path, layout):
    trainer = make_trainer(tmp_path, loss="dpo", max_steps=1, layout=layout)
    depths = []

    def look(*_):
        frames = [
            f"{Path(f.filename).stem}.{f.name}" for f in traceback.extract_stack() if f.filename.startswith(OURS)
        ]
        # Before the first batch is scored, models are tried out on it.
        tried = {"layout.meet", "causal.looks_ahead"} & {*frames}
        if "mixin.compute_loss" in frames and not tried:
            depths.append(frames[frames.index("mixin.compute_loss") :])

    trainer.model.register_forward_pre_hook(look)
    trainer.train()
    assert depths
    assert max(map(len, depths)) <= 8, max(depths, key=len)
