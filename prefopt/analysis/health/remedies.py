"""What to try, with the run's own values in the options."""

from __future__ import annotations

from prefopt.analysis.health.history import History

OUTERMOST = ("conflict_free", "pair_normalized")
"""Losses to which nothing can be added. By name, because reading the loss would import torch."""


def learning_rate(history: History, factor: float) -> str:
    """`--learning_rate`, the run's own times a factor."""
    rate = history.learning_rate
    if rate is None:
        return "a lower learning rate" if factor < 1 else "a higher learning rate"
    return f"--learning_rate {number(rate * factor)}"


def likelihood_term(history: History) -> str:
    """The run's loss with a term that keeps the chosen answers likely; "" if it has one or is not known."""
    loss = history.settings.loss
    if loss is None or "sft" in loss or loss.startswith(OUTERMOST):
        return ""
    return f'--loss "{loss} + 0.2*sft"'


def normalized(history: History) -> str:
    """The run's loss with each answer's gradient normalised; "" if it cannot be, or is not known here."""
    # Here, because the rest of `prefopt health` on a saved run needs no torch.
    from prefopt.losses import LossError, PairNormalized, parse

    loss = history.settings.loss
    if loss is None:
        return ""
    try:
        PairNormalized(parse(loss))
    except LossError:
        return ""
    return f'--loss "pair_normalized({loss})"'


def number(value: float) -> str:
    """A number as a person would write it: 2e-5."""
    return f"{value:.2g}".replace("e-0", "e-").replace("e+0", "e")


def either(*remedies: str) -> str:
    """Several remedies, empty ones left out."""
    return "; or ".join(remedy for remedy in remedies if remedy)
