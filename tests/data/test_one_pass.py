"""One pass over a set gives what its rows give one by one: over processes, from the cache, for rows held out later."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset

from prefopt.data import DataError, validate
from prefopt.data import one_pass as module
from prefopt.data.collect import Findings
from prefopt.data.one_pass import KEY, one_pass
from prefopt.data.prepare import rows_are_checked, tokenize_checked
from prefopt.data.reuse import Made
from prefopt.data.stored import key_of, tokenizer_key
from prefopt.data.validate import row_check
from tests.data.test_encodings import talk
from tests.tiny import CHATML, make_tokenizer

ROLES = ("chosen", "rejected")
HOW = {"max_length": 60, "truncation_mode": "keep_start"}


def rows(count: int = 23) -> list[dict[str, Any]]:
    """Conversations, with a repeated one, a reversed one, equal sides, a null, an empty answer."""
    found = [talk(random.Random(n)) for n in range(count)]
    found[7] = found[2]
    found[11] = {**found[3], "chosen": found[3]["rejected"], "rejected": found[3]["chosen"]}
    found[13] = {**found[13], "rejected": found[13]["chosen"]}
    found[17] = {**found[17], "chosen": None}
    found[19] = {**found[19], "rejected": [{"role": "assistant", "content": "", "tool_calls": None}]}
    return found


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Batches and sets as of thousands of rows, and a cache of one's own."""
    monkeypatch.setattr("prefopt.data.parts.ROWS_AT_ONCE", 4)
    monkeypatch.setattr(module, "KEPT_FROM", 10)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def alone(dataset: Dataset, tokenizer: Any) -> tuple[Any, list[Any]]:
    """The report and the ids, row by row."""
    check = row_check(dataset, tokenizer, **HOW)
    results = [check(row) for row in dataset]
    findings = Findings(check.sides, ROLES)
    for index, (row, checked) in enumerate(zip(dataset, results, strict=True)):
        findings.add(index, row, checked)
    return findings.report(), [checked.ids for checked in results]


@pytest.mark.parametrize("num_proc", [1, 2, None])
@pytest.mark.parametrize("form", ["talks", "texts", "mixed", "labelled"])
def test_a_pass_gives_what_each_row_gives_alone(form: str, num_proc: int | None) -> None:
    dataset, tokenizer = Dataset.from_list(rows()), make_tokenizer()
    if form == "texts":
        texts = [{name: str(row[name])[:90] for name in ("prompt", *ROLES)} for row in rows()]
        dataset = Dataset.from_list([*texts, {"prompt": "a", "chosen": " ", "rejected": None}])
    elif form == "mixed":
        dataset = dataset.add_column("source", ["a", "b", "c.jsonl"] * 7 + ["a", "b"])
        dataset = dataset.add_column("row", list(range(len(dataset))))
    elif form == "labelled":
        dataset = dataset.rename_column("chosen", "completion").remove_columns("rejected")
        dataset = dataset.add_column("label", [True] * len(dataset))
    report, ids = alone(dataset, tokenizer)
    assert len(report.problems) > 3
    passed = one_pass(dataset, row_check(dataset, tokenizer, **HOW), ROLES, num_proc)
    assert passed.report == report
    names = [name for name in passed.ids.column_names if name != KEY]
    for row, expected in zip(passed.ids, ids, strict=True):
        assert {name: row[name] for name in names} == (expected or {name: [] for name in names})
    assert validate(dataset, tokenizer=tokenizer, **HOW) == report


def test_a_second_pass_reads_what_the_first_wrote(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, tokenizer = Dataset.from_list(rows()), make_tokenizer()
    first = one_pass(dataset, row_check(dataset, tokenizer, **HOW))
    monkeypatch.setattr(module, "_write", None)
    again = one_pass(Dataset.from_list(rows()), row_check(dataset, make_tokenizer(), **HOW))
    assert again.report == first.report
    assert again.ids.to_list() == first.ids.to_list()
    assert again.ids._fingerprint == first.ids._fingerprint


def test_nothing_is_left_of_a_pass_that_fails(tmp_path: Path) -> None:
    dataset, tokenizer = Dataset.from_list(rows()), make_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        one_pass(dataset, row_check(dataset, tokenizer, **HOW), num_proc=2)
    assert list((tmp_path / "cache" / "prefopt").iterdir()) == []


def test_nothing_is_kept_with_caching_disabled(tmp_path: Path) -> None:
    dataset, tokenizer = Dataset.from_list(rows()), make_tokenizer()
    datasets.disable_caching()
    try:
        one_pass(dataset, row_check(dataset, tokenizer, **HOW))
    finally:
        datasets.enable_caching()
    assert not (tmp_path / "cache").exists()


def test_results_are_found_by_rows_tokenizer_and_settings() -> None:
    dataset, tokenizer = Dataset.from_list(rows()), make_tokenizer()
    columns = dataset.column_names

    def key(data: Dataset = dataset, words: Any = tokenizer, **how: Any) -> str | None:
        return key_of(data, columns, row_check(data, words, **{**HOW, **how}))

    other = make_tokenizer(CHATML + " ")
    longer = make_tokenizer()
    longer.add_tokens(["<new>"])
    padded = make_tokenizer()
    padded(["a", "a b"], padding=True)
    padded(["a", "a b"], truncation=True, max_length=1)
    padded.backend_tokenizer.enable_padding(pad_token='"added_tokens":')
    padded.pad_token = "<|im_end|>"
    changed = Dataset.from_list([*rows()[:-1], talk(random.Random(99))])
    keys = [key(), key(changed), key(words=other), key(words=longer), key(max_length=61), key(vocabulary=9)]
    assert len({*keys, key(dataset.select(range(22, -1, -1)))}) == 7
    assert key(words=padded) == key(dataset.select(range(23))) == key()

    class Mine(type(tokenizer)):  # type: ignore[misc]
        """Code that is not in transformers."""

    tokenizer.__class__ = Mine
    assert key() is None


def made_of(dataset: Dataset, tokenizer: Any) -> Made:
    return Made(dataset, one_pass(dataset, row_check(dataset, tokenizer, **HOW)).ids, str(tokenizer_key(tokenizer)))


def tokenized(dataset: Dataset, tokenizer: Any, made: list[Made]) -> Any:
    with rows_are_checked(made):
        return tokenize_checked(dataset, tokenizer, name="train", **HOW)


def test_rows_that_were_moved_since_get_their_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make_tokenizer()
    good = Dataset.from_list([row for n, row in enumerate(rows()) if n not in (13, 17, 19)])
    parts = good.select(range(12)), good.select(range(12, 20))
    made = [made_of(part, tokenizer) for part in parts]
    expected = [row_check(good, tokenizer, **HOW)(row).ids for row in good]
    monkeypatch.setattr("prefopt.data.prepare.one_pass", None)
    orders = [list(range(20)), list(range(12)), [5, 3, 19, 0, 0, 13], list(range(2, 9))]
    for order in orders:
        result = tokenized(good.select(order), tokenizer, made)
        assert [{name: row[name] for name in expected[0]} for row in result] == [expected[n] for n in order]
        assert [row["chosen"] for row in result] == [good[n]["chosen"] for n in order]
        assert KEY not in result.column_names


def test_untouched_rows_get_their_ids_without_a_digest_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make_tokenizer()
    good = Dataset.from_list([row for n, row in enumerate(rows()) if n not in (13, 17, 19)])
    made = made_of(good, tokenizer)
    monkeypatch.setattr("prefopt.data.reuse.row_keys", None)
    assert (
        tokenized(good.add_column("note", ["x"] * len(good)), tokenizer, [made])["chosen_ids"]
        == made.ids["chosen_ids"]
    )
    with pytest.raises(TypeError, match="NoneType"):
        tokenized(good.select(range(len(good) - 1, -1, -1)), tokenizer, [made])


def test_rows_that_were_changed_since_are_checked_and_tokenized() -> None:
    tokenizer = make_tokenizer()
    good = Dataset.from_list([row for n, row in enumerate(rows()) if n not in (13, 17, 19)])
    made = [made_of(good, tokenizer)]
    new = [{"role": "assistant", "content": "Something else."}]
    changed = good.map(lambda row: {"chosen": new})
    result = tokenized(changed, tokenizer, made)
    assert [row["chosen_ids"] for row in result] == [
        row_check(changed, tokenizer, **HOW)(row).ids["chosen_ids"] for row in changed
    ]
    with pytest.raises(DataError, match="chosen equals rejected"):
        tokenized(good.map(lambda row: {"chosen": new, "rejected": new}), tokenizer, made)
    other = make_tokenizer(CHATML + "{{ 'The end.' }}")
    assert tokenized(good, other, made)["chosen_ids"] != tokenized(good, tokenizer, made)["chosen_ids"]


@pytest.mark.parametrize(("count", "wanted", "expected"), [(9, None, 1), (25, None, 2), (999, None, 4), (25, 7, 7)])
def test_a_process_for_each_core_if_there_are_rows_enough(
    monkeypatch: pytest.MonkeyPatch, count: int, wanted: int | None, expected: int
) -> None:
    monkeypatch.setattr(module, "_cores", lambda: 4)
    assert module.processes(count, wanted) == expected
    monkeypatch.setattr("multiprocessing.get_all_start_methods", lambda: ["spawn"])
    assert module.processes(count, wanted) == 1


def test_a_process_that_is_killed_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    dataset, tokenizer = Dataset.from_list(rows()), make_tokenizer()
    monkeypatch.setattr("prefopt.data.row_check.RowCheck.batch", lambda self, rows: os._exit(9))
    with pytest.raises(DataError, match="One of the 2 processes that tokenize the rows was killed"):
        one_pass(dataset, row_check(dataset, tokenizer, **HOW), num_proc=2)
    assert list((tmp_path / "cache" / "prefopt").iterdir()) == []
