"""The charts of a page: which logged numbers belong together, and few enough points for a browser."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prefopt.report.folder import Curve

POINTS = 1000
"""Points of one curve on a page, at most."""
POINTS_OF_A_PAGE = 60_000
"""Points of all curves together: what keeps a page under a megabyte."""


@dataclass(frozen=True)
class Chart:
    """One chart.

    Attributes:
        title: above it.
        unit: of the vertical axis.
        note: what to look for, in one sentence.
        names: the logged numbers on it, without `eval_`.
    """

    title: str
    unit: str
    note: str
    names: tuple[str, ...]


_FIRST = (
    Chart(
        "Log-ratios",
        "nats",
        "log pi - log ref of a whole completion. Both below zero: the policy gives less probability to either answer; "
        "what was learned is their difference.",
        ("ratios/chosen", "ratios/rejected", "ratios/candidate"),
    ),
    Chart("Margin", "nats", "Log-ratio of chosen minus that of rejected.", ("ratios/margins",)),
    Chart("Accuracy", "share of pairs", "Pairs whose chosen answer has the larger reward.", ("rewards/accuracies",)),
    Chart("Reward margin", "reward", "In the loss's own unit, not comparable between losses.", ("rewards/margins",)),
)
_ENTANGLEMENT = (
    Chart(
        "Gradient entanglement",
        "cosine",
        "Between the gradients of the two answers of a probe pair, its mean. Near 1: a step cannot raise the chosen "
        "answer and lower the rejected one.",
        ("entanglement/cosine",),
    ),
    Chart(
        "What a step does to probe pairs",
        "share of pairs",
        "To first order.",
        ("entanglement/chosen_rises", "entanglement/rejected_falls"),
    ),
    Chart(
        "Conditions of entanglement",
        "share of pairs",
        "The inner product of the two gradients: above zero, below the squared norm of either.",
        ("entanglement/inner_positive", "entanglement/inner_below_chosen", "entanglement/inner_below_rejected"),
    ),
    Chart("Gradient norms of probe pairs", "", "", ("entanglement/chosen_norm", "entanglement/rejected_norm")),
    Chart(
        "Push of the loss",
        "",
        "How much the loss changes with either log-probability.",
        ("entanglement/push_chosen", "entanglement/push_rejected"),
    ),
)
_LATER = (
    Chart("Entropy", "nats per token", "Falls where answers become all alike.", ("entropy",)),
    Chart("Gradient norm", "", "Before clipping.", ("grad_norm",)),
    Chart("Learning rate", "", "", ("learning_rate",)),
)
KL = re.compile(r"(?:^|[/_])kl(?:$|[/_])", re.IGNORECASE)
_ENTANGLED = "entanglement/"
_OF_EVALUATION = re.compile(r"^eval_")


def charts_of(curves: Mapping[str, Curve]) -> tuple[list[Chart], list[Chart]]:
    """The charts that a run has numbers for, and those of everything else that it logged."""
    names = list(dict.fromkeys(_OF_EVALUATION.sub("", name) for name in curves))
    terms = [name for name in names if re.fullmatch(r"[^/]+/loss", name) or name.startswith("loss/")]
    # Each on an axis of its own: their scales differ.
    losses = [Chart("Loss", "", "", ("loss",)), *(Chart(f"Term {term}", "", "", (term,)) for term in terms)]
    kl = tuple(name for name in names if KL.search(name))
    between = [Chart("KL to the reference", "nats", "", kl), *_ENTANGLEMENT]
    charts = [chart for chart in (*losses, *_FIRST, *between, *_LATER) if any(name in names for name in chart.names)]
    shown = {name for chart in charts for name in chart.names}
    return charts, [Chart(name, "", "", (name,)) for name in sorted(names) if name not in shown]


def as_data(charts: Iterable[Chart], curves: Mapping[str, Curve], points: int = POINTS) -> list[dict[str, Any]]:
    """The charts with their numbers, for the page's script."""
    data = []
    for chart in charts:
        series = []
        for color, name in enumerate(chart.names):
            for prefix in ("", "eval_"):
                if (curve := curves.get(prefix + name)) is not None:
                    label = _label(chart, name, held_out=bool(prefix))
                    series.append(series_of(label, curve, color, points, held_out=bool(prefix)))
        data.append({"title": chart.title, "unit": chart.unit, "note": chart.note, "series": series})
    return data


def _label(chart: Chart, name: str, held_out: bool) -> str:
    if len(chart.names) == 1:
        return "held out" if held_out else "training"
    short = name.removeprefix("ratios/")
    if short.startswith(_ENTANGLED):
        short = short.removeprefix(_ENTANGLED).replace("_", " ")
    return f"{short}{' held out' if held_out else ''}"


def series_of(label: str, curve: Curve, color: int, points: int, held_out: bool = False) -> dict[str, Any]:
    """One curve for the page's script."""
    steps, values = decimated(curve.steps, curve.values, points)
    return {
        "label": label,
        "color": color,
        "heldOut": held_out,
        "steps": steps,
        "values": [float(f"{value:.5g}") for value in values],
    }


def points_each(curves: int) -> int:
    """How many points a curve may have on a page with so many of them."""
    return max(min(POINTS, POINTS_OF_A_PAGE // max(curves, 1)), 20)


def decimated(steps: Sequence[int], values: Sequence[float], points: int = POINTS) -> tuple[list[int], list[float]]:
    """At most `points` of a curve: of each stretch of steps the smallest and the largest value, and both ends.

    No peak is lost. A curve that is short enough is returned whole.
    """
    count = len(steps)
    if count <= points:
        return list(steps), list(values)
    buckets = max(points // 2 - 1, 1)
    chosen = {0, count - 1}
    for bucket in range(buckets):
        stretch = range(bucket * count // buckets, (bucket + 1) * count // buckets)
        chosen |= {min(stretch, key=values.__getitem__), max(stretch, key=values.__getitem__)}
    places = sorted(chosen)
    return [steps[place] for place in places], [values[place] for place in places]
