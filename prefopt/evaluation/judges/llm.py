"""A judge that is a language model: behind an endpoint, in memory, or the policy itself. It follows a rubric."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from prefopt.evaluation.judgements import ABSTAINED
from prefopt.evaluation.judges.base import Candidate, Choice, Contest, Judge, Verdict
from prefopt.generation.samples import Generator, PromptRow, Sample, SamplingSettings, Text
from prefopt.safety.errors import UsageError
from prefopt.safety.files import is_file

UNPARSABLE, CUT = "unparsable", "cut"

_PLACE = re.compile(r"\{(prompt|completion|first|second|answer)\}")
_SCORE = re.compile(r"(?:score\s*[:=]\s*|\[\[)\**\s*(-?\d+(?:\.\d+)?|none)\b", re.IGNORECASE)
_VERDICT = re.compile(r"(?:verdict\s*[:=]\s*\**\s*\[*|\[\[)(A|B|C|tie|none)\b", re.IGNORECASE)
_WINNERS = {"a": 1.0, "b": 0.0, "c": 0.5, "tie": 0.5}


def llm_judge(
    rubric: Path, generator: Generator, settings: SamplingSettings, name: str = "llm", both_orders: bool = True
) -> Judge:
    """A judge that asks a generator.

    The rubric is a text with `{prompt}` and `{completion}`, which asks for a line `Score: 7`; or with `{prompt}`,
    `{first}` and `{second}`, which asks for `Verdict: A`, `B` or `tie` (A is the first). `none` abstains. The last
    such line counts; `[[A]]` and `[[7]]` are read too. `{answer}` is the right answer of the prompt's row.

    Args:
        rubric: the file.
        generator: writes the judgements; the policy for self-rewarding (Yuan et al. 2024, arXiv 2401.10020).
        settings: `samples` is how often each question is asked: scores are averaged, choices stored one by one.
        name: of the judge.
        both_orders: ask about each pair in both orders.

    Raises:
        UsageError: for a rubric without these places, or repeats that would all be the same.
    """
    if not is_file(rubric):
        raise UsageError(f"there is no rubric {rubric}: name a text file with {{prompt}} and {{completion}}")
    text = rubric.read_text(encoding="utf-8")
    places = places_of(text)
    if settings.samples > 1 and settings.temperature == 0:
        raise UsageError(f"the judge {name} would give the same answer {settings.samples} times: set its temperature")
    if "completion" in places and not places & {"first", "second"}:
        return _ScoringModel(text, generator, settings, name)
    if {"first", "second"} <= places and "completion" not in places:
        return _ComparingModel(text, generator, settings, name, both_orders)
    raise UsageError(f"{rubric} must have {{completion}}, or {{first}} and {{second}}, where the answers are to stand")


class _Model:
    cached = True
    every_process = True

    def __init__(self, rubric: str, generator: Generator, settings: SamplingSettings, name: str):
        self._rubric, self._generator, self._settings, self.name = rubric, generator, settings, name
        self.settings: Mapping[str, Any] = {
            "rubric": hashlib.sha256(rubric.encode("utf-8")).hexdigest(), "model": generator.name,
            "sampling": str(settings), "reader": 2,
        }  # fmt: skip

    def _replies(self, questions: Sequence[Mapping[str, str]]) -> list[list[Sample]]:
        """To each question, as often as it is asked."""
        prompts = [PromptRow([{"role": "user", "content": filled(self._rubric, facts)}]) for facts in questions]
        # Equal questions have one id, and one set of samples.
        unique = list({prompt.id: prompt for prompt in prompts}.values())
        groups = zip(unique, self._generator.sample(unique, self._settings), strict=True)
        replies = {prompt.id: samples for prompt, samples in groups}
        return [replies[prompt.id] for prompt in prompts]


def places_of(rubric: str) -> set[str]:
    """What a rubric has a place for: prompt, completion, first, second, answer."""
    return set(_PLACE.findall(rubric))


def filled(rubric: str, facts: Mapping[str, str]) -> str:
    """A rubric with its places filled; in one pass, so that what looks like a place in an answer stays as it is."""
    return _PLACE.sub(lambda place: facts.get(place[1], ""), rubric)


class _ScoringModel(_Model):
    def score(self, candidates: Sequence[Candidate]) -> list[Verdict]:
        asked = [{**facts_of(one.prompt, one.columns), "completion": one.completion} for one in candidates]
        return [_mean_score(samples) for samples in self._replies(asked)]


class _ComparingModel(_Model):
    def __init__(self, rubric: str, generator: Generator, settings: SamplingSettings, name: str, both_orders: bool):
        super().__init__(rubric, generator, settings, name)
        self.both_orders, self.repeats = both_orders, settings.samples

    def compare(self, contests: Sequence[Contest]) -> list[Choice]:
        asked = [{**facts_of(one.prompt, one.columns), "first": one.first, "second": one.second} for one in contests]
        replies = self._replies(asked)
        return [read_choice(samples[one.repeat].completion) for one, samples in zip(contests, replies, strict=True)]


def read_score(text: str, finished: bool = True) -> Verdict:
    """The last score of a reply; none where the reply was cut inside of it, as `Score: 1` of `Score: 10`."""
    scores = [*_SCORE.finditer(text)]
    if not scores:
        return Verdict(None, UNPARSABLE, text)
    last = scores[-1]
    if not finished and last.end() == len(text.rstrip(".")):
        return Verdict(None, CUT, text)
    if last[1].lower() == "none":
        return Verdict(None, ABSTAINED, text, abstain=True)
    return Verdict(float(last[1]), raw=text)


def read_choice(text: str) -> Choice:
    """The last verdict of a reply."""
    verdicts = _VERDICT.findall(text)
    if not verdicts:
        return Choice(None, reason=UNPARSABLE, raw=text)
    if verdicts[-1].lower() == "none":
        return Choice(None, reason=ABSTAINED, raw=text, abstain=True)
    return Choice(_WINNERS[verdicts[-1].lower()], raw=text)


def _mean_score(replies: Sequence[Sample]) -> Verdict:
    """The mean over the replies that have a score; without any, what the first reply says."""
    verdicts = [read_score(reply.completion, reply.finished) for reply in replies]
    scores = [verdict.score for verdict in verdicts if verdict.score is not None]
    raw = "\n---\n".join(reply.completion for reply in replies)
    return Verdict(sum(scores) / len(scores), raw=raw) if scores else replace(verdicts[0], raw=raw)


def facts_of(prompt: Text, columns: Mapping[str, Any]) -> dict[str, str]:
    """What a rubric's `{prompt}` and `{answer}` stand for."""
    if not isinstance(prompt, str):
        lines = [f"{message.get('role')}: {message.get('content')}" for message in prompt]
        prompt = str(prompt[0].get("content")) if len(prompt) == 1 else "\n\n".join(lines)
    return {"prompt": prompt, "answer": str(columns.get("answer", ""))}
