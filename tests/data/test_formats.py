"""The layouts that other tools write are read as they are meant, and said; one reading too many is asked about."""

from __future__ import annotations

import json
from typing import Any

import pytest
from datasets import Dataset

from prefopt.data import DataError, normalise, validate
from prefopt.data.messages import without_nulls

Row = dict[str, Any]


def user(text: str) -> Row:
    return {"role": "user", "content": text}


def assistant(text: str) -> Row:
    return {"role": "assistant", "content": text}


PROMPT, A, B = [user("How many legs?")], [assistant("Eight.")], [assistant("Six.")]
SPOKEN = [{"from": "human", "value": "How many legs?"}]
EXPECTED = {"prompt": PROMPT, "chosen": A, "rejected": B}

RECOGNISED: dict[str, tuple[str, Row, Row]] = {
    "openai": (
        "openai",
        {"input": {"messages": PROMPT}, "preferred_output": A, "non_preferred_output": B},
        EXPECTED,
    ),
    "openai with tools": (
        "openai",
        {
            "input": {"messages": PROMPT, "tools": [{"type": "function"}]},
            "preferred_output": A,
            "non_preferred_output": B,
        },
        {**EXPECTED, "tools": [{"type": "function"}]},
    ),
    "sharegpt": (
        "sharegpt",
        {
            "conversations": SPOKEN,
            "chosen": {"from": "gpt", "value": "Eight."},
            "rejected": {"from": "gpt", "value": "Six."},
        },
        EXPECTED,
    ),
    "sharegpt, lists, system and tools": (
        "sharegpt",
        {
            "conversations": SPOKEN,
            "chosen": [{"from": "gpt", "value": "Eight."}],
            "rejected": [{"from": "gpt", "value": "Six."}],
            "system": "Be terse.",
            "tools": "[]",
        },
        {**EXPECTED, "prompt": [{"role": "system", "content": "Be terse."}, *PROMPT], "tools": "[]"},
    ),
    "axolotl": ("axolotl", {"messages": PROMPT, "chosen": A[0], "rejected": B[0]}, EXPECTED),
    "messages with two texts": ("axolotl", {"messages": PROMPT, "chosen": "Eight.", "rejected": "Six."}, EXPECTED),
    "swift, a text": ("swift", {"messages": [*PROMPT, *A], "rejected_response": "Six."}, EXPECTED),
    "swift, a message": ("swift", {"messages": [*PROMPT, *A], "rejected_response": B[0]}, EXPECTED),
    "swift, two conversations": (
        "swift",
        {"messages": [*PROMPT, *A], "rejected_messages": [*PROMPT, *B]},
        EXPECTED,
    ),
    "swift, query and response": (
        "swift",
        {"query": "How many legs?", "response": "Eight.", "rejected_response": "Six."},
        {"prompt": "How many legs?", "chosen": "Eight.", "rejected": "Six."},
    ),
}


def read(rows: list[Row], streaming: bool = False, **options: Any) -> tuple[list[Row], list[str]]:
    dataset = Dataset.from_list(rows)
    said: list[str] = []
    normalised = normalise(dataset.to_iterable_dataset() if streaming else dataset, say=said.append, **options)
    assert validate(normalised).ok
    return [without_nulls(dict(row)) for row in normalised], said


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", RECOGNISED)
def test_a_layout_with_one_reading_is_read_and_said(name: str, streaming: bool) -> None:
    layout, row, expected = RECOGNISED[name]
    rows, said = read([row], streaming)
    assert rows == [expected]
    assert len(said) == 1
    assert said[0].startswith(f"Read as {layout} (")
    assert read([row], format=layout)[0] == [expected]


def test_speakers_calls_and_observations_become_roles() -> None:
    talk = [
        {"from": "human", "value": "Weather?"},
        {"from": "function_call", "value": '{"name": "look", "arguments": {"where": "here"}}'},
        {"from": "observation", "value": "rain"},
    ]
    answer, call = (
        {"from": "gpt", "value": "Rain."},
        {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
    )
    ((row,), _) = read([{"conversations": talk, "chosen": answer, "rejected": call}])
    looked = {"type": "function", "function": {"name": "look", "arguments": '{"where": "here"}'}}
    assert row["prompt"] == [
        user("Weather?"),
        {"role": "assistant", "content": "", "tool_calls": [looked]},
        {"role": "tool", "content": "rain"},
    ]
    assert row["rejected"][0]["tool_calls"][0]["function"] == {"name": "f", "arguments": "{}"}


def test_messages_that_are_json_or_python_text_are_parsed_and_said() -> None:
    row = {"prompt": json.dumps(PROMPT), "chosen": str(A), "rejected": json.dumps(B[0])}
    rows, said = read([row])
    assert rows == [EXPECTED]
    assert said == ["Read as messages, from the JSON text that they are: prompt, chosen, rejected."]
    unpaired, _ = read([{"messages": json.dumps([*PROMPT, *A]), "label": True}])
    assert unpaired == [{"prompt": PROMPT, "completion": A, "label": True}]


@pytest.mark.parametrize(
    "text", ["[1, 2]", '{"role_of_x": 1}', "[see the role of x]", '[{"from": 1}]', "{'role': open('x')}"]
)
def test_other_text_in_brackets_stays_text(text: str) -> None:
    row = {"prompt": "Write a list.", "chosen": text, "rejected": "no"}
    assert read([row]) == ([row], [])


def test_a_broken_row_does_not_hide_the_layout() -> None:
    good = {"messages": PROMPT, "chosen": A[0], "rejected": B[0]}
    other = {**good, "messages": [user("How many arms?")]}
    dataset = normalise(Dataset.from_list([good, {**good, "rejected": None}, other]), say=lambda line: None)
    assert validate(dataset).counts() == {"null rejected": 1}


def test_an_unfit_format_says_what_it_needs() -> None:
    rows = Dataset.from_list([{"a": "x", "b": "y"}])
    with pytest.raises(DataError, match="--format openai is columns input, non_preferred_output, preferred_output"):
        normalise(rows, format="openai")
    with pytest.raises(DataError, match=r"'opnai' is not known. Did you mean 'openai'"):
        normalise(rows, format="opnai")


@pytest.mark.parametrize(
    ("layout", "row", "prompt"),
    [
        ("orca", {"question": "Legs?"}, "Legs?"),
        ("alpaca", {"instruction": "Count.", "input": "Legs"}, "Count.\nLegs"),
        ("alpaca", {"instruction": "Count.", "input": ""}, "Count."),
    ],
)
def test_a_named_layout_is_read(layout: str, row: Row, prompt: str) -> None:
    rows, _ = read([{**row, "chosen": "Eight.", "rejected": "Six."}], format=layout)
    assert rows == [{"prompt": prompt, "chosen": "Eight.", "rejected": "Six."}]


def test_two_outputs_in_a_list_are_better_and_worse() -> None:
    rows, _ = read([{"instruction": "Count.", "input": "", "output": ["Eight.", "Six."]}], format="alpaca")
    assert rows == [{"prompt": "Count.", "chosen": "Eight.", "rejected": "Six."}]


ANSWERED = [
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "5"},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "4"},
]
SHAREGPT = [{"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]} for m in ANSWERED]


@pytest.mark.parametrize(
    ("row", "options"),
    [
        ({"prompt": "2+2?", "completion": "4"}, {}),
        ({"messages": ANSWERED}, {}),
        ({"conversations": SHAREGPT}, {}),
        ({"instruction": "2+2?", "input": "", "output": "4"}, {"format": "alpaca"}),
        ({"question": "2+2?", "answer": "4"}, {"columns": {"prompt": "question", "completion": "answer"}}),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_answers_without_labels_are_desirable_if_no_label_is_needed(
    row: dict[str, Any], options: dict[str, Any], streaming: bool
) -> None:
    data: Any = Dataset.from_list([row] * 3)
    if streaming:
        data = data.to_iterable_dataset()
    with pytest.raises(DataError):
        normalise(data, **options)
    said: list[str] = []
    (first, *_) = normalise(data, **options, unlabelled=True, say=said.append)
    assert first["label"] is True
    answer = first["completion"]
    assert (answer if isinstance(answer, str) else answer[-1]["content"]) == "4"
    assert isinstance(answer, str) or len(first["prompt"]) == 3
    assert any("no label" in line and "desirable" in line for line in said)


def test_rows_with_labels_or_pairs_keep_them_if_no_label_is_needed() -> None:
    labelled = Dataset.from_list([{"prompt": "q", "completion": "a", "label": False}])
    assert normalise(labelled, unlabelled=True)[0] == labelled[0]
    pairs = Dataset.from_list([{"prompt": "q", "chosen": "a", "rejected": "b"}])
    assert normalise(pairs, unlabelled=True)[0] == pairs[0]
    with pytest.raises(DataError, match="--format alpaca"):
        normalise(Dataset.from_list([{"instruction": "q", "input": "", "output": "a"}]), unlabelled=True)
    with pytest.raises(DataError, match="--columns prompt=question completion=answer"):
        normalise(Dataset.from_list([{"question": "q", "answer": "a"}]), unlabelled=True)


@pytest.mark.parametrize("wanted", [True, False])
def test_llama_factorys_labels(wanted: bool) -> None:
    talk = Dataset.from_list([{"conversations": SHAREGPT, "kto_tag": wanted}])
    alpaca = Dataset.from_list([{"instruction": "2+2?", "input": "Now.", "output": "4", "kto_tag": wanted}])
    rows = normalise(talk)[0], normalise(alpaca, format="alpaca")[0]
    assert [row["label"] for row in rows] == [wanted, wanted]
    assert without_nulls(rows[0]["completion"]) == ANSWERED[-1:]
    assert rows[1]["prompt"] == "2+2?\nNow."
