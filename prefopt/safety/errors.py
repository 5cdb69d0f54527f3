"""How a program ends that cannot go on: our own errors as a message, those of other libraries with their traceback.

Only command lines use it. Inside Python, in a notebook or a test, the errors themselves are raised as ever.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import sys
from collections.abc import Iterable, Iterator
from types import TracebackType

from prefopt.safety.redaction import redact

_USUAL = (ValueError, TypeError, OSError, ArithmeticError)
"""Kinds of Python's own that prefopt raises with words for users; RuntimeErrors are so only under a name of ours."""


def show_short_errors() -> None:
    """From now on this process ends with the message alone where the error is ours.

    An error is ours if prefopt raised it, with words that say what was wrong, where, and what to do. One from deep
    inside another library is a defect of ours or theirs, and its traceback is what a report of it needs.
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
            print(redact(f"error: {error}"), file=sys.stderr)
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
        raise SystemExit(redact(f"error: {error}")) from error


def is_ours(error: BaseException) -> bool:
    """Whether the frame that raised an error is in prefopt, and its kind one that carries words for users."""
    module, traceback = "", error.__traceback__
    while traceback is not None:
        module = str(traceback.tb_frame.f_globals.get("__name__", ""))
        traceback = traceback.tb_next
    meant = isinstance(error, _USUAL) or type(error).__module__.startswith("prefopt.")
    return meant and module.startswith("prefopt.")


def did_you_mean(given: str, known: Iterable[str], limit: int = 3) -> str:
    """` Did you mean 'a' or 'b'?` with a leading space, or nothing when no known name is near."""
    by_lower = {name.lower(): name for name in known}
    near = [by_lower[hit] for hit in difflib.get_close_matches(given.lower(), by_lower, n=limit, cutoff=0.6)]
    return f" Did you mean {' or '.join(repr(name) for name in near)}?" if near else ""
