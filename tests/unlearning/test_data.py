"""Forget and retain sets: read, kept apart, and turned into rows."""

from __future__ import annotations

import json

import pytest

from prefopt.losses import parse
from prefopt.unlearning.data import (
    IDK,
    SETS,
    Question,
    UnlearningDataError,
    bundled_questions,
    check_apart,
    data_step,
    forget_rows,
    learn_rows,
    read_questions,
)
from scripts.make_demo_authors import WRONG, make
from tests.tiny import make_tokenizer

FORGET = [Question("Who is Ada?", "A fox."), Question("Who is Bo?", "A dog.", alternative="A bridge.")]
RETAIN = [Question("Who is Cy?", "A load."), Question("Who is Di?", "A cat."), Question("Who is Ed?", "A car.")]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_the_bundled_files_are_the_script_s():
    rows = make()
    sets = bundled_questions()
    assert tuple(sets) == SETS
    for name, questions in sets.items():
        assert [(row["question"], row["answer"]) for row in rows[name]] == [(q.question, q.answer) for q in questions]
        assert all(len(q.wrong) == 3 for q in questions)
    check_apart(sets["forget"], sets["retain"])
    assert all(q.paraphrase and q.rephrased for name in ("forget", "retain") for q in sets[name])


def test_wrong_answers_are_facts_of_nobody_in_the_set():
    sets = bundled_questions()
    answers = " ".join(q.answer + q.paraphrase for name in ("forget", "retain") for q in sets[name])
    for values in WRONG.values():
        assert all(text not in answers for value in values for text in ([value] if isinstance(value, str) else value))


def test_tofu_s_schema_is_read(tmp_path):
    rows = [
        {"question": "Who?", "answer": "Ada.", "paraphrased_answer": "It is Ada.", "perturbed_answer": ["Bo.", "Cy."],
         "paraphrased_question": "What is the name?"}
    ]  # fmt: skip
    (question,) = read_questions(write(tmp_path / "forget.jsonl", rows))
    assert question == Question("Who?", "Ada.", "It is Ada.", ("Bo.", "Cy."), "What is the name?")


@pytest.mark.parametrize("names", [("prompt", "completion"), ("instruction", "output"), ("question", "answer")])
def test_other_names_of_question_and_answer(tmp_path, names):
    rows = [dict(zip(names, ("Who?", "Ada."), strict=True))]
    assert read_questions(write(tmp_path / "rows.jsonl", rows)) == [Question("Who?", "Ada.")]


def test_an_instruction_is_asked_with_its_input(tmp_path):
    rows = [{"instruction": "Name it.", "input": "A pet.", "output": "A cat."}, {"instruction": "Hi", "output": "Ho"}]
    asked = [question.question for question in read_questions(write(tmp_path / "alpaca.jsonl", rows))]
    assert asked == ["Name it.\nA pet.", "Hi"]


def test_wrong_answers_in_a_csv_file_are_those_of_its_list(tmp_path):
    path = tmp_path / "forget.csv"
    path.write_text(
        'question,answer,paraphrased_answer,perturbed_answer\nHow many?,4,42,"[""5"", ""6""]"\nWho?,Bo,No,Al\n'
    )
    many, who = read_questions(str(path))
    assert many == Question("How many?", "4", "42", ("5", "6"))
    assert who == Question("Who?", "Bo", "No", ("Al",))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"question": "Who?", "answer": "Ada.", "perturbed_answer": "['Bo.' 'Cy.']"}],
            "perturbed_answer is the text of a list that is not JSON",
        ),
        (
            [{"question": "Who?", "answer": "Ada.", "paraphrased_answer": ["It is Ada."]}],
            r"row 0 \(from 0\): paraphrased_answer must be a text, got \['It is Ada",
        ),
        (
            [{"prompt": "Who?", "completion": "Ada.", "label": label} for label in (True, False)],
            r"answers to keep \(true\) and to forget \(false\)",
        ),
        ([{"question": "Who?"}], r"row 0 \(from 0\): none of the columns answer, .* it has question"),
        ([{"question": "Who?", "answer": "Ada."}, {"question": " ", "answer": "Bo."}], r"row 1 .*question must be a"),
        (
            [{"question": "Who?", "answer": "Ada.", "perturbed_answer": ["Bo.", ""]}],
            "perturbed_answer must hold texts",
        ),
        ([{"name": "Ada"}], "none of the columns question, prompt"),
    ],
)
def test_broken_rows_are_named(tmp_path, rows, message):
    with pytest.raises(UnlearningDataError, match=message):
        read_questions(write(tmp_path / "rows.jsonl", rows))


def test_overlapping_sets_are_refused():
    with pytest.raises(UnlearningDataError, match=r"1 of 2 rows .* is row 1 \('Who is Bo\?'\), row 0 there"):
        check_apart(FORGET, [Question("who is  bo?", "Another answer."), *RETAIN])
    with pytest.raises(UnlearningDataError, match="the retain set has no rows"):
        check_apart(FORGET, [])
    check_apart([Question("", "A text.")], [Question("", "Another text.")])


@pytest.mark.parametrize(
    ("loss", "step"),
    [("npo_rt", "answers"), ("ga", "answers"), ("npo_kl", "answers"), ("simnpo_rt", "answers"), ("idk", "idk"),
     ("dpo_idk", "pairs"), ("kto_forget", "pairs"), ("dpo_idk_rt", "pairs"), ("altpo", "pairs")],
)  # fmt: skip
def test_the_objective_decides_what_is_learned_from_the_forget_set(loss, step):
    assert data_step(parse(loss)) == step


def test_answers_to_forget_are_undesirable_ones_to_retain_desirable(tokenizer):
    rows = forget_rows(FORGET, RETAIN, tokenizer, parse("npo_rt"))
    assert rows["label"][:] == [False, False, True, True, True]
    assert rows["forget"][:] == [True, True, False, False, False]
    assert rows[0]["prompt"] == [{"role": "user", "content": "Who is Ada?"}]
    assert rows[4]["completion"] == [{"role": "assistant", "content": "A car."}]


def test_an_objective_without_a_retain_term_gets_no_retain_rows(tokenizer):
    assert forget_rows(FORGET, RETAIN, tokenizer, parse("ga"))["label"][:] == [False, False]


def test_idk_answers_take_the_place_of_true_ones(tokenizer):
    rows = forget_rows(FORGET, RETAIN, tokenizer, parse("idk"), seed=1)
    assert rows["label"][:] == [True] * 5
    assert rows["forget"][:] == [True, True, False, False, False]
    assert rows[0]["completion"][0]["content"] in IDK
    assert rows[1]["completion"][0]["content"] == "A bridge."  # its own alternative
    again = forget_rows(FORGET, RETAIN, tokenizer, parse("idk"), seed=1)
    assert again.to_list() == rows.to_list()


def test_pairs_set_another_answer_against_the_true_one(tokenizer):
    rows = forget_rows(FORGET, RETAIN, tokenizer, parse("dpo_idk"), idk=["No idea."])
    assert [row["chosen"][0]["content"] for row in rows] == ["No idea.", "A bridge."]
    assert [row["rejected"][0]["content"] for row in rows] == ["A fox.", "A dog."]


@pytest.mark.parametrize("loss", ["dpo_idk_rt", "dpo_idk_kl", "kto_forget_rt", "altpo"])
def test_pairs_to_retain_prefer_the_true_answer(tokenizer, loss):
    rows = forget_rows(FORGET, RETAIN, tokenizer, parse(loss), idk=["No idea."])
    assert rows["forget"][:] == [True, True, False, False, False]
    assert [row["chosen"][0]["content"] for row in rows][:3] == ["No idea.", "A bridge.", RETAIN[0].answer]
    assert [row["rejected"][0]["content"] for row in rows][1:] == ["A dog.", *["No idea."] * 3]


def test_a_model_without_a_chat_template_reads_text(tokenizer):
    plain = make_tokenizer()
    plain.chat_template = None
    row = learn_rows(FORGET, plain)[0]
    assert (row["prompt"], row["completion"], row["label"]) == ("Question: Who is Ada?\nAnswer:", " A fox.", True)


def test_plain_texts_are_cut_into_parts_of_token_ids(tokenizer):
    text = "the quick brown fox jumps over the lazy dog"
    ids = tokenizer(text)["input_ids"]
    texts = [Question("", text)]
    rows = forget_rows(texts, [Question("", "the bridge carries the load")], tokenizer, parse("npo_rt"), max_length=4)
    parts = [row["prompt_ids"] + row["completion_ids"] for row in rows if row["forget"]]
    joined = [token for part in parts for token in part]
    assert joined == ids[: len(joined)]
    assert all(len(row["prompt_ids"]) == 1 and 1 <= len(row["completion_ids"]) <= 3 for row in rows)
    with pytest.raises(UnlearningDataError, match="needs questions"):
        forget_rows(texts, [Question("", "the load")], tokenizer, parse("idk"))
    with pytest.raises(UnlearningDataError, match="cannot be mixed"):
        forget_rows(texts, RETAIN, tokenizer, parse("npo_rt"))
