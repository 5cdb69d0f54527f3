"""A run of which one process fails while the other waits for it; started by `test_failing_processes.py`."""

from __future__ import annotations

import math
import sys
from pathlib import Path

from tests.processes import engine_options
from tests.trainer.runs import make_pairs, make_trainer

BAD = {"a value that is no number": None, "a loss that is not finite": math.inf}


def main(folder: Path, engine: str, fault: str) -> None:
    # In the order of the data, two rows a process and step: the seventh is the second process's, at the second step.
    weights = [BAD[fault] if i == 6 else 1.0 for i in range(16)]
    trainer = make_trainer(
        folder,
        loss="dpo",
        model=str(folder / "llama-0"),
        train_dataset=make_pairs(16, weight=weights),
        per_device_train_batch_size=2,
        max_steps=4,
        train_sampling_strategy="sequential",
        **engine_options(engine),
    )
    trainer.train()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
