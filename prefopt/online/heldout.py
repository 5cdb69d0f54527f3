"""What the held-out answers of a round say: its scores, and its wins against the start and the round before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prefopt.evaluation.agreement import summarize
from prefopt.evaluation.arrays import Floats
from prefopt.evaluation.head_to_head import preferred
from prefopt.evaluation.intervals import Interval, share
from prefopt.evaluation.judgements import Judgement, read_judgements, scores_by_prompt
from prefopt.evaluation.report import Evaluated, Wins, passes_at_k, votes_right
from prefopt.generation.samples import PromptRow, Sample, by_prompt, read_samples
from prefopt.online.folders import RoundFolder
from prefopt.online.judging import Judges
from prefopt.online.summary import numbers_of


def answers_of(
    samples: Sequence[Sample], judgements: Sequence[Judgement], weights: Mapping[str, float] | None
) -> Evaluated:
    """The answers of a model with the weighted mean of their scores; every prompt has as many."""
    groups = list(by_prompt(samples).values())
    scores = scores_by_prompt(judgements, weights)
    rows = [[scores.get(one.prompt_id, {}).get(one.index, np.nan) for one in group] for group in groups]
    return Evaluated(samples[0].model, groups, np.array(rows, dtype=np.float64))


def unscored(judgements: Sequence[Judgement]) -> dict[str, int]:
    """How many scores of judges are missing, by reason."""
    missing: Counter[str] = Counter()
    for one in summarize(judgements):
        missing.update(one.missing if one.kind == "score" else {})
    return dict(missing)


def answers_in(folder: RoundFolder, weights: Mapping[str, float] | None) -> Evaluated:
    """`answers_of` a round's files."""
    samples, judgements = read_samples(folder.heldout_samples), read_judgements(folder.heldout_judgements)
    return answers_of(list(samples), list(judgements), weights)


def heldout_numbers(answers: Evaluated, prompts: Sequence[PromptRow] = (), column: str = "answer") -> dict[str, Any]:
    """The numbers of a model's answers to held-out prompts; intervals are 95% intervals over prompts.

    Args:
        answers: of the model.
        prompts: that were answered, in the same order.
        column: of the prompts with the right number, for the majority vote.

    Returns:
        Those of `numbers_of`, and `interval` of the mean score. If all scores are 0 or 1, `accuracy`. If there are
        several answers to each prompt, also `pass_at_k` by k, and `majority_vote` where the answers are numbers.
    """
    means = [float(mean) for mean in answers.prompt_scores if not np.isnan(mean)]
    samples = [sample for group in answers.groups for sample in group]
    scores = [float(score) for score in answers.scores.flat if not np.isnan(score)]
    numbers: dict[str, Any] = {**numbers_of(samples, scores), "interval": interval(means)}
    if set(scores) <= {0.0, 1.0} and (accuracy := _measured(means)):
        numbers["accuracy"] = accuracy
    if answers.scores.shape[1] > 1:
        passes = {str(k): _measured(values) for k, values in passes_at_k(answers).items()}
        numbers["pass_at_k"] = {k: measured for k, measured in passes.items() if measured}
        votes = votes_right(answers, prompts, column) if prompts else []
        numbers["majority_vote"] = _measured(votes)
    return {name: value for name, value in numbers.items() if value != {}}


def compared(
    answers: Evaluated, other: Evaluated, prompts: Sequence[PromptRow], judges: Judges | None, path: Path
) -> dict[str, Any]:
    """`against`, by the judges that compare if there are any; what they say is in the file at `path`.

    Every process must call this.
    """
    if judges is None or not judges.compares:
        return against(answers, other)
    judges.compare_models(answers.groups, other.groups, prompts, path)
    return against(answers, other, preferred(answers.groups, read_judgements(path), judges.weights))


def against(answers: Evaluated, other: Evaluated, preferences: Floats | None = None) -> dict[str, Any]:
    """How often a model's answers win against another's to the same prompts.

    Args:
        answers: of the model.
        other: of the other model.
        preferences: (N,) how far judges prefer the model's, in [0, 1]; by the mean scores if left out.

    Returns:
        `prompts` that count, `win_rate` and `length_controlled_win_rate` with their intervals; empty if fewer than two
        prompts were judged.
    """
    won = Wins.of(answers, other, preferences)
    if len(won.wins) < 2:
        return {}
    return {
        "prompts": len(won.wins),
        "win_rate": _as_json(won.raw()),
        "length_controlled_win_rate": _as_json(won.length_controlled()),
    }


def interval(means: Sequence[float]) -> list[float] | None:
    """The bootstrap 95% interval of the mean over prompts; None for fewer than two."""
    measured = _measured(means)
    return [measured["low"], measured["high"]] if measured else None


def _measured(values: Sequence[float]) -> dict[str, float]:
    """The mean over prompts and its interval; empty for fewer than two."""
    return _as_json(share(list(values))) if len(values) > 1 else {}


def _as_json(one: Interval) -> dict[str, float]:
    return {"value": one.value, "low": one.low, "high": one.high}
