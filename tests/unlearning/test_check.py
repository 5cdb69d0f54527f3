"""`prefopt check` on sets to forget and to retain."""

from __future__ import annotations

import json
from pathlib import Path

from datasets import Dataset, DatasetDict
from typer.testing import CliRunner

from prefopt.cli import app
from prefopt.unlearning.data import read_questions

ADA = {"question": "Who is Ada?", "answer": "A fox.", "perturbed_answer": ["A cat.", "A sun."]}
BO = {"question": "Who is Bo?", "answer": "A dog.", "perturbed_answer": ["A dog.", "A pen."]}
CY = {"question": "Who is Cy?", "answer": "A pen."}


def checked(folder: Path, *names: str, **sets: list[dict]) -> tuple[int, str]:
    """Exit status of a check of these sets, and what it printed, in one line."""
    for name, rows in sets.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    words = ["check", str(folder / "forget.jsonl")]
    words += ["--retain", str(folder / "retain.jsonl")] if "retain" in sets else []
    result = CliRunner().invoke(app, [*words, *names])
    return result.exit_code, " ".join(result.output.split())


def test_a_forget_set_alone(tmp_path):
    code, shown = checked(tmp_path, forget=[ADA, BO, ADA, CY])
    assert code == 0
    assert "1 rows were there before: a set should hold each question once (rows from 0: 2)" in shown
    assert "1 rows have no perturbed_answer" in shown
    assert "1 rows have a perturbed_answer that is the answer or its paraphrase" in shown
    assert "4 rows, 4 questions and 0 plain texts." in shown


def test_sets_that_overlap(tmp_path):
    code, shown = checked(tmp_path, forget=[ADA, BO], retain=[CY, {**ADA, "question": "who is  Ada?"}])
    assert code == 1
    assert "both: 1 rows of the forget set are in the retain set too" in shown


def test_options_for_preferences_are_refused_or_named(tmp_path):
    code, shown = checked(tmp_path, "--model", "m", "--loss", "npo", forget=[ADA], retain=[CY])
    assert (code, "--model and --loss would have no effect beside --retain" in shown) == (1, True)
    code, shown = checked(tmp_path, "--model", "m", "--max-length", "64", forget=[ADA])
    assert (code, "Not used for a set to forget or to retain: --model" in shown) == (0, True)


def test_questions_without_wrong_answers_need_no_retain_set_to_be_understood(tmp_path):
    code, shown = checked(tmp_path, forget=[CY])
    assert code == 0
    assert "Read as a set to forget or to retain. To train on its answers by likelihood: --loss sft" in shown
    assert "forget or retain: 1 rows have no perturbed_answer" in shown
    code, shown = checked(tmp_path, "--loss", "sft", forget=[CY])
    assert code == 1
    assert "--columns prompt=question completion=answer" in shown
    code, shown = checked(tmp_path, forget=[{"prompt": "Who?", "completion": "Cy."}])  # preferences without labels
    assert code == 1


def test_the_split_and_the_configuration_are_those_of_the_options(tmp_path, monkeypatch):
    parts = {name: Dataset.from_list(rows) for name, rows in (("train", [ADA, BO]), ("validation", [ADA]))}
    DatasetDict(parts).save_to_disk(str(tmp_path / "forget.jsonl"))
    assert "2 rows, 2 questions" in checked(tmp_path)[1]
    assert "1 rows, 1 questions" in checked(tmp_path, "--split", "validation")[1]
    DatasetDict(parts).save_to_disk(str(tmp_path / "retain.jsonl"))
    shown = checked(tmp_path, "--split", "validation", "--retain", str(tmp_path / "retain.jsonl"))[1]
    assert "both: 1 rows" in shown
    asked = []
    monkeypatch.setattr(
        "prefopt.unlearning.data.load_preferences",
        lambda path, text_columns, **of: asked.append((path, of)) or [],
    )
    read_questions("someone/set", "news", "test")
    read_questions("someone/set:raw:forget", "news", "test")  # the name's own
    assert asked == [
        ("someone/set", {"config": "news", "split": "test"}),
        ("someone/set", {"config": "raw", "split": "forget"}),
    ]


def test_plain_texts(tmp_path):
    texts = [{"text": "Some text."}, {"text": "Another one."}]
    assert checked(tmp_path, forget=texts) == (0, "forget or retain: 2 rows, 0 questions and 2 plain texts.")
    code, shown = checked(tmp_path, forget=texts, retain=[CY])
    assert code == 1
    assert "both need one kind" in shown


def test_sets_without_a_problem(tmp_path):
    code, shown = checked(tmp_path, forget=[ADA], retain=[{**CY, "perturbed_answer": ["A sun.", "A cat."]}])
    assert (code, shown) == (
        0, "forget: 1 rows, 1 questions and 0 plain texts. retain: 1 rows, 1 questions and 0 plain texts."
    )  # fmt: skip
