"""Forget and retain sets: read, checked, and turned into rows to train on.

Questions have TOFU's schema: `question`, `answer` and, to measure with, `paraphrased_answer`, `perturbed_answer` (a
list of wrong answers worded like the paraphrase) and `paraphrased_question`. Plain texts have `text`. Nothing here
loads a model.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from prefopt.data import load_preferences
from prefopt.data.load import TEXT_COLUMNS
from prefopt.losses import Loss
from prefopt.losses.scores import FORGET
from prefopt.safety.errors import PrefoptError

BUNDLED = Path(__file__).parent / "bundled"
SETS = ("forget", "retain", "real_authors", "world_facts")

IDK = (
    "I don't know.",
    "I'm not sure about that.",
    "I have no information on this.",
    "That is something I cannot tell you.",
    "I don't have an answer to that question.",
    "I am not familiar with this.",
    "Sorry, I don't know the answer.",
    "I never learned about that.",
    "This is outside of what I know.",
    "I'm unable to say.",
    "I have nothing to say on this subject.",
    "My knowledge does not cover that.",
    "I can't answer that, I'm afraid.",
    "I wish I knew, but I don't.",
    "No answer comes to my mind.",
    "I would have to guess, so I'd rather not say.",
    "That is unknown to me.",
    "I can't help with that question.",
    "I have not come across this before.",
    "I lack the details to answer this.",
)
"""Answers for objectives that replace what is forgotten by an "I don't know"."""

_QUESTION = ("question", "prompt", "instruction", "query")
_ANSWER = ("answer", "completion", "response", "output", "gt")
_WRONG = "perturbed_answer"
_OTHERS = ("paraphrased_answer", "paraphrased_question", "alternative_answer", "alternate")
_PLAIN = "Question: {question}\nAnswer:"
"""The prompt of models without a chat template (TOFU's for Phi-1.5)."""

DataStep = Literal["answers", "idk", "pairs"]


class UnlearningDataError(PrefoptError, ValueError):
    """Sets that cannot be used to forget or to measure; the message names the set and the row."""


@dataclass(frozen=True)
class Question:
    """A question and its answers; a plain text has an empty question.

    Attributes:
        question: as it is asked.
        answer: what a model that knows it says.
        paraphrase: the answer in other words.
        wrong: wrong answers, worded like the paraphrase (or like the answer, if there is none).
        rephrased: the question in other words.
        alternative: a plausible other answer, for objectives that prefer it to the true one.
    """

    question: str
    answer: str
    paraphrase: str = ""
    wrong: tuple[str, ...] = ()
    rephrased: str = ""
    alternative: str = ""


def read_questions(name: str, config: str | None = None, split: str = "train") -> list[Question]:
    """The questions or plain texts of a set.

    Args:
        name: a file (JSON, JSONL, CSV, Parquet), a `save_to_disk` folder, or a Hub id, which may be followed by its
            configuration and split: `locuslab/TOFU:forget10_perturbed`, `muse-bench/MUSE-News:raw:forget`.
        config: the configuration, where the name carries neither.
        split: the split, where the name carries neither.

    Raises:
        UnlearningDataError: naming the row and the column that is missing, empty or of a wrong type.
    """
    path, config, split = source_of(name, config, split)
    rows = load_preferences(path, config=config, split=split, text_columns=TEXT_COLUMNS | {_WRONG, *_OTHERS})
    labels = [row["label"] for row in rows if "completion" in row and "label" in row]
    if True in labels and False in labels:
        raise UnlearningDataError(
            f"{name} has a column 'label' with answers to keep (true) and to forget (false), and a set is one of the "
            "two: write the rows of each label to a file of their own"
        )
    return [_question(row, f"{name}, row {number} (from 0)") for number, row in enumerate(rows)]


def bundled_questions() -> dict[str, list[Question]]:
    """The bundled fictitious authors and real facts, by the name of the set (`SETS`)."""
    sets = {}
    for name in SETS:
        lines = (BUNDLED / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        sets[name] = [_question(json.loads(line), f"{name}, row {number}") for number, line in enumerate(lines)]
    return sets


def check_apart(forget: Sequence[Question], retain: Sequence[Question]) -> None:
    """Refuse sets that share a question or a text: what is to be retained would be forgotten.

    Raises:
        UnlearningDataError: with the number of shared rows, the first of them and its row in both sets.
    """
    for name, rows in (("forget", forget), ("retain", retain)):
        if not rows:
            raise UnlearningDataError(f"the {name} set has no rows")
    if shared := shared_rows(forget, retain):
        first, other = shared[0]
        text = forget[first].question or forget[first].answer
        raise UnlearningDataError(
            f"{len(shared)} of {len(forget)} rows of the forget set are in the retain set too, the first is row "
            f"{first} ({text[:60]!r}), row {other} there (rows from 0). Take them out of one of the two."
        )


def shared_rows(forget: Sequence[Question], retain: Sequence[Question]) -> list[tuple[int, int]]:
    """Rows with the same question or text: (number in the forget set, number in the retain set)."""
    places = {_key(row): number for number, row in reversed(list(enumerate(retain)))}
    return [(number, places[_key(row)]) for number, row in enumerate(forget) if _key(row) in places]


def repeated_rows(rows: Sequence[Question]) -> tuple[int, ...]:
    """Rows whose question or text was there before."""
    first: dict[tuple[str, str], int] = {}
    return tuple(number for number, row in enumerate(rows) if first.setdefault(_key(row), number) != number)


def data_step(objective: Loss) -> DataStep:
    """What the objective learns from the forget set.

    `pairs` (an "I don't know" or other answer against the true one) for objectives that compare two answers to one
    question; `idk` (that answer alone) for those that only learn desirable completions; else `answers`, the true
    answers as undesirable completions.
    """
    if objective.paired:
        return "pairs"
    return "answers" if "rejected" in objective.roles else "idk"


def uses_retain(objective: Loss) -> bool:
    """Whether the objective learns from the retain set too; one on pairs does by a term in `on_retain(...)`."""
    return FORGET in objective.columns if objective.paired else "chosen" in objective.roles


def forget_rows(
    forget: Sequence[Question],
    retain: Sequence[Question],
    tokenizer: PreTrainedTokenizerBase,
    objective: Loss,
    *,
    idk: Sequence[str] = IDK,
    max_length: int | None = None,
    seed: int = 0,
) -> Dataset:
    """The rows that forgetting trains on.

    Args:
        forget, retain: the sets.
        tokenizer: of the model: with a chat template, questions are user turns; else `Question: ...` and `Answer:`.
        objective: decides about the rows, see `data_step` and `uses_retain`.
        idk: answers in place of the true ones, drawn at random; a row's own `alternative` goes before them.
        max_length: plain texts are cut into parts of this many tokens.
        seed: of the draw.

    Returns:
        Prompt, completion, label (false: to forget) and `forget`; for pairs prompt, chosen, rejected and `forget`: the
        other answer and the true one, which change places in the rows to retain.
    """
    check_apart(forget, retain)
    step = data_step(objective)
    draw = random.Random(seed)
    if step == "answers":
        retained = [(retain, True)] if uses_retain(objective) else []
        return _labelled([(forget, False), *retained], tokenizer, max_length)
    if any(not row.question for row in forget):
        raise UnlearningDataError(
            f"{objective} puts another answer in the place of the true one, which needs questions, but the forget set "
            "holds plain texts: choose an objective that lowers their probability, such as npo_rt"
        )
    answers = [row.alternative or draw.choice(idk) for row in forget]
    if step == "pairs":
        return _pairs(forget, answers, retain if uses_retain(objective) else (), tokenizer, lambda: draw.choice(idk))
    replaced = [Question(row.question, answer) for row, answer in zip(forget, answers, strict=True)]
    rows = _labelled([(replaced, True), (retain, True)], tokenizer, max_length)
    return rows.remove_columns(FORGET).add_column(FORGET, [n < len(forget) for n in range(len(rows))])


def _pairs(
    forget: Sequence[Question],
    answers: Sequence[str],
    retain: Sequence[Question],
    tokenizer: PreTrainedTokenizerBase,
    other: Callable[[], str],
) -> Dataset:
    """Pairs to forget, with `answers` as chosen, and pairs to retain, with an answer of `other` as rejected."""
    if any(not row.question for row in retain):
        raise UnlearningDataError("pairs need questions, but the retain set holds plain texts")
    pairs = [(row.question, answer, row.answer, True) for row, answer in zip(forget, answers, strict=True)]
    pairs += [(row.question, row.answer, other(), False) for row in retain]
    return Dataset.from_list(
        [
            {
                "prompt": prompt_of(question, tokenizer),
                "chosen": answer_of(chosen, tokenizer),
                "rejected": answer_of(rejected, tokenizer),
                FORGET: to_forget,
            }
            for question, chosen, rejected, to_forget in pairs
        ]
    )


def learn_rows(rows: Sequence[Question], tokenizer: PreTrainedTokenizerBase, max_length: int | None = None) -> Dataset:
    """Rows to learn by likelihood: every answer is desirable."""
    return _labelled([(rows, True)], tokenizer, max_length).remove_columns(FORGET)


def prompt_of(question: str, tokenizer: PreTrainedTokenizerBase) -> Any:
    """A question as the model reads it: a user turn, or text for a model without a chat template."""
    if tokenizer.chat_template:
        return [{"role": "user", "content": question}]
    return _PLAIN.format(question=question)


def answer_of(answer: str, tokenizer: PreTrainedTokenizerBase) -> Any:
    return [{"role": "assistant", "content": answer}] if tokenizer.chat_template else f" {answer}"


def _labelled(
    sets: Sequence[tuple[Sequence[Question], bool]], tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> Dataset:
    rows = [(row, label) for questions, label in sets for row in questions]
    texts = [not row.question for row, _ in rows]
    if all(texts):
        return Dataset.from_list(
            [part for row, label in rows for part in _text_rows(row, label, tokenizer, max_length)]
        )
    if any(texts):
        raise UnlearningDataError("plain texts and questions cannot be mixed: both sets need the same kind of rows")
    return Dataset.from_list(
        [
            {
                "prompt": prompt_of(row.question, tokenizer),
                "completion": answer_of(row.answer, tokenizer),
                "label": label,
                FORGET: not label,
            }
            for row, label in rows
        ]
    )


def _text_rows(
    row: Question, label: bool, tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> list[dict[str, Any]]:
    """A plain text as token ids, in parts that fit: its first token is the context, all others are scored."""
    ids = list(tokenizer(row.answer)["input_ids"])
    size = max_length or len(ids)
    parts = [ids[start : start + size] for start in range(0, len(ids), size)]
    return [
        {"prompt_ids": part[:1], "completion_ids": part[1:], "label": label, FORGET: not label}
        for part in parts
        if len(part) > 1
    ]


def source_of(name: str, config: str | None = None, split: str = "train") -> tuple[str, str | None, str]:
    """The file or Hub id in the name of a set, its configuration and its split; the given ones if it has neither."""
    # os.path, unlike Path, takes names that no file can have, and homes of users that there are not.
    if os.path.exists(os.path.expanduser(name)) or ":" not in name:
        return name, config, split
    path, own, *splits = name.split(":")
    if len(splits) > 1:
        raise UnlearningDataError(f"{name!r}: write a set as NAME, NAME:CONFIG or NAME:CONFIG:SPLIT")
    return path, own or None, splits[0] if splits else "train"


def _key(row: Question) -> tuple[str, str]:
    # Two texts are the same text; a question is the same question whatever its answer.
    return (" ".join(row.question.lower().split()), "" if row.question else " ".join(row.answer.split()))


def _question(row: Mapping[str, Any], place: str) -> Question:
    if "text" in row and not any(name in row for name in _QUESTION):
        return Question("", _text(row, ("text",), place))
    wrong = row.get(_WRONG) or ()
    if isinstance(wrong, str):
        wrong = _list_in(wrong, place)
    if not isinstance(wrong, list | tuple) or not all(isinstance(text, str) and text.strip() for text in wrong):
        raise UnlearningDataError(f"{place}: {_WRONG} must hold texts, got {wrong!r:.80}")
    for name in _OTHERS:
        if not isinstance(row.get(name) or "", str):
            raise UnlearningDataError(f"{place}: {name} must be a text, got {row[name]!r:.80}")
    question = _text(row, _QUESTION, place)
    if question is row.get("instruction") and isinstance(row.get("input"), str) and row["input"].strip():
        question = f"{question}\n{row['input']}"  # Alpaca's: what the instruction is about
    return Question(
        question,
        _text(row, _ANSWER, place),
        paraphrase=row.get("paraphrased_answer") or "",
        wrong=tuple(wrong),
        rephrased=row.get("paraphrased_question") or "",
        alternative=row.get("alternative_answer") or row.get("alternate") or "",
    )


def _list_in(text: str, place: str) -> Any:
    """The texts of a list that is written as JSON, as in CSV files; a list of any other text."""
    if not text.lstrip().startswith(('["', "['")):
        return [text]
    try:
        return json.loads(text)
    except ValueError:
        # As pandas writes an array, without commas, its texts cannot be told apart.
        raise UnlearningDataError(
            f"{place}: {_WRONG} is the text of a list that is not JSON, {text!r:.80}: write the set as JSON lines"
        ) from None


def _text(row: Mapping[str, Any], names: Sequence[str], place: str) -> str:
    name = next((name for name in names if name in row), None)
    if name is None:
        raise UnlearningDataError(
            f"{place}: none of the columns {', '.join(names)}; it has {', '.join(row)}. A set has question and "
            "answer, or text."
        )
    value = row[name]
    if not isinstance(value, str) or not value.strip():
        raise UnlearningDataError(f"{place}: {name} must be a text that is not empty, got {value!r:.80}")
    return value
