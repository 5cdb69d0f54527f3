"""What every judge has: a name, settings that identify it, and `score` or `compare`."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from prefopt.evaluation.judgements import ABSTAINED
from prefopt.generation.samples import Text


@dataclass(frozen=True)
class Candidate:
    """A completion to be scored.

    Attributes:
        prompt: a text or messages.
        completion: the text.
        columns: what else the prompt's row holds (`answer`, ...).
    """

    prompt: Text
    completion: str
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Contest:
    """Two completions of one prompt, in the order in which they are shown; `repeat` counts the times it is asked."""

    prompt: Text
    first: str
    second: str
    columns: Mapping[str, Any] = field(default_factory=dict)
    repeat: int = 0


@dataclass(frozen=True)
class Verdict:
    """A score, or the reason why there is none; `raw` is what the judge wrote."""

    score: float | None
    reason: str = ""
    raw: str = ""
    abstain: bool = False

    def __post_init__(self) -> None:
        if self.score is not None and not math.isfinite(self.score):
            raise ValueError(f"a score must be finite, got {self.score}")


@dataclass(frozen=True)
class Choice:
    """How far the completion shown first is preferred, in [0, 1] with 0.5 for a tie, or why it is not known.

    Attributes:
        first: 1, 0.5 or 0, or a probability; None without a choice.
        is_probability: `first` is a probability and is stored as one.
        reason: why there is no choice.
        raw: what the judge wrote.
        abstain: the judge declined.
    """

    first: float | None
    is_probability: bool = False
    reason: str = ""
    raw: str = ""
    abstain: bool = False

    def __post_init__(self) -> None:
        if self.first is not None and not 0 <= self.first <= 1:
            raise ValueError(f"a preference must be in [0, 1], got {self.first}")


@runtime_checkable
class ScoreJudge(Protocol):
    """Scores completions one by one.

    Attributes:
        name: stands in each judgement; different for the judges of one run.
        settings: all that its scores depend on; judgements are cached under their hash.
        cached: whether looking a score up is cheaper than computing it.

    A judge with `every_process = True` is asked in all processes of `accelerate launch` at once, any other in the
    main process alone.
    """

    name: str
    settings: Mapping[str, Any]
    cached: bool

    def score(self, candidates: Sequence[Candidate]) -> Sequence[Verdict]:
        """A verdict for each candidate."""
        ...


@runtime_checkable
class PairJudge(Protocol):
    """Chooses between two completions; the attributes are those of `ScoreJudge`, and how it is asked.

    Attributes:
        both_orders: ask about each pair twice, with the completions swapped.
        repeats: times each question is asked.
    """

    name: str
    settings: Mapping[str, Any]
    cached: bool
    both_orders: bool
    repeats: int

    def compare(self, contests: Sequence[Contest]) -> Sequence[Choice]:
        """A choice for each contest."""
        ...


Judge = ScoreJudge | PairJudge


def settings_hash(settings: Mapping[str, Any]) -> str:
    """A digest of a judge's settings."""
    words = json.dumps(settings, ensure_ascii=False, sort_keys=True, default=str)
    return hashlib.sha256(words.encode("utf-8")).hexdigest()[:16]


def verdict_of(value: Any) -> Verdict:
    """The verdict that a function's return value stands for: a number, True, False, or None to abstain."""
    if value is None:
        return Verdict(None, ABSTAINED, abstain=True)
    try:
        score = float(value.item() if hasattr(value, "item") else value)  # of an array or a tensor with one number
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return Verdict(None, f"not a number: {value!r}"[:200])
    return Verdict(score) if math.isfinite(score) else Verdict(None, f"not a number: {score}")


_CHOICES = {"first": 1.0, "second": 0.0, "tie": 0.5}


def choice_of(value: Any) -> Choice:
    """The choice that a return value stands for: "first", "second", "tie", a probability, or None to abstain."""
    if value is None:
        return Choice(None, reason=ABSTAINED, abstain=True)
    if isinstance(value, str) and value in _CHOICES:
        return Choice(_CHOICES[value])
    verdict = verdict_of(value)
    if verdict.score is None:
        return Choice(None, reason=verdict.reason)
    if not 0 <= verdict.score <= 1:
        return Choice(None, reason=f"not a probability: {verdict.score}")
    return Choice(verdict.score, is_probability=not isinstance(value, bool))


def raised(error: Exception) -> str:
    """The reason of a judge that raised."""
    return f"raised: {type(error).__name__}: {error}"[:300]
