"""Columns that could matter and are not used: named once, with the option that uses them; drops empty image columns.

Ids, sources and other metadata are never named.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

from datasets import Dataset, IterableDataset

from prefopt.data.columns import column_names, first_rows
from prefopt.data.errors import DataError
from prefopt.data.maps import PEEKED_ROWS
from prefopt.data.messages import plain_text

MEDIA = ("image", "images", "video", "videos", "audio", "audios")

_SYSTEM = re.compile(r"(system|sys)(_?(prompt|message|instruction))?", re.IGNORECASE)
_INPUT = re.compile(r"inputs?|contexts?|backgrounds?|passages?|documents?|histor(y|ies)", re.IGNORECASE)
_BEGUN = re.compile(
    r"prefix(es)?|prefill|(initial|previous|prior|partial|shared)(_\w+)?_(steps?|answers?|responses?|reasoning|solution)",
    re.IGNORECASE,
)
"""The beginning of an answer, which `chosen` and `rejected` continue (Math-Step-DPO)."""
_NUMBER = re.compile(r"margins?|(\w+_)?(weight|score|rating|reward)s?(_\w+)?", re.IGNORECASE)
_MAP_NUMBERS = (
    "a 'weight' weighs rows, a 'margin' is read by margin_dpo, 'chosen_score' and 'rejected_score' are read by losses "
    "that use scores: map it to one of them, or choose such a loss"
)
_PAIRS = "prefopt.pairs/"
"""The schema of pairs that `prefopt pair` wrote: their scores are there for losses that read them."""
_TOOLS = re.compile(r"(available_)?(tools|functions)", re.IGNORECASE)


def unused_columns(dataset: Dataset | IterableDataset, used: Collection[str] = ()) -> dict[str, str]:
    """Columns of a normalised dataset that have values, could matter and are unused -> the option that uses them.

    Args:
        dataset: in canonical columns.
        used: columns that the objective or the model reads, besides those that are always read.
    """
    names = [name for name in column_names(dataset) if name not in {*used, "weight"}]
    rows = first_rows(dataset, PEEKED_ROWS)
    if rows and str(rows[0].get("schema")).startswith(_PAIRS):
        return {}
    found = {}
    for name in names:
        values = [row.get(name) for row in rows]
        hint = _hint(name, values, rows)
        if hint and any(map(_has_content, values)):
            found[name] = hint
    return found


def unused_line(unused: dict[str, str]) -> str:
    """One line that names them, columns with one remedy together; empty if there are none."""
    by_hint: dict[str, list[str]] = {}
    for name, hint in unused.items():
        by_hint.setdefault(hint, []).append(name)
    parts = [f"{', '.join(names)} ({hint})" for hint, names in by_hint.items()]
    return f"Columns not used: {'; '.join(parts)}." if parts else ""


def _hint(name: str, values: Sequence[Any], rows: Sequence[dict[str, Any]]) -> str:
    if name in MEDIA:
        return "read by vision models only"
    if _TOOLS.fullmatch(name):
        if isinstance(rows[0].get("prompt") if rows else None, list) and name == "tools":
            return ""
        return "tools belong to conversations: write the prompt as messages, the column as 'tools'"
    if _NUMBER.fullmatch(name):
        numbers = all(value is None or isinstance(value, int | float) for value in values)
        return _MAP_NUMBERS if numbers else ""
    if _BEGUN.fullmatch(name):
        begun = [plain_text(value).strip() for value in values]
        texts = [plain_text([row.get("prompt"), row.get("chosen")]) for row in rows]
        lost = any(text not in whole for text, whole in zip(begun, texts, strict=True))
        return "if the answers continue it, write it in front of them, or at the prompt's end" if lost else ""
    for ours, pattern, where in (("system", _SYSTEM, "puts it in front of"), ("input", _INPUT, "appends it to")):
        if pattern.fullmatch(name):
            texts = [plain_text(value).strip() for value in values]
            # Where the prompt repeats the column, nothing is lost.
            if all(text in plain_text(row.get("prompt")) for text, row in zip(texts, rows, strict=True)):
                return ""
            if ours == "input" and any(isinstance(value, list) for value in values):
                return f"--columns history={name} puts its turns in front of the prompt"
            return f"--columns {ours}={name} {where} the prompt"
    return ""


def _has_content(value: Any) -> bool:
    if isinstance(value, str):
        return value.strip() not in ("", "[]", "{}", "null")  # JSON text of nothing
    if isinstance(value, list):
        return any(map(_has_content, value))
    return value is not None and value != {}


def without_empty_media(dataset: Any) -> Any:
    """The dataset without empty columns for images and the like; trainers decide by the name of a column.

    Raises:
        DataError: from a stream, as soon as a row fills a column that its first rows left empty.
    """
    if not isinstance(dataset, Dataset | IterableDataset):
        return dataset
    media = [name for name in column_names(dataset) if name in MEDIA]
    if isinstance(dataset, Dataset):
        empty = [name for name in media if _is_blank(dataset, name)]
        return dataset.remove_columns(empty) if empty else dataset
    rows = first_rows(dataset, PEEKED_ROWS) if media else []
    empty = [name for name in media if not any(_has_content(row.get(name)) for row in rows)]
    if not empty:
        return dataset

    def check(row: dict[str, Any], index: int) -> dict[str, Any]:
        for name in empty:
            if _has_content(row.get(name)):
                raise DataError(
                    f"Row {index} (from 0) of the stream has {name!r}, which the first {PEEKED_ROWS} rows leave "
                    "empty. Take these rows out, or put one of them first."
                )
        return {}

    return dataset.map(check, with_indices=True, remove_columns=empty)


def _is_blank(dataset: Dataset, name: str) -> bool:
    # Not decoded: no need to open an image to see that there is one.
    column = dataset.select_columns(name).with_format("arrow")
    return not any(_has_content(value) for batch in column.iter(1000) for value in batch[name].to_pylist())
