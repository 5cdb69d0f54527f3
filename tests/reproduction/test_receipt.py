"""Receipts and pages."""

from __future__ import annotations

import dataclasses
import json

import pytest
from typer.testing import CliRunner

from prefopt.cli import app
from prefopt.reproduction import paper as papers
from prefopt.reproduction import receipt as receipts
from prefopt.reproduction.pages import summary, text, write_pages
from prefopt.reproduction.run import reproduce
from prefopt.safety.errors import UsageError
from tests.reproduction.conftest import PACKAGE


@pytest.fixture
def ran(paper, tmp_path, monkeypatch):
    """A run with its receipt."""
    monkeypatch.setattr(receipts, "select", lambda names: [paper])
    out = tmp_path / "first"
    reproduce([paper], out, package=PACKAGE)
    return receipts.write_receipt(receipts.receipt_of([paper], False, 1, out), out)


def test_a_receipt_names_code_rows_model_and_environment(ran):
    content = json.loads(ran.read_text(encoding="utf-8"))
    entry = content["experiments"]["quick.first"]
    assert {"code", "rows", "model", "environment", "outcomes"} <= set(entry)
    assert entry["environment"]["threads"] == "1"
    assert entry["outcomes"]["drawn"]["measured"].startswith("drawn 0.")


def test_repeated_every_outcome_is_the_same(ran, tmp_path):
    lines, same = receipts.repeat(ran, tmp_path / "second", package=PACKAGE)
    assert (lines, same) == ([], True)


def test_what_differs_is_said(ran, tmp_path):
    content = json.loads(ran.read_text(encoding="utf-8"))
    first = content["experiments"]["quick.first"]
    first["outcomes"]["drawn"] = {"measured": "drawn 7", "hash": "0"}
    first["code"], first["rows"], first["environment"]["torch"] = "0", {"rows.jsonl": "0"}, "0.1"
    ran.write_text(json.dumps(content), encoding="utf-8")
    lines, same = receipts.repeat(ran, tmp_path / "second", package=PACKAGE)
    assert not same
    assert lines[0].startswith("torch: 0.1 then, ")
    assert "quick.first: its code differs" in lines
    assert "quick.first: rows.jsonl differs" in lines
    assert any(line.startswith("quick.first, drawn: then drawn 7; now drawn 0.") for line in lines)


def test_the_folder_of_the_receipt_is_not_repeated_into(ran):
    with pytest.raises(UsageError, match="Pass --out"):
        receipts.repeat(ran, ran.parent, package=PACKAGE)


@pytest.mark.parametrize("content", ["{", "[]", "3", '{"schema": 1}', '{"papers": []}'])
def test_what_is_not_a_receipt_is_refused(tmp_path, content):
    file = tmp_path / "receipt.json"
    file.write_text(content)
    with pytest.raises(UsageError, match="not a receipt"):
        receipts.read_receipt(file)


@pytest.mark.parametrize("change", [{"experiments": {"x": 1}}, {"experiments": []}, {"machine": 3}, {"more": 1}])
def test_a_receipt_that_was_changed_is_refused_before_anything_runs(ran, change):
    content = json.loads(ran.read_text(encoding="utf-8")) | change
    ran.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UsageError, match="parts of it are missing or changed"):
        receipts.read_receipt(ran)


def test_a_receipt_of_another_form_is_refused(ran):
    content = json.loads(ran.read_text(encoding="utf-8")) | {"schema": 99}
    ran.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UsageError, match="form 99"):
        receipts.read_receipt(ran)


# ---- pages ----------------------------------------------------------------------------------------------------------


def test_pages_have_a_row_a_claim_and_a_picture(paper, tmp_path):
    paper = dataclasses.replace(paper, claims=paper.claims[:4])
    results = reproduce([paper], tmp_path, package=PACKAGE)
    files = write_pages([paper], results, tmp_path, ["`a command`"])
    table, page, picture = (file.read_bytes() for file in files)
    assert b"- `a command`\n- 4 claims: 1 hold, 1 hold partly, 1 do not hold, 1 ended in an error." in table
    assert table.count(b"about ") == 4
    assert b"**does not hold**" in table
    assert b"![about drawn](stand_in_drawn.png)" in page
    assert b"prefopt train" in page
    assert picture.startswith(b"\x89PNG")


def test_text_cannot_break_a_table():
    assert text("a < b_c * d") == r"a &lt; b\_c \* d"


def test_summary_counts_in_words(paper, tmp_path):
    results = reproduce([paper], tmp_path, package=PACKAGE)
    assert summary(results[:3]) == "1 hold, 1 hold partly, 1 do not hold"


# ---- the command ----------------------------------------------------------------------------------------------------


def invoke(*words: object):
    return CliRunner().invoke(app, ["reproduce", *map(str, words)])


def test_without_arguments_it_lists_papers_and_their_state(tmp_path):
    done = invoke("--out", tmp_path)
    assert done.exit_code == 0, done.output
    for paper in papers.read_papers():
        assert paper.name in done.output


def test_one_paper_is_run_and_written(tmp_path):
    done = invoke("config", "--quick", "--out", tmp_path)
    assert done.exit_code == 0, done.output
    assert "2 hold, 1 not run" in done.output
    assert "At full size: prefopt train" in done.output
    assert (tmp_path / "reproduction" / "config.md").is_file()
    again = invoke("--receipt", tmp_path / "receipt.json", "--out", tmp_path / "again")
    assert again.exit_code == 0, again.output
    assert "Every outcome is the same." in again.output


@pytest.mark.parametrize("words", [("--all", "hdpo"), ("hdpo", "--receipt", "r.json"), ("hdp",)])
def test_options_that_do_not_go_together_are_refused(words, tmp_path):
    done = invoke(*words, "--out", tmp_path)
    assert done.exit_code != 0
