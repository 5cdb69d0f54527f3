"""Pairwise losses on the log-ratio to a reference: DPO and its closest relatives.

Symbols: w chosen, l rejected; u = log pi(y|x) - log ref(y|x) in nats; d = u_w - u_l, the margin before scaling;
n completion lengths in tokens; sigmoid, relu and log as usual. Every loss is a mean over pairs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from prefopt.losses.base import PairLoss
from prefopt.losses.checks import non_negative, positive
from prefopt.losses.needs import Need
from prefopt.losses.registry import register
from prefopt.losses.scores import PreferenceBatch, Scores


def paired_roles(batch: PreferenceBatch) -> tuple[Scores, Scores]:
    """The chosen and rejected scores of a batch whose roles have been checked."""
    assert batch.chosen is not None
    assert batch.rejected is not None
    return batch.chosen, batch.rejected


class ReferencePairLoss(PairLoss):
    """A pair loss with implicit reward beta * u; beta is its only hyperparameter unless a subclass adds others."""

    needs = Need.REFERENCE

    def __init__(self, beta: float = 0.1):
        super().__init__()
        self.beta = positive("beta", beta)

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
        average: log-ratios per token, which the authors confirmed as their practice (TRL does the same). False sums
            them, the literal reading of the paper's equation and the IPO of Gorbatovski et al. 2025, arXiv 2502.01237,
            whose best betas are 0.001 to 0.005.

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
    """Hinge loss on the DPO margin (the form of SLiC that RSO uses with a reference).

    loss = relu(1 - beta d)

    Args:
        beta: scale of the margin; pairs with d >= 1 / beta do not contribute. RSO uses 0.05.

    Needs: reference sums.
    Limits: policy = reference gives 1; zero loss and gradient once d >= 1 / beta.
    Reference: Zhao et al. 2023, arXiv 2305.10425 (SLiC-HF); Liu et al. 2023, arXiv 2309.06657, eq. 12 (RSO).
    """

    formula = "relu(1 - beta*d)"
    paper = "2309.06657"
    trl_name = "hinge"

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        return torch.relu(1 - self.scaled_margin(batch))


@register("robust")
class Robust(ReferencePairLoss):
    """Robust DPO: an unbiased estimate of the DPO loss under labels that are flipped with a known probability.

    loss = [-(1 - e) log sigmoid(beta d) + e log sigmoid(-beta d)] / (1 - 2 e)

    Args:
        beta: as in DPO; 0.1 in the paper.
        label_smoothing: e in [0, 0.5), the probability that a label is flipped; 0.1 in the paper's runs. 0 is DPO,
            which is also TRL's default.

    Needs: reference sums.
    Limits: its mean over flips, (1 - e) loss(z) + e loss(-z), is DPO's loss exactly. For e > 0 the gradient tends to
        -e / (1 - 2e) as z grows and never to 0: the loss is unbounded below, so train briefly.
    Reference: Chowdhury et al. 2024, arXiv 2403.00409, eq. 13; as TRL's `robust`.
    """

    formula = "[-(1-e) log sigmoid(beta*d) + e log sigmoid(-beta*d)] / (1-2e)"
    paper = "2403.00409"
    trl_name = "robust"

    def __init__(self, beta: float = 0.1, label_smoothing: float = 0.0):
        super().__init__()
        self.beta = positive("beta", beta)
        self.label_smoothing = non_negative("label_smoothing", label_smoothing, below=0.5)

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        z = self.scaled_margin(batch)
        e = self.label_smoothing
        return (-(1 - e) * F.logsigmoid(z) + e * F.logsigmoid(-z)) / (1 - 2 * e)


@register("exo")
class EXO(ReferencePairLoss):
    """Exact preference optimization on pairs: the reverse KL from the model's preference to a smoothed label.

    loss = sigmoid(z) [log sigmoid(z) - log(1 - e)] + sigmoid(-z) [log sigmoid(-z) - log e],  z = beta d

    Args:
        beta: as in DPO; 0.1 in TRL's recipe.
        label_smoothing: e in (0, 0.5], how far the label is from certain. A certain label has infinite loss, so 0 is
            refused; TRL's own default of 0 gives infinities.

    Needs: reference sums.
    Limits: minimum 0 at z = log((1 - e) / e); mode seeking, so the gradient vanishes for pairs that are far wrong.
    Reference: Ji et al. 2024, arXiv 2402.00856, eq. 16; as TRL's `exo_pair`.
    """

    formula = "KL(sigmoid(beta*d) || 1-e) over the two orders of the pair"
    paper = "2402.00856"
    trl_name = "exo_pair"

    def __init__(self, beta: float = 0.1, label_smoothing: float = 1e-3):
        super().__init__()
        self.beta = positive("beta", beta)
        self.label_smoothing = positive("label_smoothing", label_smoothing, most=0.5)

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        z = self.scaled_margin(batch)
        e = self.label_smoothing
        first = torch.sigmoid(z) * (F.logsigmoid(z) - math.log1p(-e))
        return first + torch.sigmoid(-z) * (F.logsigmoid(-z) - math.log(e))


@register("dpo_norm")
class NormalizedDPO(ReferencePairLoss):
    """Length-normalised DPO, as in Tulu 3.

    loss = -log sigmoid(beta (u_w / n_w - u_l / n_l))

    Args:
        beta: on the scale of per-token log-ratios; about 5 in Tulu 3 (from memory). 0.1 is TRL's default.

    Needs: reference sums, lengths.
    Limits: equal lengths n give DPO with beta / n.
    Reference: Lambert et al. 2024, arXiv 2411.15124, eq. 6; as TRL's `sigmoid_norm`.
    """

    formula = "-log sigmoid(beta*(u_w/n_w - u_l/n_l))"
    paper = "2411.15124"
    trl_name = "sigmoid_norm"

    def reward(self, scores: Scores) -> Tensor:
        return self.beta * scores.ratios / scores.lengths.clamp(min=1)

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        return -F.logsigmoid(self.scaled_margin(batch))


@register("hdpo")
class HDPO(ReferencePairLoss):
    """H-DPO: DPO whose reverse KL weights the policy's entropy by alpha.

    loss = -log sigmoid(alpha beta (p_w - p_l) - beta (r_w - r_l)),  p = log pi(y|x), r = log ref(y|x)

    Args:
        beta: as in DPO; the paper's runs use 0.01 (from memory).
        alpha: weight of the entropy. Below 1 sharpens the policy, above 1 flattens it; the paper tries 0.8 to 1.2.

    Needs: reference sums.
    Limits: alpha = 1 is DPO; equal to DPO(alpha beta) with reference sums divided by alpha. The optimum is
        softmax((log ref + r / beta) / alpha). Where policy equals reference the logit is beta (alpha - 1)(r_w - r_l),
        so a run does not start at log 2.
    Reference: Omura et al. 2024, arXiv 2411.07595, eq. 8 (formula from memory, consistent with the abstract; no
        official code was found).
    """

    formula = "-log sigmoid(alpha*beta*(p_w - p_l) - beta*(r_w - r_l))"
    paper = "2411.07595"

    def __init__(self, beta: float = 0.1, alpha: float = 1.0):
        super().__init__()
        self.beta = positive("beta", beta)
        self.alpha = positive("alpha", alpha)

    def reward(self, scores: Scores) -> Tensor:
        assert scores.ref_logps is not None
        return self.beta * (self.alpha * scores.logps - scores.ref_logps)

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        return -F.logsigmoid(self.scaled_margin(batch))


@register("margin_dpo")
class MarginDPO(ReferencePairLoss):
    """DPO with a margin for each pair, from a `margin` column of the data (a reward gap, for example).

    loss = -log sigmoid(beta d - margin)

    Args:
        beta: as in DPO.

    Needs: reference sums, a numeric `margin` column.
    Limits: margin 0 is DPO.
    Reference: Touvron et al. 2023, arXiv 2307.09288, eq. 2 (the margin, in reward modelling); as
        turbo-llm/turbo-alignment uses it for DPO.
    """

    formula = "-log sigmoid(beta*d - margin)"
    paper = "2307.09288"
    columns = ("margin",)

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        chosen, _ = paired_roles(batch)
        z = self.scaled_margin(batch)
        return -F.logsigmoid(z - chosen.columns["margin"].to(z.dtype))
