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


def write_prompts(path, **columns):
    rows = (
        {"prompt": f"{number} + 1", **{name: value(number) for name, value in columns.items()}} for number in range(3)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_judge_that_compares_decides_the_win_rates(tmp_path):
    first, second = save(tmp_path / "a", 0), save(tmp_path / "b", 1)
    prompts, out = write_prompts(tmp_path / "prompts.jsonl"), tmp_path / "numbers.json"
    result = run(
        first, second, "--prompts", prompts, "--judge", "tests.evaluation.my_judges:shorter", "--samples", 2,
        "--max-new-tokens", 4, "--out", out,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "mean score" not in result.output
    a = json.loads(out.read_text())["models"][0]
    assert (a["mean_score"], a["win_rate"], a["unscored"]) == (None, None, 0)
    # The same samples by a judge of lengths: the shorter answer wins, one by one.
    words = ["--prompts", prompts, "--samples", 1, "--max-new-tokens", 4, "--out", out]
    rates = []
    for judge in ("shorter", "length"):
        assert run(first, second, *words, "--judge", f"tests.evaluation.my_judges:{judge}").exit_code == 0
        rates.append(json.loads(out.read_text())["models"][1]["win_rate"]["value"])
    assert rates[0] == pytest.approx(1 - rates[1])


def test_the_majority_vote_reads_the_column_that_is_named(tmp_path):
    model, out = save(tmp_path / "a", 0), tmp_path / "numbers.json"
    prompts = write_prompts(
        tmp_path / "prompts.jsonl", solution=lambda n: f"{n} + 1 = {n + 1}\n#### {n + 1}", other=lambda n: str(n)
    )
    words = [model, "--prompts", prompts, "--samples", 2, "--max-new-tokens", 4, "--out", out]
    for more, has in (
        (["--judge", "number,column=solution"], True),
        (["--judge", "tests.evaluation.my_judges:length"], False),
        (["--judge", "tests.evaluation.my_judges:length", "--answer-column", "solution"], True),
    ):
        result = run(*words, *more)
        assert result.exit_code == 0, result.output
        assert (json.loads(out.read_text())["models"][0]["majority"] is not None) == has


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name --prompts and --judge, or --tasks"),
        (["--prompts", "arithmetic"], "name --prompts and --judge, or --tasks"),
        (["--prompts", "arithmetic", "--judge", "number", "--task-limit", "3"], "need --tasks"),
    ],
)
def test_what_is_missing_is_said(words, message):
    result = run("m", *words)
    assert result.exit_code == 1
    assert message in " ".join(result.output.split())


def test_tasks_of_lm_eval_stand_beside_the_models(tmp_path, monkeypatch):
    from prefopt.evaluation import benchmarks

    model, out = save(tmp_path / "a", 0), tmp_path / "numbers.json"
    monkeypatch.setattr(benchmarks, "find_tasks", lambda tasks, folder: tasks)
    number = benchmarks.TaskResult("arc_easy", "acc", 0.25, 0.1, 4)
    monkeypatch.setattr(benchmarks, "run_tasks", lambda model, tokenizer, tasks, limit, seed: [number])
    result = run(model, "--tasks", "arc_easy", "--out", out)
    assert result.exit_code == 0, result.output
    assert "0.250 \u00b1 0.100" in result.output
    assert json.loads(out.read_text())["tasks"][model][0]["value"] == 0.25


def test_a_file_that_cannot_be_written_is_refused_before_a_model_is_loaded(tmp_path):
    (tmp_path / "file").write_text("")
    for out, why in (
        (tmp_path, "is a folder: name a file in it"),
        (tmp_path / "file" / "x.json", "is a file, not a"),
        (tmp_path / "file", "must end in .json"),
    ):
        result = run("m", "--prompts", "arithmetic", "--judge", "number", "--out", out)
        assert result.exit_code == 1
        assert why in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["--judge", "tests.evaluation.my_judges:fails"], "the first: raised: RuntimeError: never"),
        (["--judge", "tests.evaluation.my_judges:length,weight=2"], "one judge has no weight"),
        (["--judge", "number", "--answer-column", "anser"], "--answer-column anser: no prompt has this column"),
    ],
)
def test_what_would_be_left_out_is_said(tmp_path, words, what):
    prompts = write_prompts(tmp_path / "prompts.jsonl", answer=str)
    result = run(save(tmp_path / "a", 0), "--prompts", prompts, "--samples", 1, "--max-new-tokens", 2, *words)
    assert result.exit_code == 1
    assert what in " ".join(result.output.split())


def test_greedy_answers_are_drawn_once_and_missing_scores_have_their_reason(tmp_path):
    prompts, out = write_prompts(tmp_path / "prompts.jsonl", answer=str), tmp_path / "new folder" / "numbers.json"
    judge = "tests.evaluation.my_judges:not_of_one"
    words = ["--judge", judge, "--temperature", 0, "--max-new-tokens", 2, "--out", out]
    result = run(save(tmp_path / "a", 0), "--prompts", prompts, *words)
    assert result.exit_code == 0, result.output
    assert "1 samples without a score: raised: ValueError" in result.output
    facts = json.loads(out.read_text())
    assert (facts["sampling"]["samples"], facts["models"][0]["unscored"]) == (1, 1)


def test_a_later_model_that_is_not_there_ends_the_command_before_anything_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr("prefopt.evaluation.report.evaluate", None)
    prompts = write_prompts(tmp_path / "prompts.jsonl", answer=str)
    result = run(save(tmp_path / "a", 0), tmp_path / "none", "--prompts", prompts, "--judge", "number")
    assert result.exit_code == 1
    assert "no tokenizer can be loaded from" in result.output
