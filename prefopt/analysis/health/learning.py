"""Rules about what is learned: nothing, nothing more, the opposite, or the pairs by heart."""

from __future__ import annotations

import math

from prefopt.analysis.health.finding import Finding
from prefopt.analysis.health.history import FEW, FIRST, History, Series, mean, standard_error
from prefopt.analysis.health.remedies import either, learning_rate

STILL_PROGRESS = 1 / 3
"""Part of the run after which it should have learned something."""
STILL_NATS = 0.1
"""Answers that became less than a tenth (e^0.1) more or less likely: the model is where it began."""
STILL_SHARE = 0.01
"""A loss within a percent of its start has not moved, where the log has no log-ratios."""
STILL_ERRORS = 2.0
"""A change below two standard errors cannot be told from noise between batches."""
SATURATED_LINES = 20
"""Log lines in a row, so that a few easy batches are not reported."""
SATURATED_SHARE = 0.05
"""Share of its first value below which a loss gives almost no gradient; 0.035 for DPO, a margin of 3.4."""
CHANCE_LINES = 10
"""Log lines behind an accuracy: with 8 pairs each its standard error is 0.06."""
CHANCE_ERRORS = 3.0
"""An accuracy must be three standard errors below one half."""
WORSE_EVALUATIONS = 2
"""Evaluations in a row above the best one: a single one can be noise."""
WORSE_SHARE = 0.05
"""A rise of the held-out loss of less than this share of its first value is not reported: 0.035 for DPO."""


def learns_nothing(history: History) -> Finding | None:
    """After a third of the run, the model is where it began."""
    loss, progress = history.get("loss", FEW), history.progress
    if loss is None or progress is None or progress < STILL_PROGRESS or _warming_up(history):
        return None
    evidence = _still_ratios(history) or _still_loss(history, loss)
    if evidence is None:
        return None
    text = f"after {progress:.0%} of the run the model has hardly moved: {evidence}"
    remedy = either(learning_rate(history, 10), "check that the parameters are trainable")
    return Finding("learns_nothing", "warning", history.step, text, remedy)


def _warming_up(history: History) -> bool:
    rates = history.get("learning_rate", 2)
    return rates is not None and rates.last(1)[0] > rates.last(2)[0]


def _still_ratios(history: History) -> str | None:
    chosen, rejected = history.get("ratios/chosen", FEW), history.get("ratios/rejected", FEW)
    if chosen is None or rejected is None:
        return None
    moved = [
        mean(series.last(FEW)) - (series.first[0].number if series.first[0].step <= 1 else 0.0)
        for series in (chosen, rejected)
    ]
    if max(map(abs, moved)) >= STILL_NATS:
        return None
    return f"the chosen answers moved by {moved[0]:+.3f} nats, the rejected by {moved[1]:+.3f}"


def _still_loss(history: History, loss: Series) -> str | None:
    if history.get("ratios/chosen") is not None or history.get("ratios/rejected") is not None:
        return None  # which show it better
    for name in ("loss", "rewards/margins", "mean_token_accuracy", "logps/chosen", "logps/rejected"):
        if (series := history.get(name)) is not None:
            change, error = series.change(FIRST)
            if abs(change) > STILL_ERRORS * error or error == math.inf:
                return None
    change, error = loss.change(FIRST)
    first = mean(loss.start(FIRST))
    if abs(change) > STILL_SHARE * abs(first):
        return None
    return f"the loss went from {first:.4g} to {first + change:.4g}, with a standard error of {error:.2g}"


def saturated(history: History) -> Finding | None:
    """Every pair is ranked right with next to no loss, for many log lines: the rest of the run teaches nothing."""
    loss, accuracy = history.get("loss", SATURATED_LINES), history.get("rewards/accuracies", SATURATED_LINES)
    if loss is None or accuracy is None or min(accuracy.last(SATURATED_LINES)) < 1:
        return None
    first, highest = loss.first[0].number, max(loss.last(SATURATED_LINES))
    if not 0 <= highest <= SATURATED_SHARE * first:
        return None
    since = loss.latest[-SATURATED_LINES].step
    text = (
        f"nothing left to learn: since step {since} every pair is ranked right and the loss is below {highest:.2g} "
        f"(it began at {first:.3g})"
    )
    remedy = either(f"--max_steps {since}", "harder pairs, such as samples of this model")
    return Finding("saturated", "note", history.step, text, remedy)


def below_chance(history: History) -> Finding | None:
    """Rejected answers are ranked above chosen ones, and it does not get better."""
    accuracy, margins = history.get("rewards/accuracies", 2 * CHANCE_LINES), history.get("rewards/margins")
    if accuracy is None or margins is None or (history.progress or 1.0) < STILL_PROGRESS:
        return None
    shares, now = accuracy.last(CHANCE_LINES), mean(margins.last(CHANCE_LINES))
    if mean(shares) >= 0.5 - CHANCE_ERRORS * standard_error(shares) or now >= min(0.0, mean(margins.start())):
        return None
    text = (
        f"the rejected answers win: accuracy {mean(shares):.2f} over the last {CHANCE_LINES} log lines, margin "
        f"{now:+.3g}, below where it began"
    )
    remedy = either("check that chosen and rejected are not swapped (prefopt check DATA)", learning_rate(history, 0.2))
    return Finding("below_chance", "warning", history.step, text, remedy)


def evaluation_diverges(history: History) -> Finding | None:
    """The held-out loss rises while the training loss still falls: the pairs are learned by heart."""
    for name in history.series:
        if name.startswith("eval_") and name.endswith("loss") and "/" not in name:
            finding = _diverges(history, name)
            if finding is not None:
                return finding
    return None


def _diverges(history: History, name: str) -> Finding | None:
    held_out, loss = history.get(name, WORSE_EVALUATIONS + 1), history.get("loss", 2)
    if held_out is None or loss is None or held_out.lowest is None:
        return None
    best, worse = held_out.lowest, list(held_out.latest)[-WORSE_EVALUATIONS:]
    rise = min(value.number for value in worse) - best.number
    if best.step >= worse[0].step or rise <= WORSE_SHARE * abs(held_out.first[0].number):
        return None
    before = [value.number for value in (*loss.first, *loss.latest) if value.step <= best.step][-FEW:]
    after = [value.number for value in loss.latest if value.step > best.step][-FEW:]
    if not before or not after or mean(after) >= mean(before):
        return None
    text = (
        f"the held-out loss ({name}) rose from {best.number:.4g} at step {best.step} to {worse[-1].number:.4g}, while "
        f"the training loss fell to {mean(after):.4g}: the pairs are learned by heart"
    )
    stop = f"--max_steps {best.step}" if best.step else ""
    remedy = either(stop, learning_rate(history, 0.5), "more pairs")
    return Finding("evaluation_diverges", "warning", history.step, text, remedy)
