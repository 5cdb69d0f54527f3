"""`prefopt report` and `prefopt compare` on the command line."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from prefopt.cli import app
from tests.report.folders import write, write_run


def call(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_report_writes_a_page_into_each_folder(tmp_path):
    runs = [write_run(tmp_path / name) for name in "ab"]
    result = call("report", *runs)
    assert result.exit_code == 0
    assert all(f"Wrote {run / 'report.html'}" in result.output.replace("\n", "") for run in runs)


def test_report_examines_a_run_that_stores_no_findings(tmp_path):
    """A run of TRL whose chosen log-ratio falls without end."""
    lines = [
        {"step": s, "loss": 0.5, "rewards/chosen": -2.0 * s, "rewards/rejected": -6.0 * s, "rewards/margins": 4.0 * s,
         "rewards/accuracies": 1.0, "logps/chosen": -50.0 - 20 * s, "logps/rejected": -60.0 - 60 * s}
        for s in range(1, 13)
    ]  # fmt: skip
    write(tmp_path / "checkpoint-12", "trainer_state.json", {"log_history": lines, "max_steps": 12})
    assert call("report", tmp_path, "--beta", "0.1").exit_code == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert '<div class="finding serious">' in page


def test_compare_says_which_run_is_better(tmp_path):
    runs = [write_run(tmp_path / f"{loss}{seed}", loss, seed, rate) for loss, rate in (("dpo", 1), ("ipo", 0.1))
            for seed in (0, 1, 2)]  # fmt: skip
    result = call("compare", *runs, "--out", tmp_path / "out")
    assert "It is better than ipo" in result.output
    assert sorted(file.name for file in (tmp_path / "out").iterdir())[:2] == ["compare.html", "compare.json"]


def test_wrong_options_are_named(tmp_path):
    runs = [write_run(tmp_path / name) for name in "ab"]
    assert "--beta must be above 0" in call("report", runs[0], "--beta", "0").output
    assert "--out names one file" in call("report", *runs, "--out", tmp_path / "x.html").output
    assert "at least two runs" in call("compare", runs[0]).output
    assert "there is no such folder" in call("report", tmp_path / "missing").output


def test_a_page_goes_into_a_new_or_an_existing_folder(tmp_path):
    run = write_run(tmp_path / "run")
    assert call("report", run, "--out", tmp_path / "new" / "page.html").exit_code == 0
    assert (tmp_path / "new" / "page.html").is_file()
    assert call("report", run, "--out", tmp_path / "new").exit_code == 0
    data = tmp_path / "pairs.jsonl"
    data.write_text("{}")
    assert "another kind of file" in call("report", run, "--out", data).output
    assert data.read_text() == "{}"
    assert (tmp_path / "new" / "report.html").is_file()


@pytest.mark.parametrize("content", ['{"before": {"eval_', "[1, 2]", '{"before": 3}'])
def test_a_broken_evaluation_before_training_does_not_end_the_page(tmp_path, content):
    run = write_run(tmp_path / "run")
    (run / "before.json").write_text(content, encoding="utf-8")
    assert call("report", run).exit_code == 0
    result = call("health", run)
    if content.endswith("eval_"):
        assert "before.json cannot be read (without it, the log alone is examined)" in " ".join(result.output.split())
    else:
        assert result.exit_code == 0
