"""Objectives over groups: K completions of a prompt at once, with their order or their scores.

Symbols: s_i is the score of completion i, the highest is the best; z_i = beta u_i its reward, u_i its log-ratio.
Groups may have different sizes K. Values are per group.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from prefopt.losses.checks import non_negative, positive
from prefopt.losses.grouped import GroupLoss, Groups
from prefopt.losses.likelihood import Reduction, check_reduction, reduce_tokens
from prefopt.losses.needs import Need
from prefopt.losses.registry import register
from prefopt.losses.scores import PreferenceBatch, Scores

_MAX_GAIN = 60.0
"""Scores above this count as this in `lipo_lambda`, so that 2^s and its products stay finite in float32."""


@register("plackett_luce")
class PlackettLuce(GroupLoss):
    """Plackett-Luce DPO: the likelihood of a ranking in which the best is chosen first, then the best of the rest.

    loss = sum_i log(exp z_i + sum over j with s_j < s_i of exp z_j) - z_i

    Args:
        beta: as in DPO.

    Needs: reference sums; groups with scores, of which only the order counts, or in order.
    Limits: K = 2 is DPO. Completions with equal scores are not compared with one another; all equal gives 0. A term is
        the negative log-softmax of completion i among itself and those below it. Scores may be transformed by any
        increasing function.
    Reference: Rafailov et al. 2023, arXiv 2305.18290, appendix A.3; eq. 7 of 2402.01878. Ties are not in the papers.
    """

    formula = "sum_i [log(exp(z_i) + sum_{s_j < s_i} exp(z_j)) - z_i], z = beta*u"
    paper = "2305.18290"
    reads_scores = False

    def per_group(self, groups: Groups) -> Tensor:
        z = groups.rewards
        among = groups.better | torch.eye(z.shape[1], dtype=torch.bool, device=z.device)
        rest = z[:, None, :].expand(among.shape).masked_fill(~among, -torch.inf)
        return ((torch.logsumexp(rest, -1) - z) * groups.present).sum(-1)


class _SoftLabels(GroupLoss):
    """Losses whose label is a distribution over the group, softmax(s / alpha)."""

    def __init__(self, beta: float = 0.01, alpha: float = 1.0):
        super().__init__(beta)
        self.alpha = positive("alpha", alpha)

    def labels(self, groups: Groups) -> Tensor:
        """(G, K) adding up to 1."""
        return groups.softmax(groups.scores / self.alpha)


@register("infonca")
class InfoNCA(_SoftLabels):
    """InfoNCA: cross-entropy between the softmax of the scores and the softmax of the rewards.

    loss = -sum_i p_i log softmax(z)_i,  p = softmax(s / alpha)

    Args:
        beta: as in DPO; 0.01 in the authors' script.
        alpha: temperature of the scores, in their unit. The authors' code has 1e-4 for scores from 1 to 10, so that
            the best completion is the label.

    Needs: reference sums; groups with scores.
    Limits: the minimum is z = s / alpha up to a constant of the group. K = 2 is DPO with the soft label
        sigmoid((s_w - s_l) / alpha), and DPO as alpha falls to 0. The same added to all rewards changes nothing.
    Reference: Chen et al. 2024, arXiv 2402.05369; as thu-ml/Noise-Contrastive-Alignment, reward_trainer.py.
    """

    formula = "-sum_i softmax(s/alpha)_i log softmax(z)_i, z = beta*u"
    paper = "2402.05369"

    def per_group(self, groups: Groups) -> Tensor:
        logps = groups.rewards - groups.log_sum_exp(groups.rewards)
        return -(self.labels(groups) * logps).sum(-1)


@register("nca_scores")
class NCAScores(_SoftLabels):
    """NCA over K scores: as InfoNCA, but each completion's likelihood counts, not only its share of the group's.

    loss = -sum_i [p_i log sigmoid(z_i) + (1/K) log sigmoid(-z_i)],  p = softmax(s / alpha)

    Args:
        beta: as in DPO; 0.01 in the authors' script.
        alpha: temperature of the scores, in their unit; 1e-4 in the authors' code, as for InfoNCA.

    Needs: reference sums; groups with scores.
    Limits: K = 2 with one score far above the other is `nca`. The minimum is z_i = log(K p_i): completions that are
        better than the group's average become likelier than under the reference, which no InfoNCA ensures.
    Reference: Chen et al. 2024, arXiv 2402.05369; as thu-ml/Noise-Contrastive-Alignment, reward_trainer.py.
    """

    formula = "-sum_i [softmax(s/alpha)_i log sigmoid(z_i) + log sigmoid(-z_i)/K], z = beta*u"
    paper = "2402.05369"

    def per_group(self, groups: Groups) -> Tensor:
        z, shares = groups.rewards, groups.present.to(groups.rewards) / groups.sizes[:, None]
        return -(self.labels(groups) * F.logsigmoid(z) + shares * F.logsigmoid(-z)).sum(-1)


@register("lipo_lambda")
class LiPOLambda(GroupLoss):
    """LiPO-lambda: DPO on every pair of a group, weighted by what swapping the two would change in the ranking.

    loss = sum over i, j with s_i > s_j of w_ij (-log sigmoid(z_i - z_j))
    w_ij = |2^s_i - 2^s_j| |1 / log(1 + r_i) - 1 / log(1 + r_j)|,  r = rank by reward, the highest is 1, no gradient

    Args:
        beta: as in DPO; 0.05 in the paper.

    Needs: reference sums; groups with scores, in the paper each completion's mean probability, from 0 to 1, to win
    against the others of its group.
    Limits: K = 2 is DPO times |2^s_w - 2^s_l| (1/log 2 - 1/log 3); equal scores are not compared.
    Of equal rewards (all of them, before the first step) the one with the lower score ranks first, so that the first
        step has a gradient. The paper does not say.
    Numerics: scores above 60 count as 60.
    Reference: Liu et al. 2024, arXiv 2402.01878, eq. 8 (third version); no code of the authors is public.
    """

    formula = "sum_{s_i > s_j} |2^s_i - 2^s_j| |1/log(1+r_i) - 1/log(1+r_j)| (-log sigmoid(z_i - z_j)), z = beta*u"
    paper = "2402.01878"

    def __init__(self, beta: float = 0.05):
        super().__init__(beta)

    def per_group(self, groups: Groups) -> Tensor:
        z = groups.rewards
        gains = torch.exp2(groups.scores.clamp(max=_MAX_GAIN))
        discounts = 1 / torch.log1p(_ranks(groups))
        weights = [(values[:, :, None] - values[:, None, :]).abs() for values in (gains, discounts)]
        losses = -F.logsigmoid(z[:, :, None] - z[:, None, :])
        return (weights[0] * weights[1] * losses * groups.better).sum((-1, -2))


def _ranks(groups: Groups) -> Tensor:
    """(G, K) ranks by reward from 1; of equal rewards the lower score comes first, then the first in the group."""
    by_score = groups.scores.masked_fill(~groups.present, torch.inf).argsort(dim=-1, stable=True)
    rewards = groups.rewards.detach().masked_fill(~groups.present, -torch.inf).gather(-1, by_score)
    order = by_score.gather(-1, rewards.argsort(dim=-1, descending=True, stable=True))
    return order.argsort(dim=-1).to(groups.rewards) + 1


@register("gvpo")
class GVPO(GroupLoss):
    """Group variance policy optimization: rewards follow the scores up to a constant of the group.

    loss = 1/2 sum_i (e_i - mean e)^2 / (K - 1),  e = z - s

    Args:
        beta: nats of log-ratio count this much of a unit of the score; 0.1 in the authors' code.

    Needs: reference sums, in the paper of the policy that drew the completions; groups with scores.
    Limits: the minimum is the policy that maximises the score less beta KL to the reference, from completions of any
        policy. K = 2 is beta^2 / 4 times rebel(eta = 1 / beta). The same added to all scores changes nothing.
    Reference: Zhang et al. 2025, arXiv 2504.19599; as jszkc/GVPO, GVPO/gvpo_core_algos.py (the mean that it detaches
        does not change the gradient: what it multiplies adds up to 0).
    """

    formula = "1/2 sum_i (e_i - mean e)^2/(K - 1), e = beta*u - s"
    paper = "2504.19599"

    def per_group(self, groups: Groups) -> Tensor:
        errors = groups.rewards - groups.scores
        squares = ((errors - groups.mean(errors)) * groups.present) ** 2
        return squares.sum(-1) / (2 * (groups.sizes - 1).clamp(min=1))


@register("a_star_po")
class AStarPO(GroupLoss):
    """A*-PO: regress each reward onto the score's advantage over the reference's optimal value.

    loss = mean_i (z_i - (s_i - V))^2,  V = value_beta log mean_i exp(s_i / value_beta)

    Args:
        beta: of the regression; 1e-3 in the authors' code.
        value_beta: of the value; 0.5 there. 0 takes the mean score.

    Needs: reference sums; groups with scores, drawn from the reference, since V is estimated from them.
    The authors estimate V from 8 completions of the reference and then train on one completion of the policy a prompt;
    here the completions of the group serve for both.
    Limits: with beta = value_beta the minimum is the policy that maximises the score less beta KL to the reference.
    Reference: Brantley et al. 2025, arXiv 2505.20686; as ZhaolinGao/A-PO, verl/trainer/apo/core_algos.py and
        verl/utils/dataset/rl_dataset.py.
    """

    formula = "mean_i (z_i + V - s_i)^2, V = b log mean_i exp(s_i/b), z = beta*u, b = value_beta"
    paper = "2505.20686"

    def __init__(self, beta: float = 1e-3, value_beta: float = 0.5):
        super().__init__(beta)
        self.value_beta = non_negative("value_beta", value_beta)

    def per_group(self, groups: Groups) -> Tensor:
        return groups.mean((groups.rewards + self._value(groups) - groups.scores) ** 2).squeeze(-1)

    def _value(self, groups: Groups) -> Tensor:
        if not self.value_beta:
            return groups.mean(groups.scores)
        sums = groups.log_sum_exp(groups.scores / self.value_beta)
        return self.value_beta * (sums - groups.sizes[:, None].to(sums).log())


@register("tpo")
class TPO(GroupLoss):
    """Triple preference optimization: likelihood of a gold answer, and a preference between two other answers.

    loss = -log sigmoid(beta (p_w - p_l) - gamma) + alpha * (-log pi(gold|x))

    Args:
        beta: as in `cpo`; 0.1 is the default of the authors' code.
        alpha: weight of the gold answer's likelihood; 1 in the authors' script.
        gamma: target margin, only used with `average` in the authors' code (TPO-L).
        average: log-probabilities per token in the preference (TPO-L).
        nll: how the likelihood is normalised, as in `sft`; over the tokens of the batch in the authors' code.

    Needs: groups in order, or with scores, of which only the order counts; no reference. The best completion is the
    gold answer, the second is chosen, the last is rejected; those between do not count.
    Limits: of two completions the best is gold and chosen: cpo(beta) + alpha * sft(nll).
    Reference: Saeidi et al. 2024, arXiv 2405.16681; as sahsaeedi/TPO, utils/tpo_trainer.py (tpo_loss).
    """

    formula = "-log sigmoid(beta*(p_2 - p_K) - gamma) - alpha*log pi(y_1|x), y_1 the best (gold), y_2 the second"
    paper = "2405.16681"
    needs = Need.NONE
    reads_scores = False

    def __init__(
        self,
        beta: float = 0.1,
        alpha: float = 1.0,
        gamma: float = 0.0,
        average: bool = False,
        nll: Reduction = "token",
    ):
        super().__init__(beta)
        check_reduction("nll", nll)
        self.alpha = non_negative("alpha", alpha)
        self.gamma = non_negative("gamma", gamma)
        self.average = average
        self.nll = nll
        self.batchwise = nll == "token"
        self.by_length = "nll" if nll == "token" else ""

    def reward(self, scores: Scores) -> Tensor:
        return self.beta * (scores.mean_logps if self.average else scores.logps)

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        candidates = batch.candidate
        assert candidates is not None
        groups = Groups.of(candidates, self.reward(candidates))
        gold = groups.best_first[:, 0] + groups.sizes.cumsum(0) - groups.sizes
        likelihood = reduce_tokens(-candidates.logps[gold], candidates.lengths[gold], self.nll, self._weights(batch))
        return self.per_group(groups) + self.alpha * likelihood

    def per_group(self, groups: Groups) -> Tensor:
        places = torch.stack([(groups.sizes > 2).long(), (groups.sizes - 1).clamp(min=0)], -1)
        chosen, rejected = groups.rewards.gather(-1, groups.best_first.gather(-1, places)).unbind(-1)
        return -F.logsigmoid(chosen - rejected - self.gamma)
