"""Which rows of an Arrow table certainly have no problem, by whole columns; the others are looked at one by one.

It never names a problem: a row that it is not sure about is left to `row.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
from datasets import Dataset, Value

from prefopt.data.columns import GIVEN_LOGPS
from prefopt.data.row import ANSWERING, MAX_LOGP, MAX_WEIGHT, ROLES

Mask = npt.NDArray[np.bool_]

_BLANK = r"\x00-\x20\x7f\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}"
_CLEAR = rf"^[{_BLANK}]*[^{_BLANK}\[{{]"
"""A text that is not blank and does not begin as messages written as text do."""

_LOOKED_AT = ("label", "weight", "tools", "chat_template_kwargs", "source", "row", *GIVEN_LOGPS)
_STRINGS = ("string", "large_string")


def can_screen(dataset: Dataset, sides: tuple[str, ...]) -> bool:
    """Whether `clear_rows` knows the types of the columns: all texts plain, or all lists of messages."""
    shown, features = dataset.format, dataset.features
    if shown["type"] is not None or len(shown["columns"]) < len(features):
        return False
    texts = [features[name] for name in ("prompt", *sides)]
    alike = all(map(_is_string, texts)) or all(map(_is_messages, texts))
    plain = not any(_holds(features.get(name), _is_no_json_type) for name in ("prompt", *sides, "tools"))
    label = sides != ("completion",) or _dtype(features.get("label")) in ("bool", "int64")
    return alike and plain and label


def screened_columns(names: Iterable[str], sides: tuple[str, ...]) -> list[str]:
    """The columns that `clear_rows` and the search for repeated rows read."""
    return [name for name in names if name in ("prompt", *sides, *_LOOKED_AT)]


def rows_at(dataset: Dataset, places: Sequence[int]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Some rows with their numbers."""
    columns = dataset[list(places)] if places else {}
    for at, place in enumerate(places):
        yield place, {name: values[at] for name, values in columns.items()}


def is_of_messages(column: Any) -> bool:
    return not _is_text(column)


def clear_rows(table: Any, sides: tuple[str, ...]) -> Mask:
    """For each row, whether it certainly has no problem of `row.row_problems`."""
    columns = {name: table.column(name).combine_chunks() for name in table.column_names}
    names = ("prompt", *sides)
    chats = not _is_text(columns["prompt"])
    clear = np.ones(table.num_rows, bool)
    for name in names:
        clear &= _messages_are_clear(columns[name], name) if chats else _texts_are_clear(columns[name])
    if len(sides) == 2:
        last = [_last_contents(columns[side]) if chats else columns[side] for side in sides]
        clear &= _mask(pc.not_equal(*last))
    if chats:
        for name in ("tools", "chat_template_kwargs"):
            if name in columns:
                clear &= _mask(columns[name].is_null())
    return clear & _numbers_are_clear(columns, sides)


def _mask(values: Any) -> Mask:
    mask: Mask = pc.fill_null(values, False).to_numpy(zero_copy_only=False)
    return mask


def _texts_are_clear(texts: Any) -> Mask:
    return _mask(pc.match_substring_regex(texts, _CLEAR))


def _messages_are_clear(column: Any, name: str) -> Mask:
    roles, contents = (_field(column, field) for field in ("role", "content"))
    starts, ends = _places(column)
    full = ends > starts
    first, last = np.where(full, starts, 0), np.where(full, ends - 1, 0)
    if not len(roles):
        return full
    known = _mask(pc.is_in(roles, pa.array(sorted(ROLES if name == "prompt" else ANSWERING), roles.type)))
    unknown = np.concatenate([[0], np.cumsum(~known)])
    clear: Mask = full & (unknown[ends] == unknown[starts]) & _texts_are_clear(contents)[last]
    if name == "prompt":
        clear &= ~_mask(pc.equal(roles, "assistant"))[last]
    return clear & known[first]


def _last_contents(column: Any) -> Any:
    """The last message's text of each row; null for a row without messages."""
    starts, ends = _places(column)
    last = pa.array(ends - 1, mask=ends <= starts)
    return _field(column, "content").take(last)


def _places(column: Any) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Where the messages of each row begin and end in the flattened column."""
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
    ends = np.cumsum(lengths, dtype=np.int64)
    return ends - lengths, ends


def _field(column: Any, name: str) -> Any:
    """A field of all messages, null where the message is."""
    return pc.struct_field(column.flatten(), name)


def _numbers_are_clear(columns: Mapping[str, Any], sides: tuple[str, ...]) -> Mask:
    clear = np.ones(len(columns["prompt"]), bool)
    if sides == ("completion",):
        label = columns["label"]
        clear &= _mask(label.is_valid() if pa.types.is_boolean(label.type) else pc.is_in(label, pa.array([0, 1])))
    for name, low, high in (("weight", 0, MAX_WEIGHT), *((name, -MAX_LOGP, MAX_LOGP) for name in GIVEN_LOGPS)):
        if name in columns:
            numbers = columns[name]
            if not (pa.types.is_floating(numbers.type) or pa.types.is_integer(numbers.type)):
                return np.zeros(len(clear), bool)
            numbers = numbers.cast(pa.float64())
            at_low = pc.greater_equal(numbers, low) if name == "weight" else pc.greater(numbers, low)
            at_high = pc.less_equal(numbers, high) if name == "weight" else pc.less(numbers, high)
            clear &= _mask(pc.and_(at_low, at_high))
    return clear


# ---- types of columns ---------------------------------------------------------------------------------------------


def _is_text(column: Any) -> bool:
    return bool(pa.types.is_string(column.type) or pa.types.is_large_string(column.type))


def _dtype(feature: Any) -> str | None:
    return feature.dtype if type(feature) is Value else None


def _is_string(feature: Any) -> bool:
    return _dtype(feature) in _STRINGS


def _is_messages(feature: Any) -> bool:
    inner = getattr(feature, "feature", feature[0] if isinstance(feature, list) and feature else None)
    return isinstance(inner, Mapping) and all(_is_string(inner.get(name)) for name in ("role", "content"))


def _holds(feature: Any, is_so: Any) -> bool:
    """Whether a type, or one inside it, is so."""
    if isinstance(feature, Mapping):
        return any(_holds(inner, is_so) for inner in feature.values())
    if isinstance(feature, list):
        return any(_holds(inner, is_so) for inner in feature)
    inner = getattr(feature, "feature", None)
    return _holds(inner, is_so) if inner is not None else feature is not None and is_so(feature)


def _is_no_json_type(feature: Any) -> bool:
    """Dates, and types whose stored form differs from their value."""
    return (_dtype(feature) or "date").startswith(("date", "time", "duration"))
