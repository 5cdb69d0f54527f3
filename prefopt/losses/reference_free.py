"""Pairwise losses that need no reference model.

Symbols as in `direct`; a = log pi(y|x) / n, the log-probability per completion token.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from prefopt.losses.base import PairLoss
from prefopt.losses.checks import finite, positive
from prefopt.losses.direct import paired_roles
from prefopt.losses.registry import register
from prefopt.losses.scores import PreferenceBatch, Scores


@register("simpo")
class SimPO(PairLoss):
    """Simple preference optimization: length-normalised log-probabilities with a target margin.

    loss = -log sigmoid(beta (a_w - a_l) - gamma)

    Args:
        beta: scale of the per-token log-probabilities. The paper uses 2.0 to 2.5 (10 for its later models).
        gamma: target margin in units of the loss's logit. The paper states gamma / beta: 0.5 for Llama-3-Base
            (beta=2.0, gamma=1.0, the defaults here), 0.8 for Mistral-Base.

    Needs: sums and lengths; no reference.
    Limits: gamma = 0 and equal lengths n give a DPO-shaped loss on (p_w - p_l) with beta / n and no reference.
    Reference: Meng et al. 2024, arXiv 2405.14734, eq. 6.
    """

    formula = "-log sigmoid(beta*(a_w - a_l) - gamma)"
    paper = "2405.14734"

    def __init__(self, beta: float = 2.0, gamma: float = 1.0):
        super().__init__()
        self.beta = positive("beta", beta)
        self.gamma = finite("gamma", gamma)

    def reward(self, scores: Scores) -> Tensor:
        return self.beta * scores.mean_logps

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        chosen, rejected = paired_roles(batch)
        return -F.logsigmoid(self.reward(chosen) - self.reward(rejected) - self.gamma)
