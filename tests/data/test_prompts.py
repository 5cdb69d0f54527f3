"""No prompt is cut out of answers: what is not clear is asked about, with an option that works when copied."""

from __future__ import annotations

import re
from typing import Any

import pytest
from datasets import Dataset

from prefopt import PreferenceConfig, PreferenceTrainer
from prefopt.data import DataError, normalise, parse_columns, validate
from prefopt.data.prompts import refuse_to_guess
from tests.tiny import make_model, make_tokenizer

Row = dict[str, Any]

SPIDER = {"chosen": "The answer is eight legs.", "rejected": "The answer is six legs."}
PRIME = {"chosen": "The answer is 13.", "rejected": "It is 12."}


def silent(line: str) -> None:
    pass


def both(name: str, **more: str) -> Dataset:
    questions = ("How many legs has a spider?", "Name a prime number above 10.")
    return Dataset.from_list([{name: q, **pair, **more} for q, pair in zip(questions, (SPIDER, PRIME), strict=True)])


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("transcripts", [False, True])
@pytest.mark.parametrize("name", ["question", "instruction", "input", "query", "problem", "Request", "what_was_asked"])
def test_a_column_that_looks_like_the_prompt_is_asked_about(name: str, transcripts: bool, streaming: bool) -> None:
    rows: Any = both(name)
    rows = rows.to_iterable_dataset() if streaming else rows
    with pytest.raises(DataError, match=f"column '{name}' looks like it.*--columns prompt={name}") as raised:
        normalise(rows, transcripts=transcripts)
    (words,) = re.findall(r"--columns (.*?)\. ", str(raised.value))
    read = list(normalise(rows, parse_columns(words), transcripts=transcripts, say=silent))
    assert [row["prompt"] for row in read] == ["How many legs has a spider?", "Name a prime number above 10."]
    assert read[0]["chosen"] == SPIDER["chosen"]


def test_the_line_to_pass_names_system_and_input_too() -> None:
    rows = both("instruction", system="You are terse.", input="Think.")
    with pytest.raises(DataError, match=r"--columns prompt=instruction input=input system=system\. ") as raised:
        normalise(rows)
    (words,) = re.findall(r"--columns (.*?)\. ", str(raised.value))
    row = normalise(rows, parse_columns(words))[0]
    assert row["prompt"] == [
        {"role": "system", "content": "You are terse."},
        {"role": "user", "content": "How many legs has a spider?\nThink."},
    ]
    assert row["chosen"] == [{"role": "assistant", "content": SPIDER["chosen"]}]
    # A column that is there and empty is not worth a word.
    with pytest.raises(DataError, match=r"--columns prompt=instruction\. "):
        normalise(both("instruction", system="", input=""))


def test_answers_as_messages_are_asked_about_too() -> None:
    row = {"question": "Legs?", "chosen": [{"role": "assistant", "content": "8"}]}
    row["rejected"] = [{"role": "assistant", "content": "6"}]
    with pytest.raises(DataError, match="--columns prompt=question"):
        normalise(Dataset.from_list([row]))
    assert normalise(Dataset.from_list([row]), {"prompt": "question"})[0]["prompt"] == [
        {"role": "user", "content": "Legs?"}
    ]


def test_answers_without_any_prompt_are_refused() -> None:
    with pytest.raises(
        DataError, match=r"'The answer is 13\.' and 'It is 12\.'.*look like answers without their prompts"
    ):
        normalise(Dataset.from_list([SPIDER, PRIME]))
    # One phrase that all answers begin with is no prompt.
    same = [{"chosen": f"The answer is {n}.", "rejected": f"The answer is {n + 1}."} for n in range(4)]
    with pytest.raises(DataError, match="look like answers without their prompts"):
        normalise(Dataset.from_list(same))
    assert normalise(Dataset.from_list(same), format="implicit")[0]["prompt"] == "The answer is"


IMPLICIT: list[Row] = [
    {"chosen": "The sky is blue.", "rejected": "The sky is green."},
    {"chosen": "Grass is green.", "rejected": "Grass is red."},
    {"chosen": "Question: Legs?\nAnswer: Eight.", "rejected": "Question: Legs?\nAnswer: Six."},
    {"chosen": "猫喜欢什么？鱼。", "rejected": "猫喜欢什么？草。"},
]


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"source": "a web page of many words", "id": "a1"},
        {"explanation": "blue is what people see by day"},
        {"category": "nature", "chosen_model": "x"},
    ],
)
def test_prompts_in_front_of_both_texts_are_cut_as_before(more: Row) -> None:
    rows = normalise(Dataset.from_list([{**row, **more} for row in IMPLICIT]), say=silent)
    assert [row["prompt"] for row in rows] == ["The sky is", "Grass is", "Question: Legs?\nAnswer:", "猫喜欢什么？"]


def test_a_question_that_both_texts_repeat_is_no_reason_to_ask() -> None:
    rows = [{"question": "Legs?", "chosen": "Legs? Eight.", "rejected": "Legs? Six."}]
    assert normalise(Dataset.from_list(rows))[0]["prompt"] == "Legs?"
    talk = [{"role": "user", "content": "Legs?"}]
    whole = {side: [*talk, {"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    assert normalise(Dataset.from_list([{"instruction": "Legs?", **whole}]))[0]["prompt"] == talk


def test_a_prompt_beside_other_conversations_is_not_thrown_away() -> None:
    whole = {
        side: [{"role": "user", "content": "Legs?"}, {"role": "assistant", "content": side}]
        for side in ("chosen", "rejected")
    }
    with pytest.raises(DataError, match=r"'You are terse.' beside 'Legs\?'.*--columns system=prompt"):
        normalise(Dataset.from_list([{"prompt": "You are terse.", **whole}]))
    read = normalise(Dataset.from_list([{"prompt": "You are terse.", **whole}]), {"system": "prompt"})[0]
    assert [message["role"] for message in read["prompt"]] == ["system", "user"]
    assert normalise(Dataset.from_list([{"prompt": "Legs? ", **whole}]))[0]["chosen"] == whole["chosen"][1:]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("Human: How many legs?", [{"role": "user", "content": "How many legs?"}]),
        ("\n\nHuman: How many legs?\n\nAssistant:", [{"role": "user", "content": "How many legs?"}]),
        ("How many legs?", [{"role": "user", "content": "How many legs?"}]),
    ],
)
def test_a_prompt_beside_answers_with_speakers_is_used(prompt: str, expected: list[Row]) -> None:
    row = {"prompt": prompt, "chosen": "Assistant: Eight.", "rejected": "Assistant: Six."}
    dataset = normalise(Dataset.from_list([row]))
    assert validate(dataset).ok
    assert dataset[0] == {
        "prompt": expected,
        "chosen": [{"role": "assistant", "content": "Eight."}],
        "rejected": [{"role": "assistant", "content": "Six."}],
    }


def test_a_prompt_that_transcripts_do_not_repeat_is_named() -> None:
    row = {side: f"\n\nHuman: Legs?\n\nAssistant: {side}" for side in ("chosen", "rejected")}
    assert normalise(Dataset.from_list([{"prompt": "\n\nHuman: Legs?", **row}]))[0]["prompt"][0]["content"] == "Legs?"
    with pytest.raises(DataError, match=r"column 'prompt' says something else: 'Arms\?'.*--columns unused=prompt"):
        normalise(Dataset.from_list([{"prompt": "Arms?", **row}]))
    assert len(normalise(Dataset.from_list([{"prompt": "Arms?", **row}]), {"unused": "prompt"})) == 1
    mostly = [{"prompt": "Legs?", **row}, {"prompt": "Legs?", **row}, {"prompt": "Arms?", **row}]
    assert validate(normalise(Dataset.from_list(mostly))).counts()["unparseable transcript"] == 1


def test_answers_of_a_speaker_without_a_prompt_are_refused() -> None:
    rows = [{"chosen": f"Assistant: {n}", "rejected": f"Assistant: {n + 1}"} for n in range(5)]
    for transcripts in (True, False):
        with pytest.raises(DataError, match="answers without their prompts"):
            normalise(Dataset.from_list(rows), transcripts=transcripts)


def test_a_second_system_message_is_refused() -> None:
    row = {
        "system": "Be terse.",
        "prompt": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "q"}],
        "chosen": [{"role": "assistant", "content": "a"}],
        "rejected": [{"role": "assistant", "content": "b"}],
    }
    with pytest.raises(DataError, match=r"has a system message already, 'Be kind.', beside 'Be terse.'"):
        normalise(Dataset.from_list([row]), {"system": "system"})
    same = normalise(Dataset.from_list([{**row, "system": "Be kind."}]), {"system": "system"})[0]
    assert same["prompt"] == row["prompt"]


def test_the_trainer_asks_as_well(tmp_path: Any) -> None:
    args = PreferenceConfig(str(tmp_path), loss="dpo", max_steps=1, report_to="none", use_cpu=True)
    data, tokenizer = both("question"), make_tokenizer()
    with pytest.raises(DataError, match="--columns prompt=question"):
        PreferenceTrainer(
            make_model(), ref_model=make_model(), args=args, train_dataset=data, processing_class=tokenizer
        )


def test_rows_that_trl_will_cut_are_looked_at_first() -> None:
    refuse_to_guess(Dataset.from_list(IMPLICIT))
    with pytest.raises(DataError, match="--columns prompt=question"):
        refuse_to_guess(both("question"))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "turns", [[["Hi.", "Hello."]], [{"role": "user", "content": "Hi."}, {"from": "gpt", "value": "Hello."}]]
)
def test_earlier_turns_go_in_front_of_the_prompt(turns: list[Any], streaming: bool) -> None:
    data: Any = Dataset.from_list([{"prompt": "Legs?", "chosen": "Eight.", "rejected": "Six.", "history": turns}])
    said: list[str] = []
    normalise(data, say=said.append)
    assert "--columns history=history puts its turns in front of the prompt" in said[0]
    data = data.to_iterable_dataset() if streaming else data
    (row,) = normalise(data, {"history": "history"})
    assert [(message["role"], message["content"]) for message in row["prompt"]] == [
        ("user", "Hi."),
        ("assistant", "Hello."),
        ("user", "Legs?"),
    ]
    assert row["rejected"] == [{"role": "assistant", "content": "Six."}]


def test_what_is_mapped_and_cannot_be_read_is_refused_not_left_out() -> None:
    row = {"prompt": "Legs?", "chosen": "Eight.", "rejected": "Six."}
    with pytest.raises(DataError, match=r"--columns history=\.\.\. instead"):
        normalise(Dataset.from_list([{**row, "history": [["Hi.", "Hello."]]}]), {"input": "history"})
    with pytest.raises(DataError, match=r"messages, or .question, answer. pairs"):
        normalise(Dataset.from_list([{**row, "history": "Hi."}]), {"history": "history"})


def test_layouts_take_their_turns_and_no_empty_ones() -> None:
    row = {"query": "Legs?", "response": "Eight.", "rejected_response": "Six."}
    turns = normalise(Dataset.from_list([{**row, "history": [["Hi.", "Hello."]]}]))[0]["prompt"]
    assert [message["content"] for message in turns] == ["Hi.", "Hello.", "Legs?"]
    assert normalise(Dataset.from_list([{**row, "history": []}]))[0]["prompt"] == "Legs?"
