"""Chat templates are programs that come with a model: errors in them as messages, and a time limit.

They run in the sandbox of transformers, which keeps them from Python's internals and from ranges beyond 100000, but
not from loops within loops. It imports transformers, jinja2 and this folder's errors.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

from jinja2 import TemplateSyntaxError
from jinja2.exceptions import SecurityError

from prefopt.data.errors import DataError

SECONDS = 10.0
"""Maximum processor seconds to render one row; real templates take under a millisecond."""

_PROBE = [{"role": "user", "content": "Hello"}]


def check_template(tokenizer: Any, where: str = "the tokenizer's chat template") -> None:
    """Refuse a template that cannot render any conversation; one that only refuses the probe passes.

    Args:
        tokenizer: with its template, or none.
        where: the name of the template in the message.

    Raises:
        DataError: for broken Jinja (with the line), for what the sandbox stops, for a template that does not end.
    """
    if not getattr(tokenizer, "chat_template", None):
        return
    try:
        with time_limit(where):
            tokenizer.apply_chat_template(_PROBE, tokenize=False, add_generation_prompt=True)
    except (TemplateSyntaxError, SecurityError, OverflowError) as error:
        raise DataError(template_trouble(error, where)) from error
    except DataError:
        raise
    except Exception:
        return  # it may need a system message, tools, or parts; checking the rows will show it


def template_trouble(error: Exception, where: str = "the tokenizer's chat template") -> str:
    """An error of a template in words."""
    if isinstance(error, TemplateSyntaxError):
        return f"{where}, line {error.lineno}: not valid Jinja: {error.message}. Repair it, or pass another template."
    if isinstance(error, SecurityError):
        return f"{where}: the sandbox stopped it: {error}. Look at it before you trust this model."
    return f"{where}: it failed: {str(error) or type(error).__name__}. Repair it, or pass another template."


@contextlib.contextmanager
def time_limit(where: str) -> Iterator[None]:
    """Raises inside after `SECONDS` of processor time, so that a busy machine does not matter.

    Timers reach a process's main thread only, and not on Windows; elsewhere, or within another timer, there is no
    limit. One long operation of C code (`10 ** 10 ** 9`) is not interrupted, the code after it is.

    Raises:
        DataError: naming `where`.
    """
    usable = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
    if not usable or signal.getitimer(signal.ITIMER_VIRTUAL)[0] > 0:
        yield
        return

    def stop(*_: Any) -> None:
        raise DataError(
            f"{where}: not done with one conversation after {SECONDS:g} seconds of processor time, so it may "
            "never end. Look at its loops, or pass another template."
        )

    previous = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, previous)
