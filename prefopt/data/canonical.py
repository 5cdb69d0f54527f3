"""Rows of Arrow tables as bytes: one text of bytes for equal rows, however a file or a library stores them.

Null fields of objects do not count, nor do the widths of numbers, the order of fields, or large types beside small
ones. Whole columns are written at once; `encoded` writes a Python value in the same way.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]

_BYTES = pa.large_binary()
_NULL = b"n"
_NULL_NUMBER = -(2**63)


def rows_of(table: Any) -> Iterator[memoryview]:
    """The bytes of each row of a table."""
    fields = {name: table.column(name).combine_chunks() for name in table.column_names}
    yield from views(_objects(fields, table.num_rows))


def bytes_of(values: Any) -> Iterator[memoryview]:
    """The bytes of each element of an array."""
    yield from views(_column(values))


def views(texts: Any) -> Iterator[memoryview]:
    """The elements of an array of bytes or strings without nulls, without copies."""
    texts = texts.cast(_BYTES) if texts.type != _BYTES else texts
    if not len(texts):
        return
    _, places, data = texts.buffers()
    ends = np.frombuffer(places, np.int64)[texts.offset : texts.offset + len(texts) + 1].tolist()
    view = memoryview(data if data is not None else b"")
    for start, end in itertools.pairwise(ends):
        yield view[start:end]


def encoded(value: Any) -> bytes:
    """The bytes of one value, as `rows_of` writes it."""
    if value is None:
        return _NULL
    if isinstance(value, bool):
        return b"true" if value else b"false"
    if isinstance(value, int | float):
        return b"#" + (repr(value) if isinstance(value, int) else _float(value)).encode()
    if isinstance(value, str):
        text = value.encode("utf-8", "surrogatepass")
        return b"s%d:%b" % (len(text), text)
    if isinstance(value, bytes):
        return b"s%d:%b" % (len(value), value)
    if isinstance(value, Mapping):
        fields = (encoded(str(name)) + encoded(value[name]) for name in sorted(value) if value[name] is not None)
        return b"{%b}" % b"".join(fields)
    if isinstance(value, list | tuple | np.ndarray):
        return _encoded_list(list(value))
    if hasattr(value, "tobytes"):  # a picture
        return b"p" + encoded(value.tobytes())
    return encoded(str(value))


def _encoded_list(items: list[Any]) -> bytes:
    kinds = {type(item) for item in items if item is not None}
    if kinds and kinds <= {int, float}:
        number: Any = np.int64 if kinds == {int} else np.float64
        none = _NULL_NUMBER if kinds == {int} else np.nan
        body = np.array([none if item is None else item for item in items], number).tobytes()
    else:
        body = b"".join(map(encoded, items))
    return b"[%d:%b]" % (len(items), body)


def _float(value: float) -> str:
    return str(pa.scalar(value, pa.float64()).cast(pa.string()).as_py())


def _column(values: Any) -> Any:
    """`bytes_of` as an array."""
    kind = values.type
    if isinstance(values, pa.ExtensionArray):
        return _column(values.storage)
    if pa.types.is_dictionary(kind):
        return _column(values.cast(kind.value_type))
    if pa.types.is_null(kind):
        return pa.array([_NULL] * len(values), _BYTES)
    if pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind):
        wide = values.cast(pa.float64()) if pa.types.is_floating(kind) else values
        prefix = b"" if pa.types.is_boolean(kind) else b"#"
        return _or_null(_joined(prefix, wide.cast(pa.large_string()).cast(_BYTES)), values)
    if any(is_so(kind) for is_so in _TEXTS):
        return _or_null(_text(values.cast(_BYTES)), values)
    if pa.types.is_struct(kind):
        names = [kind.field(place).name for place in range(kind.num_fields)]
        return _or_null(_objects(dict(zip(names, values.flatten(), strict=True)), len(values)), values)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return _or_null(_lists(values), values)
    return pa.array(map(encoded, values.to_pylist()), _BYTES)


_TEXTS = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)


def _joined(*parts: Any) -> Any:
    """Arrays and bytes joined element by element; null where one is null."""
    return pc.binary_join_element_wise(*(pa.scalar(p, _BYTES) if isinstance(p, bytes) else p for p in (*parts, b"")))


def _or_null(texts: Any, values: Any) -> Any:
    return pc.if_else(values.is_valid(), texts, pa.scalar(_NULL, _BYTES)) if values.null_count else texts


def _text(values: Any) -> Any:
    return _joined(b"s", _decimal(pc.binary_length(values)), b":", values)


def _decimal(numbers: Any) -> Any:
    return numbers.cast(pa.large_string()).cast(_BYTES)


def _objects(fields: Mapping[str, Any], count: int) -> Any:
    parts: list[Any] = [pa.array([b"{"] * count, _BYTES)]
    for name in sorted(fields):
        text = _joined(encoded(name), _column(fields[name]))
        values = fields[name]
        parts.append(pc.if_else(values.is_valid(), text, pa.scalar(b"", _BYTES)))
    return _joined(*parts, b"}")


def _lists(values: Any) -> Any:
    """`[count:items]`; numbers are eight bytes each, everything else as it is alone."""
    lengths = pc.fill_null(pc.list_value_length(values), 0)
    ends = np.concatenate([[0], np.cumsum(lengths.to_numpy(zero_copy_only=False), dtype=np.int64)])
    items = values.flatten()  # without the items of nulls
    if pa.types.is_integer(items.type) or pa.types.is_floating(items.type):
        wide, none = (pa.int64(), _NULL_NUMBER) if pa.types.is_integer(items.type) else (pa.float64(), np.nan)
        body, places = pc.fill_null(items.cast(wide), none).to_numpy(zero_copy_only=False).tobytes(), ends * 8
    else:
        texts = _column(items).cast(_BYTES)
        starts = np.concatenate([[0], np.cumsum(pc.binary_length(texts).to_numpy(zero_copy_only=False))])
        body, places = b"".join(views(texts)), starts[ends]
    buffers = [None, pa.py_buffer(places.astype(np.int64).tobytes()), pa.py_buffer(body)]
    joined = pa.Array.from_buffers(_BYTES, len(values), buffers)
    return _joined(b"[", _decimal(lengths), b":", joined, b"]")
