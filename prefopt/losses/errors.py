"""The errors of losses that are meant for the user. Imports nothing."""

from __future__ import annotations


class LossError(ValueError):
    """A loss cannot be made, read or computed as asked. The message says what was wrong, where, and what to do."""

    for_users = True  # as `prefopt.safety.errors.PrefoptError` has it, which this package does not import
