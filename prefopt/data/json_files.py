"""JSON files: which line is broken, and rows that the reader of `datasets` cannot read or would change.

That reader takes the types of columns from the first 10 MB, so a column that is null there fails on later values, and
text that looks like a date becomes one. Reading by rows takes the types from all rows and does not change text.
"""

from __future__ import annotations

import gzip
import importlib
import json
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any

from datasets import Dataset, Features, IterableDataset, Json, List, ReadInstruction, Value

from prefopt.data.errors import DataError

_ROW = frozenset({"prompt", "chosen", "rejected", "completion", "label", "messages", "conversations"})

_MIXED = "mixed"
"""Marks values of several kinds in the tree of types; they are stored as JSON."""


def open_binary(path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.suffix == ".zst":
        zstandard: Any = importlib.import_module("zstandard")
        stream: IO[bytes] = zstandard.open(path, "rb")
        return stream
    return open(path, "rb")


def raise_for_broken_json(path: Path) -> None:
    """Raise an error for the first line that is not a JSON object, if there is one."""
    try:
        _check_json(path)
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path}: the compressed file ends early or is damaged ({error}). Fetch it again.") from error


def is_one_value(path: Path) -> bool:
    """Whether a file is one array or object, not one object per line."""
    lines = [line.strip() for _, line in islice(_lines(path), 2)]
    return len(lines) < 2 or lines[0] == b"{" or lines[0].startswith(b"[")


def _check_json(path: Path) -> None:
    with open_binary(path) as stream:
        first = _first_byte(stream)
    if first == b"":
        raise DataError(f"{path}: the file is empty. Check that it was written or downloaded to the end.")
    # A .json file is one value, an array of rows or an object; .jsonl is one object per line. The content decides.
    if first == b"[":
        _check_whole_json(path)
        return
    if first in (b"\xff", b"\xfe", b"\0"):
        raise DataError(f"{path}, line 1: not UTF-8 text (it begins as UTF-16 or UTF-32 does). Save it as UTF-8.")
    row: Any = None
    number = 0
    for number, line in _lines(path):
        try:
            row = _parsed(line)
        except (ValueError, RecursionError) as error:
            if number == 1 and line.strip() in (b"{", b"{}") and isinstance(error, json.JSONDecodeError):
                _check_whole_json(path)
                return
            raise DataError(
                f"{path}, line {number}: not valid JSON ({_json_reason(error)}): {_excerpt(line)}. "
                "Each line must be one complete JSON object; repair or delete this line."
            ) from error
        if not isinstance(row, dict):
            raise DataError(
                f"{path}, line {number}: a JSON {type(row).__name__} where an object with named columns is needed: "
                f'{_excerpt(line)}. Write each row as {{"prompt": ..., "chosen": ..., "rejected": ...}}.'
            )
    if number == 1:
        _refuse_all_in_one(path, row)


def _refuse_all_in_one(path: Path, row: dict[str, Any]) -> None:
    """Refuse a single object that is not a row but holds all rows: by columns, or as a list in a field.

    Raises:
        DataError: saying what to write instead.
    """
    inside = [
        name
        for name, value in row.items()
        if isinstance(value, list) and value and isinstance(value[0], dict) and len(_ROW.intersection(value[0])) > 1
    ]
    if inside:
        raise DataError(
            f"{path}: one object with rows inside ({', '.join(inside[:5])}). Write a list of rows into a separate "
            f"file, for example with `jq .{inside[0]} {path.name}`."
        )
    by_columns = all(
        (isinstance(value, dict) and value and all(map(str.isdigit, value)))
        or (isinstance(value, list) and len(value) > 1 and all(isinstance(item, str) for item in value))
        for value in row.values()
    )
    if set(row) == {"columns", "index", "data"} or (len(row) > 1 and by_columns):
        raise DataError(
            f"{path}: the file holds columns, not rows. Write one object a row; in pandas: "
            'frame.to_json(path, orient="records", lines=True).'
        )


def _first_byte(stream: IO[bytes]) -> bytes:
    while (byte := stream.read(1)).isspace() or (byte and byte in b"\xef\xbb\xbf"):
        pass  # blanks, and the mark of UTF-8
    return byte


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Non-blank lines, numbered from 1 as editors do."""
    with open_binary(path) as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield number, line


def _parsed(text: bytes) -> Any:
    """The value of JSON text.

    Raises:
        ValueError: for text that is not valid JSON, and for halves of surrogate pairs, which Python accepts.
        RecursionError: if it is nested too deeply.
    """
    value = json.loads(text.decode("utf-8-sig"), parse_int=_whole)
    if b"\\u" in text:
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _whole(text: str) -> int | float:
    """A whole number; as a float if it does not fit into 64 bits, as the reader of `datasets` returns it."""
    number = int(text)
    return number if -(2**63) <= number < 2**63 else float(text)


def _check_whole_json(path: Path) -> None:
    with open_binary(path) as stream:
        text = stream.read()
    try:
        rows = _parsed(text)
    except (ValueError, RecursionError) as error:
        where = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise DataError(f"{path}{where}: not valid JSON ({_json_reason(error)}). Repair the file there.") from error
    if isinstance(rows, dict):
        _refuse_all_in_one(path, rows)
    for number, row in enumerate(rows if isinstance(rows, list) else ()):
        if not isinstance(row, dict):
            raise DataError(
                f"{path}, row {number} (from 0): a JSON {type(row).__name__} where an object with named columns is "
                'needed. Write each row as {"prompt": ..., "chosen": ..., "rejected": ...}.'
            )


def _json_reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 text at byte {error.start}"
    if isinstance(error, UnicodeEncodeError):
        return f"half of a character, {error.object[error.start]!a}, without its other half"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error).partition(";")[0]


def _excerpt(line: bytes, limit: int = 80) -> str:
    text = line.decode("utf-8", errors="replace").strip()
    return repr(text if len(text) <= limit else text[:limit] + "...")


# ---- by rows ------------------------------------------------------------------------------------------------------


def holds_dates(feature: Any) -> bool:
    """Whether a type, or one inside it, is a date or a time, which JSON does not have."""
    if isinstance(feature, dict):
        return any(map(holds_dates, feature.values()))
    inner = getattr(feature, "feature", None)
    return holds_dates(inner) if inner is not None else str(getattr(feature, "dtype", "")).startswith(("time", "date"))


def read_by_rows(path: Path, split: str, streaming: bool) -> Dataset | IterableDataset:
    """The rows of a valid JSON file, with types that hold all of them."""
    types: Any = None
    count = 0
    for row in _rows(str(path)):
        count += 1
        if not isinstance(row, dict):
            raise ValueError("a row is not an object")
        types = _wider(types, _type_of(row))
    if not types:
        raise ValueError("corresponds to no data")
    features = Features({name: _feature(kind) for name, kind in (types or {}).items()})
    # With the time of the last change, so that a cache entry for a path is not used after the file changes.
    source = {"path": str(path.resolve()), "changed": path.stat().st_mtime_ns}
    (part,) = ReadInstruction.from_spec(split).to_absolute({"train": count})
    start, end = part.from_ or 0, count if part.to is None else part.to
    if streaming:
        stream = IterableDataset.from_generator(_rows, features=features, gen_kwargs=source)
        return stream if (start, end) == (0, count) else stream.skip(start).take(end - start)
    return Dataset.from_generator(_rows, features=features, gen_kwargs=source).select(range(start, end))


def _rows(path: str, changed: int = 0) -> Iterator[dict[str, Any]]:
    with open_binary(Path(path)) as stream:
        whole = _first_byte(stream) == b"["
    if not whole:
        try:
            yield from (_parsed(line) for _, line in _lines(Path(path)))
            return
        except ValueError:
            pass  # one object over several lines, which the first line shows
    with open_binary(Path(path)) as stream:
        value = _parsed(stream.read())
    yield from value if isinstance(value, list) else [value]


def _type_of(value: Any) -> Any:
    """A tree of types: a name, `[inner]`, a mapping, or None for null."""
    if value is None:
        return None
    if isinstance(value, dict):
        return {name: _type_of(item) for name, item in value.items()}
    if isinstance(value, list):
        inner: Any = None
        for item in value:
            inner = _wider(inner, _type_of(item))
        return [inner]
    return {bool: "bool", int: "int64", float: "float64", str: "string"}[type(value)]


def _wider(left: Any, right: Any) -> Any:
    if left is None or left == right:
        return right
    if right is None:
        return left
    if isinstance(left, dict) and isinstance(right, dict):
        return {name: _wider(left.get(name), right.get(name)) for name in {**left, **right}}
    if isinstance(left, list) and isinstance(right, list):
        return [_wider(left[0], right[0])]
    numbers = ("int64", "float64")
    return "float64" if left in numbers and right in numbers else _MIXED


def _feature(kind: Any) -> Any:
    if isinstance(kind, dict) and kind:
        return {name: _feature(inner) for name, inner in kind.items()}
    if isinstance(kind, list):
        return List(_feature(kind[0]))
    if kind is None:
        return Value("null")
    # An object without a field has no type in Arrow's files.
    return Json() if isinstance(kind, dict) or kind == _MIXED else Value(kind)
