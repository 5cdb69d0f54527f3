"""Rules about training pairs: each fires on rows made for it, names them, and is silent on others."""

from __future__ import annotations

import pytest
import trl
from datasets import Dataset
from transformers import PrinterCallback

from prefopt.analysis import HealthCallback
from prefopt.analysis.health import rows as rules
from prefopt.analysis.health.rows import examine_rows
from tests.analysis.health.test_callback import pairs
from tests.trainer.runs import make_trainer


def tokenized(count=50):
    return [{"prompt_ids": [1, row], "chosen_ids": [row, 2], "rejected_ids": [row, 3, 4]} for row in range(count)]


def swapped(row):
    return {**row, "chosen_ids": row["rejected_ids"], "rejected_ids": row["chosen_ids"]}


def examined(rows):
    return {finding.rule: finding for finding in examine_rows(Dataset.from_list(rows))}


def test_healthy_rows_have_no_findings():
    rows = tokenized()
    # The same prompt or the same answers in other pairs are no repetition.
    assert examined([*rows, {**rows[0], "chosen_ids": [9]}, {**rows[0], "prompt_ids": [9]}]) == {}


@pytest.mark.parametrize(("rule", "level", "extra"), [
    ("repeated_pairs", "note", lambda rows: rows[3]),
    ("opposed_pairs", "warning", lambda rows: swapped(rows[3])),
    ("dead_pairs", "warning", lambda rows: {**rows[3], "rejected_ids": rows[3]["chosen_ids"]}),
])  # fmt: skip
def test_a_rule_names_the_rows_made_for_it(rule, level, extra, monkeypatch):
    monkeypatch.setattr(rules, "AT_ONCE", 20)  # rows are compared across parts
    rows = tokenized()
    findings = examined([*rows, extra(rows)])
    assert list(findings) == [rule]
    assert (findings[rule].level, findings[rule].rows) == (level, (50,))
    assert "1 of 51 training pairs" in findings[rule].text
    assert findings[rule].text.endswith("row 50")


def test_a_few_repetitions_are_not_told_and_a_few_contradictions_are_a_note():
    rows = tokenized(300)
    assert examined([*rows, rows[3]]) == {}
    assert examined([*rows, swapped(rows[3])])["opposed_pairs"].level == "note"


def test_the_order_of_rows_is_that_of_the_set_as_it_is_trained_on():
    rows = Dataset.from_list([*tokenized(20), tokenized(20)[3]]).select([20, *range(20)])
    (finding,) = examine_rows(rows)
    assert finding.rows == (4,)


@pytest.mark.parametrize(
    "rows", [None, Dataset.from_list([{"completion_ids": [1]}]), Dataset.from_list(tokenized()).to_iterable_dataset()]
)
def test_other_rows_are_left_alone(rows):
    assert examine_rows(rows) == []


def test_a_trainer_of_trl_is_told_of_its_rows(tmp_path):
    data = pairs(40).to_dict()
    for name in data:
        data[name].append(data[{"chosen": "rejected", "rejected": "chosen"}.get(name, name)][7])
    lines: list[str] = []
    trainer = make_trainer(
        tmp_path, trainer=trl.DPOTrainer, config=trl.DPOConfig, train_dataset=Dataset.from_dict(data), max_steps=6
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(HealthCallback(say=lines.append))
    trainer.train()
    (line,) = lines
    assert line.startswith("Health: warning (opposed_pairs, step 0): 1 of 41 training pairs prefer the opposite")
    assert "row 40" in line
