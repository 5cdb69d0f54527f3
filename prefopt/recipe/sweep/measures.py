"""What trials are compared by: numbers that mean the same for every loss.

All come from log-probabilities of the held-out pairs under the trained model and under the model that training started
from. A loss's own value and its own rewards are never used: they have other units for other losses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from prefopt.losses import PreferenceBatch
from prefopt.safety.errors import UsageError
from prefopt.trainer import PreferenceTrainer


@dataclass(frozen=True)
class PairLogps:
    """The held-out pairs under one model, in the order of the rows.

    Attributes:
        chosen, rejected: (N,) summed log-probabilities of the completions, in nats.
        chosen_lengths, rejected_lengths: (N,) tokens that they sum over.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor

    def lists(self) -> dict[str, list[float]]:
        return {name: values.tolist() for name, values in vars(self).items()}

    @classmethod
    def of(cls, lists: Mapping[str, list[float]]) -> PairLogps:
        return cls(**{name: torch.tensor(values, dtype=torch.float64) for name, values in lists.items()})


@dataclass(frozen=True)
class Measure:
    """One measure.

    Attributes:
        direction: the better one, `maximize` or `minimize`.
        about: for people.
    """

    direction: str
    about: str


MEASURES = {
    "accuracy": Measure("maximize", "pairs whose chosen log-ratio to the starting model is above the rejected one's"),
    "margin": Measure("maximize", "chosen log-ratio minus rejected log-ratio, nats"),
    "chosen": Measure("maximize", "log-ratio of chosen completions, nats; far below 0 they are being unlearned"),
    "rejected": Measure("minimize", "log-ratio of rejected completions, nats"),
    "token_accuracy": Measure("maximize", "pairs whose chosen completion has more log-probability per token"),
    "chosen_nll": Measure("minimize", "negative log-probability per token of chosen completions, nats"),
    "kl": Measure("minimize", "KL of sampled answers to the starting model, nats; needs eval_answers in the config"),
}
"""Every measure of a sweep."""

DEFAULT_MEASURE = "accuracy"


def row_values(after: PairLogps, start: PairLogps) -> dict[str, list[float]]:
    """Every measure for each of N held-out pairs.

    Args:
        after: under the trained model.
        start: under the model that training started from.

    Returns:
        N numbers by measure.

    Raises:
        UsageError: if the two have different rows.
    """
    if len(after.chosen) != len(start.chosen) or not torch.equal(after.chosen_lengths, start.chosen_lengths):
        raise UsageError("the trained model was evaluated on other held-out rows than the starting model")
    chosen, rejected = after.chosen - start.chosen, after.rejected - start.rejected
    per_token = (after.chosen / after.chosen_lengths, after.rejected / after.rejected_lengths)
    values = {
        "accuracy": _above(chosen, rejected),
        "margin": chosen - rejected,
        "chosen": chosen,
        "rejected": rejected,
        "token_accuracy": _above(*per_token),
        "chosen_nll": -per_token[0],
    }
    return {name: row.tolist() for name, row in values.items()}


def measured(rows: Mapping[str, list[float]]) -> dict[str, float]:
    """The mean of every measure over the rows."""
    return {name: sum(values) / len(values) for name, values in rows.items()}


def _above(one: Tensor, other: Tensor) -> Tensor:
    """(N,) 1 where `one` is greater, 0.5 for a tie."""
    return (one > other).double() + 0.5 * (one == other).double()


class HeldoutPairs(TrainerCallback):  # type: ignore[misc]
    """Keeps the log-probabilities of an evaluation's pairs: they pass through the loss anyway.

    Attributes:
        last: of the last evaluation; None before the first one.
    """

    def __init__(self, trainer: PreferenceTrainer):
        if trainer.objective is None:
            raise UsageError("a sweep needs a loss of prefopt: TRL computes this one itself. Name it with loss")
        self.last: PairLogps | None = None
        self._batches: list[PairLogps] = []
        trainer.objective.register_forward_hook(self._take)

    def _take(self, loss: Any, inputs: tuple[Any, ...], output: Any) -> None:
        batch = inputs[0]
        if loss.training or not isinstance(batch, PreferenceBatch):
            return
        if not batch.paired or batch.chosen is None or batch.rejected is None:
            raise UsageError("a sweep compares losses on held-out pairs, and these held-out rows are not pairs")
        chosen, rejected = batch.chosen, batch.rejected
        values = (chosen.logps, rejected.logps, chosen.lengths, rejected.lengths)
        self._batches.append(PairLogps(*(value.detach().double().cpu() for value in values)))

    def on_evaluate(self, *_: Any, **__: Any) -> None:
        batches, self._batches = self._batches, []
        fields = ("chosen", "rejected", "chosen_lengths", "rejected_lengths")
        self.last = PairLogps(*(torch.cat([getattr(batch, name) for batch in batches]) for name in fields))
