"""Pairwise objectives that keep the scores of the two completions: reward differences, win probabilities.

Symbols as in `direct`; s_w and s_l are the columns `chosen_score` and `rejected_score` of the data.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from prefopt.losses.base import PairLoss
from prefopt.losses.checks import positive
from prefopt.losses.direct import ReferencePairLoss, paired_roles
from prefopt.losses.errors import LossError
from prefopt.losses.needs import Need
from prefopt.losses.pointwise import SPPO
from prefopt.losses.registry import register
from prefopt.losses.scores import PreferenceBatch, Scores

SCORES = ("chosen_score", "rejected_score")
"""Columns of the scores of a pair."""
SHARES = dict.fromkeys(SCORES, (0.0, 1.0))
"""Their limits where a score is a probability or a reward from 0 to 1."""


def pair_scores(batch: PreferenceBatch) -> tuple[Tensor, Tensor]:
    """(N,) scores of the chosen and of the rejected completions."""
    chosen, _ = paired_roles(batch)
    better, worse = (chosen.columns[name].to(chosen.logps) for name in SCORES)
    return better, worse


@register("rebel")
class REBEL(PairLoss):
    """REBEL: regress the difference of log-ratios onto the difference of rewards.

    loss = (u_w - u_l - eta (s_w - s_l))^2

    Args:
        eta: nats of margin for one unit of reward; the learning rate of mirror descent. 1 in the authors' code, which
            takes rewards of a reward model.

    Needs: reference sums; the columns `chosen_score` and `rejected_score`, on any scale. In the paper the reference is
    the previous iterate, from which both completions were drawn.
    Limits: a difference of scores of 1 / (2 beta eta) is ipo(beta, average=False); equal scores pull the margin to 0.
    Rewards: u / eta, so that the reward margin's target is the difference of scores.
    Reference: Gao et al. 2024, arXiv 2404.16767; as ZhaolinGao/REBEL, src/ultrafeedback_largebatch/rebel.py.
    """

    formula = "(u_w - u_l - eta*(s_w - s_l))^2"
    paper = "2404.16767"
    needs = Need.REFERENCE
    columns = SCORES

    def __init__(self, eta: float = 1.0):
        super().__init__()
        self.eta = positive("eta", eta)

    def reward(self, scores: Scores) -> Tensor:
        return scores.ratios / self.eta

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        chosen, rejected = paired_roles(batch)
        better, worse = pair_scores(batch)
        return (chosen.ratios - rejected.ratios - self.eta * (better - worse)) ** 2


@register("reward_aware")
class RewardAware(ReferencePairLoss):
    """Reward-aware preference optimization: the model's reward gap is matched to the one in the data.

    With z = beta d and g = scale (s_w - s_l):
    bwd    KL(sigmoid(g) || sigmoid(z)) of the two preferences
    fwd    KL(sigmoid(z) || sigmoid(g))
    sq     (z - g)^2
    scale  |g| (-log sigmoid(z))

    Args:
        beta: as in DPO; 0.2 is the default of the authors' code.
        scale: of the scores; 1 is the default of the authors' code.
        distance: one of the above.

    Needs: reference sums; the columns `chosen_score` and `rejected_score`.
    Called RPO by its authors, with their rpo_bwd_kl, rpo_fwd_kl, rpo_sq and scale as `distance`. `rpo` is here the
    regularized one (2405.16436).
    Limits: z = g is the minimum 0 of the first three. "bwd" has the gradient of DPO with labels sigmoid(g): with
        sigmoid(g) = 1 - e it is dpo(label_smoothing=e) less the label's entropy, and DPO as g grows. "sq" is beta^2
        times rebel(eta = scale / beta). "scale" is DPO weighted by the gap, and 0 for equal scores.
    Numerics: log-sigmoids; finite for any finite margin and gap. The gradient of "fwd" fades where z is far from 0.
    Reference: Sun et al. 2025, arXiv 2502.00203 (first used in 2406.11704); as NVIDIA/NeMo-Aligner,
        models/nlp/gpt/megatron_gpt_dpo_model.py. "scale" as in its self-rewarding branch, which multiplies each gap by
        the batch's mean of the logistic part; here by the pair's own.
    """

    formula = (
        "KL(sigmoid(g) || sigmoid(z)), KL(sigmoid(z) || sigmoid(g)), (z - g)^2 or -|g| log sigmoid(z), "
        "z = beta*d, g = scale*(s_w - s_l)"
    )
    paper = "2502.00203"
    columns = SCORES

    def __init__(self, beta: float = 0.1, scale: float = 1.0, distance: Literal["bwd", "fwd", "sq", "scale"] = "bwd"):
        super().__init__()
        if distance not in ("bwd", "fwd", "sq", "scale"):
            raise LossError(f"distance must be 'bwd', 'fwd', 'sq' or 'scale', got {distance!r}")
        self.beta = positive("beta", beta)
        self.scale = positive("scale", scale)
        self.distance = distance

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        z = self.scaled_margin(batch)
        better, worse = pair_scores(batch)
        g = self.scale * (better - worse)
        if self.distance == "sq":
            return (z - g) ** 2
        if self.distance == "scale":
            return g.abs() * -F.logsigmoid(z)
        first, second = (g, z) if self.distance == "bwd" else (z, g)
        return sum(
            (
                torch.sigmoid(sign * first) * (F.logsigmoid(sign * first) - F.logsigmoid(sign * second))
                for sign in (1, -1)
            ),
            start=torch.zeros_like(z),
        )


@register("mappo")
class MaPPO(ReferencePairLoss):
    """MaPPO: DPO whose rejected side counts as much as the two completions differ in reward.

    loss = -log sigmoid(beta u_w - (s_w - s_l) beta u_l)

    Args:
        beta: as in DPO.

    Needs: reference sums; the columns `chosen_score` and `rejected_score`, rewards from 0 to 1.
    Limits: scores 1 and 0 are DPO; equal scores push the chosen completion up alone. A constant difference is
        `dpo_shift`. Adding the same to both log-ratios changes the loss, unless the scores are 1 and 0.
    Reference: Lan et al. 2025, arXiv 2507.21183 (fifth version), eq. 8. The paper's rewards come from a Bradley-Terry
        model; how it brings them into [0, 1] is not said in what was read.
    """

    formula = "-log sigmoid(beta*u_w - (s_w - s_l)*beta*u_l)"
    paper = "2507.21183"
    columns = SCORES
    limits = SHARES

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        chosen, rejected = paired_roles(batch)
        better, worse = pair_scores(batch)
        return -F.logsigmoid(self.reward(chosen) - (better - worse) * self.reward(rejected))


@register("sppo_soft")
class SoftSPPO(SPPO):
    """Self-play preference optimization with win probabilities from the data.

    loss = (u_w - (s_w - 1/2) / beta)^2 + (u_l - (s_l - 1/2) / beta)^2

    Args:
        beta: 1 / eta of the paper, where it is 1e-3.
        reduction: "sum" of the two squares, or their "mean", as in the official code, which is half of it.

    Needs: reference sums; the columns `chosen_score` and `rejected_score`: the probability, from 0 to 1, that the
    completion beats a sample of the previous policy (the mean over the prompt's other samples).
    Limits: probabilities 1 and 0 are `sppo`; both 1/2 pull both completions to the reference.
    Reference: Wu et al. 2024, arXiv 2405.00675; as uclaml/SPPO, sppo/trainer.py (sppo; chosen_probs_win and
        chosen_probs_lose are the columns there).
    """

    formula = "(u_w - (s_w - 1/2)/beta)^2 + (u_l - (s_l - 1/2)/beta)^2; half of it if reduction='mean'"
    trl_name = ""
    columns = SCORES
    limits = SHARES

    def targets(self, batch: PreferenceBatch) -> tuple[Tensor, Tensor]:
        better, worse = pair_scores(batch)
        return (better - 0.5) / self.beta, (worse - 0.5) / self.beta
