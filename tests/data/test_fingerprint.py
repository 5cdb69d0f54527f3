"""A data set's fingerprint follows its rows, not how or where they are kept."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest
from datasets import Dataset, Features, LargeList, List, Value
from PIL import Image

from prefopt.data import load_preferences, normalise, tokenize_dataset
from prefopt.data.canonical import bytes_of, encoded
from prefopt.data.fingerprint import fingerprint
from tests.tiny import make_tokenizer
from tests.trainer.runs import make_labelled, make_pairs

ROWS = list(make_pairs(12))


def test_equal_rows_in_other_files_formats_and_orders(tmp_path: Path) -> None:
    wanted = fingerprint(Dataset.from_list(ROWS))
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
    (tmp_path / "b.json").write_text(json.dumps(ROWS[::-1]))
    Dataset.from_list(ROWS).to_parquet(tmp_path / "c.parquet")
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "d")
    for name in ("deep/a.jsonl", "b.json", "c.parquet", "d"):
        assert fingerprint(normalise(load_preferences(str(tmp_path / name)))) == wanted, name


def test_columns_that_training_does_not_read_do_not_count() -> None:
    rows = Dataset.from_list(ROWS)
    assert fingerprint(rows.add_column("source", ["x"] * 12)) == fingerprint(rows)


def test_nulls_of_mixed_messages_do_not_count() -> None:
    with_null = [{**row, "chosen": [{**row["chosen"][0], "name": None}]} for row in ROWS]
    assert fingerprint(Dataset.from_list(with_null)) == fingerprint(Dataset.from_list(ROWS))


@pytest.mark.parametrize("change", ["one letter", "one row less", "one row twice", "chosen and rejected swapped"])
def test_every_change_shows(change: str) -> None:
    rows = [json.loads(json.dumps(row)) for row in ROWS]
    if change == "one letter":
        rows[7]["rejected"][0]["content"] += "s"
    elif change == "one row less":
        rows.pop()
    elif change == "one row twice":
        rows.append(rows[3])
    else:
        rows[2]["chosen"], rows[2]["rejected"] = rows[2]["rejected"], rows[2]["chosen"]
    assert fingerprint(Dataset.from_list(rows)) != fingerprint(Dataset.from_list(ROWS))


def test_weights_and_the_objectives_columns_count() -> None:
    rows = Dataset.from_list(ROWS)
    weighted = rows.add_column("weight", [1.0] * 11 + [2.0])
    assert fingerprint(weighted) != fingerprint(rows)
    with_margin = rows.add_column("margin", [0.5] * 12)
    assert fingerprint(with_margin) == fingerprint(rows) != fingerprint(with_margin, ["margin"])


def test_token_ids_and_labels() -> None:
    labelled = make_labelled(8)
    flipped = labelled.map(lambda row, i: {"label": row["label"] ^ (i == 5)}, with_indices=True)
    assert fingerprint(labelled) != fingerprint(flipped)
    tokenizer = make_tokenizer()
    tokens, again = (tokenize_dataset(Dataset.from_list(ROWS), tokenizer) for _ in range(2))
    assert fingerprint(tokens) == fingerprint(again) != fingerprint(tokens.select(range(11)))


def test_ids_beside_texts_and_widths_of_numbers_do_not_count() -> None:
    rows = Dataset.from_list(ROWS)
    with_ids = tokenize_dataset(rows, make_tokenizer())
    assert fingerprint(with_ids) == fingerprint(rows)
    ids = with_ids.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"])
    narrow = ids.cast(Features({name: List(Value("int32")) for name in ids.column_names}))
    assert fingerprint(narrow) == fingerprint(ids) != fingerprint(rows)
    weights = [rows.add_column("weight", values) for values in ([1] * 11 + [2], [1.0] * 11 + [2.0])]
    assert fingerprint(weights[0]) == fingerprint(weights[1])


def test_large_types_and_the_order_of_fields_do_not_count() -> None:
    rows = Dataset.from_list(ROWS)
    large = [{"content": Value("large_string"), "role": Value("large_string")}]
    other = rows.cast(Features({**rows.features, "prompt": LargeList(large[0]), "chosen": large}))
    assert fingerprint(other) == fingerprint(rows)


@pytest.mark.parametrize(
    "value",
    [
        None, "", "text", True, 1, -2.5, 1e300, [], [1, 2], [1.5, 2.0], ["a", None, "b"], {"a": None},
        {"b": 1, "a": [None]}, [{"role": "user", "content": "ü"}, None], [[1], [], None, [2, 3]],
        b"\0bytes", [True, False],
    ],
)  # fmt: skip
def test_columns_and_values_have_the_same_bytes(value: object) -> None:
    for values in ([value], [value, None, value], [None, value]):
        written = [bytes(text) for text in bytes_of(pa.array(values)[1:])]
        assert written == [encoded(value) for value in pa.array(values)[1:].to_pylist()]


def test_pictures_count_as_pixels() -> None:
    pictures = [Image.new("RGB", (2, 2), (shade, 0, 0)) for shade in (10, 20)]
    rows = [{"prompt": "q", "chosen": "a", "rejected": "b", "image": picture} for picture in pictures]
    data = Dataset.from_list(rows)
    assert fingerprint(data) == fingerprint(Dataset.from_list(rows[::-1])) != fingerprint(data.select([0, 0]))
