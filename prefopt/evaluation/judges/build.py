"""Judges from texts (`--judge number,column=gold`) or mappings (a configuration's `{judge: number, column: gold}`)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefopt.evaluation.judges.answers import AnswerJudge
from prefopt.evaluation.judges.base import Judge
from prefopt.evaluation.judges.function import function_judge
from prefopt.evaluation.judges.labels import LabelsJudge
from prefopt.safety.errors import UsageError, did_you_mean


@dataclass(frozen=True)
class JudgeSpec:
    """Which judge, and how it is set.

    Attributes:
        kind: one of `KINDS`.
        value: what follows the kind: a function, a pattern, a file.
        options: of the kind.
        weight: of its scores among those of several judges.
    """

    kind: str
    value: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    weight: float = 1.0


@dataclass(frozen=True)
class _Kind:
    value: str  # what it is; "" where there is none
    options: Mapping[str, Callable[[str], Any]]
    make: Callable[[str, Mapping[str, Any]], Judge]


def _yes(text: str) -> bool:
    if text.lower() not in ("yes", "no", "true", "false", "1", "0"):
        raise ValueError("must be yes or no")
    return text.lower() in ("yes", "true", "1")


def _at_least_one(text: str) -> int:
    if int(text) < 1:
        raise ValueError("must be at least 1")
    return int(text)


_ANSWER = {"name": str, "column": str}
_KINDS: dict[str, _Kind] = {
    "exact": _Kind("", _ANSWER, lambda value, options: AnswerJudge("exact", **options)),
    "number": _Kind("", _ANSWER, lambda value, options: AnswerJudge("number", **options)),
    "math": _Kind("", _ANSWER, lambda value, options: AnswerJudge("math", **options)),
    "regex": _Kind("PATTERN", _ANSWER, lambda value, options: AnswerJudge("regex", pattern=value, **options)),
    "function": _Kind(
        "MODULE:FUNCTION", {"name": str, "both_orders": _yes, "repeats": _at_least_one},
        lambda value, options: function_judge(value, **options),
    ),
    "labels": _Kind("FILE", {"name": str}, lambda value, options: LabelsJudge(Path(value), **options)),
}  # fmt: skip
KINDS = tuple(_KINDS)


def parse_judge(spec: str | Mapping[str, Any]) -> JudgeSpec:
    """Read `KIND`, `KIND:VALUE` or `module:function`, with options after commas: `regex:(\\d+)$,column=gold,weight=2`.

    A mapping has the same text under `judge`, and the options beside it.

    Raises:
        UsageError: for an unknown kind or option, or a value that is missing or not read.
    """
    text, given = (spec, {}) if isinstance(spec, str) else (str(spec.get("judge", "")), dict(spec))
    given.pop("judge", None)
    text, *parts = re.split(r",(?=[a-z_]+=)", text)
    given.update(dict(part.split("=", 1) for part in parts))
    kind, _, value = text.partition(":")
    if kind not in _KINDS and value:
        kind, value = "function", text
    if kind not in _KINDS:
        raise UsageError(
            f"no judge {text!r}.{did_you_mean(kind, KINDS)} There are {', '.join(map(_usage, KINDS))}, and "
            "module:function"
        )
    if bool(value) != bool(_KINDS[kind].value):
        raise UsageError(f"the judge {text!r} must be written as {_usage(kind)}")
    weight = _read(text, "weight", given.pop("weight", 1.0), float)
    readers = _KINDS[kind].options
    for name in given:
        if name not in readers:
            raise UsageError(
                f"the judge {text!r} has no option {name!r}.{did_you_mean(name, readers)} It has "
                f"{', '.join((*readers, 'weight'))}"
            )
    return JudgeSpec(kind, value, {name: _read(text, name, v, readers[name]) for name, v in given.items()}, weight)


def make_judge(spec: JudgeSpec) -> Judge:
    """The judge, with its function imported, its model loaded and its files read."""
    return _KINDS[spec.kind].make(spec.value, spec.options)


def _usage(kind: str) -> str:
    return f"{kind}:{_KINDS[kind].value}" if _KINDS[kind].value else kind


def _read(judge: str, name: str, value: Any, reader: Callable[[str], Any]) -> Any:
    try:
        return reader(str(value))
    except ValueError as error:
        raise UsageError(f"{name}={value} of the judge {judge!r} cannot be read: {error}") from None
