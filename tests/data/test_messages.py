"""Messages written in other ways become lists of `role` and `content`; what cannot be read is a named row."""

from __future__ import annotations

import json
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, IterableDataset, List, Value

from prefopt.data import DataError, normalise, validate
from tests.tiny import make_tokenizer

Row = dict[str, Any]

ASKED = [{"role": "user", "content": "How many legs?"}]
ANSWERED = [{"role": "assistant", "content": "Eight.\nOr so."}]
DENIED = [{"role": "assistant", "content": "It's six."}]
PLAIN = {"prompt": ASKED, "chosen": ANSWERED, "rejected": DENIED}

WRITTEN: dict[str, Any] = {
    "other names of roles": lambda role, content: {
        "role": {"user": "human", "assistant": "gpt"}[role],
        "content": content,
    },
    "roles in capitals": lambda role, content: {"role": role.title(), "content": content},
    "role and value": lambda role, content: {"role": role, "value": content},
    "from and content": lambda role, content: {"from": role, "content": content},
    "from and value": lambda role, content: {"from": {"user": "prompter"}.get(role, "gpt"), "value": content},
}


def rows_of(row: Row, streaming: bool) -> Dataset | IterableDataset:
    data = Dataset.from_list([row])
    return data.to_iterable_dataset() if streaming else data


def texts(messages: Any) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in messages]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", WRITTEN)
def test_messages_written_in_other_ways(name: str, streaming: bool) -> None:
    row = {side: [WRITTEN[name](**message) for message in messages] for side, messages in PLAIN.items()}
    (read,) = normalise(rows_of(row, streaming))
    assert {side: texts(read[side]) for side in PLAIN} == {side: texts(PLAIN[side]) for side in PLAIN}


def test_messages_written_in_several_ways_in_one_list() -> None:
    prompt = [*ASKED, {"from": "gpt", "value": "Of what?"}, {"role": "user", "value": "A spider."}]
    (read,) = normalise(Dataset.from_list([{**PLAIN, "prompt": prompt}]))
    assert texts(read["prompt"])[1:] == [("assistant", "Of what?"), ("user", "A spider.")]


def test_tool_calls_stay_where_roles_are_renamed() -> None:
    call = {"type": "function", "function": {"name": "count", "arguments": "{}"}}
    answer = {"role": "Assistant", "content": None, "tool_calls": [call]}
    (read,) = normalise(Dataset.from_list([{**PLAIN, "chosen": [answer]}]))
    assert read["chosen"] == [{**answer, "role": "assistant"}]


@pytest.mark.parametrize("streaming", [False, True])
def test_objects_of_lists_are_messages(streaming: bool) -> None:
    kind = {"role": List(Value("string")), "content": List(Value("string"))}
    row = {
        side: {name: [message[name] for message in PLAIN[side]] for name in ("role", "content")}
        for side in ("chosen", "rejected")
    }
    data = Dataset.from_list(
        [{"prompt": "Legs?", **row}], Features({"prompt": Value("string"), "chosen": kind, "rejected": kind})
    )
    (read,) = normalise(data.to_iterable_dataset() if streaming else data)
    assert (texts(read["chosen"]), texts(read["rejected"])) == (texts(ANSWERED), texts(DENIED))


def test_text_of_a_numpy_array_of_messages_is_read() -> None:
    whole = {side: "[" + "\n ".join(map(str, ASKED + PLAIN[side])) + "]" for side in ("chosen", "rejected")}
    (read,) = normalise(Dataset.from_list([{"prompt": "How many legs?", **whole}]))
    assert read == PLAIN


def test_one_text_that_cannot_be_read_is_a_row_and_changes_no_other() -> None:
    written = {side: json.dumps(messages) for side, messages in PLAIN.items()}
    cut = {**written, "chosen": written["chosen"][:-4]}
    data = normalise(Dataset.from_list([written, cut, written]))
    assert data[0] == PLAIN
    (problem,) = [problem for problem in validate(data).problems if problem.severity == "error"]
    assert (problem.kind, problem.rows) == ("unreadable messages", [1])


def test_texts_that_all_are_cut_off_are_named() -> None:
    row = {"prompt": "Legs?", "chosen": json.dumps(ANSWERED)[:-4], "rejected": json.dumps(DENIED)[:-4]}
    assert validate(normalise(Dataset.from_list([row]))).counts() == {"messages read as text": 1}
    plain = {"prompt": "Legs?", "chosen": '{"name": "count", "value": 8}', "rejected": '[{"from": "Paris"}]'}
    assert validate(normalise(Dataset.from_list([plain]))).counts() == {}


def test_plain_text_among_conversations_is_noted() -> None:
    chat = [{"role": "user", "content": "Name a prime."}], ANSWERED, DENIED
    texts = "Name a city.", "Paris.", "France."
    rows = [dict(zip(PLAIN, values, strict=True)) for values in (chat, texts)]
    (note,) = validate(normalise(Dataset.from_list(rows, on_mixed_types="use_json")), tokenizer=make_tokenizer()).notes
    assert "in 1 of the 2 rows" in note


def labelled(label: Any, kind: Any) -> Dataset:
    features = Features({"prompt": Value("string"), "completion": Value("string"), "label": kind})
    return Dataset.from_list(
        [{"prompt": f"{n}?", "completion": "Yes.", "label": label[n]} for n in range(2)], features
    )


def test_one_missing_label_spoils_one_row() -> None:
    report = validate(normalise(labelled([1.0, None], Value("float64"))))
    assert {problem.kind: problem.rows for problem in report.problems} == {"wrong type: label": [1]}


def test_classes_of_labels_are_said_or_refused() -> None:
    said: list[Any] = []
    normalise(labelled([0, 1], ClassLabel(names=["bad", "good"])), say=said.append)
    assert "1 ('good') is read as true" in said[0]
    with pytest.raises(DataError, match="0 = 'good', 1 = 'bad'"):
        normalise(labelled([0, 1], ClassLabel(names=["good", "bad"])))


def test_a_label_beside_a_pair_is_no_label() -> None:
    rows = [{"prompt": f"{n}?", "chosen": "Yes.", "rejected": "No.", "label": 1} for n in range(2)]
    assert validate(normalise(Dataset.from_list(rows))).notes == []


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("answering", "write"), [
    ("assistant", lambda content: {"text": content}),
    ("model", lambda content: {"parts": [{"text": content}]}),
])  # fmt: skip
def test_messages_whose_text_is_in_another_field_are_not_called_empty(
    answering: str, write: Any, streaming: bool
) -> None:
    sides = {"prompt": ("user", "Legs?"), "chosen": (answering, "Eight."), "rejected": (answering, "Six.")}
    row = {name: [{"role": role, **write(content)}] for name, (role, content) in sides.items()}
    report = validate(normalise(rows_of(row, streaming)))
    assert report.counts() == {f"wrong type: {name}": 1 for name in sides}
    assert "'Legs?'" in report.message()
