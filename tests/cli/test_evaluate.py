import json

import pytest
from typer.testing import CliRunner

from prefopt.cli import app
from tests.tiny import make_model, make_tokenizer


def save(folder, seed):
    make_model(seed=seed).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def run(*words):
    return CliRunner().invoke(app, ["evaluate", *map(str, words)])


def test_models_stand_side_by_side(tmp_path):
    first, second = save(tmp_path / "a", 0), save(tmp_path / "b", 1)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{i} + 1", "answer": str(i + 1)}) + "\n" for i in range(3)))
    out = tmp_path / "numbers.json"
    result = run(
        first, second, "--prompts", prompts, "--judge", "number", "--samples", 2, "--max-new-tokens", 4, "--out", out
    )
    assert result.exit_code == 0, result.output
    for name in ("pass@1", "pass@2", "majority vote", "length-controlled", "distinct-2"):
        assert name in " ".join(result.output.split())
    facts = json.loads(out.read_text())
    a, b = facts["models"]
    assert (a["prompts"], a["win_rate"], a["unscored"]) == (3, None, 0)
    assert b["win_rate"]["low"] <= b["win_rate"]["value"] <= b["win_rate"]["high"]
    assert a["pass_at_k"]["1"]["value"] == pytest.approx(a["mean_score"]["value"])
    same = run(
        first, first, "--prompts", prompts, "--judge", "tests.evaluation.my_judges:length", "--samples", 1,
        "--max-new-tokens", 4, "--out", out,
    )  # fmt: skip
    assert same.exit_code == 0, same.output
    # A model against itself, with the same seeds: ties.
    assert json.loads(out.read_text())["models"][1]["win_rate"]["value"] == 0.5


def test_a_judge_that_compares_is_refused(tmp_path):
    result = run("m", "--prompts", "arithmetic", "--judge", "tests.evaluation.my_judges:shorter")
    assert result.exit_code == 1
    assert "evaluate needs a judge that scores" in " ".join(result.output.split())
