"""`report.html` of a run: what was trained on what, its curves, findings and answers, in one file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefopt.catalogue.papers import find
from prefopt.losses import LossError, parse
from prefopt.report.changes import changed_words
from prefopt.report.curves import as_data, charts_of, points_each
from prefopt.report.facts import facts_of_loss
from prefopt.report.folder import FINDINGS, PAGE, Curve, RunFolder, ends_in_nan, read_run
from prefopt.report.html import render
from prefopt.safety.errors import UsageError
from prefopt.safety.files import write_text

_PROMPTS = 24
"""Prompts whose answers are on the page."""
_EVALUATIONS = 12
"""Evaluations whose answers are on the page."""
_CHARACTERS = 1200
"""Of one answer."""
_CHARTS_MORE = 80
"""Charts of numbers that belong to no other chart."""
_HASHED = 32 * 2**20
"""Bytes: larger files are listed without a hash, which would take longer than the page."""
_TILES = (
    ("Accuracy", "rewards/accuracies", ".1%", ""),
    ("Margin", "ratios/margins", "+.2f", "nats"),
    ("Chosen log-ratio", "ratios/chosen", "+.2f", "nats"),
    ("Rejected log-ratio", "ratios/rejected", "+.2f", "nats"),
    ("Reward margin", "rewards/margins", "+.3g", ""),
    ("Loss", "loss", ".4g", ""),
)


def write_run_page(
    folder: Path,
    out: Path | None = None,
    beta: float | None = None,
    findings: Sequence[Mapping[str, Any]] | None = None,
) -> Path:
    """Write the page of a run: `report.html` in its folder.

    Args:
        folder: the output folder of a run of prefopt or of TRL, a checkpoint, or the file of a log.
        out: the file to write, if not that.
        beta: of a run of TRL, whose log has rewards (beta times the log-ratio) but no log-ratios.
        findings: of the run's health, if its folder has none: objects with level, rule, step, text and remedy.

    Returns:
        The file.

    Raises:
        UsageError: if the folder has no log that can be read, or `out` is not a page's name.
    """
    if out is not None and not out.is_dir() and out.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--out {out} is the name of another kind of file: name one that ends in .html, or a folder")
    run = read_run(folder, beta)
    page = out or (folder if folder.is_dir() else folder.parent)
    page = page / PAGE if page.is_dir() else page
    page.parent.mkdir(parents=True, exist_ok=True)
    write_text(page, _html(run, list(findings) if findings is not None else None))
    return page


def _html(run: RunFolder, findings: list[Mapping[str, Any]] | None) -> str:
    charts, more = charts_of(run.curves)
    more = more[:_CHARTS_MORE]
    points = points_each(len(run.curves))
    shown, rest = as_data(charts, run.curves, points), as_data(more, run.curves, points)
    known = run.findings if findings is None or run.findings else findings
    return render(
        "run.html.jinja",
        [{**chart, "xLabel": "step"} for chart in (*shown, *rest)],
        title=f"{run.name}: {run.loss}"[:200],
        run={"name": run.name, "loss": run.loss},
        status=_status(run),
        tiles=_tiles(run.curves),
        tiles_of=_tiles_of(run.curves),
        findings=[_finding(finding) for finding in known],
        no_findings=_no_findings(run, findings),
        charts_shown=[{name: chart[name] for name in ("title", "unit", "note")} for chart in shown],
        charts_more=[{name: chart[name] for name in ("title", "unit", "note")} for chart in rest],
        curves_note=_curves_note(run.curves, points),
        answers=_answers(run.answers),
        answers_note=_answers_note(run.answers),
        expression=_expression(run),
        terms=_terms(run),
        data=[_split(part) for part in _list(run.facts.get("data"))],
        problems=[_problem(entry) for entry in _list(run.facts.get("problems"))],
        problems_known="problems" in run.facts,
        command=str(run.facts.get("command") or ""),
        settings=_settings(run),
        versions=_mapping(run.facts.get("versions")),
        files=_files(run.path if run.path.is_dir() else run.path.parent),
        unread=run.unread,
    )


# ---- the top -----------------------------------------------------------------------------------------------------


def _status(run: RunFolder) -> str:
    planned = run.log.get("max_steps")
    of = f" of {planned}" if isinstance(planned, int) and planned > 0 else ""
    parts = [f"{run.last_step}{of} steps logged"]
    if (ended := run.log.get("not_finite")) is not None:
        parts.append(f"ended by a number that is not finite: {ended}")
    if engine := run.results.get("engine"):
        parts.append(str(engine))
    if base := run.facts.get("base_model"):
        parts.append(f"base model {base}")
    return "; ".join(parts)


def _tiles(curves: Mapping[str, Curve]) -> list[dict[str, str]]:
    prefix = _prefix(curves)
    tiles = []
    for label, name, form, unit in _TILES:
        curve = curves.get(prefix + name)
        if curve is None or not curve.values:
            continue
        first = f"{curve.values[0]:{form}}" if len(curve.values) > 1 else ""
        at = "before" if curve.steps[0] == 0 else f"step {curve.steps[0]}"
        tiles.append({"at": at, "label": label, "last": f"{curve.last:{form}}", "first": first, "unit": unit})
    return tiles


def _prefix(curves: Mapping[str, Curve]) -> str:
    """Of the evaluation whose numbers are shown at the top; "" for the training batches'."""
    held_out = [name for name in curves if name.startswith("eval_") and name.endswith(("rewards/margins", "loss"))]
    for ending in ("rewards/margins", "loss"):
        for name in held_out:
            if name.endswith(ending) and name.count("/") == ending.count("/"):
                return name.removesuffix(ending)
    return ""


def _tiles_of(curves: Mapping[str, Curve]) -> str:
    prefix = _prefix(curves)
    if not prefix:
        return "Of the training batches: nothing was held out."
    named = prefix.removeprefix("eval_").strip("_")
    shown = [curves[prefix + name] for _, name, _, _ in _TILES if prefix + name in curves]
    nan = ", which was not finite in part: these numbers are of an earlier one" if any(map(ends_in_nan, shown)) else ""
    return f"Of the held-out rows{f' ({named})' if named else ''}, at the last evaluation{nan}."


def _finding(finding: Mapping[str, Any]) -> dict[str, Any]:
    level = str(finding.get("level", ""))
    known = level if level in ("serious", "warning", "note") else "note"
    text = {name: str(finding.get(name, "")) for name in ("rule", "step", "remedy")}
    return {**text, "level": known, "text": str(finding.get("text", "")).rstrip(".")}


def _no_findings(run: RunFolder, findings: list[Mapping[str, Any]] | None) -> str:
    folder = run.path if run.path.is_dir() else run.path.parent
    if findings is None and not (folder / FINDINGS).is_file() and "findings" not in run.results:
        return "Not examined yet: prefopt health reads the log of this folder."
    return "The rules of prefopt health found nothing wrong in the log."


# ---- curves ------------------------------------------------------------------------------------------------------


def _curves_note(curves: Mapping[str, Curve], points: int) -> str:
    parts = ["Solid: training batches. Dashed: held-out rows. Drag to zoom, double-click to zoom out."]
    longest = max((len(curve.steps) for curve in curves.values()), default=0)
    if longest > points:
        parts.append(
            f"The longest curve has {longest:,} points; {points:,} are shown: of each stretch of steps the smallest "
            "and the largest value, so no peak is lost."
        )
    missing = {step for curve in curves.values() for step in curve.missing}
    if missing:
        first = ", ".join(map(str, sorted(missing)[:5]))
        parts.append(
            f"NaN or infinite values, left out, at {len(missing)} steps: {first}{' ...' * (len(missing) > 5)}."
        )
    return " ".join(parts)


# ---- answers -----------------------------------------------------------------------------------------------------


def _answers(stored: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Per prompt its answers in order; neighbours that are alike are one entry."""
    rows = []
    rounds = _some_rounds(stored)
    for place, prompt in enumerate(_list(stored.get("prompts"))[:_PROMPTS]):
        versions: list[dict[str, Any]] = []
        last: str | None = None
        for one in rounds:
            texts, ended = _list(one.get("texts")), _list(one.get("ended"))
            if place >= len(texts):
                continue
            text, step = str(texts[place])[:_CHARACTERS], one.get("step")
            at = "before" if step == 0 else f"step {step}"
            parts = [("same", text)] if last is None and text else changed_words(last or "", text)
            unfinished = place < len(ended) and not ended[place]
            versions.append({"at": at, "same": text == last, "parts": parts, "unfinished": unfinished})
            last = text
        rows.append({"prompt": str(prompt)[:_CHARACTERS], "versions": versions})
    return rows


def _some_rounds(stored: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The answers of the first and the last evaluation, and of some in between."""
    rounds = [one for one in _list(stored.get("answers")) if isinstance(one, dict)]
    if len(rounds) <= _EVALUATIONS:
        return rounds
    return [rounds[place * (len(rounds) - 1) // (_EVALUATIONS - 1)] for place in range(_EVALUATIONS)]


def _answers_note(stored: Mapping[str, Any]) -> str:
    count, evaluations = len(_list(stored.get("prompts"))), len(_list(stored.get("answers")))
    shown = f"The first {_PROMPTS} of {count} held-out prompts" if count > _PROMPTS else f"{count} held-out prompts"
    some = f", at {_EVALUATIONS} of {evaluations} evaluations" if evaluations > _EVALUATIONS else ""
    return f"{shown}, answered greedily{some}."


# ---- loss, data, environment -------------------------------------------------------------------------------------


def _expression(run: RunFolder) -> str:
    written = str(run.facts.get("expression") or "")
    return "" if written.replace(" ", "") == run.loss.replace(" ", "") else written


def _terms(run: RunFolder) -> list[dict[str, Any]]:
    terms = _list(run.facts.get("terms"))
    if not terms and run.loss and len(run.loss) < 2000:
        try:
            terms = list(facts_of_loss(parse(run.loss)))
        except LossError:  # a user's own loss, or a run of TRL
            return []
    return [_term(term) for term in terms if isinstance(term, dict)]


def _term(term: Mapping[str, Any]) -> dict[str, Any]:
    arxiv = str(term.get("paper") or "")
    paper = find(arxiv) if arxiv else None
    return {
        "name": str(term.get("name", "")),
        "weight": term.get("weight", 1),
        "hyperparameters": _mapping(term.get("hyperparameters")),
        "formula": str(term.get("formula") or ""),
        "paper": paper.title if paper else arxiv,
        "arxiv": arxiv if paper else "",
    }


def _split(part: Any) -> dict[str, Any]:
    part = _mapping(part)
    text = {name: str(part.get(name) or "") for name in ("role", "fingerprint", "split")}
    return {**text, "rows": part.get("rows"), "sources": [str(name) for name in _list(part.get("sources"))]}


def _problem(entry: Any) -> dict[str, Any]:
    entry = _mapping(entry)
    severity = str(entry.get("severity", ""))
    return {
        "severity": severity if severity in ("error", "warning", "info") else "info",
        "rows": entry.get("rows", 0),
        **{name: str(entry.get(name, "")) for name in ("kind", "first", "text")},
    }


def _settings(run: RunFolder) -> dict[str, Any]:
    return {
        str(name): value
        for name, value in {**_mapping(run.log.get("settings")), **_mapping(run.facts.get("settings"))}.items()
    }


def _files(folder: Path) -> dict[str, str]:
    """The files of a run by name, with their hashes; not the page itself, nor what transformers pickles."""
    files = {}
    for file in sorted(folder.iterdir()):
        if (
            file.is_file()
            and file.suffix in (".json", ".safetensors", ".py")
            and not file.name.startswith("tokenizer")
        ):
            size = file.stat().st_size
            files[file.name] = hashlib.sha256(file.read_bytes()).hexdigest() if size <= _HASHED else f"{size:,} bytes"
    return files


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
