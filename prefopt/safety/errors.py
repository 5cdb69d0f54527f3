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


def is_ours(error: BaseException) -> bool:
    """Whether an error's text is for the user. Any other error is a defect, and its traceback belongs in the report.

    What the operating system reports is for the user whichever library raises it: a full disk, a missing permission,
    a Hub that does not answer.
    """
    # Libraries in Rust (safetensors, tokenizers) raise errors of their own for it, and name its number.
    return getattr(error, "for_users", False) or isinstance(error, OSError) or "(os error " in str(error)


def message_of(error: BaseException) -> str | None:
    """The text for the user, without secrets; None for a defect, and for every error under `PREFOPT_VERBOSE=1`."""
    if not is_ours(error) or os.environ.get("PREFOPT_VERBOSE"):
        return None
    text = redact(str(error)) or type(error).__name__
    return text if getattr(error, "for_users", False) else f"{text}. PREFOPT_VERBOSE=1 shows where"


@contextlib.contextmanager
def retold(
    kind: type[PrefoptError], beginning: str, errors: tuple[type[Exception], ...] = (OSError, ValueError)
) -> Iterator[None]:
    """What a library raises in here becomes an error for the user: `beginning`, a colon and what the library said.

    Args:
        kind: of the error that is raised.
        beginning: names the file, model or option that the library was given.
        errors: the kinds that become one; all others pass.
    """
    try:
        yield
    except errors as error:
        reason = " ".join(str(error).split())[:600] or type(error).__name__
        raise kind(f"{beginning}: {reason}") from error


def show_short_errors() -> None:
    """From now on this process ends with the message alone where an error is for the user."""
    previous = sys.excepthook
    if getattr(previous, "of_prefopt", False):
        return

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if isinstance(error, KeyboardInterrupt):
            # No traceback: Ctrl-C is not a bug.
            print("\nStopped by Ctrl-C.", file=sys.stderr)
        elif (message := message_of(error)) is not None:
            print(f"error: {message}", file=sys.stderr)
        else:
            previous(kind, error, traceback)

    hook.of_prefopt = True  # type: ignore[attr-defined]
    sys.excepthook = hook


def did_you_mean(given: str, known: Iterable[str], limit: int = 3) -> str:
    """` Did you mean 'a' or 'b'?` with a leading space, or nothing when no known name is near."""
    by_lower = {name.lower(): name for name in known}
    near = [by_lower[hit] for hit in difflib.get_close_matches(given.lower(), by_lower, n=limit, cutoff=0.6)]
    return f" Did you mean {' or '.join(repr(name) for name in near)}?" if near else ""
