"""A set checked and tokenized in one pass: in batches, over processes, its ids in an Arrow file, memory flat.

The ids do not depend on the number of processes. It imports datasets and the rest of this folder, and transformers
only with the tokenizer that it is called with.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import sys
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa  # type: ignore[import-untyped]
from datasets import Dataset, DatasetInfo
from datasets.utils import tqdm

from prefopt.data.canonical import rows_of
from prefopt.data.collect import Findings
from prefopt.data.columns import GIVEN_LOGPS, kind_of_columns
from prefopt.data.errors import DataError
from prefopt.data.findings import Report
from prefopt.data.groups import COMPLETIONS, SCORES, is_group
from prefopt.data.parts import tables
from prefopt.data.row import Checked, Row
from prefopt.data.screen import can_screen
from prefopt.data.stored import FACTS, IDS, Unfinished, key_of, place_for
from prefopt.data.unused import MEDIA

if TYPE_CHECKING:
    from prefopt.data.row_check import RowCheck

KEPT_FROM = 1000
"""Rows from which on results are kept on disk, and several processes are worth their start."""

MOST_PROCESSES = 16
"""By default; each has a copy of the tokenizer."""

TOKENIZED = ("prompt", "chosen", "rejected", "completion", "tools", "chat_template_kwargs")
"""The columns that ids are made from, with those of groups: see `made_from`."""

_READ = (*TOKENIZED, "label", "weight", *GIVEN_LOGPS, "source", "row")
"""The columns that are checked."""

KEY = "made from"
"""The column of digests of what a row's ids were made from."""

_PARALLEL = "TOKENIZERS_PARALLELISM"


@dataclass(frozen=True)
class Passed:
    """What a pass gives.

    Attributes:
        report: all problems of the rows.
        ids: the id columns of each row, empty for rows that have no ids, and a digest of what they were made from.
    """

    report: Report
    ids: Dataset


def can_pass(dataset: Dataset) -> bool:
    """Whether the rows are texts alone, given as lists and texts."""
    names = dataset.column_names
    ids = any(name.endswith("_ids") for name in names)
    return dataset.format["type"] is None and not ids and not {*MEDIA} & {*names} and len(dataset) > 0


def one_pass(
    dataset: Dataset,
    check: RowCheck,
    roles: Collection[str] = ("chosen", "rejected"),
    num_proc: int | None = None,
    desc: str | None = None,
) -> Passed:
    """Check and tokenize every row, or read the results of an earlier pass over the same rows.

    Args:
        dataset: normalised, without ids; `can_pass` says that it is suitable.
        check: what is checked, with the tokenizer.
        roles: what the objective is about.
        num_proc: processes; by default one for each of this process's cores and for each thousand rows.
        desc: of the progress bar.

    Raises:
        DataError: for a set without rows, or a tokenizer or template that fits none.
    """
    more = (COMPLETIONS, SCORES) if is_group(check.sides) else ()
    columns = [name for name in dataset.column_names if name in (*_READ, *more)]
    shown = dataset.select_columns(columns)
    place = place_for(key_of(shown, columns, check) if len(dataset) >= KEPT_FROM else None)
    if len(dataset) >= KEPT_FROM and (facts := place.facts) is not None:
        return Passed(Findings.of_facts(facts, check.sides, roles).report(), place.ids())
    findings = Findings(check.sides, roles)
    with Unfinished(place) as folder:
        _write(folder / IDS, shown, check, findings, num_proc, desc)
        (folder / FACTS).write_text(json.dumps(findings.facts()), encoding="utf-8")
    return Passed(findings.report(), place.ids())


def _write(
    file: Path, dataset: Dataset, check: RowCheck, findings: Findings, num_proc: int | None, desc: str | None
) -> None:
    """Write the ids of all rows, and add what is found in them to `findings`."""
    screened = can_screen(dataset, check.sides)
    job = _Job(dataset.features, check)
    bar = tqdm(total=len(dataset), desc=desc, unit=" rows", disable=None if len(dataset) >= KEPT_FROM else True)
    count, start = min(processes(len(dataset), num_proc), len(dataset)), 0
    with (
        bar,
        pa.OSFile(str(file), "wb") as sink,
        pa.ipc.new_stream(sink, job.schema) as writer,
        _workers(job, count) as work,
    ):
        for table, (batch, checked, plain) in work(tables(dataset, dataset.column_names)):
            writer.write_batch(pa.ipc.read_record_batch(batch, job.schema))
            told = {start + place: one for place, one in checked.items()}
            if screened:
                findings.add_table(start, table, told, len(plain))
            else:
                clear = Checked(readable=True)
                for place, row in enumerate(rows_in(table, dataset.features)):
                    findings.add(start + place, row, replace(checked.get(place, clear), plain=place in plain))
            start += table.num_rows
            bar.update(table.num_rows)


def rows_in(table: Any, features: Any) -> list[Row]:
    """The rows of an Arrow table, as a data set with these features gives them."""
    columns = Dataset(table, info=DatasetInfo(features=features), fingerprint="batch")[:]
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


# ---- one batch ---------------------------------------------------------------------------------------------------

Batch = tuple[bytes, dict[int, Checked], set[int]]
"""Ids as an Arrow batch, results of rows with problems by their place in it, places of rows of plain text."""


@dataclass(frozen=True)
class _Job:
    """What is done to each batch of rows."""

    features: Any
    check: RowCheck

    @property
    def names(self) -> list[str]:
        return [f"{name}_ids" for name in ("prompt", *self.check.sides)]

    @property
    def schema(self) -> Any:
        """Ids in 32 bits: no vocabulary needs more."""
        return pa.schema([*((name, self._type(name)) for name in self.names), (KEY, pa.binary(16))])

    @staticmethod
    def _type(name: str) -> Any:
        ids = pa.list_(pa.int32())
        return pa.list_(ids) if name == f"{COMPLETIONS}_ids" else ids

    def __call__(self, table: Any) -> Batch:
        results = self.check.batch(rows_in(table, self.features))
        lists = {name: [[] if one.ids is None else one.ids[name] for one in results] for name in self.names}
        arrays = [pa.array(ids, self._type(name)) for name, ids in lists.items()]
        keys = pa.array(row_keys(table), pa.binary(16))
        batch = pa.record_batch([*arrays, keys], schema=self.schema).serialize().to_pybytes()
        plain = {place for place, checked in enumerate(results) if checked.plain}
        told = {
            place: replace(checked, ids=None)
            for place, checked in enumerate(results)
            if checked.problems or checked.said or not checked.readable
        }
        return batch, told, plain


def row_keys(table: Any) -> list[bytes]:
    """For each row of an Arrow table, a digest of what its ids are made from."""
    names = made_from(table.column_names)
    return [hashlib.blake2b(row, digest_size=16).digest() for row in rows_of(table.select(names))]


def made_from(names: Sequence[str]) -> list[str]:
    """Those of a set's columns that ids are made from; pairs may have a column `completions` that is not read."""
    more = (COMPLETIONS,) if kind_of_columns(names) == "group" else ()
    return [name for name in names if name in (*TOKENIZED, *more)]


# ---- processes ---------------------------------------------------------------------------------------------------


def processes(rows: int, wanted: int | None = None) -> int:
    """How many to start for so many rows: one where forking is not possible, or not safe (macOS)."""
    if sys.platform == "darwin" or "fork" not in multiprocessing.get_all_start_methods():
        return 1
    return wanted or max(min(_cores(), rows // KEPT_FROM, MOST_PROCESSES), 1)


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


_job: _Job | None = None
"""Of a forked process: copying it there by fork costs nothing."""


def _start(job: _Job) -> None:
    global _job
    _job = job


def _run(rows: bytes) -> Batch:
    assert _job is not None
    return _job(pa.ipc.open_stream(rows).read_all())


@contextlib.contextmanager
def _workers(job: _Job, count: int) -> Iterator[Callable[[Iterable[Any]], Iterator[tuple[Any, Batch]]]]:
    """A function that does the job for each table of rows, in order; `count` processes do it, or this one alone."""
    if count == 1:
        yield lambda tables: ((table, job(table)) for table in tables)
        return
    # Processes that share the cores must not start a thread for each, nor may they fork threads.
    with _environment(_PARALLEL, "false"):
        pool = ProcessPoolExecutor(count, multiprocessing.get_context("fork"), _start, (job,))
        try:
            yield lambda tables: _in_order(pool, tables, 2 * count)
        except BrokenProcessPool as error:
            raise DataError(
                f"One of the {count} processes that tokenize the rows was killed, perhaps for want of memory: set "
                "dataset_num_proc to a smaller number."
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _in_order(pool: Executor, tables: Iterable[Any], window: int) -> Iterator[tuple[Any, Batch]]:
    """Results in order; at most `window` wait, so that memory stays flat."""
    waiting: deque[tuple[Any, Future[Batch]]] = deque()
    for table in tables:
        waiting.append((table, pool.submit(_run, _as_bytes(table))))
        if len(waiting) == window:
            table, result = waiting.popleft()
            yield table, result.result()
    while waiting:
        table, result = waiting.popleft()
        yield table, result.result()


def _as_bytes(table: Any) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
