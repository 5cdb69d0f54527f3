"""The one exception that `prefopt.data` raises for data a person has to look at, and the wording of its hints.

It imports nothing of ours but the redaction of secrets, so every file of this folder can use it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from prefopt.redaction import redact


class DataError(ValueError):
    """The data cannot be used as it is. The message says what was wrong, where, and what to do."""

    def __init__(self, message: str):
        # A source may be named by a URL with a password in it.
        super().__init__(redact(message))


def did_you_mean(given: str, known: Iterable[str], limit: int = 3) -> str:
    """` Did you mean 'a' or 'b'?` with a leading space, or nothing when no known name is near."""
    by_lower = {name.lower(): name for name in known}
    near = [by_lower[hit] for hit in difflib.get_close_matches(given.lower(), by_lower, n=limit, cutoff=0.6)]
    return f" Did you mean {' or '.join(repr(name) for name in near)}?" if near else ""
