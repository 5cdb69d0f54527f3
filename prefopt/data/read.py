"""From a name to normalised rows, for commands and recipes: load, recognise the layout, name unused columns."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection, Mapping

from datasets import Dataset, IterableDataset

from prefopt.data.columns import first_rows, text_columns
from prefopt.data.doubts import doubts
from prefopt.data.errors import DataError
from prefopt.data.load import load_preferences
from prefopt.data.maps import PEEKED_ROWS
from prefopt.data.schema import normalise


def read_preferences(
    name: str,
    *,
    config: str | None = None,
    split: str = "train",
    columns: Mapping[str, str] | None = None,
    format: str | None = None,
    streaming: bool = False,
    used: Collection[str] = (),
    unlabelled: bool = False,
    say: Callable[[str], object] | None = None,
) -> Dataset | IterableDataset:
    """`normalise(load_preferences(name))`, with their arguments.

    Raises:
        DataError: of both, the second with the name of the set.
    """
    loaded = load_preferences(
        name, config=config, split=split, streaming=streaming, text_columns=text_columns(columns)
    )
    try:
        read = normalise(loaded, columns, format=format, used=used, unlabelled=unlabelled, say=say)
    except DataError as error:
        raise DataError(
            f"{name}: {error}".replace("prefopt pair DATA", f"prefopt pair {shlex.quote(name)}")
        ) from error
    if say is not None:
        for line in doubts(first_rows(read, PEEKED_ROWS), columns or ()):
            say(line)
    return read
