"""The reference cache: found by content, whole or absent on disk, one folder per reference."""

from __future__ import annotations

import errno
import json
import logging
import os
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from prefopt.scoring.cache import ReferenceCache, entries, prune
from prefopt.scoring.collate import PreferenceCollator
from prefopt.scoring.rows import RowBatch

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
        return -(self.inputs.ids * self.inputs.completion)[rows][:, 1:].float()


def collate(examples, **options) -> RowBatch:
    return RowBatch.of(PreferenceCollator(pad_token_id=0, **options)(examples))


def scored(cache: ReferenceCache, inputs) -> tuple[torch.Tensor, list[int]]:
    reference = Reference(inputs)
    return cache.scores(inputs, reference), reference.asked


def expected(inputs) -> torch.Tensor:
    return -(inputs.ids * inputs.completion)[:, 1:].float()


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


@pytest.mark.parametrize("age", [0, 2 * 86400])
@pytest.mark.parametrize("by", ["opening", "pruning"])
def test_only_what_no_one_can_still_be_writing_is_cleaned_up(tmp_path, age, by):
    folder = ReferenceCache(tmp_path / "one").folder
    unfinished = folder / "abc.safetensors.def.unfinished"
    unfinished.write_bytes(b"half")
    os.utime(unfinished, (time.time() - age,) * 2)
    if by == "opening":
        ReferenceCache(folder)
    else:
        assert prune(root=tmp_path) == []
    assert unfinished.exists() == (age == 0)
    assert (folder / "reference.json").exists()


def damage_cut(path):
    os.truncate(path, path.stat().st_size - 5)


def damage_emptied(path):
    os.truncate(path, 0)


def damage_zeroed(path):
    path.write_bytes(bytes(path.stat().st_size))


def damage_another_format(path):
    save_file({"weights": torch.zeros(3)}, path)


def damage_other_ends(path):
    keys = torch.zeros(2, 16, dtype=torch.uint8)
    save_file({"keys": keys, "stops": torch.tensor([2, 9]), "logps": torch.zeros(4)}, path)


def damage_other_keys(path):
    keys = torch.zeros(1, 16, dtype=torch.uint8)
    save_file({"keys": keys, "stops": torch.tensor([2, 4]), "logps": torch.zeros(4)}, path)


@pytest.mark.parametrize(
    "damage", [damage_cut, damage_emptied, damage_zeroed, damage_another_format, damage_other_ends, damage_other_keys]
)
def test_a_damaged_file_is_passed_over_with_one_warning(tmp_path, caplog, damage):
    inputs, cache = collate(EXAMPLES), ReferenceCache(tmp_path / "one")
    scored(cache, collate(EXAMPLES[:1]))
    cache.write()
    (good,) = cache.folder.glob("*.safetensors")
    scored(cache, inputs)
    cache.write()
    (bad,) = set(cache.folder.glob("*.safetensors")) - {good}
    damage(bad)
    with caplog.at_level(logging.WARNING):
        again = ReferenceCache(tmp_path / "one")
        again.read_new_files()
    assert [str(bad) in record.message for record in caplog.records] == [True]
    values, asked = scored(again, inputs)
    assert asked == [4]
    torch.testing.assert_close(values, expected(inputs), rtol=0, atol=0)
    again.write()
    assert len(ReferenceCache(tmp_path / "one")) == 6
    assert [entry.name for entry in entries(tmp_path)] == ["one"]


def test_a_full_disk_costs_a_warning_and_no_run(tmp_path, caplog, monkeypatch):
    inputs, cache = collate(EXAMPLES), ReferenceCache(tmp_path / "one")
    scored(cache, inputs)

    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched, caplog.at_level(logging.WARNING):
        patched.setattr("prefopt.scoring.cache.save_file", full)
        cache.write()
    assert "6 new entries" in caplog.text
    assert "No space left on device" in caplog.text
    assert list((tmp_path / "one").iterdir()) == [tmp_path / "one" / "reference.json"]
    assert scored(cache, inputs)[1] == []
    cache.write()
    assert len(ReferenceCache(tmp_path / "one")) == 6


def test_a_folder_that_is_deleted_under_a_run_is_made_anew(tmp_path):
    inputs, cache = collate(EXAMPLES), ReferenceCache(tmp_path / "one", {"model": "one"})
    scored(cache, inputs)
    prune(["one"], root=tmp_path)
    cache.write()
    assert len(ReferenceCache(tmp_path / "one")) == 6
    assert json.loads((tmp_path / "one" / "reference.json").read_text()) == {"model": "one"}


def test_what_others_write_is_taken_in(tmp_path):
    ours, theirs = ReferenceCache(tmp_path / "one"), ReferenceCache(tmp_path / "one")
    scored(theirs, collate(EXAMPLES))
    theirs.write()
    ours.write()  # with nothing of its own
    assert scored(ours, collate(EXAMPLES))[1] == []


def test_the_same_completion_elsewhere_in_a_row_is_another_entry(tmp_path):
    cache = ReferenceCache(tmp_path / "one")
    scored(cache, collate([{"prompt_ids": [5, 6], "chosen_ids": [7, 2], "rejected_ids": [8, 2]}]))
    moved = collate([{"prompt_ids": [5], "chosen_ids": [6, 7, 2], "rejected_ids": [6, 8, 2]}])
    assert scored(cache, moved)[1] == [2]


LONG = [{"prompt_ids": [5, 6, 7, 8], "chosen_ids": [9, 10, 11, 12, 2], "rejected_ids": [13, 14, 15, 2]}]


@pytest.mark.parametrize(
    ("cut", "missed"),
    [
        ({"max_length": 7}, 2),
        ({"max_length": 7, "truncation_mode": "keep_end"}, 2),
        ({"max_length": 4, "truncation_mode": "keep_end"}, 2),  # the prompt is gone, and some of a completion
        ({"max_length": 8}, 1),  # only the chosen row is longer
        ({"max_length": 9}, 0),
        ({"pad_to_multiple_of": 16}, 0),
    ],
)
def test_rows_that_are_cut_elsewhere_are_other_entries(tmp_path, cut, missed):
    cache = ReferenceCache(tmp_path / "one")
    scored(cache, collate(LONG))
    inputs = collate(LONG, **cut)
    values, asked = scored(cache, inputs)
    assert sum(asked) == missed
    torch.testing.assert_close(values, expected(inputs), rtol=0, atol=0)


def test_where_the_completion_starts_is_in_the_key_when_the_tokens_are_the_same(tmp_path):
    """Of a completion whose prompt was cut off, the first token is not scored; nor is it under a prompt of none."""
    cache = ReferenceCache(tmp_path / "one")
    tokens = [5, 6, 7, 2]
    for start in range(4):
        inputs = collate([{"prompt_ids": tokens[:start], "chosen_ids": tokens[start:], "rejected_ids": [9 + start]}])
        values, asked = scored(cache, inputs)
        assert asked == [2]
        torch.testing.assert_close(values, expected(inputs), rtol=0, atol=0)


def test_every_process_computes_if_one_must(tmp_path):
    cache, inputs = ReferenceCache(tmp_path / "one"), collate(EXAMPLES)
    scored(cache, inputs)
    reference = Reference(inputs)
    values = cache.scores(inputs, reference, any_missing=lambda mine: True)
    assert reference.asked == [1]
    torch.testing.assert_close(values, expected(inputs), rtol=0, atol=0)
    cache.write()
    assert len(ReferenceCache(tmp_path / "one")) == 6
    cache.scores(inputs, Reference(inputs), any_missing=lambda mine: True)
    assert not cache._new  # what was known is not written again


def test_a_process_takes_part_with_a_row_that_has_a_completion(tmp_path):
    """Without one the layouts would not be tried on it, while the other processes wait for what it finds."""
    cache, inputs = ReferenceCache(tmp_path / "one"), collate(EXAMPLES)
    inputs.completion[0] = 0
    scored(cache, inputs)
    taken = []
    cache.scores(inputs, lambda rows: taken.append(rows.tolist()) or Reference(inputs)(rows), lambda mine: True)
    assert taken == [[False, True, False, False, False, False]]


def test_a_batch_without_rows_is_not_computed(tmp_path):
    cache, inputs = ReferenceCache(tmp_path / "one"), collate(EXAMPLES)
    nothing = replace(inputs, ids=inputs.ids[:0], attention=inputs.attention[:0], completion=inputs.completion[:0])
    values, asked = scored(cache, nothing)
    assert (values.shape, asked) == ((0, inputs.ids.shape[1] - 1), [])


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
