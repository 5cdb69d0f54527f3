"""Every file of configs/rounds is read: options, losses and pair builders, and the demo's settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from prefopt.losses import parse
from prefopt.online.builders import parse_builder
from prefopt.online.options import RoundsArguments, options_of, sampling_of
from prefopt.online.policy import loss_of, plan_round
from prefopt.online.tasks import TASKS
from prefopt.recipe import parse_arguments

FILES = sorted((Path(__file__).parents[2] / "configs" / "rounds").glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_config_of_rounds_is_whole(file, tmp_path):
    more = ["--prompts", "mine.jsonl"] if file.stem in ("spin", "online_dpo") else []
    recipe = parse_arguments("irpo", ["--config", str(file), *more], RoundsArguments)
    script = options_of(recipe)
    builder = parse_builder(script.pairs)
    for number in range(1, script.rounds + 1):
        plan = plan_round(script, tmp_path, "initial", str(recipe.training.loss), number)
        assert builder.supervised == ("rejected" not in parse(loss_of(script, plan.loss, number)).roles)
        assert sampling_of(script, number, 0).samples == script.samples
    if script.prompts is None:
        assert script.judges == [TASKS[script.task].judge]
        assert script.prompts_per_round <= len(TASKS[script.task].prompts("train"))


def test_the_demo_has_the_bundled_task():
    recipe = parse_arguments("irpo", ["--demo"], RoundsArguments)
    script = options_of(recipe)
    assert (script.task, script.rounds, script.stop, script.max_new_tokens) == ("arithmetic", 3, ["\n"], 24)
    prompts = TASKS["arithmetic"].prompts
    assert len(prompts("train")) == script.rounds * script.prompts_per_round
    assert not {row.id for row in prompts("train")} & {row.id for row in prompts("heldout")}
