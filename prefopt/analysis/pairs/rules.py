"""Rules about single pairs under a trained model; their findings name rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

from prefopt.analysis.health.finding import Finding, first_rows
from prefopt.analysis.pairs.table import PairTable

LEAST_PAIRS = 30
"""Below this, a share of a tenth cannot be told from none."""
SURE = 0.9
"""Confidence from which a ranking against the label puts the label in doubt."""
LEARNED = 0.6
"""A model that ranks fewer pairs as labelled has learned too little to doubt a label."""
DOUBTFUL_SHARE, DOUBT_ERRORS = 0.05, 4.0
"""Of the pairs that it is sure of, beyond those that a calibrated model gets wrong; also in standard errors."""
GAP, GAP_ERRORS = 0.1, 3.0
"""Confidence above accuracy, also in standard errors of the accuracy."""
SPENT, SPENT_SHARE = 0.01, 0.5
"""A push of a hundredth of the first one (a margin of 5.3 for DPO), in half of the pairs."""
LENGTH_R2 = 0.8
"""Share of the margins' variance. Data about something else than length rarely exceed 0.3."""


def overconfident(table: PairTable) -> Finding | None:
    """The implicit reward is surer than it is right."""
    sure, right = float(table.confidence.mean()), table.accuracy
    error = math.sqrt(max(right * (1 - right), 1 / len(table)) / len(table))
    if sure - right <= max(GAP, GAP_ERRORS * error):
        return None
    text = (
        f"the implicit reward is overconfident: a mean confidence of {sure:.2f} where {right:.0%} of the pairs are "
        f"ranked as labelled (expected calibration error {table.calibration_error:.2f}, Brier score {table.brier:.2f})"
    )
    remedy = 'fewer steps; or more pairs; or --loss "dpo(label_smoothing=0.1)"'
    return Finding("overconfident", "note", 0, text, remedy)


def doubtful_labels(table: PairTable) -> Finding | None:
    """The model is sure of the opposite of more labels than its confidence allows: an estimate of wrong ones."""
    sure = table.confidence >= SURE
    count, chances = int(sure.sum()), 1 - table.confidence[sure]
    against = (sure & (table.margins < 0)).nonzero().flatten().tolist()
    allowed, spread = float(chances.sum()), float((chances * (1 - chances)).sum()) ** 0.5
    share = (len(against) - allowed) / max(count, 1)
    if table.accuracy < LEARNED or count < LEAST_PAIRS or share < DOUBTFUL_SHARE:
        return None
    if len(against) <= allowed + DOUBT_ERRORS * spread:
        return None
    text = (
        f"{len(against)} of the {count} pairs that the model ranks with a confidence of {SURE} or more are labelled "
        f"the other way, where its confidence allows {allowed:.0f}: about {share:.0%} of the labels may be wrong: "
        f"{first_rows(against)}"
    )
    remedy = f'read these rows; or --loss "dpo(label_smoothing={min(share, 0.5):.2g})"'
    return Finding("doubtful_labels", "note", 0, text, remedy, tuple(against))


def spent_pairs(table: PairTable) -> Finding | None:
    """Half of the pairs have no gradient left."""
    spent = (table.push <= SPENT * table.push_at_start).nonzero().flatten().tolist()
    if len(spent) < SPENT_SHARE * len(table):
        return None
    text = (
        f"{len(spent)} of {len(table)} pairs have almost no gradient left (the loss pushes them with less than "
        f"{SPENT:.0%} of its first force): {first_rows(spent)}"
    )
    remedy = "fewer steps; or harder pairs, such as samples of this model; or a smaller beta"
    return Finding("spent_pairs", "note", 0, text, remedy, tuple(spent))


def margin_follows_length(table: PairTable) -> Finding | None:
    """The difference of lengths alone says what the margin is."""
    share = table.explained_by_length
    if share < LENGTH_R2:
        return None
    text = f"the difference of lengths explains {share:.0%} of the variance of the margins: the reward counts tokens"
    remedy = 'a loss per token, such as --loss "simpo(beta=2, gamma=1)"; or pairs of similar lengths'
    return Finding("margin_follows_length", "warning", 0, text, remedy)


RULES: Mapping[str, Callable[[PairTable], Finding | None]] = {
    rule.__name__: rule for rule in (overconfident, doubtful_labels, spent_pairs, margin_follows_length)
}
"""Name -> rule."""


def examine_pairs(table: PairTable, step: int = 0) -> list[Finding]:
    """What a model's rewards of held-out pairs show; rows are numbered as in the table, from 0.

    Args:
        table: of `score_pairs`; fewer than `LEAST_PAIRS` pairs are not judged.
        step: of the model, for the findings.
    """
    if len(table) < LEAST_PAIRS:
        return []
    findings = (rule(table) for rule in RULES.values())
    return [replace(finding, step=step) for finding in findings if finding is not None]
