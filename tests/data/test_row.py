"""What readers make of rows: messages that stayed text, dates, tools as a list of JSON texts."""

from __future__ import annotations

import datetime
import json
from typing import Any

import pytest

from prefopt.data import tokenize_row, validate
from tests.data.test_round_trip import TOOLS, calls, pair, shipped, user
from tests.data.test_validate import Rows
from tests.tiny import make_tokenizer

PLAIN = {"prompt": "Why?", "chosen": " So.", "rejected": " No."}
MESSAGES = [{"role": "assistant", "content": "So."}]


@pytest.mark.parametrize("text", [json.dumps(MESSAGES), str(MESSAGES), json.dumps(MESSAGES[0])])
@pytest.mark.parametrize("column", ["prompt", "chosen", "rejected"])
def test_messages_that_stayed_text_are_named(text: str, column: str) -> None:
    report = validate(Rows([PLAIN, {**PLAIN, column: text}]))
    assert {problem.kind: problem.rows for problem in report.problems} == {"wrong type: messages written as text": [1]}


@pytest.mark.parametrize("text", ['{"answer": 1}', "[1, 2]", '"quoted"', "{'role'}", "[]", '[{"role": 1}]'])
def test_json_that_is_no_messages_is_text(text: str) -> None:
    assert validate(Rows([{**PLAIN, "chosen": text}]), tokenizer=make_tokenizer()).counts() == {}


@pytest.mark.parametrize("date", [datetime.date(2024, 1, 2), datetime.datetime(2024, 1, 2, 3)])
def test_texts_that_became_dates_are_named(date: Any) -> None:
    assert "wrong type: date" in validate(Rows([{**PLAIN, "chosen": date}])).counts()
    row = pair([user("When?")], calls({"day": date}))
    report = validate(Rows([row]), tokenizer=make_tokenizer())
    assert report.counts() == {"wrong type: date": 1}
    assert "load_preferences" in report.message()


def test_tools_may_be_a_list_of_json_texts() -> None:
    row = pair([user("Weather?")], calls({"city": "Paris"}), tools=TOOLS)
    listed = {**row, "tools": [json.dumps(tool) for tool in TOOLS]}
    assert validate(Rows([listed]), tokenizer=shipped("qwen3")).counts() == {}
    assert tokenize_row(listed, shipped("qwen3")) == tokenize_row(row, shipped("qwen3"))


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"chosen": 42}, "The first such value: 42."),
        ({"chosen": ["So."]}, "--columns chosen=chosen.0 takes the first"),
        ({"weight": "0.5"}, "The first such value: '0.5'."),
    ],
)
def test_values_of_wrong_types_are_shown(more: dict[str, Any], told: str) -> None:
    assert told in validate(Rows([{**PLAIN, **more}])).message()
