"""Rules about the optimization itself: numbers that are not finite, a loss that rises, gradients, entropy."""

from __future__ import annotations

import statistics

from prefopt.analysis.health.finding import Finding
from prefopt.analysis.health.history import FEW, LATEST, History, mean
from prefopt.analysis.health.remedies import either, learning_rate

_MUST_BE_FINITE = ("loss", "grad_norm", "logps/", "ratios/", "rewards/")
"""TRL's `logits/...` can be infinite in a good run: some models mask unused tokens."""
OVERFLOWS = 3
"""float16's loss scale is searched by overflows: this many lines in a row with one are not a search any more."""
RISE_SHARE = 0.5
"""A loss half again as high as at its start: batches of the same data differ by less."""
RISE_ERRORS = 3.0
"""It must also exceed three standard errors."""
SPIKE_FACTOR = 10.0
"""A gradient of ten times the median: batches of the same data rarely differ by more than three."""
SPIKE_LINES = 10
"""Values before it, of which the median is taken: gradients shrink as the loss does."""
SPIKES = 3
"""Spikes among the latest lines; one or two come from unusual rows, and clipping takes care of them."""
CLIPPED_LINES = 30
"""Log lines in a row: gradients are often larger at the beginning."""
CLIPPED_FACTOR = 20.0
"""Losses on summed log-probabilities have norms of 10 in good runs; at 20 times the limit it is a wrong setting."""
USUAL_MAX_NORM = 1.0
"""The default of `max_grad_norm`, where a run's own is not known."""
ENTROPY_SHARE = 0.2
"""Entropy may halve in a good run; below a fifth of its start, almost every next token is certain."""


def not_finite(history: History) -> Finding | None:
    """The loss, a log-probability or the gradient is NaN or infinite."""
    metrics = {name: lines for name, lines in history.not_finite.items() if name.startswith(_MUST_BE_FINITE)}
    scaled = history.settings.fp16 is not False
    if not metrics:
        return None
    if scaled and set(metrics) <= {"grad_norm"} and metrics.get("grad_norm", 0) < OVERFLOWS:
        return None
    text = f"{', '.join(sorted(metrics)[:3])} {'is' if len(metrics) == 1 else 'are'} NaN or infinite"
    remedy = either(
        learning_rate(history, 0.1), "--warmup_steps 0.1", "bfloat16 or float32 in place of float16",
        "start from the last checkpoint before it: what follows cannot be used",
    )  # fmt: skip
    return Finding("not_finite", "serious", history.step, text, remedy)


def loss_rises(history: History) -> Finding | None:
    """The loss is far above its start."""
    loss = history.get("loss", 2 * FEW)
    if loss is None:
        return None
    change, error = loss.change()
    first = mean(loss.start())
    if change <= RISE_SHARE * abs(first) or change <= RISE_ERRORS * error:
        return None
    text = f"the loss rose from {first:.4g} to {first + change:.4g} (means of {FEW} log lines)"
    remedy = either(learning_rate(history, 0.2), "--warmup_steps 0.1")
    return Finding("loss_rises", "warning", history.step, text, remedy)


def gradient_spikes(history: History) -> Finding | None:
    """The gradient is again and again many times what it was just before."""
    norms = history.get("grad_norm", SPIKE_LINES + SPIKES)
    if norms is None:
        return None
    latest = norms.last(LATEST)
    if max(latest) <= SPIKE_FACTOR * min(latest):
        return None
    spikes = []
    for place in range(SPIKE_LINES, len(latest)):
        usual = statistics.median(latest[place - SPIKE_LINES : place])
        if latest[place] > SPIKE_FACTOR * usual:
            spikes.append((latest[place], usual))
    if len(spikes) < SPIKES:
        return None
    largest, usual = max(spikes)
    text = (
        f"{len(spikes)} of the last {len(latest)} gradients are more than {SPIKE_FACTOR:.0f} times the median of the "
        f"{SPIKE_LINES} before them; the largest is {largest:.2g} after {usual:.2g}"
    )
    remedy = either("look for unusual rows (prefopt check DATA)", "a larger batch", learning_rate(history, 0.5))
    return Finding("gradient_spikes", "warning", history.step, text, remedy)


def always_clipped(history: History) -> Finding | None:
    """Every gradient is clipped to a small part of itself."""
    norms, limit = history.get("grad_norm", CLIPPED_LINES), history.settings.max_grad_norm
    limit = USUAL_MAX_NORM if limit is None else limit
    if norms is None or limit <= 0:
        return None
    latest = norms.last(CLIPPED_LINES)
    if min(latest) < CLIPPED_FACTOR * limit:
        return None
    text = (
        f"each of the last {CLIPPED_LINES} gradients was clipped to {limit:g} from {min(latest):.3g} or more: all "
        "steps have the same length, whatever the batch says"
    )
    remedy = f"--max_grad_norm {statistics.median(latest):.2g} clips only the outliers"
    return Finding("always_clipped", "note", history.step, text, remedy)


def entropy_collapses(history: History) -> Finding | None:
    """The model has become certain of almost every next token."""
    entropy = history.get("entropy", 2 * FEW)
    if entropy is None:
        return None
    first, now = mean(entropy.start()), mean(entropy.last(FEW))
    if first <= 0 or now > ENTROPY_SHARE * first:
        return None
    text = f"the entropy fell from {first:.2f} to {now:.2f} nats per token: the model is certain of every next token"
    remedy = either(learning_rate(history, 0.2), "fewer steps", "a larger beta")
    return Finding("entropy_collapses", "warning", history.step, text, remedy)
