import json

import pytest
from typer.testing import CliRunner

from prefopt.cli import app
from prefopt.evaluation.judgements import read_judgements

RULE = "prefopt.demo.rule:follows_rule"


def run(*words):
    return CliRunner().invoke(app, ["judge", *map(str, words)])


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_judges_write_a_file_and_a_summary(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": "2 + 2", "answer": "4"}])
    answers = ["It is 4.", "Sure! It is 4.", "It is 5."]
    samples = write(tmp_path / "samples.jsonl", [{"prompt": "2 + 2", "completion": answer} for answer in answers])
    out = tmp_path / "judgements.jsonl"
    result = run(samples, "--prompts", prompts, "--judge", "number", "--judge", RULE, "--out", out)
    assert result.exit_code == 0, result.output
    assert [(one.judge, one.score) for one in read_judgements(out)] == [
        *(("number", score) for score in (1, 1, 0)), *(("follows_rule", score) for score in (1, 0, 1)),
    ]  # fmt: skip
    assert "6 judgements of 3 samples of 1 prompts" in result.output
    assert "number and follows_rule order 0% of 3 pairs alike" in result.output
    assert (tmp_path / "cache" / "judgements" / "judgements.sqlite").exists()


def test_failures_are_shown_and_nothing_judged_is_an_error(tmp_path):
    samples = write(tmp_path / "samples.jsonl", [{"prompt": "p", "completion": "c"}])
    fails = "tests.evaluation.my_judges:with_row"
    result = run(samples, "--judge", fails, "--out", tmp_path / "j.jsonl", "--no-cache")
    assert result.exit_code == 1
    assert "with_row: 1 without a judgement: raised: UsageError" in result.output
    assert "nothing was judged" in result.output


def test_a_missing_column_is_named(tmp_path):
    samples = write(tmp_path / "samples.jsonl", [{"prompt": "p", "completion": "c"}])
    result = run(samples, "--judge", "number", "--out", tmp_path / "j.jsonl")
    assert result.exit_code == 1
    assert "Name the file of prompts that has it" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["--judge", RULE, "--tournament"], "--tournament says which samples are compared"),
        (["--judge", RULE, "--pairs", 2], "--pairs says which samples are compared"),
        (["--judge", f"{RULE},weight=2"], "weights count when pairs are made"),
        (["--judge", "json:no_such"], "json/__init__.py) has no function no_such"),
        (["--judge", "broken_judges:score"], "its module raises NameError: name 'undefined' is not defined"),
    ],
)
def test_options_without_effect_and_broken_modules_are_named(tmp_path, monkeypatch, words, what):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken_judges.py").write_text("undefined\n")
    samples = write(tmp_path / "samples.jsonl", [{"prompt": "p", "completion": "c"}])
    result = run(samples, "--out", tmp_path / "j.jsonl", "--no-cache", *words)
    assert result.exit_code == 1
    assert what in " ".join(result.output.split())
