"""Errors with a text for the user, and how a command line ends with one: the message alone, without a traceback.

In a notebook or a test the errors themselves are raised.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import sys
from collections.abc import Iterable, Iterator
from types import TracebackType

from prefopt.safety.redaction import redact


class PrefoptError(Exception):
    """An error whose text is for the user: what was wrong, where, and what to do. Secrets are taken out of it."""

    for_users = True  # `prefopt.losses`, which imports nothing of ours, has it on its LossError

    def __init__(self, message: object = ""):
        super().__init__(redact(str(message)))


class UsageError(PrefoptError, ValueError):
    """An option, an argument or a file that cannot be used as it is."""


def show_short_errors() -> None:
    """From now on this process ends with the message alone where the error is ours.

    `PREFOPT_VERBOSE=1` shows every traceback.
    """
    previous = sys.excepthook
    if getattr(previous, "of_prefopt", False):
        return

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if isinstance(error, KeyboardInterrupt):
            # Where the program was when Ctrl-C came is no defect to report.
            print("\nStopped by Ctrl-C.", file=sys.stderr)
        elif is_ours(error) and not os.environ.get("PREFOPT_VERBOSE"):
            print(f"error: {message_of(error)}", file=sys.stderr)
        else:
            previous(kind, error, traceback)

    hook.of_prefopt = True  # type: ignore[attr-defined]
    sys.excepthook = hook


@contextlib.contextmanager
def short_errors() -> Iterator[None]:
    """The same for a part of a program.

    Raises:
        SystemExit: with the message, in place of an error of ours.
    """
    try:
        yield
    except Exception as error:
        if not is_ours(error) or os.environ.get("PREFOPT_VERBOSE"):
            raise
        raise SystemExit(f"error: {message_of(error)}") from error


def is_ours(error: BaseException) -> bool:
    """Whether an error's text is for the user. Any other error is a defect, and its traceback belongs in the report.

    An OSError is so wherever it comes from: the disk is full, a file may not be read, the Hub does not answer.
    """
    return getattr(error, "for_users", False) or isinstance(error, OSError)


def message_of(error: BaseException) -> str:
    """The text of an error that `is_ours`, without secrets."""
    text = redact(str(error)) or type(error).__name__
    return text if getattr(error, "for_users", False) else f"{text}. PREFOPT_VERBOSE=1 shows where"


def did_you_mean(given: str, known: Iterable[str], limit: int = 3) -> str:
    """` Did you mean 'a' or 'b'?` with a leading space, or nothing when no known name is near."""
    by_lower = {name.lower(): name for name in known}
    near = [by_lower[hit] for hit in difflib.get_close_matches(given.lower(), by_lower, n=limit, cutoff=0.6)]
    return f" Did you mean {' or '.join(repr(name) for name in near)}?" if near else ""
