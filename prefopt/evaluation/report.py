"""The numbers of one or more models on the same prompts, with intervals over prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from prefopt.evaluation.accuracy import majority_vote, pass_at_k
from prefopt.evaluation.agreement import short_reason
from prefopt.evaluation.arrays import Floats
from prefopt.evaluation.head_to_head import compare_once
from prefopt.evaluation.intervals import Interval, share
from prefopt.evaluation.judges.answers import final_number
from prefopt.evaluation.judges.base import Candidate, Judge, PairJudge
from prefopt.evaluation.texts import distinct_n, repetition, words_of
from prefopt.evaluation.win_rates import length_controlled_win_rate, win_rate
from prefopt.generation.samples import Generator, PromptRow, Sample, SamplingSettings
from prefopt.safety.errors import UsageError


@dataclass(frozen=True)
class Evaluated:
    """A model's samples on the held-out prompts, and their scores.

    Attributes:
        name: of the model.
        groups: the samples of each prompt.
        scores: (N, K) of the judge; NaN where there is none.
        missing: how many scores there are none of, by reason.
    """

    name: str
    groups: list[list[Sample]]
    scores: Floats
    missing: Mapping[str, int] = field(default_factory=dict)

    @property
    def prompt_scores(self) -> Floats:
        """(N,) mean score of each prompt's samples that have one; NaN without any."""
        counts = (~np.isnan(self.scores)).sum(axis=1)
        sums = np.nansum(self.scores, axis=1)
        return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


@dataclass(frozen=True)
class ModelReport:
    """What `report` says of a model; intervals are over prompts.

    Attributes:
        model: its name.
        prompts: how many it was asked.
        unscored: samples without a score.
        missing: how many of them, by reason.
        mean_score: of the judge; for a judge of right and wrong, the accuracy. None for a judge that compares.
        pass_at_k: by k, for a judge of right and wrong.
        majority: accuracy of the most frequent final number of a prompt's samples, where the rows have an answer.
        win_rate: against the first model, by the mean score of each prompt, or by a judge that compares; None for the
            first.
        length_controlled: the same as if answers had the first model's length.
        tokens: mean length of a sample.
        finished: share of samples that ended before the limit.
        distinct_2: share of distinct word pairs among all samples.
        repetition: mean share of repeated four-grams of words within a sample.
    """

    model: str
    prompts: int
    unscored: int
    mean_score: Interval | None
    pass_at_k: Mapping[int, Interval] = field(default_factory=dict)
    majority: Interval | None = None
    win_rate: Interval | None = None
    length_controlled: Interval | None = None
    tokens: float = 0.0
    finished: float = 0.0
    distinct_2: float = 0.0
    repetition: float = 0.0
    missing: Mapping[str, int] = field(default_factory=dict)


def evaluate(
    generator: Generator, prompts: Sequence[PromptRow], judge: Judge, settings: SamplingSettings, name: str = ""
) -> Evaluated:
    """Draw and score samples of one model; a judge that compares gives no scores: name it to `report`."""
    groups = list(generator.sample(prompts, settings))
    if isinstance(judge, PairJudge):
        return Evaluated(name or generator.name, groups, np.full((len(groups), settings.samples), np.nan))
    candidates = [
        Candidate(row.prompt, sample.completion, row.columns)
        for row, group in zip(prompts, groups, strict=True)
        for sample in group
    ]
    verdicts = judge.score(candidates)
    missing = Counter(short_reason(one.reason) for one in verdicts if one.score is None)
    values = [np.nan if one.score is None else one.score for one in verdicts]
    scores = np.array(values, dtype=np.float64).reshape(len(groups), settings.samples)
    if np.isnan(scores).all():
        why = next(one.reason for one in verdicts if one.score is None)
        raise UsageError(f"the judge {judge.name} scored no sample of {name or generator.name}; the first: {why}")
    return Evaluated(name or generator.name, groups, scores, dict(missing.most_common()))


def report(
    models: Sequence[Evaluated],
    prompts: Sequence[PromptRow],
    resamples: int = 1000,
    seed: int = 0,
    *,
    judge: Judge | None = None,
    column: str = "answer",
) -> list[ModelReport]:
    """The numbers of each model; win rates are against the first one, prompt by prompt.

    Prompts that have no score under one of two models do not count for their win rate.

    Args:
        models: on the same prompts.
        prompts: in the order of the models' groups.
        resamples: of each bootstrap.
        seed: of each bootstrap.
        judge: one that compares decides the win rates; sample i of a prompt is compared with the first model's i.
        column: of the prompts with the right number, for the majority vote; GSM8K's whole solutions are read too.
    """
    return [_of_model(one, models[0], prompts, resamples, seed, judge, column) for one in models]


def _of_model(
    model: Evaluated,
    first: Evaluated,
    prompts: Sequence[PromptRow],
    resamples: int,
    seed: int,
    judge: Judge | None,
    column: str,
) -> ModelReport:
    compares = isinstance(judge, PairJudge)
    how: dict[str, Any] = {"resamples": resamples, "seed": seed}
    samples = [sample for group in model.groups for sample in group]
    words = [words_of(sample.completion) for sample in samples]
    means = model.prompt_scores
    facts: dict[str, Any] = {
        "model": model.name,
        "prompts": len(model.groups),
        "unscored": 0 if compares else int(np.isnan(model.scores).sum()),
        "missing": model.missing,
        "mean_score": None if compares else share(means[~np.isnan(means)], **how),
        "tokens": float(np.mean([sample.token_count for sample in samples])),
        "finished": float(np.mean([sample.finished for sample in samples])),
        "distinct_2": distinct_n(words, 2),
        "repetition": float(np.mean([repetition(one, 4) for one in words])),
    }
    passes = passes_at_k(model)
    facts["pass_at_k"] = {k: share(values, **how) for k, values in passes.items()}
    votes = votes_right(model, prompts, column)
    if votes:
        facts["majority"] = share(votes, **how)
    if model is not first:
        preferred = compare_once(model.groups, first.groups, judge, prompts) if isinstance(judge, PairJudge) else None
        won = Wins.of(model, first, preferred)
        facts["win_rate"], facts["length_controlled"] = won.raw(**how), won.length_controlled(**how)
    return ModelReport(**facts)


def passes_at_k(model: Evaluated) -> dict[int, list[float]]:
    """`pass_at_k` of each prompt by k (1, 2, 4 ... the number of samples); empty unless all scores are 0 or 1."""
    if not set(np.unique(model.scores)) <= {0.0, 1.0}:
        return {}
    count = model.scores.shape[1]
    right = model.scores.sum(axis=1).astype(int)
    ks = sorted({1, *(k for k in (2, 4, 8, 16, 32, 64) if k < count), count})
    return {k: [pass_at_k(count, c, k) for c in right] for k in ks}


def votes_right(model: Evaluated, prompts: Sequence[PromptRow], column: str = "answer") -> list[float]:
    """Whether the majority's number is right, for each prompt; empty where a prompt has no number in the column."""
    answers = [final_number(str(row.columns.get(column, ""))) for row in prompts]
    if None in answers or len(answers) < 2:
        return []
    voted = [majority_vote([final_number(sample.completion) for sample in group]) for group in model.groups]
    return [float(vote == answer) for vote, answer in zip(voted, answers, strict=True)]


@dataclass(frozen=True)
class Wins:
    """One model against another on N prompts that both have a score for.

    Attributes:
        wins: (N,) 1 where its mean score is higher, 0.5 for a tie, 0; or how far it is preferred.
        lengths: (N,) its samples' mean characters.
        other_lengths: (N,) the other's.
    """

    wins: Floats
    lengths: Floats
    other_lengths: Floats

    @classmethod
    def of(cls, model: Evaluated, other: Evaluated, preferred: Floats | None = None) -> Wins:
        """Wins by mean score, or as judges that compare prefer them.

        Args:
            model: whose wins.
            other: on the same prompts.
            preferred: (N,) how far the model's answers are preferred, in [0, 1]; NaN where that is not known.
        """
        if preferred is None:
            preferred = (np.sign(model.prompt_scores - other.prompt_scores) + 1) / 2
        both = ~np.isnan(preferred)
        return cls(preferred[both], mean_lengths(model)[both], mean_lengths(other)[both])

    def raw(self, **how: Any) -> Interval:
        """`win_rate`, with its options."""
        return win_rate(self.wins, **how)

    def length_controlled(self, **how: Any) -> Interval:
        """`length_controlled_win_rate`, with its options."""
        return length_controlled_win_rate(self.wins, self.lengths, self.other_lengths, **how)


def mean_lengths(model: Evaluated) -> Floats:
    """(N,) mean characters of each prompt's samples."""
    return np.array([np.mean([len(sample.completion) for sample in group]) for group in model.groups])
