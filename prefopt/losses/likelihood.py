"""Plain likelihood of the chosen completions: the supervised term of hybrid objectives.

Three normalisations exist under one name in the literature; with unequal lengths they are different objectives, so the
choice is an argument here.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from prefopt.losses.base import Loss
from prefopt.losses.distributed import global_sum, world_size
from prefopt.losses.registry import register
from prefopt.losses.scores import PreferenceBatch


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

    def __init__(self, nll: Literal["mean", "sum", "token"] = "mean"):
        super().__init__()
        if nll not in ("mean", "sum", "token"):
            raise ValueError(f"nll must be 'mean', 'sum' or 'token', got {nll!r}")
        self.nll = nll

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        assert batch.chosen is not None
        scores = batch.chosen
        if self.nll == "mean":
            return -scores.mean_logps
        if self.nll == "sum":
            return -scores.logps
        # Scaled so that the mean over examples, which every loss takes, is the mean over tokens.
        tokens = global_sum(scores.lengths.to(scores.logps).sum()).clamp(min=1)
        examples = self._count(scores.logps, batch) * world_size()
        return -scores.logps * examples / tokens
