"""Pairwise objectives on next-token distributions, not only on sequence log-probabilities.

Symbols as in `direct`.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from prefopt.losses.checks import non_negative, positive
from prefopt.losses.direct import ReferencePairLoss, paired_roles
from prefopt.losses.errors import LossError
from prefopt.losses.needs import Need
from prefopt.losses.registry import register
from prefopt.losses.scores import PreferenceBatch, Scores


@register("tdpo")
class TDPO(ReferencePairLoss):
    """Token-level DPO: a penalty in the margin for the policy's distance from the reference along each completion.

    variant 1:  loss = -log sigmoid(beta (d - (K_l - K_w)))
    variant 2:  loss = -log sigmoid(beta (d - alpha (K_l - stop_gradient(K_w))))
    K = sum over completion positions of KL(ref || pi) of the next-token distributions

    Args:
        beta: 0.1 in the paper.
        alpha: weight of the drift in variant 2; 0.5 in the paper. Unused by variant 1.
        variant: 1 or 2, TDPO1 or TDPO2 of the paper.

    Needs: reference sums and the full next-token distributions of both models.
    Limits: policy = reference gives log 2; alpha = 0 in variant 2 is DPO.
    Reference: Zeng et al. 2024, arXiv 2404.11999, eq. 15 to 17; as
        Vance0124/Token-level-Direct-Preference-Optimization, trainers.py (its configuration file picks variant 1).
    """

    formula = "-log sigmoid(beta*(d - alpha*(K_l - sg(K_w)))), K = sum_t KL(ref || pi); variant 1: no alpha, no sg"
    paper = "2404.11999"
    needs = Need.REFERENCE | Need.FORWARD_KL

    def __init__(self, beta: float = 0.1, alpha: float = 0.5, variant: Literal[1, 2] = 2):
        super().__init__()
        if variant not in (1, 2):
            raise LossError(f"variant must be 1 or 2, got {variant!r}")
        self.beta = positive("beta", beta)
        self.alpha = non_negative("alpha", alpha)
        self.variant = variant

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        chosen, rejected = paired_roles(batch)
        up, down = _drift(chosen), _drift(rejected)
        charge = down - up if self.variant == 1 else self.alpha * (down - up.detach())
        return -F.logsigmoid(self.scaled_margin(batch) - self.beta * charge)


def _drift(scores: Scores) -> Tensor:
    assert scores.token_forward_kl is not None
    return scores.token_forward_kl.sum(-1)
