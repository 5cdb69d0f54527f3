"""An audit's numbers with their intervals, the findings in words, and one table of all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from prefopt.report.intervals import over_rows
from prefopt.safety.tables import table
from prefopt.unlearning import metrics
from prefopt.unlearning.audit.attack import Attack, Values

ROLES = ("before", "unlearned", "gold")
"""The model before forgetting, after it, and the gold model."""

_MEASURES = {"probability": "probability", "rouge": "ROUGE-L"}
_SHORT = {"probability": "prob.", "rouge": "ROUGE"}
"""In the table, where lines are short."""
_VERDICTS = {
    "more": "leaks more than the gold model",
    "less": "says less than the gold model, which tells the two apart as well",
    "same": "no difference from the gold model was found",
}


def summary(values: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Means of one number a question, with 95% bootstrap intervals over questions.

    Args:
        values: by role; one number a question, of the same questions in the same order.

    Returns:
        For each role `value`, `low`, `high`; with a gold model also `difference` (unlearned minus gold, paired by
        question) and `verdict`: `more` or `less` if the interval of the difference excludes 0, else `same`.
    """
    found: dict[str, Any] = {role: _interval(values[role]) for role in ROLES if role in values}
    if "gold" in values:
        found["difference"] = _interval_of_differences(np.subtract(values["unlearned"], values["gold"]))
        low, high = found["difference"]["low"], found["difference"]["high"]
        found["verdict"] = "more" if low > 0 else "less" if high < 0 else "same"
    return found


def attack_summary(attack: Attack, values: Mapping[str, Values]) -> dict[str, Any]:
    """An attack for `audit.json`: its rows, and what they show.

    Args:
        attack: which was made.
        values: of each model, by role.
    """
    rows = _rows(values, attack.shown)
    return {"title": attack.title, "rows": rows, "finding": _finding(attack, rows)}


def plain_summary(values: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, Any]:
    """The same of the questions as they were trained: the numbers of each model, by role."""
    whole = {role: {"as trained": of} for role, of in values.items()}
    return {"title": "Asked as trained", "rows": _rows(whole, lambda what, measure: True)}


def _rows(
    values: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]], shown: Callable[[str, str], bool]
) -> list[dict[str, Any]]:
    """One row for each thing that was done and each measure of it."""
    return [
        {
            "what": what,
            "measure": measure,
            "shown": shown(what, measure),
            **summary({role: of[what][measure] for role, of in values.items()}),
        }
        for what, measures in values["unlearned"].items()
        for measure in measures
    ]


def _interval(values: Any) -> dict[str, float]:
    interval = metrics.bootstrap(np.mean, values)
    return {"value": interval.value, "low": interval.low, "high": interval.high}


def _interval_of_differences(values: Any) -> dict[str, float]:
    interval = over_rows(values)
    assert interval is not None  # `_interval` of the two models has refused a single row
    return {"value": interval.value, "low": interval.low, "high": interval.high}


def _finding(attack: Attack, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The verdict about the headline, and a sentence with it: `more` if any of its measures says so."""
    of_headline = [row for row in rows if row["what"] == attack.headline]
    if "verdict" not in of_headline[0]:
        parts = [f"{_MEASURES[row['measure']]} {row['unlearned']['value']:.2f}" for row in of_headline]
        words = f"{', '.join(parts)} {attack.headline}; without a gold model nothing says whether that is a leak"
        return {"verdict": None, "words": words}
    verdict = next(name for name in _VERDICTS if name == "same" or any(row["verdict"] == name for row in of_headline))
    parts = [
        f"{_MEASURES[row['measure']]} {row['unlearned']['value']:.2f}, gold {row['gold']['value']:.2f}, difference "
        + _with_interval(row["difference"])
        for row in of_headline
    ]
    return {"verdict": verdict, "words": f"{_VERDICTS[verdict]}. {attack.headline.capitalize()}: {'; '.join(parts)}"}


def table_of(audit: Mapping[str, Any]) -> Table:
    """Forget quality, utility and every attack in one table of 80 columns.

    Args:
        audit: the content of `audit.json`.
    """
    sections = [audit["plain"], *audit["attacks"].values()]
    roles = [role for role in ROLES if any(role in row for section in sections for row in section["rows"])]
    compared = any("difference" in row for section in sections for row in section["rows"])
    headings = [*roles, *(["difference"] if compared else [])]
    shown = table("", *headings, right=headings, title="What a high forget quality hides", padding=(0, 1, 0, 0))
    for name, of in audit["numbers"].items():
        cells = [f"{of[role]:.3g}" if role in of else "" for role in roles]
        if "interval" in of:
            cells[roles.index("unlearned")] += _span(*of["interval"])
        shown.add_row(name, *cells, *([""] if compared else []))
    for section in sections:
        shown.add_section()
        # The heading of a section is longer than the first column.
        shown.add_row(Text(section["title"], style="bold"))
        for row in section["rows"]:
            if row["shown"]:
                # The section's heading says what was done, if only one thing was.
                what = f" {row['what']}" if len({row["what"] for row in section["rows"]}) > 1 else ""
                shown.add_row(f"{_SHORT[row['measure']]}{what}", *_cells(row, headings))
    shown.caption = (
        f"{audit['questions']} forgotten rows: probability of the answer per token, ROUGE-L recall. Difference: "
        "unlearned minus gold on the same rows, * where its interval excludes 0. Intervals: 95%, bootstrap over rows."
    )
    if not audit["settings"].get("quantization", {"bitsandbytes": True})["bitsandbytes"]:
        shown.caption += " Simulated: weights are rounded to the nearest NF4 value, without bitsandbytes."
    return shown


def _cells(row: Mapping[str, Any], headings: Sequence[str]) -> list[str]:
    cells = []
    for heading in headings:
        if heading not in row:
            cells.append("")
        elif heading == "unlearned":
            cells.append(_with_interval(row[heading]))
        elif heading == "difference":
            cells.append(("*" if row["verdict"] != "same" else "") + _with_interval(row[heading]))
        else:
            cells.append(f"{row[heading]['value']:.2f}")
    return cells


def _with_interval(of: Mapping[str, float]) -> str:
    return f"{of['value']:.2f}{_span(of['low'], of['high'])}"


def _span(low: float, high: float) -> str:
    # Without the zeros, the table fits into 80 columns.
    low_end, high_end = (f"{end:.2f}".replace("0.", ".") for end in (low, high))
    return f" [{low_end}, {high_end}]"
