"""Any objective in a TRL trainer of one's own: the mixin adds the argument `loss`, and the subclass stays as it is.

    python examples/own_trl_trainer.py MODEL PAIRS.jsonl

A row of PAIRS has prompt, chosen and rejected; docs/data.md lists other layouts.
"""

import sys
from typing import Any

from trl import DPOTrainer

from prefopt import LossMixin, PreferenceConfig
from prefopt.data import read_preferences


class LouderTrainer(DPOTrainer):
    """Somebody's own trainer: it counts the logs."""

    logged = 0

    def log(self, logs: dict[str, float], *arguments: Any, **others: Any) -> None:
        self.logged += 1
        super().log(logs | {"logged": self.logged}, *arguments, **others)


class MyTrainer(LossMixin, LouderTrainer):
    pass


def train(name: str, pairs: str, steps: int = 100, objective: str = "dpo(beta=0.1) + 0.2*sft") -> list[float]:
    """The logged losses."""
    args = PreferenceConfig("out", max_steps=steps, logging_steps=1, save_strategy="no", report_to="none")
    trainer = MyTrainer(name, args=args, train_dataset=read_preferences(pairs), loss=objective)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    train(sys.argv[1], sys.argv[2])
