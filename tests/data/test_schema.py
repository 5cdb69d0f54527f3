"""Every published format becomes a pair or an unpaired row; other columns travel along."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from trl.data_utils import extract_prompt as trl_extract_prompt

from prefopt.data import DataError, clean, kind, load_preferences, normalise, validate
from prefopt.data.prompts import extract_prompt
from prefopt.data.transcripts import UNPARSED

PUBLISHED = Path(__file__).parents[2].parent / "shared" / "data"


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


SKY = [user("What color is the sky?")]

CANONICAL = {"prompt": "q", "chosen": "a", "rejected": "b"}

PAIRS = {
    "canonical text": (
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
    ),
    "implicit text": (
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
        {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
    ),
    "implicit messages": (
        {"chosen": [*SKY, assistant("Blue.")], "rejected": [*SKY, assistant("Green.")]},
        {"prompt": SKY, "chosen": [assistant("Blue.")], "rejected": [assistant("Green.")]},
    ),
    "text prompt, message completions": (
        {"prompt": "Sky?", "chosen": [assistant("Blue.")], "rejected": [assistant("Green.")]},
        {"prompt": [user("Sky?")], "chosen": [assistant("Blue.")], "rejected": [assistant("Green.")]},
    ),
    "text prompt repeated in the messages": (
        {"prompt": "Sky?", "chosen": [user("Sky?"), assistant("Blue.")], "rejected": [user("Sky?"), assistant("No.")]},
        {"prompt": [user("Sky?")], "chosen": [assistant("Blue.")], "rejected": [assistant("No.")]},
    ),
    "message prompt repeated in the messages": (
        {"prompt": SKY, "chosen": [*SKY, assistant("Blue.")], "rejected": [*SKY, assistant("No.")]},
        {"prompt": SKY, "chosen": [assistant("Blue.")], "rejected": [assistant("No.")]},
    ),
    "message prompt, text completions": (
        {"prompt": SKY, "chosen": "Blue.", "rejected": "Green."},
        {"prompt": SKY, "chosen": [assistant("Blue.")], "rejected": [assistant("Green.")]},
    ),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", PAIRS)
def test_pair_formats(name: str, streaming: bool) -> None:
    given, expected = PAIRS[name]
    extra = {"weight": 0.5, "margin": 2.0}
    dataset = Dataset.from_list([{**given, **extra}])
    normalised = normalise(dataset.to_iterable_dataset() if streaming else dataset)
    assert kind(normalised) == "pair"
    assert list(normalised) == [{**expected, **extra}]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"prompt": "q", "completion": "a", "label": True}, {"prompt": "q", "completion": "a", "label": True}),
        ({"prompt": "q", "completion": "a", "label": 1}, {"prompt": "q", "completion": "a", "label": True}),
        (
            {"messages": [*SKY, assistant("Blue.")], "label": False},
            {"prompt": SKY, "completion": [assistant("Blue.")], "label": False},
        ),
        (
            {"prompt": "Sky?", "completion": [assistant("Blue.")], "label": True},
            {"prompt": [user("Sky?")], "completion": [assistant("Blue.")], "label": True},
        ),
    ],
)
def test_unpaired_formats(given: dict[str, Any], expected: dict[str, Any]) -> None:
    normalised = normalise(Dataset.from_list([given]))
    assert kind(normalised) == "unpaired"
    assert normalised[0] == expected


def test_tool_calls_and_tools_are_kept() -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}
    row = {
        "chosen": [*SKY, call],
        "rejected": [*SKY, assistant("No.")],
        "tools": "[]",
        "chat_template_kwargs": {"t": 1},
    }
    normalised = normalise(Dataset.from_list([row]))[0]
    assert normalised["chosen"][0]["tool_calls"] == call["tool_calls"]
    assert (normalised["tools"], normalised["chat_template_kwargs"]) == ("[]", {"t": 1})


def test_two_styles_in_one_pair_are_refused() -> None:
    with pytest.raises(DataError, match="'chosen' holds text and column 'rejected' holds messages"):
        normalise(Dataset.from_list([{"prompt": "q", "chosen": "a", "rejected": [assistant("b")]}]))


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ([*SKY, assistant("a")], [*SKY, assistant("b")]),
        ([*SKY, assistant("a")], [*SKY, assistant("a")]),
        ([*SKY, assistant("a"), user("c"), assistant("d")], [*SKY, assistant("a"), user("c"), assistant("e")]),
        ("The sky is blue.", "The sky is green."),
        ("Q: x\nA: yes", "Q: x\nA: no"),
    ],
)
def test_implicit_prompts_are_cut_as_trl_cuts_them(chosen: Any, rejected: Any) -> None:
    theirs = trl_extract_prompt({"chosen": chosen, "rejected": rejected})
    assert extract_prompt(chosen, rejected) == (theirs["prompt"], theirs["chosen"], theirs["rejected"])


def test_an_implicit_text_prompt_never_ends_inside_a_word() -> None:
    assert extract_prompt("The sky is blue", "The sky is black") == ("The sky is", " blue", " black")
    assert extract_prompt("blue", "black") == ("bl", "ue", "ack")  # one word only: nothing to go back to
    assert extract_prompt("", "") == ("", "", "")


def transcript(*turns: str) -> str:
    speakers = ("Human", "Assistant")
    return "".join(f"\n\n{speakers[number % 2]}: {turn}" for number, turn in enumerate(turns))


def test_transcripts_become_messages() -> None:
    rows = [
        {"chosen": transcript("Hi", "Hello\n\nthere"), "rejected": transcript("Hi", "Shoo")},
        {"chosen": transcript("Hi", "Hey", "Why?", "So."), "rejected": transcript("Hi", "Hey", "Why?", "No.")},
        {"chosen": transcript("Hi", "Hey", "Why?", "So."), "rejected": transcript("Hi", "Yo")},
    ]
    first, second, third = normalise(Dataset.from_list(rows))
    assert first == {
        "prompt": [user("Hi")],
        "chosen": [assistant("Hello\n\nthere")],
        "rejected": [assistant("Shoo")],
    }
    assert second["prompt"] == [user("Hi"), assistant("Hey"), user("Why?")]
    assert (second["chosen"], second["rejected"]) == ([assistant("So.")], [assistant("No.")])
    # They part before the last turn: everything from the first differing answer on is the completion.
    assert third["prompt"] == [user("Hi")]
    assert third["chosen"] == [assistant("Hey"), user("Why?"), assistant("So.")]


def test_transcripts_can_stay_the_text_they_are() -> None:
    pair = {"chosen": transcript("Hi", "Hello"), "rejected": transcript("Hi", "Shoo")}
    row = normalise(Dataset.from_list([pair]), transcripts=False)[0]
    assert row == {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " Hello", "rejected": " Shoo"}


def test_a_speaker_named_twice_makes_one_message() -> None:
    text = "\n\nHuman: Hi\n\nAssistant: One\n\nAssistant: Two\n\nHuman: And?\n\nAssistant: "
    row = normalise(Dataset.from_list([{"chosen": text + "x", "rejected": text + "y"}]))[0]
    assert row["prompt"] == [user("Hi"), assistant("One\n\nTwo"), user("And?")]


def test_unparseable_transcripts_are_reported_not_crashed() -> None:
    good = {"chosen": transcript("Hi", "Hello"), "rejected": transcript("Hi", "Go away")}
    bad = [
        {"chosen": transcript("Hi", "Hey", "left alone"), "rejected": transcript("Hi", "x")},  # ends with the human
        {"chosen": transcript("Hi", "a"), "rejected": transcript("Bye", "b")},  # different questions
        {"chosen": "no speakers", "rejected": transcript("Hi", "b")},
        {"chosen": None, "rejected": transcript("Hi", "b")},
    ]
    dataset = normalise(Dataset.from_list([good] * 5 + bad))
    assert dataset[7]["chosen"] == [{"role": UNPARSED, "content": "no speakers"}]
    report = validate(dataset)
    (problem,) = [problem for problem in report.problems if problem.kind == "unparseable transcript"]
    assert problem.rows == [5, 6, 7, 8]
    assert "Human" in problem.explanation
    with pytest.raises(DataError, match="unparseable transcript: 4 rows, first 5, 6, 7, 8"):
        clean(dataset, report)


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published sets are not beside this checkout")
def test_published_sets_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    harmless = normalise(load_preferences(str(PUBLISHED / "hh-harmless" / "part-a.jsonl.gz")))
    report = validate(harmless)
    assert (len(harmless), report.counts()) == (1156, {"empty chosen": 4})
    kept = clean(harmless, report, "drop", tmp_path / "dropped.jsonl")
    assert len(kept) == 1152
    feedback = normalise(load_preferences(str(PUBLISHED / "kto-demo" / "kto_en_demo.json")))
    assert (kind(feedback), len(feedback), validate(feedback).ok) == ("unpaired", 300, True)
    mapping = {"prompt": "question", "chosen": "response_j", "rejected": "response_k"}
    name = str(PUBLISHED / "stack-exchange-tiny" / "stack_exchange_paired_tiny.json")
    exchange = normalise(load_preferences(name, columns=mapping))
    assert (kind(exchange), len(exchange), validate(exchange).ok) == ("pair", 25, True)


PLAIN_PAIR = {"prompt": "Say hi.", "chosen": "Hi.", "rejected": "No."}
CHAT_PAIR = {"prompt": [user("Say hi.")], "chosen": [assistant("Hi.")], "rejected": [assistant("No.")]}
GROUP = {"prompt": "Say hi.", "completions": ["Hi.", "No."], "scores": [2.0, 1.0]}


@pytest.mark.parametrize("form", ["numpy", "torch", "pandas", "arrow"])
@pytest.mark.parametrize("row", [PLAIN_PAIR, CHAT_PAIR, GROUP, {"prompt": "Hi", "completion": "Ho", "label": True}])
def test_rows_of_arrays_are_read_as_lists(row, form):
    assert list(normalise(Dataset.from_list([row]).with_format(form))) == [row]


@pytest.mark.parametrize("as_list", [tuple, lambda messages: np.array(messages, dtype=object)])
def test_a_generator_of_arrays_or_tuples_is_read_as_lists(as_list):
    rows = [{name: as_list(messages) for name, messages in CHAT_PAIR.items()}]
    assert list(normalise(IterableDataset.from_generator(lambda: iter(rows)))) == [CHAT_PAIR]
    labelled = {"prompt": "Hi", "completion": np.str_("Ho"), "label": np.bool_(True)}
    stream = normalise(IterableDataset.from_generator(lambda: iter([labelled])))
    assert [type(value) for value in next(iter(stream)).values()] == [str, str, bool]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            DatasetDict(train=Dataset.from_list([PLAIN_PAIR])),
            r"several data sets: 'train'\. Pass one, as dataset\[NAME\]",
        ),
        ([PLAIN_PAIR], r"not a list\. Dataset\.from_list"),
    ],
)
def test_what_is_not_one_data_set_is_refused(data, message):
    with pytest.raises(DataError, match=message):
        normalise(data)
