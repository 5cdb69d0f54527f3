"""How often a training step makes the host wait for the device: every place by name, and how many are ours."""

from __future__ import annotations

from collections import Counter

import pytest
from peft import LoraConfig
from transformers import TrainerCallback

from tests.gpu.steps import pairs, run
from tests.gpu.syncs import counted

WAITS = {"tree": 6, "padded": 7}
"""Waits a step in prefopt's own code, as a CPU counts them. A GPU may count copies that C++ makes on its own, too."""


class LastStep(TrainerCallback):
    """Counts in the last step, when layout, caches and optimizer are settled."""

    def __init__(self, device: str) -> None:
        self.device, self.places = device, Counter()

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == state.max_steps - 1:
            self.open = counted(self.device)
            self.places = self.open.__enter__()

    def on_step_end(self, args, state, control, **_):
        if state.global_step == state.max_steps:
            self.open.__exit__(None, None, None)


@pytest.mark.parametrize("layout", ["tree", "padded"])
def test_waits_of_a_step(tmp_path, small_model, device, note, layout):
    last = LastStep(device)
    run(
        tmp_path, small_model, device, steps=4, bf16=True, layout=layout, logging_steps=100,
        train_dataset=pairs(16),
        trainer_options={
            "peft_config": LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"), "callbacks": [last],
        },
    )  # fmt: skip
    ours = {name: count for name, count in last.places.items() if name.startswith("prefopt/")}
    others = {name: count for name, count in last.places.items() if name not in ours}
    note("waits in prefopt", dict(sorted(ours.items(), key=lambda item: -item[1])))
    note("waits elsewhere", dict(sorted(others.items(), key=lambda item: -item[1])))
    note("total", {"prefopt": sum(ours.values()), "elsewhere": sum(others.values())})
    assert sum(last.places.values()) > 0  # the trainer itself looks at the loss
    assert sum(ours.values()) <= WAITS[layout] * (1 if device == "cpu" else 2)
