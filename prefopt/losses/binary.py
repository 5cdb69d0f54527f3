"""Losses for single completions that are labelled good or bad, with no pairing.

Symbols as in `direct`: u = log pi(y|x) - log ref(y|x).
"""

from __future__ import annotations

import torch
from torch import Tensor

from prefopt.losses.base import Loss, LossOutput
from prefopt.losses.checks import non_negative, positive
from prefopt.losses.distributed import global_mean
from prefopt.losses.needs import Need
from prefopt.losses.registry import register
from prefopt.losses.scores import PreferenceBatch, Scores


@register("kto")
class KTO(Loss):
    """Kahneman-Tversky optimization: desirable completions above, undesirable ones below a moving reference point.

    loss = desirable_weight (1 - sigmoid(beta (u - z0)))       for chosen completions
    loss = undesirable_weight (1 - sigmoid(beta (z0 - u)))     for rejected completions
    z0   = max(0, mean of u over mismatched prompt-completion pairs of all processes), no gradient

    Args:
        beta: scale of the log-ratios; the paper uses 0.1.
        desirable_weight: weight of chosen completions, 1 in the paper.
        undesirable_weight: weight of rejected completions, 1 in the paper; if the two classes differ in number, it
            recommends desirable_weight * N_chosen of 1 to 4/3 times undesirable_weight * N_rejected.

    Needs: reference sums, also of mismatched pairs (completions moved on by one example within the batch).
    The mean is over all completions of the batch, chosen and rejected. Works on pairs too, as 2N examples. A
    batch without mismatched pairs (a lone example) takes the z0 of the training batch before it, which is saved with
    checkpoints.
    Limits: u = z0 gives weight / 2; the gradient vanishes for very good and very bad examples.
    Reference: Ethayarajh et al. 2024, arXiv 2402.01306, eq. 8.
    """

    formula = "w_d (1 - sigmoid(beta*(u - z0))) for chosen, w_u (1 - sigmoid(beta*(z0 - u))) for rejected"
    paper = "2402.01306"
    needs = Need.REFERENCE | Need.MISMATCHED

    def __init__(self, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0):
        super().__init__()
        self.beta = positive("beta", beta)
        self.desirable_weight = non_negative("desirable_weight", desirable_weight)
        self.undesirable_weight = non_negative("undesirable_weight", undesirable_weight)
        self.last_baseline: Tensor
        self.register_buffer("last_baseline", torch.zeros(()))

    def reward(self, scores: Scores) -> Tensor:
        return self.beta * scores.ratios

    def baseline(self, batch: PreferenceBatch) -> Tensor:
        """z0, a scalar without gradient, the same on every process."""
        assert batch.mismatched is not None
        shifts = batch.mismatched
        # A last batch of one example has no other prompt to move to: use the value of the batch before.
        z0 = global_mean(shifts.ratios, shifts.weight, otherwise=self.last_baseline.to(shifts.logps)).clamp(min=0)
        if self.training:
            self.last_baseline.copy_(z0)
        return z0

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        assert batch.chosen is not None
        assert batch.rejected is not None
        z0 = self.baseline(batch)
        # 1 - sigmoid(x) = sigmoid(-x), which keeps its precision for large x.
        chosen = self.desirable_weight * torch.sigmoid(self.beta * (z0 - batch.chosen.ratios))
        rejected = self.undesirable_weight * torch.sigmoid(self.beta * (batch.rejected.ratios - z0))
        return torch.cat([chosen, rejected])

    def forward(self, batch: PreferenceBatch) -> LossOutput:
        output = super().forward(batch)
        assert batch.mismatched is not None
        output.metrics["mismatched_ratios"] = batch.mismatched.ratios.detach().float()
        return output
