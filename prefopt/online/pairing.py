"""The stage that pairs: samples and judgements of a round in, pairs out, and counts of all that was left out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from prefopt.data.groups import COMPLETIONS, SCORES
from prefopt.evaluation.judgements import (
    Judgement,
    Preference,
    Score,
    preferences_by_prompt,
    scores_by_prompt,
    text_hash,
)
from prefopt.generation.samples import PromptRow, Sample, Text, by_prompt
from prefopt.online.builders import PairBuilder
from prefopt.online.pairs import Candidate, Choice, Compare, Pair
from prefopt.safety.errors import UsageError, did_you_mean
from prefopt.safety.jsonl import write_jsonl

SCHEMA = "prefopt.pairs/1"

FOR_THE_TEMPLATE = ("tools", "chat_template_kwargs")
"""Columns of a prompt that its chat template reads: a pair needs them to be rendered as its samples were."""


@dataclass(frozen=True)
class PairSettings:
    """How samples become pairs.

    Attributes:
        builder: makes the pairs of a prompt.
        weights: of judges by name; all judges equally if None.
        gold: the column of a prompt with its gold answer, which may join the winners; None for none.
        unfinished: `drop` leaves out samples that were cut; `keep` uses them.
        duplicates: `merge` makes one candidate, with the mean score, of samples with the same text; `keep` uses each.
        seed: of what a builder draws at random.
    """

    builder: PairBuilder
    weights: Mapping[str, float] | None = None
    gold: str | None = None
    unfinished: Literal["drop", "keep"] = "drop"
    duplicates: Literal["merge", "keep"] = "merge"
    seed: int = 0


def check_gold(settings: PairSettings, prompts: Sequence[PromptRow], option: str = "gold") -> None:
    """Refuse a gold answer that no pair would have, and a builder that lacks one.

    Args:
        settings: how to pair.
        prompts: with their columns.
        option: that names the column, for messages.

    Raises:
        UsageError: naming the option or the column.
    """
    builder, column = settings.builder, settings.gold
    if column is None:
        if builder.name == "against_gold":
            raise UsageError(f"pairs against_gold need gold answers: name their column of the prompts with {option}")
        return
    if not builder.uses_gold:
        raise UsageError(
            f"{option} {column} has no effect with pairs {builder}, which choose by scores: gold answers join in "
            "correct_incorrect, round_robin and against_gold"
        )
    if all(row.columns.get(column) is None for row in prompts):
        there = sorted({name for row in prompts for name in row.columns})
        raise UsageError(
            f"{option} {column}: no prompt has this column.{did_you_mean(column, there)} There are: "
            f"{', '.join(there) or 'none'}"
        )


@dataclass
class PairCounts:
    """What became of the samples of a round.

    Attributes:
        prompts: with at least one sample.
        samples: of all prompts.
        pairs: rows that were written: pairs, groups, or rows of supervised training.
        samples_left_out: before any pair was made, by reason.
        prompts_without_pair: by reason.
        pairs_left_out: pairs or comparisons that the builder did not use, by reason. A reason with "(used)" is counted
            only.
    """

    prompts: int = 0
    samples: int = 0
    pairs: int = 0
    samples_left_out: Counter[str] = field(default_factory=Counter)
    prompts_without_pair: Counter[str] = field(default_factory=Counter)
    pairs_left_out: Counter[str] = field(default_factory=Counter)

    def add(self, samples: int, choice: Choice) -> None:
        """Count the pairs that a builder chose of the samples of one prompt."""
        self.prompts += 1
        self.samples += samples
        self.pairs += choice.rows
        self.pairs_left_out += choice.left_out
        if not choice.rows:
            self.prompts_without_pair[choice.reason] += 1

    def as_json(self) -> dict[str, Any]:
        return {
            name: dict(sorted(value.items())) if isinstance(value, dict) else value
            for name, value in vars(self).items()
        }

    def lines(self, rows: str = "pairs") -> list[str]:
        """The counts in words, one kind a line; kinds without any are left out.

        Args:
            rows: what the rows are called.
        """
        lines = [f"{self.pairs} {rows} from {self.samples} samples of {self.prompts} prompts"]
        for what, counter in (
            ("samples left out", self.samples_left_out),
            (f"prompts without a {rows.removesuffix('s')}", self.prompts_without_pair),
            (f"{rows} or comparisons left out", self.pairs_left_out),
        ):
            if counter:
                parts = ", ".join(f"{count} {reason}" for reason, count in counter.most_common())
                lines.append(f"{counter.total()} {what}: {parts}")
        return lines


@dataclass(frozen=True)
class Judged:
    """The judgements of a round, by prompt.

    Attributes:
        scores: of samples by index.
        preferences: how far the sample with the lower index is preferred, by pair of indices.
        reasons: why a sample has no score, by index.
    """

    scores: Mapping[str, Mapping[int, float]]
    preferences: Mapping[str, Mapping[tuple[int, int], float]]
    reasons: Mapping[tuple[str, int], str]

    def score(self, prompt: str, index: int) -> float | None:
        """The sample's score; without scores, the mean of how far it was preferred to others of its prompt."""
        if (own := self.scores.get(prompt, {}).get(index)) is not None or prompt in self.scores:
            return own
        shares = [
            share if index == pair[0] else 1 - share
            for pair, share in self.preferences.get(prompt, {}).items()
            if index in pair
        ]
        return math.fsum(shares) / len(shares) if shares else None

    def reason(self, prompt: str, index: int) -> str:
        return self.reasons.get((prompt, index), "not judged")

    def compare(self, prompt: str) -> Compare | None:
        """The preferences of a prompt as a judge of two completions; None without preferences."""
        preferences = self.preferences.get(prompt)
        if not preferences:
            return None

        def judge(first: Candidate, second: Candidate) -> float | None:
            low, high = sorted((first.index, second.index))
            share = preferences.get((low, high))
            return share if share is None or first.index == low else 1 - share

        return judge


def judged(
    judgements: Sequence[Judgement], samples: Sequence[Sample], weights: Mapping[str, float] | None = None
) -> Judged:
    """The judgements of these samples, which are of one round.

    Raises:
        UsageError: if a judgement is about another text, or none is of this round.
    """
    rounds = {sample.round for sample in samples}
    if len(rounds) > 1:
        numbers = ", ".join(map(str, sorted(rounds)))
        raise UsageError(f"the samples are of rounds {numbers}: pair the samples of one round at a time")
    ours = [one for one in judgements if one.round in rounds]
    if judgements and not ours:
        number = min(rounds, default=0)
        raise UsageError(
            f"the judgements are of round {judgements[0].round}, the samples of round {number}: judgements of your "
            f'own need "round": {number} in each line'
        )
    _check_texts(ours, samples)
    reasons: dict[tuple[str, int], str] = {}
    for one in ours:
        if isinstance(one, Score) and one.score is None and (weights is None or one.judge in weights):
            reasons[one.prompt_id, one.index] = (one.reason or "no reason stated").split(":")[0]
    return Judged(scores_by_prompt(ours, weights), preferences_by_prompt(ours, weights), reasons)


def _check_texts(judgements: Sequence[Judgement], samples: Sequence[Sample]) -> None:
    texts = {(sample.prompt_id, sample.index): sample.completion for sample in samples}
    for one in judgements:
        indices = sorted(one.indices) if isinstance(one, Preference) else [one.index]
        try:
            completions = [texts[one.prompt_id, index] for index in indices]
        except KeyError:
            continue  # a sample that is not in the file
        if one.text_hash and one.text_hash != text_hash(*completions):
            raise UsageError(
                f"a judgement of prompt {one.prompt_id}, sample {indices}, is about another text than the sample's: "
                "judge these samples again"
            )


def pair_prompt(
    samples: Sequence[Sample],
    judgements: Judged,
    settings: PairSettings,
    counts: PairCounts,
    row: PromptRow | None = None,
) -> list[dict[str, Any]]:
    """The lines of one prompt's pairs, or of its group; counts what is left out.

    Args:
        samples: of the prompt, in the order of their index.
        judgements: of the round.
        settings: how to pair.
        counts: changed in place.
        row: the prompt with its columns, for the gold answer and the chat template.
    """
    first = samples[0]
    candidates = candidates_of(samples, judgements, settings, counts)
    if settings.gold is not None:
        candidates += _gold(row, settings.gold)
    compare = judgements.compare(first.prompt_id) if settings.builder.name == "tournament" else None
    if compare is not None:  # shares of wins are no scores: a tournament does not compare everything with everything
        candidates = [replace(candidate, score=None) for candidate in candidates]
    choice = settings.builder(candidates, f"{settings.seed}/{first.round}/{first.prompt_id}", compare)
    counts.add(len(samples), choice)
    more = {name: row.columns[name] for name in FOR_THE_TEMPLATE if row is not None and name in row.columns}
    lines = [_group_line(choice.group, first)] if choice.group else [_line(pair, first) for pair in choice.pairs]
    return [{**line, **more} for line in lines]


def pairs_of(
    samples: Sequence[Sample],
    judgements: Sequence[Judgement],
    settings: PairSettings,
    counts: PairCounts,
    prompts: Sequence[PromptRow] = (),
) -> Iterator[dict[str, Any]]:
    """The lines of the pairs of a round, prompts in the order of their samples.

    Args:
        samples: of the round.
        judgements: of the samples.
        settings: how to pair.
        counts: changed in place.
        prompts: with their columns, for gold answers and the chat template.
    """
    ours, rows = judged(judgements, samples, settings.weights), {row.id: row for row in prompts}
    for name, group in by_prompt(samples).items():
        yield from pair_prompt(group, ours, settings, counts, rows.get(name))


def write_pairs(
    path: Path,
    samples: Sequence[Sample],
    judgements: Sequence[Judgement],
    settings: PairSettings,
    prompts: Sequence[PromptRow] = (),
) -> PairCounts:
    """Write the pairs of a round to a file, whole or not at all; the arguments are those of `pairs_of`."""
    counts = PairCounts()
    write_jsonl(path, pairs_of(samples, judgements, settings, counts, prompts))
    return counts


def unusable(sample: Sample, settings: PairSettings) -> str:
    """Why a sample makes no pair, whatever its judgement; empty if it may."""
    if not sample.completion.strip():
        return "empty"
    return "unfinished" if not sample.finished and settings.unfinished == "drop" else ""


def same_candidate(sample: Sample, settings: PairSettings) -> int | str:
    """Equal for samples of a prompt that are merged into one candidate."""
    return sample.index if settings.duplicates == "keep" else sample.completion


def candidates_of(
    samples: Sequence[Sample], judgements: Judged, settings: PairSettings, counts: PairCounts
) -> list[Candidate]:
    """The usable samples of a prompt with their scores; counts those that are left out."""
    groups: dict[Any, list[Candidate]] = {}
    for sample in samples:
        if reason := unusable(sample, settings):
            counts.samples_left_out[reason] += 1
            continue
        score = judgements.score(sample.prompt_id, sample.index)
        if score is None and settings.builder.needs_scores and not judgements.preferences.get(sample.prompt_id):
            counts.samples_left_out[f"no score ({judgements.reason(sample.prompt_id, sample.index)})"] += 1
            continue
        one = Candidate(sample.index, sample.completion, score, sample.token_count, sample.finished)
        groups.setdefault(same_candidate(sample, settings), []).append(one)
    counts.samples_left_out["duplicate"] += sum(len(group) - 1 for group in groups.values())
    counts.samples_left_out = +counts.samples_left_out
    return [_merged(group) for group in groups.values()]


def _merged(group: Sequence[Candidate]) -> Candidate:
    """The first of candidates with the same text, with the mean of their scores."""
    first, scores = group[0], [one.score for one in group if one.score is not None]
    mean = math.fsum(scores) / len(scores) if scores else None
    return Candidate(first.index, first.completion, mean, first.token_count, first.finished)


def _gold(row: PromptRow | None, column: str) -> list[Candidate]:
    """The gold answer of a prompt: a text, or messages that end with it."""
    answer = None if row is None else row.columns.get(column)
    if isinstance(answer, list) and answer and isinstance(answer[-1], dict):
        answer = answer[-1].get("content")
    if answer is None:
        return []
    if not isinstance(answer, str):
        raise UsageError(f"column {column!r} must hold a text, the gold answer; here it is {answer!r}"[:300])
    return [Candidate(-1, answer, None, gold=True)]


def _line(pair: Pair, sample: Sample) -> dict[str, Any]:
    shared = {"prompt_id": sample.prompt_id, "round": sample.round, "why": pair.why}
    start = {"schema": SCHEMA, "prompt": sample.prompt}
    if pair.rejected is None:
        row = {"completion": side_after(sample.prompt, pair.chosen.completion), "score": pair.chosen.score}
        return {**start, **row, "index": pair.chosen.index, **shared}
    return {
        **start,
        "chosen": side_after(sample.prompt, pair.chosen.completion),
        "rejected": side_after(sample.prompt, pair.rejected.completion),
        "chosen_score": pair.chosen.score,
        "rejected_score": pair.rejected.score,
        "margin": pair.margin,
        "chosen_index": pair.chosen.index,
        "rejected_index": pair.rejected.index,
        **shared,
    }


def _group_line(group: Sequence[Candidate], sample: Sample) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "prompt": sample.prompt,
        COMPLETIONS: [side_after(sample.prompt, one.completion) for one in group],
        SCORES: [one.score for one in group],
        "indices": [one.index for one in group],
        "prompt_id": sample.prompt_id,
        "round": sample.round,
    }


def side_after(prompt: Text, completion: str) -> Text:
    """A completion as its prompt is: a message after messages, a text after a text."""
    return completion if isinstance(prompt, str) else [{"role": "assistant", "content": completion}]
