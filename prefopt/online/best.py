"""The best round of a run by a held-out number, for the screen, for `RUN/summary.json` and for the model's card."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prefopt.online.folders import RoundFolder
from prefopt.online.summary import with_interval
from prefopt.safety.errors import UsageError
from prefopt.safety.files import write_text
from prefopt.trainer.evaluation import OF_ANSWERS

METRICS = OF_ANSWERS
"""What a best round can be chosen by; more is better. `pass_at_k` takes the largest k, and the win rates are those
against the start, which has 0.5 by definition."""

SCHEMA = "prefopt.rounds_summary/1"

_HEADING = "## Rounds"


@dataclass(frozen=True)
class BestRound:
    """The round with the highest held-out number; the earliest of equals.

    Attributes:
        round: its number; 0 for the initial model.
        metric: one of `METRICS`.
        value: of the metric.
        low, high: the ends of its interval; None where it has none.
        model: the folder of its model in the run's folder, or the initial model's name.
    """

    round: int
    metric: str
    value: float
    low: float | None
    high: float | None
    model: str

    def __str__(self) -> str:
        which = f"round {self.round}, {self.model}" if self.round else "the initial model, before any round"
        return f"Best by {self.metric}: {which} ({with_interval(asdict(self))})"


def best_round(summaries: Sequence[Mapping[str, Any]], metric: str, initial: str) -> BestRound | None:
    """The best of the rounds that have the metric; None if none has it.

    Args:
        summaries: of the start and the rounds.
        metric: one of `METRICS`; where judges only compare, there is no `mean_score`, and `win_rate` stands for it.
        initial: the name of the model before the first round.
    """
    best: BestRound | None = None
    if metric == "mean_score" and measured_by(summaries[-1], metric) is None:
        metric = "win_rate" if measured_by(summaries[-1], "win_rate") else metric
    for summary in summaries:
        number = summary["round"]
        if (measured := measured_by(summary, metric)) is None or (best and measured["value"] <= best.value):
            continue
        model = f"{RoundFolder(Path(), number).model}" if number else initial
        best = BestRound(number, metric, measured["value"], measured["low"], measured["high"], model)
    return best


def run_summary(summaries: Sequence[Mapping[str, Any]], best: BestRound | None) -> str:
    """The content of `RUN/summary.json`: the best round, and what the table shows of each round."""
    rounds = [{name: one.get(name) for name in ("round", "pairs", "heldout", "kl")} for one in summaries]
    facts = {"schema": SCHEMA, "best_round": None if best is None else asdict(best), "rounds": rounds}
    return json.dumps(facts, indent=2, ensure_ascii=False) + "\n"


def measured_by(summary: Mapping[str, Any], metric: str) -> Mapping[str, Any] | None:
    """The value of a metric in a round's summary, with the ends of its interval; None if the round has none."""
    heldout = summary.get("heldout") or {}
    if metric == "mean_score":
        low, high = heldout.get("interval") or (None, None)
        value = heldout.get("mean_score")
        return None if value is None else {"value": value, "low": low, "high": high}
    if metric in ("win_rate", "length_controlled_win_rate"):
        if summary["round"] == 0:
            return {"value": 0.5, "low": None, "high": None}
        return (heldout.get("against_start") or {}).get(metric)
    measured = heldout.get(metric)
    return measured[max(measured, key=int)] if measured and metric == "pass_at_k" else measured or None


def check_metric(summary: Mapping[str, Any], metric: str) -> None:
    """Refuse, before the first round, a metric that the start's held-out answers do not have.

    Raises:
        UsageError: saying what the metric needs.
    """
    needs = {
        "accuracy": "scores that are 0 or 1",
        "pass_at_k": "scores that are 0 or 1 of every held-out answer",
        "majority_vote": "numbers as answers in the held-out prompts",
    }
    if metric in needs and measured_by(summary, metric) is None:
        raise UsageError(f"best_round_by {metric} needs {needs[metric]}: name another one, such as mean_score")


def name_in_card(card: Path, number: int, best: BestRound) -> None:
    """Say in the card of the last round's model which round is the best; an earlier such section is replaced."""
    if not card.exists():
        return
    which = f"round {best.round} (`../../{best.model}`)" if best.round else f"the start (`{Path(best.model).name}`)"
    which = "this round" if best.round == number else which
    shown = with_interval(asdict(best))
    text = card.read_text(encoding="utf-8").partition(f"\n{_HEADING}\n")[0].rstrip("\n")
    section = (
        f"This is the model after round {number}. The best by held-out `{best.metric}` is that of {which}: {shown}."
    )
    write_text(card, f"{text}\n\n{_HEADING}\n\n{section}\n")
