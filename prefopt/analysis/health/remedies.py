"""What to try, with the run's own values in the options."""

from __future__ import annotations

from prefopt.analysis.health.history import History
from prefopt.losses import Loss, LossError, PairNormalized, parse


def learning_rate(history: History, factor: float) -> str:
    """`--learning_rate`, the run's own times a factor."""
    rate = history.learning_rate
    if rate is None:
        return "a lower learning rate" if factor < 1 else "a higher learning rate"
    return f"--learning_rate {number(rate * factor)}"


def likelihood_term(history: History) -> str:
    """The run's loss with a term that keeps the chosen answers likely; "" if it has one or is not known."""
    loss, read = history.settings.loss, _read(history)
    return "" if loss is None or "sft" in loss or (read and read.outermost) else f'--loss "{loss} + 0.2*sft"'


def normalized(history: History) -> str:
    """The run's loss with each answer's gradient normalised; "" if it cannot be, or is not known."""
    if (loss := _read(history)) is None:
        return ""
    try:
        PairNormalized(loss)
    except LossError:
        return ""
    return f'--loss "pair_normalized({history.settings.loss})"'


def _read(history: History) -> Loss | None:
    """The run's loss; None where it is not known here, as one from a file."""
    try:
        return None if history.settings.loss is None else parse(history.settings.loss)
    except LossError:
        return None


def number(value: float) -> str:
    """A number as a person would write it: 2e-5."""
    return f"{value:.2g}".replace("e-0", "e-").replace("e+0", "e")


def either(*remedies: str) -> str:
    """Several remedies, empty ones left out."""
    return "; or ".join(remedy for remedy in remedies if remedy)
