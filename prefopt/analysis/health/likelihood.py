"""Rules about the answers' log-probabilities: chosen ones that fall, and margins that come from length alone."""

from __future__ import annotations

from dataclasses import dataclass

from prefopt.analysis.health.finding import Finding
from prefopt.analysis.health.history import FIRST, MEASURED, History, Series, mean
from prefopt.analysis.health.remedies import either, learning_rate, likelihood_term, normalized

RECENT = 3
"""Log lines behind a statement about now: one batch of unusual pairs cannot make it alone."""
FALL_NATS = 10.0
"""A chosen answer that lost this much is e^10, twenty thousand times less likely than before training."""
FALL_SHARE = 0.1
"""Long answers lose ten nats quickly: below a tenth of what an answer cost before, it is not reported."""
COLLAPSE_SHARE = 1.0
"""Chosen answers that cost twice the nats they did before: no longer text that the model would write."""
NOISE_ERRORS = 6.0
"""Where only `logps` are logged, batches differ by tens of nats, and a long run is tested at thousands of lines."""
LENGTH_FACTOR = 1.3
"""Below this ratio of mean lengths, length cannot explain much of a margin."""
LENGTH_SHARE = 0.9
"""The share of the margin from which length explains it. The bundled job, which teaches short answers, has 0.5."""
LENGTH_NATS = 2.0
"""Smaller margins than this, in nats, are still mostly noise."""

MEASUREMENTS = 2
"""Measurements of entanglement in a row."""
FEW_RISE, MOST_FALL = 0.25, 0.5
"""Of 16 probe pairs at most 4 chosen answers rise: one run of independent pairs in 25 would show it by chance."""


@dataclass(frozen=True)
class _Moved:
    """How a role's answers changed since the beginning, in nats per answer; `before`: their log-probability then."""

    nats: float
    before: float


def _moved(history: History, role: str, prefix: str = "") -> _Moved | None:
    """The change from the log-ratios, or from rewards / beta, or from log-probabilities beyond their noise."""
    logps = history.get(f"{prefix}logps/{role}")
    if logps is None:
        return None
    count = 1 if prefix else RECENT
    now = mean(logps.last(count))
    name, scale = f"ratios/{role}", 1.0
    if history.get(f"{prefix}{name}") is None and history.settings.beta:
        name, scale = f"rewards/{role}", history.settings.beta
    if (ratios := history.get(f"{prefix}{name}")) is not None:
        nats = (mean(ratios.last(count)) - _at_start(history, name, ratios)) / scale
    elif prefix:
        nats = logps.last(1)[0] - logps.start()[0]
    else:
        nats, error = logps.change(FIRST)
        if abs(nats) <= NOISE_ERRORS * error:
            return None
    return _Moved(nats, now - nats)


def _at_start(history: History, name: str, series: Series) -> float:
    """A metric's value before training, which is not 0 if the reference is another model."""
    held_out = history.get(f"eval_{name}")
    if held_out is not None and held_out.first[0].step == 0:
        return held_out.first[0].number
    return series.first[0].number if series.first[0].step <= 1 else 0.0


def _margin_change(history: History, prefix: str) -> tuple[float, float] | None:
    """The margin at first and now."""
    margins = history.get(f"{prefix}rewards/margins")
    if margins is None:
        return None
    first = margins.first[0]
    return first.number if first.step <= 1 else 0.0, mean(margins.last(1 if prefix else RECENT))


def over_optimised(history: History) -> Finding | None:
    """The margin grows, but the chosen answers cost twice the nats that they did before training."""
    for prefix, where in (("", ""), ("eval_", "held-out ")):
        chosen, margin = _moved(history, "chosen", prefix), _margin_change(history, prefix)
        if chosen is None or margin is None or chosen.nats > -FALL_NATS or margin[1] <= max(margin[0], 0.0):
            continue
        if chosen.nats > -COLLAPSE_SHARE * abs(chosen.before):
            continue
        text = (
            f"over-optimised: the {where}chosen answers fell from {chosen.before:.0f} to "
            f"{chosen.before + chosen.nats:.0f} nats while the margin grew to {margin[1]:.3g}. The model leaves both "
            "answers for text that nobody preferred"
        )
        earlier = f"--max_steps {history.step // 2}" if history.step > 1 else ""
        remedy = either(learning_rate(history, 0.2), earlier, likelihood_term(history))
        return Finding("over_optimised", "serious", history.step, text, remedy)
    return None


def chosen_falls(history: History) -> Finding | None:
    """The chosen answers became much less likely than before training (likelihood displacement)."""
    for prefix, where in (("", ""), ("eval_", "held-out ")):
        chosen, rejected = _moved(history, "chosen", prefix), _moved(history, "rejected", prefix)
        if chosen is None or chosen.nats > -max(FALL_NATS, FALL_SHARE * abs(chosen.before)):
            continue
        beside = "" if rejected is None else f" (rejected: {rejected.nats:+.0f})"
        text = (
            f"the {where}chosen answers lost {-chosen.nats:.0f} nats{beside}, from {chosen.before:.0f}: the model "
            "becomes less likely to give the good answers too"
        )
        remedy = either(learning_rate(history, 0.5), likelihood_term(history), "a larger beta")
        return Finding("chosen_falls", "warning", history.step, text, remedy)
    return None


def margin_is_length(history: History) -> Finding | None:
    """The margin is what the lengths alone give: each token of both answers moved by the same amount."""
    names = ("ratios/chosen", "ratios/rejected", "lengths/chosen", "lengths/rejected")
    metrics = [series for name in names if (series := history.get(name, 2 * RECENT)) is not None]
    if len(metrics) < len(names):
        return None
    up, down, length_up, length_down = (mean(series.last(2 * RECENT)) for series in metrics)
    margin = up - down
    if margin < LENGTH_NATS or min(length_up, length_down) <= 0:
        return None
    factor = max(length_up, length_down) / min(length_up, length_down)
    explained = (up + down) / (length_up + length_down) * (length_up - length_down)
    if factor < LENGTH_FACTOR or explained < LENGTH_SHARE * margin:
        return None
    which = "shorter" if length_up < length_down else "longer"
    text = (
        f"the margin ({margin:.0f} nats) may be length alone: a token of the chosen answers moved by "
        f"{up / length_up:+.2f} nats, one of the rejected by {down / length_down:+.2f}, and the chosen answers are "
        f"{which} ({length_up:.0f} to {length_down:.0f} tokens)"
    )
    remedy = either('a loss per token, such as --loss "simpo(beta=2, gamma=1)"', "pairs of similar lengths")
    return Finding("margin_is_length", "warning", history.step, text, remedy)


def entangled(history: History) -> Finding | None:
    """The loss lowers both answers of most probe pairs, whose gradients point the same way (2410.13828)."""
    names = ("chosen_rises", "rejected_falls", "cosine", "inner_below_chosen")
    metrics = [series for name in names if (series := history.get(f"{MEASURED}{name}", MEASUREMENTS)) is not None]
    if len(metrics) < len(names):
        return None
    rises, falls, cosine, below = (mean(series.last(MEASUREMENTS)) for series in metrics)
    if rises > FEW_RISE or falls < MOST_FALL:
        return None
    text = (
        f"gradient entanglement: a step on a probe pair lowers the chosen answer too in {1 - rises:.0%} of them. The "
        f"gradients of the two answers have a mean cosine of {cosine:.2f}, and in {1 - below:.0%} of the pairs their "
        "inner product exceeds the square of the chosen answer's"
    )
    remedy = either(
        likelihood_term(history), normalized(history), "pairs that share less text",
        'a loss that pushes the rejected answer less, such as --loss "dpo_shift(beta=0.1)"',
    )  # fmt: skip
    return Finding("entangled", "note", history.step, text, remedy)
