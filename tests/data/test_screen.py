"""Whole columns are screened before rows are looked at: what is called clear has no problem, and order is kept."""

from __future__ import annotations

import random
from typing import Any

import pytest
from datasets import Dataset, Features, Value

from prefopt.data import columns, validate
from prefopt.data.row import row_problems
from prefopt.data.row_check import RowCheck
from prefopt.data.screen import can_screen, clear_rows
from prefopt.data.validate import Findings
from prefopt.losses import scores

TEXTS = [
    *("", " ", "\n\t", "\u3000", "\x1c", "\xa0 ", "yes", "no", "\u3000x", " [x]", '{"a": 1}', "[", "{", "\x85"),
    *('[{"role": "user", "content": "x"}]', '[{"role": "user", "content": "x"', "[{'role': 'user', 'content': 'x'}]"),
    *("\n\nHuman: x\n\nAssistant: y", "ünï", "\u200bx", None),
]  # fmt: skip
ROLES = ["user", "assistant", "system", "tool", "human", "function", "text among messages", None, ""]
TEXT, MESSAGES = Value("string"), [{"role": Value("string"), "content": Value("string")}]


def make_rows(count: int, chats: bool, paired: bool, seed: int = 0) -> Dataset:
    """Rows of which many are broken, each in another way."""
    rng = random.Random(seed)

    def text(share: float) -> str | None:
        return rng.choice(TEXTS) if rng.random() < share else f"t{rng.randint(0, 9)}"

    def value(name: str) -> Any:
        if not chats or rng.random() < 0.05:
            return None if chats else text(0.4)
        usual = "user" if name == "prompt" else "assistant"
        count = rng.choice([0, 1, 2, 3]) if rng.random() < 0.3 else 1
        messages = [
            {"role": rng.choice(ROLES) if rng.random() < 0.2 else usual, "content": text(0.3)} for _ in range(count)
        ]
        return [*messages, None] if rng.random() < 0.03 else messages

    sides = ("chosen", "rejected") if paired else ("completion",)
    numbers = {"weight": [1.0, 0.0, -1.0, float("nan"), float("inf"), 1e9, 2e9, None]}
    numbers |= {"ref_chosen_logps": [-1.0, float("nan"), -1e30, None]} if paired else {"label": [True, False, None]}
    rows = [
        {name: value(name) for name in ("prompt", *sides)}
        | {name: rng.choice([*values[:2]] * 9 + values) for name, values in numbers.items()}
        | {"tools": rng.choice([None, None, "[]", "x"]), "source": rng.choice("ab"), "row": rng.randint(0, 2)}
        for _ in range(count)
    ]
    types = {"label": Value("bool"), "weight": Value("float64"), "ref_chosen_logps": Value("float64"), "tools": TEXT}
    types |= {"source": TEXT, "row": Value("int64")} | dict.fromkeys(("prompt", *sides), MESSAGES if chats else TEXT)
    return Dataset.from_list(rows, features=Features({name: types[name] for name in rows[0]}))


@pytest.mark.parametrize("paired", [True, False], ids=["pairs", "labelled"])
@pytest.mark.parametrize("chats", [True, False], ids=["messages", "text"])
def test_the_report_is_that_of_looking_at_every_row(chats: bool, paired: bool) -> None:
    rows = make_rows(2500, chats, paired)
    assert can_screen(rows, ("chosen", "rejected") if paired else ("completion",))
    for data in (rows, rows.select(range(7, 1300)), rows.shuffle(seed=1)):
        check = RowCheck(("chosen", "rejected") if paired else ("completion",), tuple(data.column_names))
        one_by_one = Findings(check.sides)
        for index, row in enumerate(data):
            one_by_one.add(index, row, check(row))
        assert validate(data) == one_by_one.report()
        assert len(validate(data).problems) > 8


def test_rows_in_order_are_clear_and_others_are_not() -> None:
    for chats in (True, False):
        rows = make_rows(400, chats, paired=True, seed=3)
        clear = clear_rows(rows.with_format("arrow")[:], ("chosen", "rejected"))
        problems = [[*row_problems(row, ("chosen", "rejected"), rows.column_names)] for row in rows]
        assert not any(found for found, is_clear in zip(problems, clear, strict=True) if is_clear)
        in_order = [row for row, found in zip(rows, problems, strict=True) if not found]
        # Messages that differ only before the last one, and rows with tools, are looked at.
        assert sum(clear) > len(in_order) / 3 > 10


def test_columns_of_other_types_are_not_screened() -> None:
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    parts = [{"role": "user", "content": [{"type": "text", "text": "x"}]}]
    for change in ({"chosen": 3}, {"prompt": None}, {"prompt": parts}, {"prompt": [{"role": "user", "content": "x"}]}):
        assert not can_screen(Dataset.from_list([{**pair, **change}]), ("chosen", "rejected"))
    plain = Dataset.from_list([pair])
    assert can_screen(plain, ("chosen", "rejected"))
    assert not can_screen(plain.with_format("numpy"), ("chosen", "rejected"))


def test_names_of_columns_are_those_of_the_losses() -> None:
    assert columns.GIVEN_LOGPS == scores.GIVEN_LOGPS
    assert columns.EMBEDDINGS == scores.EMBEDDINGS
