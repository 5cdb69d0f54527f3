"""Plain likelihood of the chosen completions: the supervised term of hybrid objectives.

The literature has three normalisations under one name. With unequal lengths they are different objectives, so the
choice is an argument here.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from prefopt.losses.base import Loss
from prefopt.losses.distributed import global_sum, present
from prefopt.losses.errors import LossError
from prefopt.losses.registry import register
from prefopt.losses.scores import PreferenceBatch

Reduction = Literal["mean", "sum", "token"]
"""Per token of the completion, summed, or over the tokens of the batch."""


def check_reduction(name: str, value: str) -> None:
    if value not in ("mean", "sum", "token"):
        raise LossError(f"{name} must be 'mean', 'sum' or 'token', got {value!r}")


def reduce_tokens(sums: Tensor, lengths: Tensor, how: str, weights: Tensor | None) -> Tensor:
    """(N,) per-example values from sums over each example's tokens.

    Args:
        sums: (N,) sums over completion tokens.
        lengths: (N,) numbers of completion tokens.
        how: "mean" per token of the example, "sum", or "token": scaled so that the mean over the examples of all
            processes, which every loss takes, equals the mean over their tokens.
        weights: (N,) example weights or None; an example of weight 0 counts as absent.
    """
    if how == "mean":
        return sums / lengths.clamp(min=1)
    if how == "sum":
        return sums
    counted = present(sums, weights)
    tokens, examples = global_sum((lengths * counted).sum()), global_sum(counted.sum())
    return sums * examples / tokens.clamp(min=1)


@register("sft")
class SFT(Loss):
    """Negative log-likelihood of the chosen completions.

    nll="mean":   mean over examples of -log pi(y_w|x) / n_w     (IRPO)
    nll="sum":    mean over examples of -log pi(y_w|x)           (RPO)
    nll="token":  -sum log pi(y_w|x) / sum n_w over the batch of all processes   (TRL's `sft`, CPO, ORPO)

    Args:
        nll: how the likelihood is normalised.

    Needs: sums and lengths of the chosen role; no reference, no rejected completions.
    Limits: equal lengths make "mean" and "token" equal.
    Under gradient accumulation "token" divides by the tokens of each micro-batch, as TRL does.
    """

    formula = "-log pi(y_w|x), per token (nll=mean), summed (sum) or over the batch's tokens (token)"
    trl_name = "sft"
    roles = ("chosen",)

    def __init__(self, nll: Reduction = "mean"):
        super().__init__()
        check_reduction("nll", nll)
        self.nll = nll
        self.batchwise = nll == "token"
        self.by_length = "nll" if nll == "token" else ""

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        assert batch.chosen is not None
        return reduce_tokens(-batch.chosen.logps, batch.chosen.lengths, self.nll, self._weights(batch))
