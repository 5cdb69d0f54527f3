"""A run of which one process fails while the other waits for it; started by `test_failing_processes.py`."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch
from torch import Tensor

from prefopt.losses import DPO, PreferenceBatch
from tests.processes import engine_options
from tests.trainer.runs import make_pairs, make_trainer

BAD = 7.0
"""The gap of the one row that fails. No check before training can see it: the number itself is fine."""


class WithAGap(DPO):
    """A loss with a column of its own, which fails at the row whose gap is `BAD`."""

    columns = ("gap",)
    name = "with_a_gap"
    fault = ""

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        gap = batch.chosen.columns["gap"]
        if self.fault == "an error" and (gap == BAD).any():
            raise RuntimeError("a row that cannot be computed")
        return super().per_example(batch) + torch.where(gap == BAD, math.inf, gap)


def main(folder: Path, engine: str, fault: str) -> None:
    # In the order of the data, two rows a process and step: the seventh is the second process's, at the second step.
    gaps = [BAD if i == 6 else 1.0 for i in range(16)]
    loss = WithAGap()
    loss.fault = fault
    trainer = make_trainer(
        folder,
        model=str(folder / "llama-0"),
        train_dataset=make_pairs(16, gap=gaps),
        per_device_train_batch_size=2,
        max_steps=4,
        train_sampling_strategy="sequential",
        trainer_options={"loss": loss},
        **engine_options(engine),
    )
    trainer.train()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
