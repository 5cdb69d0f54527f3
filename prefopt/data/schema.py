"""Recognises published preference formats and converts them to three: pairs, unpaired feedback and groups.

Pairs have `prompt`, `chosen`, `rejected`; unpaired rows `prompt`, `completion`, `label`; groups `prompt`, a list of
`completions`, and `scores` unless the list is in order. Texts are plain strings or lists of messages, one of the two
throughout. Other columns stay. No row is dropped or checked here.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, Literal, cast

import numpy as np
from datasets import ClassLabel, Dataset, Features, IterableDataset, List, Value

from prefopt.data.advice import missing_columns_message
from prefopt.data.columns import (
    PAIR_COLUMNS,
    UNPAIRED_COLUMNS,
    column_names,
    first_rows,
    kind_of_columns,
    rename_columns,
)
from prefopt.data.errors import DataError
from prefopt.data.formats import IMPLICIT, read_format
from prefopt.data.groups import COMPLETIONS, SCORES, WINS, mean_wins
from prefopt.data.maps import MESSAGE, MESSAGES, PEEKED_ROWS, map_rows, python_rows
from prefopt.data.messages import UNREADABLE, as_messages, in_turns, role, same_texts, writing
from prefopt.data.paths import parsed
from prefopt.data.prompts import CONTEXT, add_context, check_implicit, check_repeated, extract_prompt
from prefopt.data.ranking_advice import unread_order
from prefopt.data.transcripts import check_transcripts, from_transcripts, looks_like_transcript
from prefopt.data.unused import unused_columns, unused_line, without_empty_media

logger = logging.getLogger(__name__)

_DESIRABLE = re.compile(r"1|true|yes|good|desirable|chosen|preferred|positive|accepted|liked?|up", re.IGNORECASE)
"""Names of the class that means a desirable completion."""

Row = dict[str, Any]
Style = Literal["text", "messages"]


Kind = Literal["pair", "unpaired", "group"]


def kind(dataset: Dataset | IterableDataset) -> Kind:
    """Which of the three formats a normalised dataset has; an error with its columns if it has neither."""
    names = column_names(dataset)
    found = kind_of_columns(names)
    if found is None:
        raise DataError(missing_columns_message(names))
    return cast(Kind, found)


def normalise(
    dataset: Dataset | IterableDataset,
    columns: Mapping[str, str] | None = None,
    *,
    format: str | None = None,
    transcripts: bool = True,
    used: Collection[str] = (),
    unlabelled: bool = False,
    say: Callable[[str], object] | None = None,
) -> Dataset | IterableDataset:
    """The dataset in canonical columns; unchanged if it has them already.

    Converted are: the layouts of `formats.py`, messages written in other ways (one a side, `from`/`value`, JSON text),
    prompts left implicit in `chosen` and `rejected` (their shared beginning), Human/Assistant transcripts, plain
    prompts beside message completions and the reverse, `messages` + `label`, labels written 0/1.

    Args:
        dataset: rows as they were loaded.
        columns: our name -> the dataset's own. Mapping `system` puts a system message in front of every prompt (rows
            of plain text become conversations), mapping `input` appends its text to the prompt.
        format: a layout's name, if it is not recognised or another is meant.
        transcripts: read Human/Assistant transcripts as conversations, not as plain text.
        used: columns that the objective or the model reads; others that could matter are named.
        unlabelled: rows with one answer and no label are accepted, and get the label true: for objectives that need
            desirable completions alone.
        say: called with lines about the layout and about unused columns; by default they are logged.

    Raises:
        DataError: if there are no preferences, or if the prompt would have to be guessed.
    """
    say = say or logger.warning
    dataset = _one_set(dataset)
    if columns:
        dataset = rename_columns(dataset, columns)
    dataset, taken, line = read_format(dataset, format, unlabelled)
    dataset, rewritten = _rewrite_messages(without_empty_media(dataset))
    rows = first_rows(dataset, PEEKED_ROWS)
    names, labels = column_names(dataset), ""
    if unlabelled and kind_of_columns(names) is None and kind_of_columns([*names, "label"]) is not None:
        dataset, labels = _all_desirable(dataset)
    if kind_of_columns(column_names(dataset)) is None:
        raise DataError(missing_columns_message(names, rows, unlabelled))
    if kind(dataset) == "pair":
        dataset = _normalise_pairs(dataset, rows, transcripts, format == IMPLICIT)
    elif kind(dataset) == "group":
        dataset = _normalise_groups(dataset, rows)
    else:
        dataset, classes = _boolean_label(_normalise_unpaired(dataset, rows))
        labels = labels or classes
    dataset = add_context(dataset, [name for name in CONTEXT if name in (columns or {}) or name in taken])
    for told in (line, rewritten, labels, unused_line(unused_columns(dataset, used))):
        if told:
            say(told)
    return dataset


def _one_set(dataset: Any) -> Dataset | IterableDataset:
    if isinstance(dataset, Dataset | IterableDataset):
        return cast(Dataset | IterableDataset, python_rows(dataset))
    if isinstance(dataset, dict) and all(isinstance(part, Dataset | IterableDataset) for part in dataset.values()):
        raise DataError(f"These are several data sets: {', '.join(map(repr, dataset))}. Pass one, as dataset[NAME].")
    raise DataError(
        f"Rows must be a Dataset or an IterableDataset of the library datasets, not a {type(dataset).__name__}. "
        "Dataset.from_list(rows) makes one of dicts, Dataset.from_pandas(frame) of a table."
    )


def _rewrite_messages(dataset: Dataset | IterableDataset) -> tuple[Dataset | IterableDataset, str]:
    """Columns of messages as lists of `role` and `content`, and a line about those that are text in the file."""
    names = [name for name in (*PAIR_COLUMNS, "completion", "messages") if name in column_names(dataset)]
    rows = first_rows(dataset, PEEKED_ROWS) if names else []
    written = {name: [writing(row.get(name)) for row in rows] for name in names}
    # One text among messages is a broken row, which validation reports.
    changed = [name for name, kinds in written.items() if kinds.count("other messages") > kinds.count("text")]
    if not changed:
        return dataset, ""
    parsed = [name for name in changed if any(isinstance(row.get(name), str) for row in rows)]
    line = f"Read as messages, from the JSON text that they are: {', '.join(parsed)}." if parsed else ""
    features = {name: _of_messages(dataset.features and dataset.features.get(name)) for name in changed}

    def rewrite(row: Row) -> Row:
        read = {name: as_messages(row.get(name)) for name in changed}
        return {
            name: [{"role": UNREADABLE, "content": value}] if isinstance(value, str) else value
            for name, value in read.items()
        }

    return map_rows(dataset, rewrite, features, "Reading messages"), line


def _of_messages(feature: Any) -> Any:
    """The type of a column once its messages are lists of `role` and `content`; None if it must be inferred."""
    feature = getattr(feature, "feature", feature)
    feature = feature[0] if isinstance(feature, list) and feature else feature
    if not isinstance(feature, Mapping):
        return None
    if all(isinstance(inner, List) for inner in feature.values()):  # one object of lists
        feature = {name: inner.feature for name, inner in feature.items()}
    if "from" not in feature and "value" not in feature:
        return [feature] if "content" in feature else None
    # A later row may call a function, and a field that the type lacks would be lost.
    text = Value("string")
    calls = [{"type": text, "function": {"name": text, "arguments": text}}]
    given = {
        name: inner for name, inner in feature.items() if name not in ("from", "value") and inner != Value("null")
    }
    return [{"role": text, "content": feature.get("value", text), "tool_calls": calls, **given}]


def _style(rows: Sequence[Row], column: str) -> Style | None:
    """How a column's texts are written, judged by its first value that is either."""
    for row in rows:
        value = row.get(column)
        if isinstance(value, str):
            return "text"
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return "messages"
    return None


def _normalise_pairs(
    dataset: Dataset | IterableDataset, rows: Sequence[Row], read_transcripts: bool, implicit: bool
) -> Dataset | IterableDataset:
    styles = {name: _style(rows, name) for name in PAIR_COLUMNS}
    names = column_names(dataset)
    has_prompt = "prompt" in names
    transcripts = [
        looks_like_transcript(row.get("chosen")) and looks_like_transcript(row.get("rejected")) for row in rows
    ]
    if read_transcripts and transcripts and 2 * sum(transcripts) >= len(transcripts):
        check_transcripts(names, rows)
        return map_rows(dataset, from_transcripts, dict.fromkeys(PAIR_COLUMNS, MESSAGES), "Reading transcripts")
    sides = {styles["chosen"], styles["rejected"]}
    if styles["prompt"] == "messages" and "text" in sides:
        written = [name for name in ("chosen", "rejected") if styles[name] == "text"]
        features = dict.fromkeys(written, MESSAGES)
        return map_rows(dataset, partial(in_turns, names=written), features, "Writing completions as messages")
    if sides == {"text", "messages"}:
        raise DataError(
            f"Column 'chosen' holds {styles['chosen']} and column 'rejected' holds {styles['rejected']}. "
            "Write both as plain text or both as lists of messages."
        )
    if not has_prompt and not implicit:
        check_implicit(names, rows)
    if styles["chosen"] == "messages" and (not has_prompt or styles["prompt"] == "text" or _repeats_prompt(rows)):
        check_repeated(rows)
        return map_rows(dataset, _pair_from_messages, _copied(dataset, "chosen"), "Separating prompts")
    if not has_prompt:
        return map_rows(dataset, _pair_from_text, _copied(dataset, "chosen"), "Separating prompts")
    return dataset


def _normalise_unpaired(dataset: Dataset | IterableDataset, rows: Sequence[Row]) -> Dataset | IterableDataset:
    names = column_names(dataset)
    if not set(UNPAIRED_COLUMNS) <= set(names):
        if _style(rows, "messages") != "messages":
            plain = _style(rows, "messages") == "text"
            found = "plain text" if plain else f"no list of messages in its first {len(rows)} rows"
            raise DataError(f"Column 'messages' holds {found}. It must hold lists of {MESSAGE} messages.")
        # Removed only after the map, so that nothing of `messages` is lost if it fails.
        features = _copied(dataset, "messages", ("prompt", "completion"))
        return map_rows(dataset, _from_messages, features, "Separating prompts").remove_columns("messages")
    styles = {name: _style(rows, name) for name in ("prompt", "completion")}
    if styles["completion"] == "messages" and styles["prompt"] == "text":
        written, desc = ["prompt"], "Writing prompts as messages"
    elif styles["prompt"] == "messages" and styles["completion"] == "text":
        written, desc = ["completion"], "Writing completions as messages"
    else:
        return dataset
    return map_rows(dataset, partial(in_turns, names=written), dict.fromkeys(written, MESSAGES), desc)


def _normalise_groups(dataset: Dataset | IterableDataset, rows: Sequence[Row]) -> Dataset | IterableDataset:
    if any(isinstance(row.get(COMPLETIONS), str) and isinstance(parsed(row[COMPLETIONS]), list) for row in rows):
        lists = [name for name in (COMPLETIONS, SCORES, WINS) if name in column_names(dataset)]
        dataset = map_rows(dataset, partial(_parsed, names=lists), dict.fromkeys(lists), "Reading lists")
        rows = first_rows(dataset, PEEKED_ROWS)
    texts = [text for row in rows if isinstance(row.get(COMPLETIONS), list) for text in row[COMPLETIONS]]
    written = [writing(text) for text in texts if text is not None]
    if not any(written):
        # Answers in one text, or objects whose field with the text is not known.
        raise DataError(missing_columns_message(column_names(dataset), rows))
    names = column_names(dataset)
    if WINS in names and SCORES not in names:
        scores = {SCORES: List(Value("float64"))}
        dataset = map_rows(dataset, _scores_of_wins, scores, "Averaging win probabilities", remove=[WINS])
    if WINS not in names and SCORES not in names and (advice := unread_order(rows)):
        raise DataError(advice)
    styles = {"text" if isinstance(text, str) else "messages" for text in texts if text is not None}
    if any(isinstance(text, dict) for text in texts):
        dataset = map_rows(dataset, _as_conversations, {COMPLETIONS: None}, "Reading messages")
    if _style(rows, "prompt") == "messages" and styles == {"text"}:
        return map_rows(dataset, _answers_in_turns, {COMPLETIONS: List(MESSAGES)}, "Writing completions as messages")
    if _style(rows, "prompt") == "text" and styles == {"messages"}:
        return map_rows(
            dataset, partial(in_turns, names=["prompt"]), {"prompt": MESSAGES}, "Writing prompts as messages"
        )
    return dataset


def _parsed(row: Row, names: Sequence[str]) -> Row:
    return {name: parsed(row[name]) for name in names}


def _scores_of_wins(row: Row) -> Row:
    """Scores that are mean win probabilities; null, which the check reports, for a value that is not such a matrix."""
    return {SCORES: mean_wins(row[WINS])}


def _as_conversations(row: Row) -> Row:
    """Completions that are one message each, as lists of messages."""
    texts = row[COMPLETIONS]
    return {COMPLETIONS: [as_messages(text) for text in texts] if isinstance(texts, list) else texts}


def _answers_in_turns(row: Row) -> Row:
    texts = row[COMPLETIONS]
    if not isinstance(texts, list):
        return {COMPLETIONS: texts}
    return {COMPLETIONS: [[{"role": "assistant", "content": t}] if isinstance(t, str) else t for t in texts]}


def _copied(
    dataset: Dataset | IterableDataset, column: str, targets: tuple[str, ...] = PAIR_COLUMNS
) -> dict[str, Any]:
    """Types for the columns cut out of `column`: its own."""
    feature = dataset.features[column] if dataset.features is not None else None
    return dict.fromkeys(targets, feature)


def _pair_from_text(row: Row) -> Row:
    chosen, rejected = row["chosen"], row["rejected"]
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        return {"prompt": None, "chosen": chosen, "rejected": rejected}
    return dict(zip(PAIR_COLUMNS, extract_prompt(chosen, rejected), strict=True))


def _pair_from_messages(row: Row) -> Row:
    """Completions given as messages, without a prompt, with a plain one, or with the prompt repeated at the start."""
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    as_it_is = {"prompt": None, **in_turns(row, ("prompt",)), "chosen": chosen, "rejected": rejected}
    if not chosen or not rejected or not isinstance(chosen, list) or not isinstance(rejected, list):
        return as_it_is
    if isinstance(prompt, str) and role(chosen[0]) == role(rejected[0]) == "assistant":
        return as_it_is
    if isinstance(prompt, list):
        if not (_opens_with(chosen, prompt) and _opens_with(rejected, prompt)):
            return as_it_is
        return {"prompt": prompt, "chosen": chosen[len(prompt) :], "rejected": rejected[len(prompt) :]}
    return dict(zip(PAIR_COLUMNS, extract_prompt(chosen, rejected), strict=True))


def _repeats_prompt(rows: Sequence[Row]) -> bool:
    """Whether `chosen` holds the conversation from its start although `prompt` holds its start too."""
    return any(
        isinstance(row.get("prompt"), list) and row["prompt"] and _opens_with(row.get("chosen"), row["prompt"])
        for row in rows
    )


def _opens_with(messages: Any, prompt: list[Any]) -> bool:
    return isinstance(messages, list) and len(messages) > len(prompt) and same_texts(messages[: len(prompt)], prompt)


def _from_messages(row: Row) -> Row:
    """The last message is what the label judges, if it is the assistant's; everything before it is the prompt."""
    messages = row["messages"]
    if not isinstance(messages, list) or not messages or role(messages[-1]) != "assistant":
        return {"prompt": messages, "completion": []}
    return {"prompt": messages[:-1], "completion": messages[-1:]}


def _all_desirable(dataset: Dataset | IterableDataset) -> tuple[Dataset | IterableDataset, str]:
    """Answers without a label, as desirable ones, and a line that says so."""
    whole = "messages" in column_names(dataset)
    what = "the last message of each conversation" if whole else "every completion"
    line = f"The rows have no label: {what} is trained on as a desirable one."
    if isinstance(dataset, Dataset):
        return dataset.add_column("label", np.ones(len(dataset), bool)), line
    features = None if dataset.features is None else Features({**dataset.features, "label": Value("bool")})
    return dataset.map(_desirable, features=features), line


def _desirable(row: Row) -> Row:
    return {"label": True}


def _boolean_label(dataset: Dataset | IterableDataset) -> tuple[Dataset | IterableDataset, str]:
    """Labels stored as the numbers 0 and 1 become booleans; validation reports any other value.

    Returns:
        The dataset, and a line about which named class of a label is read as true.
    """
    feature = dataset.features.get("label") if dataset.features is not None else None
    if isinstance(feature, ClassLabel):
        classes = dict(enumerate(feature.names or ()))
        if _DESIRABLE.fullmatch(classes.get(0, "")):
            raise DataError(
                f"Column 'label' has the classes {', '.join(f'{n} = {name!r}' for n, name in classes.items())}, and 1 "
                "would be read as true, against what the names say. Write true and false."
            )
        return dataset, f"Column 'label' has classes: 1 ({classes.get(1)!r}) is read as true."
    if not isinstance(dataset, Dataset) or not isinstance(feature, Value):
        return dataset, ""
    # One missing label turns a CSV file's whole numbers into floats; without one they really were floats.
    whole, floats = re.match(r"u?int", feature.dtype), re.match(r"float", feature.dtype)
    values = set(dataset.unique("label")) if whole or floats else set()
    if (whole and values <= {0, 1, None}) or (floats and values in ({0, 1, None}, {0, None}, {1, None})):
        return dataset.cast_column("label", Value("bool")), ""
    return dataset, ""
