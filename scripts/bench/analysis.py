"""What watching a run costs: processor time of `HealthCallback` and `EntanglementCallback` beside that of the steps.

    python scripts/bench/analysis.py

Trains the bundled job for three steps of four pairs with both, measures entanglement once on four pairs, and prints
what measuring a pair costs in pairs of training, and what this comes to at the default interval in the bundled job.
Processor time, so that other programs on the machine do not count. Takes about a minute of one core. Further options
are the recipe's.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from typing import Any

from transformers import TrainerCallback

from prefopt.analysis import EntanglementCallback, HealthCallback
from prefopt.analysis.gradients.probes import PROBES
from prefopt.recipe import load_data, parse_arguments, preflight
from prefopt.recipe.build import make_trainer

STEPS, BATCH, PROBED = 3, 4, 4
OF_THE_JOB = 8
"""Pairs in a step of the bundled job."""


class Timed(TrainerCallback):
    """A callback with the processor time of each call of one of its events."""

    def __init__(self, inner: TrainerCallback, event: str):
        self.inner, self.event = inner, event
        self.seconds: list[float] = []

    def __getattribute__(self, name: str) -> Any:
        own = object.__getattribute__
        if not name.startswith("on_"):
            return own(self, name)
        call = getattr(own(self, "inner"), name)
        return self._timed(call) if name == own(self, "event") else call

    def _timed(self, call: Any) -> Any:
        def timed(*arguments: Any, **keywords: Any) -> Any:
            begin = time.process_time()
            try:
                return call(*arguments, **keywords)
            finally:
                self.seconds.append(time.process_time() - begin)

        return timed


class Steps(TrainerCallback):
    """The processor time of each step, added last, so that no callback at its beginning counts."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._begun = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._begun = time.process_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.process_time() - self._begun)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        words = [
            "--output_dir", folder, "--max_steps", str(STEPS), "--per_device_train_batch_size", str(BATCH),
            "--eval_rows", "0", *sys.argv[1:],
        ]  # fmt: skip
        recipe = parse_arguments("dpo(beta=0.1)", words)
        ready = preflight(recipe)
        trainer = make_trainer(recipe, ready, load_data(recipe, ready))
        trainer.remove_callback(HealthCallback)
        health = Timed(HealthCallback(), "on_log")
        measured = Timed(EntanglementCallback(trainer, every=STEPS, probes=PROBED), "on_step_begin")
        steps = Steps()
        for callback in (health, measured, steps):
            trainer.add_callback(callback)
        trainer.train()
        default = EntanglementCallback(trainer)._every
    step = statistics.median(steps.seconds[1:])
    line, one = statistics.median(health.seconds), measured.seconds[0]
    pair = (one / PROBED) / (step / BATCH)
    print(f"a step of {BATCH} pairs: {step:.2f} s of processor time (median of {len(steps.seconds) - 1})")
    print(f"HealthCallback, a log line: {1e3 * line:.2f} ms, {line / step:.3%} of a step")
    print(
        f"EntanglementCallback, {PROBED} pairs: {one:.1f} s; measuring a pair costs {pair:.2f} pairs of training, "
        f"so {PROBES} pairs every {default} steps of {OF_THE_JOB} cost {pair * PROBES / default / OF_THE_JOB:.1%}"
    )


if __name__ == "__main__":
    main()
