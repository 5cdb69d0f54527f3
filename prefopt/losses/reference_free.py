"""Pairwise losses that need no reference model.

Symbols as in `direct`; p = log pi(y|x), a = p / n, the log-probability per completion token, and
o(a) = a - log(1 - e^a), its log-odds. The papers of CPO, SLiC, RRHF, ORPO and ASFT add a likelihood term; here is the
alignment term only; the sums of the papers are presets (`prefopt losses orpo_paper`).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from prefopt.losses.base import PairLoss
from prefopt.losses.checks import finite, non_negative, positive
from prefopt.losses.direct import paired_roles
from prefopt.losses.numerics import capped_expm1, log_odds
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


@register("cpo")
class CPO(PairLoss):
    """The preference term of contrastive preference optimization: DPO with a uniform reference.

    loss = -log sigmoid(beta (p_w - p_l))

    Args:
        beta: 0.1 in the paper.
        label_smoothing: e in [0, 0.5], the assumed share of flipped labels.

    Needs: sums; no reference. The paper adds the likelihood of the chosen completions: preset `cpo_paper`.
    Limits: SimPO with gamma = 0 at equal lengths n and beta * n.
    Reference: Xu et al. 2024, arXiv 2401.08417, eq. 3; as TRL's experimental CPO trainer (fe1ixxu/ALMA
        itself now holds ARPO).
    """

    formula = "-(1-e) log sigmoid(beta*(p_w - p_l)) - e log sigmoid(-beta*(p_w - p_l))"
    paper = "2401.08417"

    def __init__(self, beta: float = 0.1, label_smoothing: float = 0.0):
        super().__init__()
        self.beta = positive("beta", beta)
        self.label_smoothing = non_negative("label_smoothing", label_smoothing, most=0.5)

    def reward(self, scores: Scores) -> Tensor:
        return self.beta * scores.logps

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        chosen, rejected = paired_roles(batch)
        z = self.reward(chosen) - self.reward(rejected)
        return -(1 - self.label_smoothing) * F.logsigmoid(z) - self.label_smoothing * F.logsigmoid(-z)


@register("slic")
class SLiC(PairLoss):
    """The ranking term of SLiC-HF: a hinge on summed log-probabilities.

    loss = relu(delta - (p_w - p_l))

    Args:
        delta: the target margin in nats; 1 in ContextualAI/HALOs.

    Needs: sums; no reference. SLiC-HF adds 0.1 times the likelihood of a target: preset `slic_hf`.
    Limits: zero loss and gradient once p_w - p_l >= delta.
    Reference: Zhao et al. 2023, arXiv 2305.10425, eq. 3.
    """

    formula = "relu(delta - (p_w - p_l))"
    paper = "2305.10425"

    def __init__(self, delta: float = 1.0):
        super().__init__()
        self.delta = positive("delta", delta)

    def reward(self, scores: Scores) -> Tensor:
        return scores.logps

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        chosen, rejected = paired_roles(batch)
        return torch.relu(self.delta - (chosen.logps - rejected.logps))


@register("rrhf")
class RRHF(PairLoss):
    """The ranking term of RRHF: the rejected completion must not be more likely per token than the chosen one.

    loss = relu(a_l - a_w)

    Args: none.

    Needs: sums and lengths; no reference. RRHF adds the likelihood of the best completion: preset `rrhf_paper`.
    Limits: zero loss and gradient once a_w >= a_l.
    Reference: Yuan et al. 2023, arXiv 2304.05302, eq. 2.
    """

    formula = "relu(a_l - a_w)"
    paper = "2304.05302"

    def reward(self, scores: Scores) -> Tensor:
        return scores.mean_logps

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        chosen, rejected = paired_roles(batch)
        return torch.relu(rejected.mean_logps - chosen.mean_logps)


@register("simper")
class SimPER(PairLoss):
    """SimPER: the inverse perplexity of the chosen completion up, that of the rejected one down.

    loss = e^(a_l) - e^(a_w)

    Args: none.

    Needs: sums and lengths; no reference.
    Limits: values in (-1, 1); equal averages give 0. The gradient fades as a completion becomes unlikely, so rejected
        completions are not pushed down for ever.
    Reference: Xiao et al. 2025, arXiv 2502.00883; as tengxiao1/SimPER, scripts/simper_trainer.py.
    """

    formula = "e^a_l - e^a_w"
    paper = "2502.00883"

    def reward(self, scores: Scores) -> Tensor:
        return scores.mean_logps

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        chosen, rejected = paired_roles(batch)
        return rejected.mean_logps.exp() - chosen.mean_logps.exp()


@register("alpha_po")
class AlphaPO(PairLoss):
    """AlphaPO: SimPO with its reward bent by alpha.

    loss = -log sigmoid(beta (s_w - s_l) - gamma),  s = (1 - e^(-alpha a)) / alpha

    Args:
        beta: 2.5 in TRL's recipe for the paper.
        gamma: target margin in units of the logit; 0.1 in TRL's recipe for the paper.
        alpha: shape of the reward; 0.25 in the paper. 0 is SimPO.

    Needs: sums and lengths; no reference.
    Limits: alpha = 0 is SimPO. Not to be confused with `alpha_dpo`.
    Reference: Gupta et al. 2025, arXiv 2501.03884, eq. 8; as TRL's experimental CPO trainer with `alpha`.
    """

    formula = "-log sigmoid(beta*(s_w - s_l) - gamma), s = (1 - e^(-alpha*a))/alpha"
    paper = "2501.03884"

    def __init__(self, beta: float = 2.5, gamma: float = 0.1, alpha: float = 0.25):
        super().__init__()
        self.beta = positive("beta", beta)
        self.gamma = finite("gamma", gamma)
        self.alpha = finite("alpha", alpha)

    def reward(self, scores: Scores) -> Tensor:
        a = scores.mean_logps
        return self.beta * (a if self.alpha == 0 else -capped_expm1(-self.alpha * a) / self.alpha)

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        chosen, rejected = paired_roles(batch)
        return -F.logsigmoid(self.reward(chosen) - self.reward(rejected) - self.gamma)


class _OddsLoss(PairLoss):
    """A pair loss whose implicit reward is beta times the log-odds per token."""

    def __init__(self, beta: float = 1.0):
        super().__init__()
        self.beta = positive("beta", beta)

    def reward(self, scores: Scores) -> Tensor:
        return self.beta * log_odds(scores.mean_logps)


@register("orpo")
class ORPO(_OddsLoss):
    """The alignment term of ORPO, with a beta inside: a logistic loss on the difference of log-odds.

    loss = -log sigmoid(beta (o_w - o_l))

    Args:
        beta: scale of the log-odds; 1 in the one-stage paper, where the term is weighted 0.1 beside the likelihood.

    Needs: sums and lengths; no reference. One-stage ORPO is the preset `orpo_paper`.
    Limits: never above `asft` with the same beta. Per-token probabilities are clamped to 1 - 1e-6.
    Reference: Hong et al. 2024, arXiv 2403.07691, eq. 7; beta and the two-stage use: Gorbatovski et al. 2025, arXiv
        2502.01237.
    """

    formula = "-log sigmoid(beta*(o_w - o_l))"
    paper = "2403.07691"

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        chosen, rejected = paired_roles(batch)
        return -F.logsigmoid(self.reward(chosen) - self.reward(rejected))


@register("asft")
class ASFT(_OddsLoss):
    """The alignment term of ASFT, with a beta inside: the odds of each completion separately.

    loss = -log sigmoid(beta o_w) - log sigmoid(-beta o_l)

    Args:
        beta: scale of the log-odds; 1 in the one-stage paper.

    Needs: sums and lengths; no reference. One-stage ASFT is the preset `asft_paper`.
    Limits: at beta = 1 it is -a_w - log(1 - e^a_l), likelihood plus unlikelihood. Per-token
        probabilities are clamped to 1 - 1e-6.
    Reference: Wang et al. 2024, arXiv 2409.10571; beta and the two-stage use: Gorbatovski et al. 2025, arXiv
        2502.01237.
    """

    formula = "-log sigmoid(beta*o_w) - log sigmoid(-beta*o_l)"
    paper = "2409.10571"

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        chosen, rejected = paired_roles(batch)
        return -F.logsigmoid(self.reward(chosen)) - F.logsigmoid(-self.reward(rejected))
