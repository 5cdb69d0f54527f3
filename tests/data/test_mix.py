"""Mixing keeps every row, holds the proportions, repeats itself for a seed and names where rows came from."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from datasets import Dataset

from prefopt.data import DataError, in_proportion, mix, parse_sources, validate


def _texts(name: str, count: int, **extra: object) -> Dataset:
    return Dataset.from_list(
        [{"prompt": f"{name}{i}", "chosen": "good", "rejected": "bad", **extra} for i in range(count)]
    )


def test_parse_sources() -> None:
    assert parse_sources("a.jsonl:0.7,b.jsonl:0.3") == [("a.jsonl", 0.7), ("b.jsonl", 0.3)]
    assert parse_sources("owner/set, C:\\data\\b.csv") == [("owner/set", None), ("C:\\data\\b.csv", None)]


def test_a_file_with_a_comma_in_its_name_is_one_source(tmp_path: Path) -> None:
    path = tmp_path / "pairs, cleaned.jsonl"
    path.touch()
    assert parse_sources(str(path)) == [(str(path), None)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a:0.5,b", "'b' has no weight while others have"),
        ("a:x", "weight 'x' of 'a' is not a number above 0"),
        ("a:0,b:1", "weight '0' of 'a' is not a number above 0"),
        ("a:nan,b:1", "weight 'nan'"),
        ("a:1,,b:1", "empty entry"),
        ("a:1,a:2", "'a' is given twice"),
    ],
)
def test_parse_sources_refuses(text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_sources(text)


def test_weighted_mixing_loses_no_row_and_holds_the_proportions() -> None:
    mixed = mix({"a.jsonl": _texts("a", 300), "b.jsonl": _texts("b", 300)}, [3, 1], seed=1)
    shares = Counter(mixed["source"])
    assert 0.70 < shares["a.jsonl"] / len(mixed) < 0.80
    assert len(set(mixed["prompt"])) == 600
    assert all(row["prompt"] == f"{row['source'][0]}{row['row']}" for row in mixed)
    # A source drawn again on purpose is no duplicate.
    assert validate(mixed).counts() == {}


def test_rows_in_proportion_come_once_from_all_over_a_source_and_know_their_place() -> None:
    sources = {"a.jsonl": _texts("a", 90), "b.jsonl": _texts("b", 90)}
    parts = in_proportion(sources, [3, 1])
    mixed = mix(parts)
    assert Counter(mixed["source"]) == {"a.jsonl": 90, "b.jsonl": 30}
    assert len(set(mixed["prompt"])) == 120
    assert all(row["prompt"] == f"{row['source'][0]}{row['row']}" for row in mixed)
    assert max(parts["b.jsonl"]["row"]) > 60
    assert [len(part) for part in in_proportion(sources, [1000, 1]).values()] == [90, 1]
    with pytest.raises(DataError, match=r"'a\.jsonl' has no rows"):
        mix(in_proportion(sources | {"a.jsonl": sources["a.jsonl"].select([])}, [1, 1]))


def test_mixing_is_deterministic_for_a_seed() -> None:
    sources = {"a": _texts("a", 30), "b": _texts("b", 10)}
    one, again, other = (mix(sources, [1, 1], seed=seed)["prompt"][:40] for seed in (0, 0, 1))
    assert list(one) == list(again) != list(other)


@pytest.mark.parametrize("streaming", [False, True])
def test_without_weights_every_row_comes_once(streaming: bool) -> None:
    sources = {"a": _texts("a", 5), "b": _texts("b", 3)}
    if streaming:
        sources = {name: part.to_iterable_dataset() for name, part in sources.items()}
    assert sorted(row["prompt"] for row in mix(sources)) == [f"a{i}" for i in range(5)] + [f"b{i}" for i in range(3)]


def test_streams_mix_by_weight() -> None:
    sources = {name: _texts(name, 20).to_iterable_dataset() for name in "ab"}
    rows = list(mix(sources, [1, 1], seed=0))
    assert len({row["prompt"] for row in rows}) == 40
    assert all(row["prompt"] == f"{row['source']}{row['row']}" for row in rows)


def test_a_missing_weight_column_counts_one_and_own_sources_are_kept() -> None:
    mixed = mix({"a": _texts("a", 2, weight=0.5, source="math"), "b": _texts("b", 2)})
    assert {(row["source"], row["weight"]) for row in mixed} == {("a:math", 0.5), ("b", 1.0)}


def test_messages_with_and_without_tool_calls_mix() -> None:
    plain = {"role": "assistant", "content": "a"}
    call = {"content": "", "role": "assistant", "tool_calls": [{"name": "f"}]}
    ask = [{"role": "user", "content": "q"}]
    parts = {
        "a": Dataset.from_list([{"prompt": ask, "chosen": [plain], "rejected": [plain]}]),
        "b": Dataset.from_list([{"prompt": ask, "chosen": [call], "rejected": [plain]}]),
    }
    rows = {row["source"]: row for row in mix(parts)}
    assert rows["a"]["chosen"][0]["content"] == "a"
    assert rows["b"]["chosen"][0]["tool_calls"] == [{"name": "f"}]


def test_unlike_sources_are_refused() -> None:
    unpaired = Dataset.from_list([{"prompt": "q", "completion": "a", "label": True}])
    with pytest.raises(DataError, match="a: pair rows as plain text; b: unpaired rows as plain text"):
        mix({"a": _texts("a", 1), "b": unpaired})
    with pytest.raises(DataError, match="Give one for each"):
        mix({"a": _texts("a", 1)}, [1, 2])
