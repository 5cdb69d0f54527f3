"""The comparison of runs as files: `compare.html`, `compare.md`, `compare.json`, and a picture for a card."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from prefopt.catalogue.markdown import table
from prefopt.report.card import code
from prefopt.report.comparison import Cell, Comparison, Flips, compare, shown
from prefopt.report.curves import points_each, series_of
from prefopt.report.folder import Curve, read_run
from prefopt.report.html import render
from prefopt.report.intervals import Interval
from prefopt.report.runs import (
    ACCURACY,
    KL_MEASURE,
    MARGIN,
    MEASURES,
    WIN_RATE,
    Group,
    Measure,
    grouped,
    held_out,
    kl_of,
    last_answers,
)
from prefopt.safety.errors import UsageError, retold
from prefopt.safety.files import write_text
from prefopt.safety.redaction import redact, redacted

PAGE, MARKDOWN, DATA, PICTURE = "compare.html", "compare.md", "compare.json", "compare.png"
VERSION = 1
"""Of the layout of `compare.json`; a new field does not change it."""

_CURVES = (
    ("Margin", "nats", "ratios/margins"),
    ("Accuracy", "share of pairs", "rewards/accuracies"),
    ("Chosen log-ratio", "nats", "ratios/chosen"),
    ("Rejected log-ratio", "nats", "ratios/rejected"),
)
_NAMES = 5
"""Folders of one group that the table names."""
_PROMPTS = 12
_CHARACTERS = 600
"""Of one answer or text."""


def compare_runs(folders: Sequence[Path], out: Path, beta: float | None = None) -> Path:
    """Compare runs and write `compare.html`, `compare.md` and `compare.json`; with matplotlib also `compare.png`.

    Runs that differ by their seed alone are one group. What is compared means the same for every loss: accuracy on
    held-out pairs, log-ratios in nats, KL, length of answers, win rate where there is one.

    Args:
        folders: output folders of runs of prefopt or of TRL, at least two.
        out: the folder to write into.
        beta: of runs of TRL, whose logs have rewards (beta times the log-ratio) but no log-ratios.

    Returns:
        The page.

    Raises:
        UsageError: for fewer than two folders, the same one twice, or one without a log.
    """
    places = [folder.resolve() for folder in folders]
    if twice := [str(folder) for folder, place in zip(folders, places, strict=True) if places.count(place) > 1]:
        raise UsageError(f"a comparison needs different runs, and these are one: {', '.join(twice)}")
    if len(folders) < 2:
        raise UsageError(f"a comparison needs at least two runs, got {', '.join(map(str, folders)) or 'none'}")
    comparison = compare(grouped([read_run(folder, beta) for folder in folders]))
    with retold(UsageError, f"--out {out} cannot be the folder of a comparison"):
        out.mkdir(parents=True, exist_ok=True)
    write_text(out / DATA, json.dumps(redacted(as_json(comparison)), indent=2) + "\n")
    write_text(out / MARKDOWN, as_markdown(comparison))
    write_text(out / PAGE, as_html(comparison))
    draw(comparison, out / PICTURE)
    return out / PAGE


# ---- for programs and for cards ----------------------------------------------------------------------------------


def as_json(comparison: Comparison) -> dict[str, Any]:
    """The comparison as plain values, for `compare.json`."""
    best, measure = comparison.best, comparison.decided_by
    return {
        "version": VERSION,
        "verdict": comparison.verdict,
        "cautions": comparison.cautions,
        "best": None if best is None else best.label,
        "tied": [group.label for group in comparison.tied],
        "decided_by": None if measure is None else measure.key,
        "groups": [
            {
                "label": group.label,
                "loss": group.first.loss,
                "runs": [{"folder": str(run.path), "seed": seed} for seed, run in group.runs.items()],
                "measures": {cell.measure.key: _cell_values(cell) for cell in cells},
            }
            for group, cells in zip(comparison.groups, comparison.cells, strict=True)
        ],
        "flips": [asdict(flip) for flip in comparison.flips],
    }


def _cell_values(cell: Cell) -> dict[str, Any]:
    values = {"value": cell.value, "interval": cell.interval, "best_minus_this": cell.difference}
    return {name: asdict(value) if isinstance(value, Interval) else value for name, value in values.items()}


def as_markdown(comparison: Comparison) -> str:
    """The verdict and the table, for a card."""
    measures = _measures(comparison)
    headings = ["runs", *(measure.label for measure in measures)]
    if comparison.decided_by is not None:
        headings.append(f"best minus this, {comparison.decided_by.label}")
    rows = []
    for group, cells in zip(comparison.groups, comparison.cells, strict=True):
        by_key = {cell.measure.key: cell for cell in cells}
        row = [code(group.label), *(_markdown_cell(by_key.get(measure.key)) for measure in measures)]
        if comparison.decided_by is not None:
            cell = by_key.get(comparison.decided_by.key)
            row.append("" if cell is None or cell.difference is None else shown(cell.difference, cell.measure))
        rows.append(row)
    cautions = "\n".join(f"- {_plain(line)}" for line in comparison.cautions)
    parts = [_plain(comparison.verdict), table(headings, rows), _TABLE_NOTE, cautions]
    return "\n\n".join(part for part in parts if part) + "\n"


def _plain(text: str) -> str:
    """Text in which no character is Markdown or HTML."""
    return re.sub(r"([\\`*_\[\]<>|~&#])", r"\\\1", redact(text))


def _markdown_cell(cell: Cell | None) -> str:
    return "" if cell is None else " ".join(part for part in (_value(cell), _ends(cell)) if part)


_TABLE_NOTE = (
    "Of the held-out rows at the last evaluation, means over seeds; in brackets the 95% interval of the mean over "
    "seeds (Student's t), where there are two or more. The margin is the log-ratio of chosen minus that of rejected "
    "answers. Accuracy is by the reward of each loss."
)


def _measures(comparison: Comparison) -> list[Measure]:
    keys = {cell.measure.key for cells in comparison.cells for cell in cells}
    return [measure for measure in MEASURES if measure.key in keys]


def _value(cell: Cell) -> str:
    return f"{cell.value:{cell.measure.form}}"


def _ends(cell: Cell) -> str:
    form, interval = cell.measure.form, cell.interval
    return "" if interval is None else f"[{interval.low:{form}}, {interval.high:{form}}]"


def draw(comparison: Comparison, file: Path) -> None:
    """Accuracy and margin of the groups over the steps, as a picture; nothing without matplotlib."""
    try:
        from prefopt.report.picture import draw_curves
    except ImportError:
        return
    drawn = [(title, unit, _by_group(comparison.groups, name)) for title, unit, name in _CURVES[:2]]
    drawn = [(title, unit, curves) for title, unit, curves in drawn if any(curves.values())]
    if drawn:
        draw_curves(drawn, file)


def _by_group(groups: Sequence[Group], name: str) -> dict[str, list[Curve]]:
    return {
        group.label: [curve for run in group.runs.values() if (curve := held_out(run, name)) is not None]
        for group in groups
    }


# ---- the page ----------------------------------------------------------------------------------------------------


def as_html(comparison: Comparison) -> str:
    """`compare.html`."""
    groups, measures = comparison.groups, _measures(comparison)
    runs = sum(len(group.runs) for group in groups)
    charts = [*_curve_charts(groups), *_frontier(groups)]
    return render(
        "compare.html.jinja",
        charts,
        title=f"{runs} runs compared",
        subtitle=f"{len(groups)} setting{'' if len(groups) == 1 else 's'}",
        verdict=comparison.verdict,
        cautions=comparison.cautions,
        headings=[measure.label for measure in measures],
        rows=[_row(comparison, place, measures) for place in range(len(groups))],
        decided_by="" if comparison.decided_by is None or comparison.best is None else comparison.decided_by.label,
        table_note=_TABLE_NOTE,
        charts_shown=[{name: chart[name] for name in ("title", "unit", "note")} for chart in charts],
        curves_note="Of the held-out rows. Bold: the mean over seeds where all were evaluated; thin: each seed.",
        flips=[_flip(flip) for flip in comparison.flips],
        no_flips=_no_flips(comparison),
        samples=_samples(groups),
    )


def _row(comparison: Comparison, place: int, measures: Sequence[Measure]) -> dict[str, Any]:
    group, cells = comparison.groups[place], {cell.measure.key: cell for cell in comparison.cells[place]}
    row = []
    for measure in measures:
        cell = cells.get(measure.key)
        if cell is None:
            row.append({"value": "", "interval": ""})
        else:
            row.append({"value": _value(cell), "interval": _ends(cell)})
    names = list(group.names)
    if len(names) > _NAMES:
        names = [*names[:_NAMES], f"and {len(names) - _NAMES} more"]
    label, best = group.label, group is comparison.best and not comparison.tied
    value, ends = _difference(cells, comparison.decided_by)
    about = {"label": label, "best": best, "color": place % 8, "folders": ", ".join(names)}
    return {**about, "cells": row, "difference": value, "ends": ends}


def _difference(cells: Mapping[str, Cell], measure: Measure | None) -> tuple[str, list[str]]:
    """How much the best group is above this one in the deciding measure, and the interval."""
    cell = None if measure is None else cells.get(measure.key)
    if cell is None or cell.difference is None:
        return "", []
    value, _, ends = shown(cell.difference, cell.measure).partition(" ")
    interval, over, count = ends.partition(" over ")
    return value, [interval, f"{over}{count}".strip()]


def _curve_charts(groups: Sequence[Group]) -> list[dict[str, Any]]:
    charts = []
    curves = [(title, unit, _by_group(groups, name)) for title, unit, name in _CURVES]
    curves.append(
        ("KL to the reference", "nats", {g.label: _present(kl_of(run) for run in g.runs.values()) for g in groups})
    )
    points = points_each(sum(len(runs) + 1 for _, _, by_group in curves for runs in by_group.values()))
    for title, unit, by_group in curves:
        series = []
        for color, (label, members) in enumerate(by_group.items()):
            if mean := _mean_curve(members):
                series.append(series_of(label, mean, color, points))
            if len(members) > 1:
                series += [{**series_of(label, one, color, points), "faint": True} for one in members]
        if series:
            charts.append({"title": title, "unit": unit, "note": "", "xLabel": "step", "series": series})
    return charts


def _present(curves: Any) -> list[Curve]:
    return [curve for curve in curves if curve is not None]


def _mean_curve(curves: Sequence[Curve]) -> Curve | None:
    """The mean at the steps that all have."""
    values = [dict(zip(curve.steps, curve.values, strict=True)) for curve in curves]
    steps = sorted(set.intersection(*(set(one) for one in values))) if values else []
    return Curve(steps, [float(np.mean([one[step] for one in values])) for step in steps]) if steps else None


def _frontier(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """What a run won against how far it went from its reference."""
    rewards = next((m for m in (WIN_RATE, MARGIN, ACCURACY) if any(group.values(m) for group in groups)), None)
    series = []
    for color, group in enumerate(groups):
        won, far = ({} if rewards is None else group.values(rewards)), group.values(KL_MEASURE)
        points = sorted((far[seed], won[seed]) for seed in far if seed in won)
        if points:
            entry: dict[str, Any] = {"label": group.label, "color": color, "heldOut": False, "dots": True}
            series.append({**entry, "steps": [x for x, _ in points], "values": [y for _, y in points]})
    if rewards is None or not series:
        return []
    note = "One point for each run, at its end. Better is higher, and further left: the same gain for less change."
    axes = {"xLabel": "KL to the reference, nats", "frontier": True}
    return [{"title": "Reward against KL", "unit": rewards.label, "note": note, "series": series, **axes}]


def _flip(flip: Flips) -> dict[str, Any]:
    chance = f"if both were equally good, a split this uneven would come up with probability {flip.probability:.2g}"
    text = (
        f"Of {flip.rows} held-out pairs, {flip.gained} are ranked correctly by {flip.better} alone and {flip.lost} by "
        f"{flip.other} alone; {chance} (McNemar's exact test)."
    )
    pairs = [
        {
            "row": pair["row"],
            "margins": f"{pair['better_margin']:+.3g}, {pair['other_margin']:+.3g}",
            **{name: str(pair.get(name, ""))[:_CHARACTERS] for name in ("prompt", "chosen", "rejected")},
        }
        for pair in flip.shown
    ]
    return {"better": flip.better, "other": flip.other, "text": text, "shown": pairs}


def _no_flips(comparison: Comparison) -> str:
    if comparison.best is None:
        return "Pairs are compared with the best run, and there is none."
    without = [
        name
        for group in comparison.groups
        for name, run in zip(group.names, group.runs.values(), strict=True)
        if not run.pairs
    ]
    if without:
        return (
            f"Not known: no heldout.json in {', '.join(without)}. prefopt train writes it at the end of a run on one "
            "process whose held-out rows are pairs."
        )
    return "Not known: the runs were evaluated on different held-out rows."


def _samples(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """The last answers of the first run of each group to the prompts that all have."""
    answers = [(group.label, last_answers(group.first)) for group in groups]
    answers = [(label, texts) for label, texts in answers if texts]
    if not answers:
        return []
    common = [prompt for prompt in answers[0][1] if all(prompt in texts for _, texts in answers)]
    return [
        {"prompt": prompt[:_CHARACTERS], "answers": [(label, texts[prompt][:_CHARACTERS]) for label, texts in answers]}
        for prompt in common[:_PROMPTS]
    ]
