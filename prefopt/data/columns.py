"""Column names: which ones make a preference set, how to rename, and what to say when they are missing.

Names that other datasets use are known here only to suggest the exact `--columns` to pass; they are never taken
silently, since `answer` may as well be the gold answer as the preferred one. It may import datasets and errors.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, TypeVar

from datasets import Dataset, IterableDataset

from prefopt.data.errors import DataError, did_you_mean
from prefopt.data.maps import PEEKED_ROWS, map_rows
from prefopt.data.messages import plain_text, writing
from prefopt.data.paths import feature_at, fields_of, value_at

PAIR_COLUMNS = ("prompt", "chosen", "rejected")
UNPAIRED_COLUMNS = ("prompt", "completion", "label")
_OURS = frozenset((*PAIR_COLUMNS, *UNPAIRED_COLUMNS, "messages", "system", "input", "history"))
_TEXTS = _OURS - {"label"}

# Most telling first: where a set has several of them, the first one found is suggested.
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

_SIDES = {
    "chosen": {"chosen", "preferred", "better", "best", "good", "accepted", "positive", "win", "winner", "winning"},
    "rejected": {"rejected", "dispreferred", "worse", "worst", "bad", "negative", "lose", "loser", "losing"},
}
"""Words by which longer names (`good_answer`, `chosen_conversations`) say which side they hold."""
_NOT = {"non", "not", "un", "less"}

_ABOUT_THE_ROW = re.compile(
    r"(^|_)(id|idx|index|hash|uuid|url|model|source|dataset|split|lang(uage)?|date|time(stamp)?|label|type|category|"
    r"topic|annotator|author|user_?name|license|meta(data)?|comments?|notes?|rationales?|reason(ing)?s?|explanations?|"
    r"critiques?|feedback|judg(e)?ments?|system(_prompt|_message)?|tools)s?$|^(chosen|rejected)_|_(chosen|rejected)$",
    re.IGNORECASE,
)
"""Names of columns that say something about a row and are not its prompt, however long their texts."""

_LISTED = 30
"""Most columns that a message lists, each with the beginning of its name: a file without a header has a text there."""

DatasetT = TypeVar("DatasetT", Dataset, IterableDataset)


def column_names(dataset: Dataset | IterableDataset) -> list[str]:
    """The dataset's columns; a stream that does not know them yet is asked for its first row."""
    if dataset.column_names is not None:
        return list(dataset.column_names)
    return list(next(iter(dataset), {}))


def first_rows(dataset: Dataset | IterableDataset, count: int) -> list[dict[str, Any]]:
    return list(islice(iter(dataset), count))


def without_columns(dataset: DatasetT, names: Iterable[str]) -> DatasetT:
    gone = [name for name in names if name in column_names(dataset)]
    return dataset.remove_columns(gone) if gone else dataset


def is_metadata(name: str) -> bool:
    """Whether a column's name says that it is about the row, not a part of it."""
    return bool(_ABOUT_THE_ROW.search(name))


def text_columns(columns: Mapping[str, str] | None = None) -> frozenset[str]:
    """Names of columns that hold text, never numbers: ours, their aliases, and what `columns` maps to ours."""
    aliases = {alias for ours in _TEXTS for alias in ALIASES.get(ours, ())}
    return _TEXTS | aliases | {theirs for ours, theirs in (columns or {}).items() if ours in _TEXTS}


def rename_columns(dataset: DatasetT, columns: Mapping[str, str]) -> DatasetT:
    """Renames `columns` (ours -> the dataset's own, or a field inside one: `question.text`, `output.0`).

    A column that already has our name and is displaced by the mapping is kept as `<name>_original`.
    """
    have = column_names(dataset)
    inside = {ours: path for ours, path in columns.items() if path not in have and path.partition(".")[0] in have}
    rows = first_rows(dataset, PEEKED_ROWS) if inside else []
    fields = {o: path for o, path in inside.items() if any(value_at(row, path) is not None for row in rows)}
    if fields:
        dataset = _take_fields(dataset, fields)
        columns = {ours: theirs for ours, theirs in columns.items() if ours not in fields}
    for ours, theirs in columns.items():
        if ours not in _OURS and not ours.isidentifier():
            raise DataError(f"--columns {ours}={theirs}: {ours!r} is not a column name. Use one of {_listed(_OURS)}.")
        if theirs not in have:
            swapped = f" Did you mean {theirs}={ours}? Our name comes first." if ours in have else ""
            raise DataError(
                f"--columns {ours}={theirs}: the dataset has no column {theirs[:60]!r}."
                f"{did_you_mean(theirs, have) or swapped} Its columns: {_listed(have)}."
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
    """`"pair"`, `"unpaired"` (also for `messages` + `label`), or None where a needed column is missing."""
    if "chosen" in names and "rejected" in names:
        return "pair"
    if "label" in names and ("messages" in names or ("prompt" in names and "completion" in names)):
        return "unpaired"
    return None


def missing_columns_message(names: Sequence[str], rows: Sequence[Mapping[str, Any]] = ()) -> str:
    """What is missing, what was found, and the `--columns` that makes it work, where one does.

    Args:
        names: the dataset's columns.
        rows: its first rows; what their values cannot be is not suggested.
    """
    from prefopt.data.formats import format_advice
    from prefopt.data.rankings import pairing_advice

    start = f"These columns make no preference set: {_listed(names)}. "
    if advice := pairing_advice(names, rows) or format_advice(names, rows):
        return start + advice
    found = _found(names, rows)
    candidates = (("chosen", "rejected"), ("prompt", "completion", "label"), ("messages", "label"))

    def reach(columns: tuple[str, ...]) -> float:
        return sum(found[wanted] is not None for wanted in columns) / len(columns)

    nearest = max(candidates, key=reach)
    needed = (
        "Needed: prompt, chosen, rejected (prompt may be left out where chosen and rejected hold whole "
        "conversations); or prompt, completion, label; or messages, label. "
    )
    if reach(nearest) == 0:
        return (
            f"{start}{needed}None of them looks like a needed one. Map them with --columns prompt=... chosen=... "
            "rejected=..."
        )
    mapped = ("prompt", *nearest) if nearest[0] == "chosen" else nearest
    lacking = [wanted for wanted in nearest if found[wanted] is None]
    if not lacking:
        return f"{start}{needed}If that is what they mean, pass: --columns {_arguments(found, mapped)}."
    if lacking == ["label"]:
        return f"{start}{needed}{_without_label(names, rows, found, nearest)}"
    if lacking == ["completion", "label"]:
        prompt = f"{_arguments(found, ('prompt',))} ".lstrip()
        return (
            f"{start}{needed}{found['prompt']!r} looks like the prompt, but no column looks like the answers. Map "
            f"them: --columns {prompt}chosen=NAME rejected=NAME."
        )
    return (
        f"{start}{needed}No column looks like {' or '.join(lacking)}; add it, or map it with --columns "
        f"{lacking[0]}=NAME if it has another name, or choose a set that holds preferences."
    )


def _found(names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> dict[str, str | None]:
    """The column, or the field of one, that stands for each of ours."""
    fields = list(dict.fromkeys(path for row in rows for path in fields_of(row)))
    texts = [name for name in (*names, *fields) if not rows or any(writing(value_at(row, name)) for row in rows)]
    places = [[name for name in texts if name in names], [path for path in texts if path not in names]]
    found: dict[str, str | None] = {}
    for wanted in ("chosen", "rejected", "prompt", "completion", "messages"):
        found[wanted] = next((name for place in places if (name := _find(wanted, place))), None)
    found["label"] = _find("label", [name for name in names if _may_be_label(name, rows)])
    for side in ("chosen", "rejected"):
        of_side = [name for name in texts if _side(name) == side]
        found[side] = found[side] or max(of_side, key=lambda name: _length(name, rows), default=None)
    if found["rejected"] and not found["chosen"]:
        found["chosen"] = found["completion"]
    if found["rejected"] and not found["prompt"]:
        found["prompt"] = found["messages"]
    return found


def _side(name: str) -> str | None:
    """The side that the words of a name speak of; `non_preferred_output` speaks of the rejected one."""
    words = {word.lower() for word in re.split(r"[\W_]+|(?<=[a-z])(?=[A-Z])", name)}
    sides = [side for side, telling in _SIDES.items() if words & telling]
    if sides == ["chosen"] and words & _NOT:
        return "rejected"
    return sides[0] if len(sides) == 1 else None


def _length(name: str, rows: Sequence[Mapping[str, Any]]) -> int:
    return sum(len(plain_text(value_at(row, name))) for row in rows)


def _arguments(found: Mapping[str, str | None], mapped: Sequence[str]) -> str:
    """Words of `--columns` as a shell takes them."""
    told = [(ours, found[ours]) for ours in mapped if found[ours] not in (None, ours)]
    return " ".join(shlex.quote(f"{ours}={str(theirs)[:60]}") for ours, theirs in told)


def _without_label(
    names: Sequence[str], rows: Sequence[Mapping[str, Any]], found: Mapping[str, str | None], nearest: Sequence[str]
) -> str:
    texts = [found[wanted] for wanted in nearest if wanted != "label"]
    verdicts = [name for name in names if rows and all(isinstance(row.get(name), bool) for row in rows)]
    if verdicts:
        arguments = _arguments({**found, "label": verdicts[0]}, nearest)
        return f"If true in {verdicts[0]!r} means a desirable completion, pass: --columns {arguments}."
    return (
        f"{' and '.join(map(repr, texts))} look like a conversation, but no column looks like "
        "label, and there is no second answer to prefer it to: without labels and pairs this is data for "
        "supervised fine-tuning. Add label (true or false), or chosen and rejected, or choose a set that holds "
        "preferences."
    )


def _may_be_label(name: str, rows: Sequence[Mapping[str, Any]]) -> bool:
    """Two values at most: a rating or a text is none."""
    values = [row.get(name) for row in rows]
    simple = all(value is None or isinstance(value, str | int | float) for value in values)
    return simple and len({str(value) for value in values if value is not None}) <= 2


def _find(wanted: str, names: Sequence[str]) -> str | None:
    """The column that stands for `wanted`: itself, a known alias, or a near spelling."""
    if wanted in names:
        return wanted
    by_lower = {name.rpartition(".")[2].lower(): name for name in reversed(names)}
    for alias in (wanted, *ALIASES[wanted]):
        if alias in by_lower:
            return by_lower[alias]
    # A spelling slip (`promt`, `Rejected_`); `reject` must not stand for `prompt`, so the other names are excluded.
    spellings = [name for name in names if name not in _OURS and not name.lower().endswith(("_id", "_ids"))]
    hint = did_you_mean(wanted, spellings, limit=1)
    return next((name for name in spellings if repr(name) in hint), None)


def _listed(names: Sequence[str] | frozenset[str]) -> str:
    listed = [name[:60] for name in (sorted(names) if isinstance(names, frozenset) else names)]
    more = f", and {len(listed) - _LISTED} more" if len(listed) > _LISTED else ""
    return ", ".join(listed[:_LISTED]) + more or "(none)"
