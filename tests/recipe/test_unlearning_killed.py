"""`recipes/unlearn.py`, killed in each of its stages and resumed: the same numbers as a run that nothing disturbed."""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prefopt.trainer import LossMixin
from prefopt.unlearning import measure
from prefopt.unlearning.trainer import UnlearningTrainer
from tests.recipe.test_unlearning import words
from tests.reliability.faults import forked, wrap

pytest.importorskip("rouge_score")

RECIPE = Path(__file__).parents[2] / "recipes" / "unlearn.py"
LEARN, GOLD = 60, 40
"""Steps of learning both sets, and of learning what to retain."""
FORGET = 8
SAVE = 3


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def in_step(kind: str, step: int) -> Callable[[], None]:
    """Kill in a step of the trainer whose folder's name begins like this, after `step` finished ones."""

    def around(_: int, original: Any, trainer: Any, *arguments: Any, **keywords: Any) -> Any:
        if Path(trainer.args.output_dir).name.startswith(kind) and trainer.state.global_step == step:
            die()
        return original(trainer, *arguments, **keywords)

    return lambda: wrap(LossMixin, "training_step", around)


def in_first_measurement() -> None:
    """Kill while the gold model answers the second set: the model before forgetting is measured."""

    def around(call: int, original: Any, *arguments: Any, **keywords: Any) -> Any:
        if call == 6:
            die()
        return original(*arguments, **keywords)

    wrap(measure, "answer_questions", around)


def in_last_measurement() -> None:
    """Kill while the model that has forgotten answers the second set."""
    answered = []

    def evaluated(_: int, original: Any, trainer: Any, *arguments: Any, **keywords: Any) -> Any:
        answered[:] = [trainer.state.global_step == FORGET, 0]
        return original(trainer, *arguments, **keywords)

    def around(_: int, original: Any, *arguments: Any, **keywords: Any) -> Any:
        answered[1] += 1
        if answered == [True, 2]:
            die()
        return original(*arguments, **keywords)

    wrap(UnlearningTrainer, "evaluate", evaluated)
    wrap(measure, "answer_questions", around)


KILLS: dict[str, Callable[[], None]] = {
    "learning": in_step("learned", 31),
    "learning the gold model": in_step("gold", 20),
    "first measurement": in_first_measurement,
    "forgetting": in_step("run", 5),
    "last measurement": in_last_measurement,
}


def attempt(folder: Path, kill: Callable[[], None] | None = None) -> int:
    """Run the recipe in a child, from where an earlier attempt got to; returns its exit status."""
    more = (
        "--learn", "true", "--resume_from_checkpoint", "auto", "--save_strategy", "steps", "--save_steps", str(SAVE),
    )  # fmt: skip

    def count(_: int, original: Any, trainer: Any, *arguments: Any, **keywords: Any) -> Any:
        with (folder / "steps").open("a") as file:
            file.write("x")
        return original(trainer, *arguments, **keywords)

    def work() -> None:
        wrap(LossMixin, "training_step", count)
        if kill is not None:
            kill()
        sys.argv = ["unlearn.py", *words(folder, *more, output="run")]
        runpy.run_path(str(RECIPE), run_name="__main__")

    return forked(work, output=folder / "output.txt")


def said(folder: Path) -> str:
    return (folder / "output.txt").read_text()[-3000:]


@pytest.mark.slow
def test_killed_in_each_stage_and_resumed_it_ends_with_the_same_numbers(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    assert attempt(whole) == 0, said(whole)
    for stage, kill in KILLS.items():
        assert attempt(killed, kill) == -signal.SIGKILL, f"{stage}: {said(killed)}"
        assert not (killed / "run" / "results.json").exists(), stage
    assert attempt(killed) == 0, said(killed)
    assert results(killed) == results(whole)
    steps = [len((folder / "steps").read_text()) for folder in (whole, killed)]
    assert steps[0] == LEARN + GOLD + FORGET
    # Every stage goes on from its last checkpoint: what a kill costs is the steps since then.
    assert steps[0] < steps[1] <= steps[0] + 4 * SAVE


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run" / "results.json").read_text())
