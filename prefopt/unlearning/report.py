"""What forgetting did, for people: a table with intervals, answers side by side, a picture over the steps."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from prefopt.safety.files import write_whole
from prefopt.safety.tables import table
from prefopt.unlearning import metrics
from prefopt.unlearning.data import Question
from prefopt.unlearning.measure import UTILITY_SETS, Measured, SetScores, apart, numbers, summaries, utility_of

_SHOWN = {
    "forget_probability": "probability of the answers",
    "forget_rouge": "ROUGE-L recall of its answers",
    "forget_f1": "F1 of its continuations",
    "verbatim_f1": "F1, verbatim set",
    "forget_knowledge_f1": "F1 after examples",
    "forget_truth_ratio": "truth ratio",
    "forget_kl": "KL from the start (nats a token)",
    "extraction_strength": "extraction strength",
    "exact_memorization": "exact memorization",
    "forget_quality": "forget quality (p-value)",
    "log10_forget_quality": "its log10",
    "retain_probability": "probability of the answers",
    "retain_rouge": "ROUGE-L recall of its answers",
    "retain_knowledge_f1": "F1 after examples",
    "retain_truth_ratio": "truth ratio",
    "retain_kl": "KL from the start (nats a token)",
    "real_authors_probability": "probability, real authors",
    "real_authors_rouge": "ROUGE-L recall, real authors",
    "real_authors_truth_ratio": "truth ratio, real authors",
    "world_facts_probability": "probability, world facts",
    "world_facts_rouge": "ROUGE-L recall, world facts",
    "world_facts_truth_ratio": "truth ratio, world facts",
    "model_utility": "model utility (harmonic mean of the nine)",
    "privleak_min_k": "privacy leak (min-k), percent",
}
"""The rows of the table, in order."""

_SECTIONS = {"forget_probability": "Forget set", "retain_probability": "Kept"}
_OF_GOLD = {"forget_quality", "log10_forget_quality"}
"""The gold model's comparison with itself says nothing."""


def table_of(results: Mapping[str, Any], questions: int) -> Table:
    """Every metric before and after, beside the gold model's; after with its 95% interval.

    Args:
        results: as `as_json` returns them.
        questions: number of forgotten ones.
    """
    models = {"before": results["before"], "after": results["after"], "gold model": results["gold"]}
    values = {name: of for name, of in models.items() if of is not None}
    spans = results["intervals"]
    shown = table("", *values, right=tuple(values), title="What was forgotten, what was kept")
    for name, words in _SHOWN.items():
        if name not in values["after"]:
            continue
        if name in _SECTIONS:
            shown.add_row(Text(_SECTIONS[name], style="bold"))
        cells = [
            f"{of[name]:.3g}" if name in of and not (model == "gold model" and name in _OF_GOLD) else ""
            for model, of in values.items()
        ]
        if name in spans:
            low, high = spans[name]
            cells[1] += f" [{low:.2g}, {high:.2g}]"
        shown.add_row(words, *cells)
    shown.caption = (
        f"{questions} forgotten questions. Intervals: 95%, bootstrap over questions. Above p = 0.05, the model cannot "
        "be told from the gold model by its truth ratios."
    )
    return shown


def intervals(measured: Measured) -> dict[str, tuple[float, float]]:
    """95% percentile intervals, over redrawn questions: of every mean, and of the model utility."""
    spans: dict[str, tuple[float, float]] = {}
    for name, scores in measured.items():
        if name == "holdout":
            continue
        if len(scores.probability) > 1:
            columns = _columns(name, scores)
            for what, total in _totals(name, scores).items():
                interval = metrics.bootstrap(total, columns)
                spans[f"{name}_{what}"] = interval.low, interval.high
        for what, values in apart(scores).items():
            if len(values) > 1:
                interval = metrics.bootstrap(np.mean, np.array(values))
                spans[f"{name}_{what}"] = interval.low, interval.high
    if utility_of(measured) is not None:
        samples = [_columns(name, measured[name]) for name in UTILITY_SETS]

        def utility(*redrawn: Any) -> float:
            parts = zip(UTILITY_SETS, redrawn, strict=True)
            values = {
                f"{name}_{what}": total(rows)
                for name, rows in parts
                for what, total in _totals(name, measured[name]).items()
            }
            return metrics.model_utility(values)

        interval = metrics.bootstrap(utility, *samples, resamples=300)
        spans["model_utility"] = interval.low, interval.high
    return spans


def _columns(name: str, scores: SetScores) -> Any:
    return np.array([values for values, _ in summaries(name, scores).values()]).T


def _totals(name: str, scores: SetScores) -> dict[str, Callable[[Any], float]]:
    """The summary of each column of `_columns`, by its name."""
    return {
        what: partial(_of_column, total, at) for at, (what, (_, total)) in enumerate(summaries(name, scores).items())
    }


def _of_column(total: Callable[[Any], Any], column: int, rows: Any) -> float:
    return float(total(rows[:, column]))


def answers_side_by_side(
    questions: Mapping[str, Sequence[Question]], before: Measured, after: Measured, shown: int = 4
) -> Table:
    """Greedy answers before and after to a few questions of each set, spread over it."""
    answers = table("", "question", "before", "after", title="Answers", show_lines=True)
    for name in ("forget", "retain"):
        rows = questions[name] if before[name].answers else ()  # nothing is asked about plain texts
        for row in range(0, len(rows), max(1, math.ceil(len(rows) / shown))):
            texts = (rows[row].question or rows[row].answer[:60], before[name].answers[row], after[name].answers[row])
            answers.add_row(name, *map(Text, texts))
    return answers


def as_json(before: Measured, after: Measured, gold: Measured | None) -> dict[str, Any]:
    """For `results.json`: every metric before, after and of the gold model, and intervals of those after."""
    return {
        "before": numbers(before, gold),
        "after": numbers(after, gold),
        "gold": None if gold is None else numbers(gold, gold),
        "intervals": {name: list(span) for name, span in intervals(after).items()},
    }


def draw(results: Mapping[str, Any], path: Path) -> Path | None:
    """A picture of utility against forget quality over the steps; None without matplotlib or without the numbers."""
    points = [results["before"], *({k.removeprefix("eval_"): v for k, v in e.items()} for e in results["evaluations"])]
    points.append(results["after"])  # where the curve ends, which may be an earlier evaluation
    points = [point for point in points if "log10_forget_quality" in point and "model_utility" in point]
    if not points or importlib.util.find_spec("matplotlib") is None:
        return None
    draw_curves({results["loss"]: points}, results["gold"], path)
    return path


def draw_curves(
    curves: Mapping[str, Sequence[Mapping[str, float]]], gold: Mapping[str, float] | None, path: Path
) -> None:
    """One curve a method: model utility against log10 forget quality; its last point is marked.

    Args:
        curves: of each method, the numbers at its steps in order.
        gold: the gold model's numbers.
        path: the picture; its ending says the format.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for name, points in curves.items():
        across = [point["model_utility"] for point in points]
        up = [point["log10_forget_quality"] for point in points]
        (line,) = axes.plot(across, up, marker="o", markersize=3, label=name)
        axes.plot(across[-1:], up[-1:], marker="s", markersize=8, color=line.get_color())
    axes.axhline(math.log10(0.05), color="grey", linestyle=":", label="p = 0.05")
    if gold is not None and "model_utility" in gold:
        axes.plot([gold["model_utility"]], [0], "*", markersize=14, color="black", label="gold model")
    axes.set_xlabel("model utility")
    axes.set_ylabel("log10 forget quality")
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda unfinished: figure.savefig(unfinished, format=path.suffix[1:], dpi=110))
