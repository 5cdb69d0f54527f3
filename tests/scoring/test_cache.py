"""The reference cache: found by content, whole or absent on disk, one folder per reference."""

from __future__ import annotations

import pytest
import torch

from prefopt.scoring.cache import ReferenceCache, entries, prune
from prefopt.scoring.collate import PreferenceCollator

EXAMPLES = [
    {"prompt_ids": [5, 6, 7, 8], "chosen_ids": [9, 10, 2], "rejected_ids": [11, 2]},
    {"prompt_ids": [5], "chosen_ids": [2], "rejected_ids": [30, 31, 32, 33, 34, 2]},
    {"prompt_ids": [12, 13], "chosen_ids": [40, 41, 2], "rejected_ids": [42, 2]},
]


class Reference:
    """Stands for a model: the value of a token is minus its id; remembers how many rows it was asked about."""

    def __init__(self, inputs) -> None:
        self.inputs, self.asked = inputs, []

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        self.asked.append(int(rows.sum()))
        return -(self.inputs["input_ids"] * self.inputs["completion_mask"])[rows][:, 1:].float()


def collate(examples, **options):
    return PreferenceCollator(pad_token_id=0, **options)(examples)


def scored(cache: ReferenceCache, inputs) -> tuple[torch.Tensor, list[int]]:
    reference = Reference(inputs)
    return cache.scores(inputs, reference), reference.asked


def expected(inputs) -> torch.Tensor:
    return -(inputs["input_ids"] * inputs["completion_mask"])[:, 1:].float()


def test_each_row_is_computed_once_in_any_company(tmp_path):
    cache = ReferenceCache(tmp_path / "one")
    first, again, mixed = collate(EXAMPLES[:2]), collate(EXAMPLES[1::-1], pad_to_multiple_of=32), collate(EXAMPLES)
    for inputs, asked in ((first, [4]), (again, []), (mixed, [2])):
        values, rows = scored(cache, inputs)
        assert rows == asked
        torch.testing.assert_close(values, expected(inputs), rtol=0, atol=0)
    assert (cache.hits, cache.misses) == (8, 6)


def test_what_was_written_serves_the_next_run(tmp_path):
    inputs = collate(EXAMPLES)
    cache = ReferenceCache(tmp_path / "one")
    scored(cache, inputs)
    cache.write()
    again = ReferenceCache(tmp_path / "one")
    assert len(again) == 6
    values, asked = scored(again, inputs)
    assert asked == []
    torch.testing.assert_close(values, expected(inputs), rtol=0, atol=0)


def test_an_interrupted_write_leaves_nothing_behind_that_is_read(tmp_path, monkeypatch):
    inputs = collate(EXAMPLES)
    cache = ReferenceCache(tmp_path / "one")
    scored(cache, inputs)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        cache.write()
    monkeypatch.undo()
    assert list((tmp_path / "one").glob("*.unfinished"))
    assert len(ReferenceCache(tmp_path / "one")) == 0
    cache.write()
    assert len(ReferenceCache(tmp_path / "one")) == 6


def test_what_others_write_is_taken_in(tmp_path):
    ours, theirs = ReferenceCache(tmp_path / "one"), ReferenceCache(tmp_path / "one")
    scored(theirs, collate(EXAMPLES))
    theirs.write()
    ours.read_new_files()
    assert scored(ours, collate(EXAMPLES))[1] == []


def test_the_same_completion_elsewhere_in_a_row_is_another_entry(tmp_path):
    cache = ReferenceCache(tmp_path / "one")
    scored(cache, collate([{"prompt_ids": [5, 6], "chosen_ids": [7, 2], "rejected_ids": [8, 2]}]))
    moved = collate([{"prompt_ids": [5], "chosen_ids": [6, 7, 2], "rejected_ids": [6, 8, 2]}])
    assert scored(cache, moved)[1] == [2]


def test_every_process_computes_if_one_must(tmp_path):
    cache, inputs = ReferenceCache(tmp_path / "one"), collate(EXAMPLES)
    scored(cache, inputs)
    reference = Reference(inputs)
    values = cache.scores(inputs, reference, any_missing=lambda mine: True)
    assert reference.asked == [1]
    torch.testing.assert_close(values, expected(inputs), rtol=0, atol=0)


def test_references_are_listed_and_pruned(tmp_path):
    for name in ("one", "two"):
        cache = ReferenceCache(tmp_path / name, {"model": name})
        scored(cache, collate(EXAMPLES))
        cache.write()
    found = {entry.name: entry for entry in entries(tmp_path)}
    assert {name: (entry.rows, entry.about["model"]) for name, entry in found.items()} == {
        "one": (6, "one"),
        "two": (6, "two"),
    }
    assert [entry.name for entry in prune(["one"], root=tmp_path)] == ["one"]
    assert prune(older_than_days=1, root=tmp_path) == []
    assert [entry.name for entry in prune(older_than_days=-1, root=tmp_path)] == ["two"]
    assert entries(tmp_path) == []
