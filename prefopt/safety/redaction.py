"""Removes secrets from everything that is printed, logged, saved or published: tokens, keys, passwords in URLs.

A secret is recognised by its value (environment variables such as HF_TOKEN or WANDB_API_KEY, and values passed to
`remember`), by its form (`hf_...`, `scheme://user:password@host`), or by the name beside it (`hub_token: ...`,
`--hub_token ...`). Imports the standard library alone.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

MASK = "***"

_NAME = (
    r"(?:hub|hf|hugging_?face|api|access|auth|wandb|secret)[\w-]*?(?:tok(?:en|n)?|key)|api_?key|passw(?:or)?d|secret"
)
_SECRET_NAME = re.compile(rf"(?:^|[^a-z])(?:{_NAME}|token)$", re.IGNORECASE)
_SPECIAL_TOKEN = re.compile(r"^(?:pad|eos|bos|unk|sep|cls|mask|image)_token$", re.IGNORECASE)
_ENVIRONMENT = re.compile(r"(?:^|_)(?:TOKEN|API_?KEY|ACCESS_KEY|PASSWORD|PASSWD|SECRET|SECRET_KEY)$")
_PATTERNS = (
    (re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^/\s'\"]+@", re.IGNORECASE), rf"\1{MASK}@"),
    (re.compile(r"\bhf_[A-Za-z0-9]{16,}"), f"hf_{MASK}"),
    (re.compile(r"(\bBearer\s+)[\w.~+/-]{8,}=*", re.IGNORECASE), rf"\1{MASK}"),
    (re.compile(r"([?&](?:access_token|token|api_key|key|sig|signature)=)[^&\s'\"]+", re.IGNORECASE), rf"\1{MASK}"),
    (re.compile(r"(['\"]token['\"]\s*:\s*['\"])[^'\"]+", re.IGNORECASE), rf"\1{MASK}"),
    (re.compile(rf"((?:{_NAME})['\"]?\s*[:=]\s*['\"]?)[^\s,'\"}}\])]+", re.IGNORECASE), rf"\1{MASK}"),
    (re.compile(rf"(--[\w-]*(?:{_NAME})['\"]?,?\s+['\"]?)[^\s'\"-][^\s'\"]*", re.IGNORECASE), rf"\1{MASK}"),
)
_SHORTEST = 6
"""Shorter values are not searched for: they are not secrets, and would match ordinary words."""

_remembered: set[str] = set()


def is_secret(name: str) -> bool:
    """Whether an option or a setting of this name holds a secret: `hub_token`, `api_key`; not `pad_token`."""
    return bool(_SECRET_NAME.search(name)) and not _SPECIAL_TOKEN.match(name)


def remember(*values: str | None) -> None:
    """Remove these values everywhere from now on."""
    _remembered.update(value for value in values if value and len(value) >= _SHORTEST)


def redact(text: str) -> str:
    """The text with `***` in place of every secret."""
    values = _remembered | {
        value
        for name, value in os.environ.items()
        if _ENVIRONMENT.search(name) and not _SPECIAL_TOKEN.match(name) and len(value) >= _SHORTEST
    }
    # Longest first: one secret may begin with another.
    for value in sorted(values, key=len, reverse=True):
        text = text.replace(value, MASK)
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text


def redacted(value: Any, name: str = "") -> Any:
    """A setting without secrets: texts redacted, values with a secret's name masked, also inside mappings."""
    if isinstance(value, Mapping):
        return {key: redacted(entry, str(key)) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(redacted(entry, name) for entry in value)
    if isinstance(value, str):
        return MASK if is_secret(name) and value else redact(value)
    return value


def words_without_secrets(words: Sequence[str]) -> list[str]:
    """The words of a command line, with every secret's value masked, and remembered."""
    kept: list[str] = []
    for word in words:
        option, equals, value = word.partition("=")
        before = kept[-1] if kept else ""
        is_value = before.startswith("--") and "=" not in before and not word.startswith("--")
        if is_value and is_secret(_option(before)):
            remember(word)
            kept.append(MASK)
            continue
        if option.startswith("--") and equals and is_secret(_option(option)):
            remember(value)
            word = f"{option}={MASK}"
        kept.append(redact(word))
    return kept


def _option(word: str) -> str:
    return word.lstrip("-").replace("-", "_")


def command_line(words: Sequence[str]) -> str:
    """A command as one would type it, without secrets and without the name of the home folder."""
    home = os.path.expanduser("~")
    shown = [word.replace(home, "~") if len(home) > 1 else word for word in words_without_secrets(words)]
    # The tilde means the home folder only outside quotes, and *** needs none.
    return " ".join(word if word == MASK else shlex.quote(word) for word in shown)


# ---- for a whole program -----------------------------------------------------------------------------------------


def guard_process() -> None:
    """Keep secrets out of what this process logs, out of its tracebacks, and out of `sys.argv`.

    Experiment trackers store `sys.argv` with every run. May be called more than once.
    """
    sys.argv[1:] = words_without_secrets(sys.argv[1:])
    make = logging.getLogRecordFactory()
    if getattr(make, "redacts", False):
        return

    def make_redacted(*arguments: Any, **keywords: Any) -> logging.LogRecord:
        record: logging.LogRecord = make(*arguments, **keywords)
        try:
            message = record.getMessage()
        except (TypeError, ValueError, KeyError):
            return record  # logging reports a record that cannot be formatted itself
        if (clean := redact(message)) != message:
            record.msg, record.args = clean, ()
        return record

    make_redacted.redacts = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(make_redacted)
    sys.excepthook = _redacted_traceback


def _redacted_traceback(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    sys.stderr.write(redact("".join(traceback.format_exception(kind, error, trace))))
