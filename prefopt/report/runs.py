"""Runs to compare: what is measured of each, and which differ by their seed alone."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefopt.report.curves import KL
from prefopt.report.folder import Curve, RunFolder, number


@dataclass(frozen=True)
class Measure:
    """What can be compared between runs of different losses.

    Attributes:
        key: its name in `compare.json`.
        label: its heading.
        form: of its values.
        decides: whether a larger value means a better run.
    """

    key: str
    label: str
    form: str
    decides: bool = False


WIN_RATE = Measure("win_rate", "win rate", ".1%", decides=True)
ACCURACY = Measure("accuracy", "accuracy", ".1%", decides=True)
MARGIN = Measure("margin", "margin, nats", "+.2f")
KL_MEASURE = Measure("kl", "KL, nats", ".3g")
MEASURES = (
    WIN_RATE,
    ACCURACY,
    MARGIN,
    Measure("chosen", "chosen log-ratio", "+.2f"),
    Measure("rejected", "rejected log-ratio", "+.2f"),
    KL_MEASURE,
    Measure("words", "words of an answer", ".1f"),
)
"""In the order of the table. The first one that decides and that every run has names the best run."""

OF_CURVES = {
    "accuracy": "rewards/accuracies",
    "margin": "ratios/margins",
    "chosen": "ratios/chosen",
    "rejected": "ratios/rejected",
}
"""Measures that are a curve of the held-out rows at its end."""
_BY_CHANCE = {"seed", "data_seed"}
"""Settings in which repetitions of one run differ."""
_WITHOUT_EFFECT = {"reference_cache", "resume_from_checkpoint"}
"""Settings that change no result."""


@dataclass(frozen=True)
class Group:
    """Runs that differ by their seed alone.

    Attributes:
        label: what it has that the others do not.
        runs: by seed; where seeds are unknown, there is one.
        names: of the runs' folders, with the folder above where two have one name.
    """

    label: str
    runs: Mapping[Any, RunFolder]
    names: Sequence[str]

    @property
    def first(self) -> RunFolder:
        return next(iter(self.runs.values()))

    def values(self, measure: Measure) -> dict[Any, float]:
        """The measure at the end of each run that has it, by seed."""
        values = {seed: value_of(run, measure) for seed, run in self.runs.items()}
        return {seed: value for seed, value in values.items() if value is not None}


def value_of(run: RunFolder, measure: Measure) -> float | None:
    """A measure of the held-out rows, or of the answers, at the end of a run."""
    of_sweep = run.sweep.get("measures")
    if isinstance(of_sweep, dict) and (known := number(of_sweep.get(measure.key))) is not None:
        return known
    if measure.key in OF_CURVES:
        curve = held_out(run, OF_CURVES[measure.key])
        return None if curve is None else curve.last
    if measure.key == "kl":
        curve = kl_of(run)
        return None if curve is None else curve.last
    if measure.key == "words":
        return _words(run)
    after = run.results.get("after")
    places = (run.results, after if isinstance(after, dict) else {})
    for place in places:
        for name in ("win_rate", "eval_win_rate"):
            rate = place.get(name)
            known = number(rate.get("value") if isinstance(rate, dict) else rate)
            if known is not None and math.isfinite(known):
                return known
    return None


def held_out(run: RunFolder, name: str) -> Curve | None:
    """A number of the held-out rows; of named sets, the first's."""
    if (curve := run.curves.get(f"eval_{name}")) is not None:
        return curve
    named = sorted(key for key in run.curves if key.startswith("eval_") and key.endswith(f"_{name}"))
    return run.curves[named[0]] if named else None


def kl_of(run: RunFolder) -> Curve | None:
    """The KL to the reference: of the held-out rows or answers before that of the training batches."""
    names = [name for name in run.curves if KL.search(name)]
    return run.curves[min(names, key=lambda name: (not name.startswith("eval_"), name))] if names else None


def _words(run: RunFolder) -> float | None:
    summary = run.results.get("answers_after")
    known = number(summary.get("mean_words")) if isinstance(summary, dict) else None
    if known is not None:
        return known
    texts = last_answers(run)
    return sum(len(text.split()) for text in texts.values()) / len(texts) if texts else None


def last_answers(run: RunFolder) -> dict[str, str]:
    """The last answers of a run by prompt."""
    prompts, rounds = run.answers.get("prompts"), run.answers.get("answers")
    if not isinstance(prompts, list) or not isinstance(rounds, list) or not rounds or not isinstance(rounds[-1], dict):
        return {}
    texts = rounds[-1].get("texts")
    return (
        {str(prompt): str(text) for prompt, text in zip(prompts, texts, strict=False)}
        if isinstance(texts, list)
        else {}
    )


# ---- groups ------------------------------------------------------------------------------------------------------


def grouped(runs: Sequence[RunFolder]) -> list[Group]:
    """The runs in groups, in the order in which they were named.

    A run whose settings or seed are unknown is a group of its own; so is the second of two runs with one seed.
    """
    groups: dict[str, dict[Any, RunFolder]] = {}
    for place, run in enumerate(runs):
        seed, key = _settings(run).get("seed"), _key(run)
        if key is None or seed is None or seed in groups.get(key, {}):
            groups[f"run {place}"] = {seed: run}
        else:
            groups.setdefault(key, {})[seed] = run
    members, names = list(groups.values()), _names(runs)
    labels = _labels([next(iter(group.values())) for group in members], names)
    return [
        Group(label, group, [names[run.path] for run in group.values()])
        for label, group in zip(labels, members, strict=True)
    ]


def _names(runs: Sequence[RunFolder]) -> dict[Path, str]:
    """The names of folders by path; of those with one name also the folder above, as in `trial-3/seed-0`."""
    counts = Counter(run.name for run in runs)
    above = {run.path: run.path.resolve().parent.name for run in runs}
    return {run.path: run.name if counts[run.name] == 1 else f"{above[run.path]}/{run.name}" for run in runs}


def _settings(run: RunFolder) -> dict[str, Any]:
    settings = run.facts.get("settings")
    return settings if isinstance(settings, dict) else {}


def _key(run: RunFolder) -> str | None:
    if not run.facts or not _settings(run):
        return None
    return json.dumps([_described(run), run.facts.get("base_model"), run.facts.get("base_digest")], default=str)


def _described(run: RunFolder) -> dict[str, str]:
    """Loss, data and settings, without what differs by chance."""
    settings = {
        str(name): str(value) for name, value in _settings(run).items() if name not in _BY_CHANCE | _WITHOUT_EFFECT
    }
    data = run.facts.get("data")
    sources = sorted(
        {str(part.get("sources")) for part in data if isinstance(part, dict)} if isinstance(data, list) else ()
    )
    return {"loss": run.loss, "data": " ".join(sources), **dict(sorted(settings.items()))}


def _labels(runs: Sequence[RunFolder], names_of: Mapping[Path, str]) -> list[str]:
    """A short name for each: its loss as written where losses differ, settings that differ, or its folder."""
    described = [_described(run) for run in runs]
    names = list(dict.fromkeys(name for one in described for name in one))
    differing = [name for name in names if len({one.get(name) for one in described}) > 1]
    labels = []
    for run, one in zip(runs, described, strict=True):
        written = str(run.facts.get("expression") or run.loss)
        parts = [written if name == "loss" else f"{name}={one.get(name, 'default')}" for name in differing[:4]]
        said = ", ".join(part for part in parts if part) if run.facts else run.loss
        labels.append(said or names_of[run.path])
    return [
        label if labels.count(label) == 1 else f"{label} ({names_of[run.path]})"
        for label, run in zip(labels, runs, strict=True)
    ]
