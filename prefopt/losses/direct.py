"""Pairwise losses on the log-ratio to a reference: DPO and its closest relatives.

Symbols: w chosen, l rejected; u = log pi(y|x) - log ref(y|x) in nats; d = u_w - u_l, the margin before scaling;
n completion lengths in tokens; sigmoid, relu and log as usual. Every loss is a mean over pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from prefopt.losses.base import Need, PairLoss
from prefopt.losses.checks import non_negative, positive
from prefopt.losses.registry import register
from prefopt.losses.scores import PreferenceBatch, Scores


def paired_roles(batch: PreferenceBatch) -> tuple[Scores, Scores]:
    """The chosen and rejected scores of a batch whose roles have been checked."""
    assert batch.chosen is not None
    assert batch.rejected is not None
    return batch.chosen, batch.rejected


class ReferencePairLoss(PairLoss):
    """A pair loss whose implicit reward is beta * u."""

    needs = Need.REFERENCE
    beta: float

    def reward(self, scores: Scores) -> Tensor:
        return self.beta * scores.ratios

    def scaled_margin(self, batch: PreferenceBatch) -> Tensor:
        """(N,) reward of the chosen completion minus that of the rejected one."""
        chosen, rejected = paired_roles(batch)
        return self.reward(chosen) - self.reward(rejected)


@register("dpo")
class DPO(ReferencePairLoss):
    """Direct preference optimization.

    loss = -(1 - e) log sigmoid(beta d) - e log sigmoid(-beta d)

    Args:
        beta: strength of the pull towards the reference; the paper uses 0.1 (0.5 for summarisation).
        label_smoothing: e in [0, 0.5], the assumed share of flipped labels (conservative DPO). The minimum then is at
            beta d = log((1 - e) / e) instead of infinity. TRL's `sigmoid` ignores this option since 0.29.

    Needs: reference sums.
    Limits: policy = reference gives log 2; e = 0.5 has its minimum at d = 0.
    Numerics: log-sigmoid, finite for any finite margin.
    Reference: Rafailov et al. 2023, arXiv 2305.18290, eq. 7; label smoothing: Mitchell 2023, "A note on DPO with noisy
        preferences" (cDPO).
    """

    formula = "-(1-e) log sigmoid(beta*d) - e log sigmoid(-beta*d)"
    paper = "2305.18290"
    trl_name = "sigmoid"

    def __init__(self, beta: float = 0.1, label_smoothing: float = 0.0):
        super().__init__()
        self.beta = positive("beta", beta)
        self.label_smoothing = non_negative("label_smoothing", label_smoothing, most=0.5)

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        z = self.scaled_margin(batch)
        return -(1 - self.label_smoothing) * F.logsigmoid(z) - self.label_smoothing * F.logsigmoid(-z)


@register("ipo")
class IPO(ReferencePairLoss):
    """Identity preference optimization: regress the margin onto a finite target.

    loss = (u_w / n_w - u_l / n_l - 1 / (2 beta))^2        (average=True)
    loss = (u_w - u_l - 1 / (2 beta))^2                    (average=False)

    Args:
        beta: tau in the paper: the target margin is 1 / (2 beta) nats (per token, if averaged). Its meaning differs
            between the two forms: with equal lengths n, averaged with beta is 1/n^2 times summed with beta / n.
        average: log-ratios per token, as the authors confirmed to be their practice (TRL does the same). False sums
            them, the literal reading of the paper's equation.

    Needs: reference sums, lengths.
    Limits: policy = reference gives 1 / (4 beta^2); past the target the gradient changes sign.
    Rewards: beta * (u / n) or beta * u, so that the reward margin's target is 1/2.
    Reference: Azar et al. 2023, arXiv 2310.12036, eq. 17.
    """

    formula = "(u_w/n_w - u_l/n_l - 1/(2*beta))^2; without /n if average=False"
    paper = "2310.12036"
    trl_name = "ipo"

    def __init__(self, beta: float = 0.1, average: bool = True):
        super().__init__()
        self.beta = positive("beta", beta)
        self.average = average

    def reward(self, scores: Scores) -> Tensor:
        ratios = scores.ratios / scores.lengths.clamp(min=1) if self.average else scores.ratios
        return self.beta * ratios

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        return (self.scaled_margin(batch) / self.beta - 1 / (2 * self.beta)) ** 2


@register("hinge")
class Hinge(ReferencePairLoss):
    """Hinge loss on the DPO margin (the form of SLiC that RSO fits with a reference).

    loss = relu(1 - beta d)

    Args:
        beta: scale of the margin; pairs with d >= 1 / beta no longer contribute. RSO uses 0.05.

    Needs: reference sums.
    Limits: policy = reference gives 1; zero loss and gradient once d >= 1 / beta.
    Reference: Zhao et al. 2023, arXiv 2305.10425 (SLiC-HF); Liu et al. 2023, arXiv 2309.06657, eq. 12 (RSO).
    """

    formula = "relu(1 - beta*d)"
    paper = "2309.06657"
    trl_name = "hinge"

    def __init__(self, beta: float = 0.1):
        super().__init__()
        self.beta = positive("beta", beta)

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        return torch.relu(1 - self.scaled_margin(batch))
