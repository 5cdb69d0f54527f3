"""What was read, in lines to check at a glance: the columns that are used, and the first row in pieces."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from datasets import Dataset, IterableDataset

from prefopt.data.columns import (
    EMBEDDINGS,
    GIVEN_LOGPS,
    GROUP_COLUMNS,
    PAIR_COLUMNS,
    UNPAIRED_COLUMNS,
    column_names,
    first_rows,
)
from prefopt.data.groups import SCORES, spread
from prefopt.data.messages import without_nulls
from prefopt.data.schema import kind

_READ = ("weight", "tools", "chat_template_kwargs", *GIVEN_LOGPS, *EMBEDDINGS)
_EXCERPT = 64
"""Characters, so that a line fits into 80 columns."""


def described(dataset: Dataset | IterableDataset, used: Collection[str] = ()) -> Iterator[str]:
    """Lines about a normalised dataset: its columns (`used` are a loss's own), the other columns, its first row."""
    names = column_names(dataset)
    sides = {"pair": PAIR_COLUMNS, "unpaired": UNPAIRED_COLUMNS, "group": (*GROUP_COLUMNS, *({SCORES} & {*names}))}[
        kind(dataset)
    ]
    row = next(iter(first_rows(dataset, 1)), {})
    form = "conversations" if isinstance(row.get("prompt"), list) else "plain text"
    others = [name for name in names if name not in (*sides, *_READ, *used) and not name.endswith("_ids")]
    read = ", ".join(name for name in names if name not in others)
    yield f"Read as {form}: {read}." + (f" Not read: {', '.join(others[:20])}." if others else "")
    shown, texts = spread(row, sides[1:2])
    for name in ("prompt", *texts, *sides[2:]) if row else ():
        yield f"  {name:>10}: {_excerpt(shown.get(name))}"


def _excerpt(value: Any) -> str:
    if isinstance(value, list) and any(isinstance(message, dict) for message in value):
        value = " | ".join(
            f"{message.get('role')}: {message.get('content') or without_nulls(message.get('tool_calls')) or ''}"
            for message in value
            if isinstance(message, dict)
        )
    text = value if isinstance(value, str) else str(value)
    shown = text if len(text) <= _EXCERPT else f"{text[:42]} ... {text[-17:]}"
    return repr(shown)
