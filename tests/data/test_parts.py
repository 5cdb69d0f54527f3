"""A large set is read in parts, each with a mapping of its own; the rows are the same."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from datasets import Dataset, load_from_disk

from prefopt.data import parts, validate
from prefopt.data.fingerprint import fingerprint
from tests.trainer.runs import make_pairs


@pytest.fixture
def on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Dataset:
    rows = Dataset.from_list([{**row, "number": number} for number, row in enumerate(list(make_pairs(12)) * 400)])
    rows.save_to_disk(tmp_path / "rows")
    monkeypatch.setattr(parts, "_PART_BYTES", 200_000)
    return load_from_disk(tmp_path / "rows")


def test_all_rows_come_in_order(on_disk: Dataset) -> None:
    shuffled, some = on_disk.shuffle(seed=0), on_disk.select(range(5, 4000))
    for rows in (on_disk, shuffled, some, on_disk.rename_column("number", "n").rename_column("n", "number")):
        pieces = [*parts.parts(rows)]
        assert len(pieces) > 2
        assert [*itertools.chain(*(piece["number"] for piece in pieces))] == list(rows["number"])
        numbers = [table.column("number").to_pylist() for table in parts.tables(rows, ["number"])]
        assert [*itertools.chain(*numbers)] == list(rows["number"])


def test_results_do_not_depend_on_parts(on_disk: Dataset) -> None:
    in_memory = Dataset.from_list(list(on_disk))
    assert [*parts.parts(in_memory)] == [in_memory]
    assert validate(on_disk) == validate(in_memory)
    assert fingerprint(on_disk) == fingerprint(in_memory)


def test_a_part_is_mapped_for_itself(on_disk: Dataset) -> None:
    """Only then are its pages given back when it is no longer used."""
    part = next(parts.parts(on_disk))
    addresses = [data.data.column("number").chunk(0).buffers()[1].address for data in (on_disk, part)]
    assert addresses[0] != addresses[1]
