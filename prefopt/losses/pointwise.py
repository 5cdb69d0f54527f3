"""Objectives that score the chosen and the rejected completion separately, with a reference.

Symbols as in `direct`; R = beta u. Unlike margin losses they change when the same amount is added to both
log-ratios.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from prefopt.losses.base import Loss
from prefopt.losses.checks import positive
from prefopt.losses.direct import ReferencePairLoss, paired_roles
from prefopt.losses.distributed import global_sum
from prefopt.losses.errors import LossError
from prefopt.losses.needs import Need
from prefopt.losses.registry import register
from prefopt.losses.scores import PreferenceBatch, Scores


@register("nca")
class NCA(ReferencePairLoss):
    """Noise-contrastive alignment on pairs.

    loss = -log sigmoid(R_w) - log sigmoid(-R_w) / 2 - log sigmoid(-R_l) / 2

    Args:
        beta: 0.01 in the paper's pair runs; 0.1 is TRL's default.

    Needs: reference sums.
    Limits: the chosen reward has a finite optimum, R_w = log 2, so its likelihood cannot grow without bound.
    Reference: Chen et al. 2024, arXiv 2402.05369, eq. 13; as TRL's `nca_pair`.
    """

    formula = "-log sigmoid(R_w) - log sigmoid(-R_w)/2 - log sigmoid(-R_l)/2, R = beta*u"
    paper = "2402.05369"
    trl_name = "nca_pair"

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        chosen, rejected = (self.reward(scores) for scores in paired_roles(batch))
        return -F.logsigmoid(chosen) - 0.5 * (F.logsigmoid(-chosen) + F.logsigmoid(-rejected))


@register("bco_pair")
class BCOPair(ReferencePairLoss):
    """Binary classifier optimization on pairs, without the moving threshold.

    loss = -log sigmoid(R_w) - log sigmoid(-R_l)

    Args:
        beta: 0.01 in the paper; 0.1 is TRL's default.

    Needs: reference sums.
    Limits: never below DPO's loss, since sigmoid(a) sigmoid(b) <= sigmoid(a + b). `bco` has the paper's threshold.
    Reference: Jung et al. 2024, arXiv 2404.04656, eq. 12 with delta = 0; as TRL's `bco_pair` (whose documentation
        prints DPO's formula instead).
    """

    formula = "-log sigmoid(R_w) - log sigmoid(-R_l), R = beta*u"
    paper = "2404.04656"
    trl_name = "bco_pair"

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        chosen, rejected = (self.reward(scores) for scores in paired_roles(batch))
        return -F.logsigmoid(chosen) - F.logsigmoid(-rejected)


@register("bco")
class BCO(Loss):
    """Binary classifier optimization: a classifier of good completions, with a threshold that follows the rewards.

    loss = -log sigmoid(R - delta) for chosen, -log sigmoid(-(R - delta)) for rejected
    delta = running mean of all rewards so far, chosen and rejected, of all processes; no gradient

    Args:
        beta: 0.01 in the paper.

    Needs: reference sums.
    Works on pairs and on unpaired feedback; the mean is over completions, so on pairs the value is half of the
    paper's sum of two. The threshold includes the current batch, does not change during evaluation, and is saved
    with checkpoints. The paper's weights for a shift between the prompts of the two classes are not included.
    Limits: delta = 0 is `bco_pair` / 2; on pairs the sum is never below DPO's loss for any delta.
    Reference: Jung et al. 2024, arXiv 2404.04656, eq. 12; running mean as in TRL's experimental BCO trainer.
    """

    formula = "-log sigmoid(R - delta) for chosen, -log sigmoid(delta - R) for rejected, delta = running mean of R"
    paper = "2404.04656"
    needs = Need.REFERENCE

    def __init__(self, beta: float = 0.1):
        super().__init__()
        self.beta = positive("beta", beta)
        self.reward_mean: Tensor
        self.reward_count: Tensor
        self.register_buffer("reward_mean", torch.zeros(()))
        self.register_buffer("reward_count", torch.zeros(()))

    def reward(self, scores: Scores) -> Tensor:
        return self.beta * scores.ratios

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        assert batch.chosen is not None
        assert batch.rejected is not None
        chosen, rejected = self.reward(batch.chosen), self.reward(batch.rejected)
        rewards = torch.cat([chosen, rejected])
        if self.training:
            self._follow(rewards, self._weights(batch))
        delta = self.reward_mean.to(rewards)
        return torch.cat([-F.logsigmoid(chosen - delta), -F.logsigmoid(delta - rejected)])

    def _follow(self, rewards: Tensor, weights: Tensor | None) -> None:
        weights = torch.ones_like(rewards) if weights is None else weights
        total = global_sum((rewards * weights).sum().to(self.reward_mean))
        count = global_sum(weights.sum().to(self.reward_mean))
        self.reward_count.add_(count)
        self.reward_mean.add_((total - count * self.reward_mean) / self.reward_count.clamp(min=1e-12))


@register("sppo")
class SPPO(ReferencePairLoss):
    """Self-play preference optimization with hard win probabilities (1 for chosen, 0 for rejected).

    loss = (u_w - 1 / (2 beta))^2 + (u_l + 1 / (2 beta))^2

    Args:
        beta: 1 / eta of the paper, where it is 1e-3; 0.1 is TRL's default.
        reduction: "sum" of the two squares, as in TRL, or their "mean", as in the official code, which is half of it.

    Needs: reference sums; in the paper the reference is the previous iterate, from which the pairs were drawn.
    Limits: policy = reference gives 1 / (2 beta^2) for the sum; minimum 0 at u_w = -u_l = 1 / (2 beta).
    Reference: Wu et al. 2024, arXiv 2405.00675, eq. 4.7; as TRL's `sppo_hard`; mean as in uclaml/SPPO, trainer.py.
    """

    formula = "(u_w - 1/(2*beta))^2 + (u_l + 1/(2*beta))^2; half of it if reduction='mean'"
    paper = "2405.00675"
    trl_name = "sppo_hard"

    def __init__(self, beta: float = 0.1, reduction: Literal["sum", "mean"] = "sum"):
        super().__init__()
        if reduction not in ("sum", "mean"):
            raise LossError(f"reduction must be 'sum' or 'mean', got {reduction!r}")
        self.beta = positive("beta", beta)
        self.reduction = reduction

    def targets(self, batch: PreferenceBatch) -> tuple[Tensor | float, Tensor | float]:
        """What the log-ratios of the chosen and the rejected completions are regressed onto."""
        return 1 / (2 * self.beta), -1 / (2 * self.beta)

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        chosen, rejected = paired_roles(batch)
        up, down = self.targets(batch)
        total = (chosen.ratios - up) ** 2 + (rejected.ratios - down) ** 2
        return total if self.reduction == "sum" else total / 2


@register("apo_zero")
class APOZero(ReferencePairLoss):
    """Anchored preference optimization for chosen completions better than the model's own: one up, the other down.

    loss = 1 - sigmoid(R_w) + sigmoid(R_l)

    Args:
        beta: 0.1 in the paper's runs.

    Needs: reference sums.
    Limits: policy = reference gives 1; values in (0, 2); the gradient fades as completions leave the reference.
    Reference: D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 7; as TRL's `apo_zero`. Gorbatovski et al. 2025, arXiv
        2502.01237, write it without the 1, which has the same gradient.
    """

    formula = "1 - sigmoid(R_w) + sigmoid(R_l), R = beta*u"
    paper = "2408.06266"
    trl_name = "apo_zero"

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        chosen, rejected = (self.reward(scores) for scores in paired_roles(batch))
        # 1 - sigmoid(x) = sigmoid(-x), which keeps its precision for large x.
        return torch.sigmoid(-chosen) + torch.sigmoid(rejected)


@register("apo_down")
class APODown(ReferencePairLoss):
    """Anchored preference optimization for chosen completions worse than the model's own: both down, rejected further.

    loss = sigmoid(R_w) + 1 - sigmoid(R_w - R_l)

    Args:
        beta: 0.1 in the paper's runs.

    Needs: reference sums.
    Limits: policy = reference gives 1; values in (0, 2).
    Reference: D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 8; as TRL's `apo_down`.
    """

    formula = "sigmoid(R_w) + 1 - sigmoid(R_w - R_l), R = beta*u"
    paper = "2408.06266"
    trl_name = "apo_down"

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        chosen, rejected = (self.reward(scores) for scores in paired_roles(batch))
        return torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen)


@register("cal_dpo")
class CalDPO(ReferencePairLoss):
    """Cal-DPO: DPO whose log-ratios are also regressed onto the scale of rewards.

    loss = -log sigmoid(d) + weight [(u_w - 1 / (2 beta))^2 + (u_l + 1 / (2 beta))^2]

    Args:
        beta: sets the targets +-1 / (2 beta); 1e-3 in the paper's code. The logistic term has no beta.
        weight: of the squares; 1/2 in the paper's code, 1 in Gorbatovski et al. 2025, arXiv 2502.01237, version 3.

    Needs: reference sums.
    Limits: the squares alone are weight times `sppo`.
    Reference: Xiao et al. 2024, arXiv 2412.14516, eq. 10; weights as in tengxiao1/Cal-DPO, scripts/dpo_trainer.py.
    """

    formula = "-log sigmoid(d) + weight*((u_w - 1/(2*beta))^2 + (u_l + 1/(2*beta))^2)"
    paper = "2412.14516"

    def __init__(self, beta: float = 0.1, weight: float = 0.5):
        super().__init__()
        self.beta = positive("beta", beta)
        self.weight = positive("weight", weight)

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        chosen, rejected = paired_roles(batch)
        target = 1 / (2 * self.beta)
        squares = (chosen.ratios - target) ** 2 + (rejected.ratios + target) ** 2
        return -F.logsigmoid(chosen.ratios - rejected.ratios) + self.weight * squares
