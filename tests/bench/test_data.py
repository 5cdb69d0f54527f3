"""scripts/bench/data.py: what it writes, measures and prints."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest

from prefopt.data import kind, read_preferences

FILE = Path(__file__).resolve().parents[2] / "scripts" / "bench" / "data.py"


@pytest.fixture(scope="module")
def bench() -> Any:
    spec = importlib.util.spec_from_file_location("bench_data", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("form", "style"), [("talks", list), ("texts", str)])
def test_pairs_are_the_same_each_time_and_read_as_pairs(bench: Any, tmp_path: Path, form: str, style: type) -> None:
    for name in ("a", "b"):
        bench.write_pairs(tmp_path / f"{name}.jsonl", 40, form)
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    read = read_preferences(str(tmp_path / "a.jsonl"))
    assert kind(read) == "pair"
    assert all(isinstance(row[name], style) for row in read for name in ("prompt", "chosen", "rejected"))
    assert 1500 < sum(len(json.dumps(row)) for row in read) / 40 < 5000


def test_the_table_compares_starts_that_are_alike(bench: Any) -> None:
    one = {"form": "talks", "processes": 2, "rows": 9, "processor": 1.0, "memory": 5e8}
    results = [
        {**one, "contestant": name, "start": start, "seconds": seconds}
        for name, start, seconds in (("prefopt", "first", 4.0), ("trl", "first", 10.0), ("prefopt", "second", 2.0))
    ]
    lines = bench.table(results).splitlines()[2:]
    assert [line.strip("| ").split("|")[-1].strip() for line in lines[:1]] == ["0.40"]
    assert "0.40" not in lines[1] + lines[2]


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's memory map")
def test_memory_counts_what_a_process_has_to_itself(bench: Any) -> None:
    before = bench.own_memory(os.getpid())
    filled = bytearray(os.urandom(1 << 20) * 60)
    assert 50e6 < bench.own_memory(os.getpid()) - before < 200e6
    assert filled
