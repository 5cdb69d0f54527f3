"""Messages about columns that are missing or misnamed name the exact `--columns` to pass."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from datasets import Dataset

from prefopt.data import DataError, normalise, parse_columns


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            ["question", "response_j", "response_k"],
            r"question, response_j, response_k\..*--columns prompt=question chosen=response_j rejected=response_k\.$",
        ),
        (["prompt", "winner", "loser"], r"--columns chosen=winner rejected=loser\.$"),
        (["promt", "chosen", "rejeted"], r"--columns prompt=promt rejected=rejeted\.$"),
        (["instruction", "Response_Chosen", "rejected"], r"--columns prompt=instruction chosen=Response_Chosen\.$"),
        (["query", "answer", "thumbs_up"], r"--columns prompt=query completion=answer label=thumbs_up\.$"),
        (["conversations", "label"], r"--columns messages=conversations\.$"),
        (["question", "answer"], r"'question' and 'answer'.* no column looks like label.*supervised fine-tuning"),
        (["prompt", "chosen"], r"No column looks like rejected"),
        (["question", "answer_zh"], r"'question' looks like the prompt.*--columns prompt=question chosen=NAME"),
        (["prompt", "Good Answer", "bad_answer"], r"--columns 'chosen=Good Answer' rejected=bad_answer\.$"),
        (
            ["input", "preferred", "non_preferred"],
            r"--columns prompt=input chosen=preferred rejected=non_preferred\.$",
        ),
        (["chosen_messages", "rejected_messages"], r"--columns chosen=chosen_messages rejected=rejected_messages\.$"),
        (["chosen_talk", "rejectedTalk"], r"--columns chosen=chosen_talk rejected=rejectedTalk\.$"),
        (["message_id", "lang"], r"None of them looks like a needed one"),
        (["alpha", "omega"], r"None of them looks like a needed one"),
    ],
)
def test_missing_columns_get_the_mapping_to_pass(columns: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        normalise(Dataset.from_list([dict.fromkeys(columns, "text")]))


def test_aliases_are_never_taken_silently_but_the_mapping_works() -> None:
    rows = Dataset.from_list([{"question": "q", "response_j": "a", "response_k": "b", "score": 0.5}])
    mapping = {"prompt": "question", "chosen": "response_j", "rejected": "response_k"}
    assert normalise(rows, mapping)[0] == {"prompt": "q", "chosen": "a", "rejected": "b", "score": 0.5}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "row",
    [
        {"id": 1, "data": {"prompt": "q", "chosen": "a", "rejected": "b"}},
        {"id": 1, "data": json.dumps({"prompt": "q", "chosen": "a", "rejected": "b"})},
    ],
)
def test_fields_inside_a_column_are_suggested_and_taken(row: dict[str, Any], streaming: bool) -> None:
    rows: Any = Dataset.from_list([row])
    rows = rows.to_iterable_dataset() if streaming else rows
    with pytest.raises(DataError) as raised:
        normalise(rows)
    arguments = re.search(r"--columns (.*)\.$", str(raised.value))
    assert arguments is not None
    (read,) = normalise(rows, parse_columns(arguments[1]))
    assert (read["prompt"], read["chosen"], read["rejected"]) == ("q", "a", "b")


def test_items_of_lists_are_taken_and_a_field_that_is_not_there_is_named() -> None:
    rows = Dataset.from_list([{"prompt": "q", "chosen": ["a"], "rejected": ["b", "c"]}])
    assert normalise(rows, {"chosen": "chosen.0", "rejected": "rejected.1"})[0] == {
        "prompt": "q",
        "chosen": "a",
        "rejected": "c",
    }
    with pytest.raises(DataError, match=r"the dataset has no column 'chosen\.text'"):
        normalise(rows, {"chosen": "chosen.text"})


def test_what_else_the_rows_may_be_is_said() -> None:
    with pytest.raises(DataError, match=r"pass --format alpaca\.$"):
        normalise(Dataset.from_list([{"instruction": "q", "output": ["a", "b"]}]))
    with pytest.raises(DataError, match=r"If true in 'is_safe' .* --columns completion=response label=is_safe"):
        normalise(Dataset.from_list([{"prompt": "q", "response": "a", "is_safe": True}]))
    turns = [{"from": "human", "value": "How many legs?"}]
    with pytest.raises(DataError, match="--columns prompt=trajectory"):
        normalise(Dataset.from_list([{"trajectory": turns, "chosen": "a", "rejected": "b"}]))
