"""The one exception that `prefopt.data` raises for data that the user must look at, and its hints.

It imports nothing of ours but the redaction of secrets, so every file of this folder can use it.
"""

from __future__ import annotations

from prefopt.safety.errors import PrefoptError


class DataError(PrefoptError, ValueError):
    """The data cannot be used. The message says what was wrong, where, and what to do."""
