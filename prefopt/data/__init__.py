"""Preference data: from a file, folder or Hub name to validated rows of token ids.

The order of use is load_preferences -> normalise -> (mix) -> validate -> clean -> tokenize_dataset. It may import
torch, datasets, transformers and rich; it never imports trl or `prefopt.trainer`. What makes tokens is imported on
first use, because a check without a tokenizer needs neither torch nor transformers.
"""

from typing import TYPE_CHECKING, Any

from prefopt.data.columns import rename_columns
from prefopt.data.errors import DataError
from prefopt.data.findings import Problem, Report
from prefopt.data.fit import drop_overlong
from prefopt.data.load import load_preferences, parse_columns
from prefopt.data.mix import in_proportion, mix, parse_sources, with_origin
from prefopt.data.read import read_preferences
from prefopt.data.schema import kind, normalise
from prefopt.data.validate import clean, validate

if TYPE_CHECKING:
    from prefopt.data.tokenize import tokenize_dataset, tokenize_row

__all__ = [
    "DataError",
    "Problem",
    "Report",
    "clean",
    "drop_overlong",
    "in_proportion",
    "kind",
    "load_preferences",
    "mix",
    "normalise",
    "parse_columns",
    "parse_sources",
    "read_preferences",
    "rename_columns",
    "tokenize_dataset",
    "tokenize_row",
    "validate",
    "with_origin",
]


def __getattr__(name: str) -> Any:
    if name in ("tokenize_dataset", "tokenize_row"):
        from prefopt.data import tokenize

        return getattr(tokenize, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
