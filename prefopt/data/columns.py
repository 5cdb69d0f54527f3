"""Column names: which ones make a preference set, how to rename them, and messages if they are missing.

Names that other datasets use are known here only to suggest the exact `--columns` to pass; they are never used
silently, because `answer` may be the gold answer or the preferred one. It may import datasets and errors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, TypeVar

from datasets import Dataset, IterableDataset

from prefopt.data.errors import DataError
from prefopt.data.maps import PEEKED_ROWS, map_rows
from prefopt.data.paths import feature_at, value_at
from prefopt.safety.errors import did_you_mean

PAIR_COLUMNS = ("prompt", "chosen", "rejected")
UNPAIRED_COLUMNS = ("prompt", "completion", "label")
GROUP_COLUMNS = ("prompt", "completions")
OURS = frozenset(
    (*PAIR_COLUMNS, *UNPAIRED_COLUMNS, *GROUP_COLUMNS, "scores", "messages", "system", "input", "history")
)
_TEXTS = OURS - {"label", "scores"}

# Of `prefopt.losses.scores`, which cannot be imported without torch.
GIVEN_LOGPS = ("ref_chosen_logps", "ref_rejected_logps", "prev_chosen_logps", "prev_rejected_logps")
EMBEDDINGS = ("prompt_embedding", "chosen_embedding", "rejected_embedding")

# Clearest first: if a set has several of them, the first one is suggested.
ALIASES: dict[str, tuple[str, ...]] = {
    "prompt": ("question", "instruction", "query", "input", "prompts", "problem", "user", "history", "post"),
    "chosen": (
        "response_chosen", "chosen_response", "answer_chosen", "chosen_answer", "response_j", "winner", "win",
        "preferred", "better", "accepted", "positive", "best", "response_w", "y_w", "good", "pos",
    ),
    "rejected": (
        "response_rejected", "rejected_response", "answer_rejected", "rejected_answer", "response_k", "loser", "lose",
        "dispreferred", "worse", "negative", "worst", "response_l", "y_l", "bad", "neg",
    ),
    "completion": ("answer", "response", "output", "completions", "generation", "reply", "answers", "text"),
    "label": ("labels", "kto_tag", "desirable", "is_chosen", "thumbs_up", "liked", "feedback", "preference"),
    "messages": ("conversations", "conversation", "dialogue", "dialog", "chat"),
}  # fmt: skip

_ABOUT_THE_ROW = re.compile(
    r"(^|_)(id|idx|index|hash|uuid|url|model|source|dataset|split|lang(uage)?|date|time(stamp)?|label|type|category|"
    r"topic|annotator|author|user_?name|license|meta(data)?|comments?|notes?|rationales?|reason(ing)?s?|explanations?|"
    r"critiques?|feedback|judg(e)?ments?|system(_prompt|_message)?|tools)s?$|^(chosen|rejected)_|_(chosen|rejected)$",
    re.IGNORECASE,
)
"""Names of columns about a row that are not its prompt, even with long texts."""

_LISTED = 30
"""Maximum number of columns in a message, each with the start of its name: without a header names are texts."""

DatasetT = TypeVar("DatasetT", Dataset, IterableDataset)


def column_names(dataset: Dataset | IterableDataset) -> list[str]:
    """The dataset's columns; for a stream without known columns, those of its first row."""
    if dataset.column_names is not None:
        return list(dataset.column_names)
    return list(next(iter(dataset), {}))


def first_rows(dataset: Dataset | IterableDataset, count: int) -> list[dict[str, Any]]:
    return list(islice(iter(dataset), count))


def without_columns(dataset: DatasetT, names: Iterable[str]) -> DatasetT:
    gone = [name for name in names if name in column_names(dataset)]
    return dataset.remove_columns(gone) if gone else dataset


def is_metadata(name: str) -> bool:
    """Whether a column's name means that it is about the row, not a part of it."""
    return bool(_ABOUT_THE_ROW.search(name))


def text_columns(columns: Mapping[str, str] | None = None) -> frozenset[str]:
    """Names of columns that hold text, never numbers: ours, their aliases, and what `columns` maps to ours."""
    aliases = {alias for ours in _TEXTS for alias in ALIASES.get(ours, ())}
    return _TEXTS | aliases | {theirs for ours, theirs in (columns or {}).items() if ours in _TEXTS}


def rename_columns(dataset: DatasetT, columns: Mapping[str, str]) -> DatasetT:
    """Renames `columns` (ours -> the dataset's own, or a field inside one: `question.text`, `output.0`).

    A column that already has our name and is replaced by the mapping is renamed to `<name>_original`.
    """
    have = column_names(dataset)
    inside = {ours: path for ours, path in columns.items() if path not in have and path.partition(".")[0] in have}
    rows = first_rows(dataset, PEEKED_ROWS) if inside else []
    fields = {o: path for o, path in inside.items() if any(value_at(row, path) is not None for row in rows)}
    if fields:
        dataset = _take_fields(dataset, fields)
        columns = {ours: theirs for ours, theirs in columns.items() if ours not in fields}
    for ours, theirs in columns.items():
        if ours not in OURS and not ours.isidentifier():
            raise DataError(f"--columns {ours}={theirs}: {ours!r} is not a column name. Use one of {listed(OURS)}.")
        if theirs not in have:
            swapped = f" Did you mean {theirs}={ours}? Our name comes first." if ours in have else ""
            raise DataError(
                f"--columns {ours}={theirs}: the dataset has no column {theirs[:60]!r}."
                f"{did_you_mean(theirs, have) or swapped} Its columns: {listed(have)}."
            )
    given = list(columns.values())
    for theirs in given:
        if given.count(theirs) > 1:
            twice = ", ".join(ours for ours, name in columns.items() if name == theirs)
            raise DataError(f"--columns: {theirs!r} is mapped to more than one of our columns ({twice}). Keep one.")
    mapping = {theirs: ours for ours, theirs in columns.items() if ours != theirs}
    mapping |= {ours: f"{ours}_original" for ours in columns if ours in have and ours not in given}
    return dataset.rename_columns(mapping) if mapping else dataset


def _take_fields(dataset: Any, fields: Mapping[str, str]) -> Any:
    def take(row: Mapping[str, Any]) -> dict[str, Any]:
        return {ours: value_at(row, path) for ours, path in fields.items()}

    types = {ours: feature_at(dataset, path) for ours, path in fields.items()}
    return map_rows(dataset, take, types, "Reading fields")


def kind_of_columns(names: Sequence[str]) -> str | None:
    """`"pair"`, `"unpaired"` (also for `messages` + `label`), `"group"`, or None if a needed column is missing."""
    if "chosen" in names and "rejected" in names:
        return "pair"
    if "label" in names and ("messages" in names or ("prompt" in names and "completion" in names)):
        return "unpaired"
    return "group" if set(GROUP_COLUMNS) <= set(names) else None


def listed(names: Sequence[str] | frozenset[str]) -> str:
    short = [name[:60] for name in (sorted(names) if isinstance(names, frozenset) else names)]
    more = f", and {len(short) - _LISTED} more" if len(short) > _LISTED else ""
    return ", ".join(short[:_LISTED]) + more or "(none)"
