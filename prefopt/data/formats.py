"""The layouts of preference data that other tools write, as one table: how each is recognised and converted.

A format only moves values into our columns; `messages.py` rewrites messages, `schema.py` does the rest. Formats
whose columns and values have only one meaning are used automatically, and a line about it is returned. The others
must be named with `--format`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, IterableDataset, Value

from prefopt.data.columns import column_names, first_rows
from prefopt.data.errors import DataError
from prefopt.data.maps import PEEKED_ROWS, map_rows
from prefopt.data.messages import as_messages, role, writing
from prefopt.data.paths import feature_at, value_at
from prefopt.safety.errors import did_you_mean

Row = dict[str, Any]

IMPLICIT = "implicit"
"""Not a layout of columns: the user states that `chosen` and `rejected` begin with their prompt."""


@dataclass(frozen=True)
class Format:
    """One layout.

    Attributes:
        name: for `--format`.
        about: where it comes from, in a few words.
        columns: our column -> where its value is, a column or a field of one (`input.messages`).
        also: columns that belong to the layout and may be missing.
        values: where a value is -> the check that it fits the layout.
        row: the last conversion, once the values are in our columns.
        automatic: used without `--format`, because its columns and values have only one meaning.
        labelled: False for answers that nothing judges, which are read only if no label is needed.
    """

    name: str
    about: str
    columns: Mapping[str, str]
    also: Mapping[str, str]
    values: Mapping[str, Callable[[Any], bool]]
    row: Callable[[Row], Row] | None = None
    automatic: bool = True
    labelled: bool = True

    @property
    def needs(self) -> set[str]:
        return {path.partition(".")[0] for path in self.columns.values()}

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Whether the values of a row fit the layout."""
        return all(is_so(value_at(row, path)) for path, is_so in self.values.items())


def _opens_turn(messages: Any) -> bool:
    """Messages without their answer: they end with a user or a tool."""
    messages = as_messages(messages)
    return isinstance(messages, list) and bool(messages) and role(messages[-1]) in ("user", "tool")


def _is_answer(value: Any) -> bool:
    """A text, or messages that begin with the assistant's."""
    if _is_text(value):
        return True
    messages = as_messages(value)
    return isinstance(messages, list) and bool(messages) and role(messages[0]) == "assistant"


def _is_conversation(value: Any) -> bool:
    messages = as_messages(value)
    return isinstance(messages, list) and any(role(message) == "user" for message in messages)


def _ends_answered(messages: Any) -> bool:
    return _is_conversation(messages) and role(as_messages(messages)[-1]) == "assistant"


def _split(row: Row) -> Row:
    """Whole conversation in `prompt` and `chosen`: all up to the last user's turn, and the answer after it."""
    messages = as_messages(row["chosen"])
    if not _is_conversation(messages):
        return {"prompt": None, "chosen": messages}
    cut = max(place for place, message in enumerate(messages) if role(message) == "user") + 1
    return {"prompt": messages[:cut], "chosen": messages[cut:]}


def _is_text(value: Any) -> bool:
    return writing(value) == "text"


def _are_two_texts(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_text, value))


_PAIR = {"chosen": "chosen", "rejected": "rejected"}
_ANSWERS = {"chosen": _is_answer, "rejected": _is_answer}
_TEXTS = {"chosen": _is_text, "rejected": _is_text}
_SYSTEM = {"system": "system"}
_TURNS = {"history": "history", **_SYSTEM}
_CHAT = _SYSTEM | {"tools": "tools"}

FORMATS = (
    Format(
        "openai", "OpenAI's preference format",
        {"prompt": "input.messages", "chosen": "preferred_output", "rejected": "non_preferred_output"},
        {"tools": "input.tools"},
        {"input.messages": _opens_turn, "preferred_output": _is_answer, "non_preferred_output": _is_answer},
    ),
    Format(
        "sharegpt", "conversations with two answers",
        {"prompt": "conversations", **_PAIR}, _CHAT, {"conversations": _opens_turn, **_ANSWERS},
    ),
    Format(
        "axolotl", "messages with two answers",
        {"prompt": "messages", **_PAIR}, _CHAT, {"messages": _opens_turn, **_ANSWERS},
    ),
    Format(
        "swift", "ms-swift: messages with a rejected answer",
        {"prompt": "messages", "chosen": "messages", "rejected": "rejected_response"}, _CHAT,
        {"messages": _ends_answered, "rejected_response": _is_answer},
        row=_split,
    ),
    Format(
        "swift", "ms-swift: two whole conversations",
        {"chosen": "messages", "rejected": "rejected_messages"}, _CHAT,
        {"messages": _ends_answered, "rejected_messages": _ends_answered},
    ),
    Format(
        "swift", "ms-swift: query, response and a rejected response",
        {"prompt": "query", "chosen": "response", "rejected": "rejected_response"}, _TURNS,
        {"query": _is_text, "response": _is_text, "rejected_response": _is_text},
    ),
    Format(
        "orca", "question with two answers",
        {"prompt": "question", **_PAIR}, _SYSTEM, {"question": _is_text, **_TEXTS},
        automatic=False,
    ),
    Format(
        "alpaca", "instruction with two answers",
        {"prompt": "instruction", **_PAIR}, {"input": "input", **_TURNS}, {"instruction": _is_text, **_TEXTS},
        automatic=False,
    ),
    Format(
        "alpaca", "instruction with a list of two outputs, the better one first",
        {"prompt": "instruction", "chosen": "output.0", "rejected": "output.1"}, {"input": "input", **_TURNS},
        {"output": _are_two_texts},
        automatic=False,
    ),
    Format(
        "alpaca", "instruction with an output and whether it is desirable",
        {"prompt": "instruction", "completion": "output", "label": "kto_tag"}, {"input": "input", **_TURNS},
        {"instruction": _is_text, "output": _is_text},
        automatic=False,
    ),
    Format(
        "alpaca", "instruction with an output",
        {"prompt": "instruction", "completion": "output"}, {"input": "input", **_TURNS},
        {"instruction": _is_text, "output": _is_text},
        automatic=False, labelled=False,
    ),
    Format(
        "sharegpt", "conversations and whether the last answer is desirable",
        {"messages": "conversations", "label": "kto_tag"}, _CHAT, {"conversations": _ends_answered},
    ),
    Format(
        "sharegpt", "conversations that end with an answer",
        {"messages": "conversations"}, _CHAT, {"conversations": _ends_answered},
        labelled=False,
    ),
)  # fmt: skip

NAMES = (*dict.fromkeys(layout.name for layout in FORMATS), IMPLICIT)


def read_format(
    dataset: Dataset | IterableDataset, name: str | None = None, unlabelled: bool = False
) -> tuple[Dataset | IterableDataset, dict[str, str], str]:
    """The dataset with the values of its layout in our columns, the origin of each, and a line about the layout.

    The last two are empty if nothing was done. `unlabelled`: answers that nothing judges are read too.

    Raises:
        DataError: for an unknown `name`, or one that the dataset's columns or values do not fit.
    """
    names = column_names(dataset)
    layouts = [layout for layout in FORMATS if layout.labelled or unlabelled]
    layout = _recognised(layouts, dataset, names) if name is None else _asked_for(layouts, dataset, name, names)
    if layout is None:
        return dataset, {}, ""
    paths = {**layout.columns, **{ours: path for ours, path in layout.also.items() if _has(dataset, path)}}

    def move(row: Row) -> Row:
        moved = {ours: value_at(row, path) for ours, path in paths.items()}
        return {**moved, **(layout.row(moved) if layout.row else {})}

    features = {ours: feature_at(dataset, path) for ours, path in paths.items()}
    gone = [name for name in {path.partition(".")[0] for path in paths.values()} if name not in paths]
    told = dict(paths)
    if layout.row is not None:
        told |= {"prompt": "messages up to the last user's", "chosen": "the messages behind it"}
    line = f"Read as {layout.name} ({layout.about}): {', '.join(f'{ours} = {path}' for ours, path in told.items())}."
    return map_rows(dataset, move, features, f"Reading {layout.name}", remove=gone), paths, line


def _recognised(layouts: Sequence[Format], dataset: Dataset | IterableDataset, names: Sequence[str]) -> Format | None:
    layouts = [layout for layout in layouts if layout.automatic and layout.needs <= set(names)]
    if "prompt" in names or not layouts:
        return None
    rows = first_rows(dataset, PEEKED_ROWS)
    return next((layout for layout in layouts if _most_fit(layout, rows)), None)


def _most_fit(layout: Format, rows: Sequence[Any]) -> bool:
    # A few broken rows do not change the layout; validation reports them.
    return bool(rows) and 2 * sum(map(layout.fits, rows)) > len(rows)


def _asked_for(
    layouts: Sequence[Format], dataset: Dataset | IterableDataset, name: str, names: Sequence[str]
) -> Format | None:
    if name not in NAMES:
        hint = did_you_mean(name[:60], NAMES)
        raise DataError(f"--format {name[:60]!r} is not known.{hint} Use one of {', '.join(NAMES)}.")
    if name == IMPLICIT:
        return None
    layouts = [layout for layout in layouts if layout.name == name]
    rows = first_rows(dataset, PEEKED_ROWS)
    for layout in layouts:
        if layout.needs <= set(names) and _most_fit(layout, rows):
            return layout
    about = "; or ".join(f"{', '.join(sorted(layout.needs))} ({layout.about})" for layout in layouts)
    raise DataError(
        f"--format {name} is columns {about}. The dataset's columns {', '.join(names[:30])} are not that, or do not "
        "hold that. Choose another format, or map the columns with --columns prompt=... chosen=... rejected=..."
    )


def format_advice(names: Sequence[str], rows: Sequence[Mapping[str, Any]], unlabelled: bool = False) -> str:
    """The `--format` that fits the rows and is not automatic; empty if there is none."""
    layouts = [layout for layout in FORMATS if not layout.automatic and (layout.labelled or unlabelled)]
    fitting = [layout for layout in layouts if layout.needs <= set(names)]
    layout = next((layout for layout in fitting if _most_fit(layout, rows)), None)
    return "" if layout is None else f"They fit {layout.name} ({layout.about}): pass --format {layout.name}."


def _has(dataset: Dataset | IterableDataset, path: str) -> bool:
    if dataset.features is not None:
        feature = feature_at(dataset, path)
        # A column of nothing, or of empty lists.
        return feature is not None and Value("null") not in (feature, getattr(feature, "feature", None))
    return any(value_at(row, path) is not None for row in first_rows(dataset, PEEKED_ROWS))
