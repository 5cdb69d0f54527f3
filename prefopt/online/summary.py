"""The summary of a round: counts and numbers, as JSON beside its files and as a table of all rounds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from prefopt.evaluation.intervals import bootstrap
from prefopt.evaluation.judgements import Judgement, scores_by_prompt
from prefopt.evaluation.texts import distinct_n, words_of
from prefopt.generation.samples import Sample
from prefopt.safety.tables import table


def sample_numbers(samples: Sequence[Sample], judgements: Sequence[Judgement], weights: Any) -> dict[str, Any]:
    """Mean score and length of samples.

    Returns:
        `samples`, `scored`, `unfinished`, `mean_score` (None without scores), `mean_tokens`.
    """
    return _numbers(samples, scores_by_prompt(judgements, weights))


def _numbers(samples: Sequence[Sample], by_prompt: Mapping[str, Mapping[int, float]]) -> dict[str, Any]:
    found = (by_prompt.get(sample.prompt_id, {}).get(sample.index) for sample in samples)
    scores = [score for score in found if score is not None]
    return {
        "samples": len(samples),
        "scored": len(scores),
        "unfinished": sum(not sample.finished for sample in samples),
        "mean_score": statistics.fmean(scores) if scores else None,
        "mean_tokens": statistics.fmean(sample.token_count for sample in samples) if samples else None,
    }


def heldout_numbers(samples: Sequence[Sample], judgements: Sequence[Judgement], weights: Any) -> dict[str, Any]:
    """`sample_numbers` of answers to held-out prompts, with a 95% interval of the mean score over prompts.

    Returns:
        Also `interval`, and `distinct_2`, the share of pairs of words that are distinct.
    """
    by_prompt = scores_by_prompt(judgements, weights)
    means = [statistics.fmean(scores.values()) for scores in by_prompt.values()]
    words = [words_of(sample.completion) for sample in samples]
    return {**_numbers(samples, by_prompt), "interval": interval(means), "distinct_2": distinct_n(words, 2)}


def interval(means: Sequence[float]) -> list[float] | None:
    """The bootstrap 95% interval of the mean over prompts; None for fewer than two."""
    if len(means) < 2:
        return None
    measured = bootstrap(np.mean, list(means))
    return [measured.low, measured.high]


def rounds_table(summaries: Sequence[Mapping[str, Any]]) -> Table:
    """One row a round: pairs, what was left out, the score of its samples, the held-out score, length."""
    headings = ("round", "pairs", "no pair", "ties", "cut", "score", "held-out [95%]", "tokens")
    shown = table(*headings, right=headings, title="Rounds", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for summary in summaries:
        pairs, drawn, heldout = (summary.get(name) or {} for name in ("pairs", "samples", "heldout"))
        shown.add_row(
            str(summary["round"]) if summary["round"] else "start",
            _number(pairs.get("pairs")),
            _number(sum(pairs["prompts_without_pair"].values()) if pairs else None),
            _number(sum(n for reason, n in pairs["pairs_left_out"].items() if "tie" in reason) if pairs else None),
            _number(drawn.get("unfinished")),
            _number(drawn.get("mean_score")),
            _with_interval(heldout),
            _number(heldout.get("mean_tokens")),
        )
    return shown


def _with_interval(heldout: Mapping[str, Any]) -> str:
    if heldout.get("mean_score") is None:
        return ""
    low_high = heldout.get("interval")
    return _number(heldout["mean_score"]) + (f" [{low_high[0]:.3g}, {low_high[1]:.3g}]" if low_high else "")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)
