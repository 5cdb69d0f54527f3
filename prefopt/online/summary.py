"""The summary of a round: counts and numbers, as JSON beside its files, as lines, and as a table of all rounds."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.table import Table

from prefopt.evaluation.agreement import agreements, summarize
from prefopt.evaluation.judgements import Judgement, scores_by_prompt
from prefopt.evaluation.texts import distinct_n, repetition, similarity, words_of
from prefopt.generation.samples import Sample
from prefopt.safety.tables import table


def sample_numbers(samples: Sequence[Sample], judgements: Sequence[Judgement], weights: Any) -> dict[str, Any]:
    """`numbers_of` samples, with the weighted mean of their judges' scores."""
    by_prompt = scores_by_prompt(judgements, weights)
    scores = (by_prompt.get(sample.prompt_id, {}).get(sample.index) for sample in samples)
    return numbers_of(samples, [score for score in scores if score is not None])


def numbers_of(samples: Sequence[Sample], scores: Sequence[float]) -> dict[str, Any]:
    """Mean score, length and variety of samples.

    Returns:
        `samples`, `scored`, `unfinished`, `mean_score` (None without scores), `mean_tokens`; `distinct_2`, the share
        of all pairs of words that are distinct; `repetition`, the mean share of a sample's runs of four words that
        occurred in it before; `similarity` of answers to different prompts, which rises when all answers become alike.
    """
    first = {sample.prompt_id: sample.completion for sample in reversed(samples)}
    words = [words_of(sample.completion) for sample in samples]
    return {
        "samples": len(samples),
        "scored": len(scores),
        "unfinished": sum(not sample.finished for sample in samples),
        "mean_score": statistics.fmean(scores) if scores else None,
        "mean_tokens": statistics.fmean(sample.token_count for sample in samples) if samples else None,
        "distinct_2": distinct_n(words, 2),
        "repetition": statistics.fmean(repetition(one, 4) for one in words) if words else None,
        "similarity": similarity(first),
    }


def judge_numbers(judgements: Sequence[Judgement], samples: Sequence[Sample]) -> dict[str, Any]:
    """What a round's judgements say of its judges.

    Returns:
        `judges`: a `JudgeSummary` each (position bias, length bias, what is missing); `agreements`: an `Agreement` of
        every two judges that ordered the same samples.
    """
    return {
        "judges": [asdict(one) for one in summarize(judgements, samples)],
        "agreements": [{**asdict(one), "judges": list(one.judges)} for one in agreements(judgements)],
    }


# ---- for the screen ----------------------------------------------------------------------------------------------


def judge_lines(summary: Mapping[str, Any]) -> Iterator[str]:
    """A line for each judge of a round with its biases, and one for every two judges."""
    for one in summary.get("judges", []):
        biases = {
            "ties": one["ties"] if one["kind"] == "preference" else one["tied_pairs"],
            "the first shown wins": one["first_wins"],
            "both orders agree": one["consistent"],
            "the longer wins": one["longer_wins"],
        }
        facts = [f"{one['judged']} judged", *(f"{n} {reason}" for reason, n in one["missing"].items())]
        facts += [f"{name} {share:.0%}" for name, share in biases.items() if share is not None]
        yield f"Judge {one['judge']}: {', '.join(facts)}"
    for two in summary.get("agreements", []):
        kappa = "" if two["kappa"] is None else f" (kappa {two['kappa']:.2f})"
        yield f"Judges {' and '.join(two['judges'])} order {two['same']:.0%} of {two['pairs']} pairs alike{kappa}"


def heldout_line(summary: Mapping[str, Any]) -> str:
    """The held-out numbers of a round that the table has no column for; "" if there are none."""
    numbers = summary.get("heldout") or {}
    facts = [f"pass@{k} {with_interval(one)}" for k, one in numbers.get("pass_at_k", {}).items()]
    if numbers.get("majority_vote"):
        facts.append(f"majority vote {with_interval(numbers['majority_vote'])}")
    for name, other in (("start", "the start"), ("previous", "the round before")):
        won = numbers.get(f"against_{name}")
        if won and (name == "start" or summary["round"] > 1):
            controlled = with_interval(won["length_controlled_win_rate"])
            facts.append(f"wins against {other} {with_interval(won['win_rate'])}, length-controlled {controlled}")
    if kl := summary.get("kl"):
        error = "" if kl["standard_error"] is None else f" \u00b1 {kl['standard_error']:.2g}"
        facts.append(f"KL to the initial model {kl['mean']:.3g}{error} nats")
    facts += [f"{count} without a score: {reason}" for reason, count in numbers.get("unscored", {}).items()]
    return f"Held-out answers of round {summary['round']}: {'; '.join(facts)}" if facts else ""


def rounds_table(summaries: Sequence[Mapping[str, Any]], rows: str = "pairs") -> Table:
    """One row a round: pairs, what was left out, the score of its samples, the held-out numbers.

    Win rates against the start and KL have a column where a round has them.

    Args:
        summaries: of the start and the rounds.
        rows: what the rows that a round trains on are called.
    """
    more = {"win": any(_win(one) is not None for one in summaries), "KL": any(one.get("kl") for one in summaries)}
    headings = [
        *("round", rows, "unpaired", "ties", "cut", "score", "held-out [95%]"),
        *(name for name, shown in more.items() if shown),
        "tokens",
    ]
    shown = table(*headings, right=headings, title="Rounds", box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for summary in summaries:
        pairs, drawn, heldout = (summary.get(name) or {} for name in ("pairs", "samples", "heldout"))
        low, high = heldout.get("interval") or (None, None)
        score = {"value": heldout.get("mean_score"), "low": low, "high": high}
        cells = {
            "round": str(summary["round"]) if summary["round"] else "start",
            rows: _number(pairs.get("pairs")),
            "unpaired": _number(sum(pairs["prompts_without_pair"].values()) if pairs else None),
            "ties": _number(
                sum(n for reason, n in pairs["pairs_left_out"].items() if "tie" in reason) if pairs else None
            ),
            "cut": _number(drawn.get("unfinished")),
            "score": _number(drawn.get("mean_score")),
            "held-out [95%]": with_interval(score, digits=2),
            "win": _number(_win(summary), 2),
            "KL": _number((summary.get("kl") or {}).get("mean"), 2),
            "tokens": _number(heldout.get("mean_tokens")),
        }  # fmt: skip
        shown.add_row(*(cells[name] for name in headings))
    return shown


def _win(summary: Mapping[str, Any]) -> float | None:
    won = (summary.get("heldout") or {}).get("against_start")
    return float(won["win_rate"]["value"]) if won else None


def with_interval(one: Mapping[str, float | None], digits: int = 3) -> str:
    """A value and its ends, as in `0.64 [0.54, 0.73]`; "" without a value. The ends have so many digits."""
    if one["value"] is None:
        return ""
    ends = "" if one["low"] is None else f" [{_number(one['low'], digits)}, {_number(one['high'], digits)}]"
    return _number(one["value"]) + ends


def _number(value: float | None, digits: int = 3) -> str:
    if value is None or not isinstance(value, float):
        return "" if value is None else str(value)
    return f"{value:.0f}" if 10**digits <= abs(value) < 1e6 else f"{value:.{digits}g}"
