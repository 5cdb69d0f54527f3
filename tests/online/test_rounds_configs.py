"""Every file of configs/rounds is read: options, losses and pair builders, and the demo's settings."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from prefopt.losses import parse
from prefopt.online.builders import parse_builder
from prefopt.online.options import RoundsArguments, options_of, sampling_of
from prefopt.online.policy import loss_of, plan_round
from prefopt.online.run import main
from prefopt.online.tasks import TASKS
from prefopt.recipe import parse_arguments
from prefopt.safety.jsonl import read_jsonl
from tests.online.rounds import words

FILES = sorted((Path(__file__).parents[2] / "configs" / "rounds").glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_config_of_rounds_is_whole(file, tmp_path):
    more = ["--prompts", "mine.jsonl"] if file.stem in ("spin", "online_dpo", "self_rewarding") else []
    recipe = parse_arguments("irpo", ["--config", str(file), *more], RoundsArguments)
    script = options_of(recipe)
    builder = parse_builder(script.pairs)
    for number in range(1, script.rounds + 1):
        plan = plan_round(script, tmp_path, "initial", str(recipe.training.loss), number)
        roles = parse(loss_of(script, plan.loss, number)).roles
        assert (builder.supervised, builder.grouped) == (
            {"rejected", "candidate"}.isdisjoint(roles),
            "candidate" in roles,
        )
        assert sampling_of(script, number, 0).samples == script.samples
    if script.prompts is None:
        assert script.judges == [TASKS[script.task].judge]
        assert script.prompts_per_round <= len(TASKS[script.task].prompts("train"))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("irpo_arc_rounds", {"judges": "tests.online.rounds:even", "samples": 8}),
        ("sppo_rounds", {"judges": "tests.online.rounds:longer", "prompts_per_round": 3}),
        ("rebel_rounds", {"judges": "tests.online.rounds:vowels"}),
        ("gvpo_small", {"judges": "tests.online.rounds:vowels", "prompts_per_round": 4}),
        ("hypo_small", {"judges": "tests.online.rounds:vowels", "prompts_per_round": 4, "sample_max_new_tokens": 4}),
    ],
)
def test_two_rounds_of_a_config_on_a_tiny_model(tmp_path, monkeypatch, name, options):
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))
    file = next(file for file in FILES if file.stem == name)
    own = yaml.safe_load(file.read_text())
    small = words(tmp_path, **options)
    drop = {"--loss", "--learning_rate", "--samples"} - {f"--{option}" for option in options}
    argv = [word for at in range(0, len(small), 2) if small[at] not in drop for word in small[at : at + 2]]
    summaries = main(argv=["--config", str(file), *argv, "--max_length", "64", "--bf16", "false"])
    assert [summary["training"]["steps"] for summary in summaries[1:]] == [3, 3]
    assert {summary["policy"]["loss"] for summary in summaries[1:]} == {own["loss"]}
    rows = list(read_jsonl(tmp_path / "out" / "round-2" / "pairs.jsonl"))
    scores = [row["scores"] if "scores" in row else [row["chosen_score"], row["rejected_score"]] for row in rows]
    assert all(0 <= min(of_row) < max(of_row) <= 1 for of_row in scores)
    assert (max(map(len, scores)) > 2) == own["pairs"].startswith("groups")


def test_the_demo_has_the_bundled_task():
    recipe = parse_arguments("irpo", ["--demo"], RoundsArguments)
    script = options_of(recipe)
    assert (script.task, script.rounds, script.stop, script.max_new_tokens) == ("arithmetic", 3, ["\n"], 24)
    prompts = TASKS["arithmetic"].prompts
    assert len(prompts("train")) == script.rounds * script.prompts_per_round
    assert not {row.id for row in prompts("train")} & {row.id for row in prompts("heldout")}
