"""The objectives that a language model found for DiscoPOP, from logistic and exponential pieces of one margin.

Symbols as in `direct`; x = beta d, y = x / tau with tau = 0.05, the beta of the search. Batch statistics are taken
over all processes, and gradient flows through them, as in the official code (luchris429/DiscoPOP, src/alignment/gpo.py
and scripts/plotting/plot_losses.py).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from prefopt.losses.checks import positive
from prefopt.losses.direct import ReferencePairLoss, paired_roles
from prefopt.losses.distributed import global_moments
from prefopt.losses.errors import LossError
from prefopt.losses.numerics import capped_exp
from prefopt.losses.registry import register
from prefopt.losses.scores import PreferenceBatch


class _Discovered(ReferencePairLoss):
    paper = "2406.08414"

    def __init__(self, beta: float = 0.05):
        super().__init__()
        self.beta = positive("beta", beta)


@register("discopop")
class DiscoPOP(_Discovered):
    """DiscoPOP, the log-ratio modulated loss (LRML): logistic for wrong pairs, exponential for right ones.

    loss = (1 - m) log(1 + e^-x) + m e^-x,  m = sigmoid(x / tau),  x = beta d

    Args:
        beta: 0.05 in the paper; 0.1 is TRL's default.
        tau: temperature of the blend, 0.05 in the paper for every beta.

    Needs: reference sums.
    Limits: policy = reference gives (log 2 + 1) / 2. Not convex: at tau = 0.05 it has a local minimum at x = -0.1186
        and a local maximum at x = 0.0720, and pushes pairs the wrong way between them. x = 0, where a run starts, is
        between them: on the bundled pairs all held-out pairs ended up wrong (docs/notes/claims.md).
    Reference: Lu et al. 2024, arXiv 2406.08414, eq. 5; as TRL's `discopop`.
    """

    formula = "(1-m) log(1 + e^-x) + m e^-x, m = sigmoid(x/tau), x = beta*d"
    trl_name = "discopop"

    def __init__(self, beta: float = 0.1, tau: float = 0.05):
        super().__init__(beta)
        self.tau = positive("tau", tau)

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        x = self.scaled_margin(batch)
        blend = torch.sigmoid(x / self.tau)
        return (1 - blend) * F.softplus(-x) + blend * capped_exp(-x)


@register("dbaql")
class DBAQL(_Discovered):
    """Dynamic blending adaptive quantile loss: logistic and exponential mixed by the batch's variance.

    loss = c log(1 + e^(-x/T)) + (1 - c) e^(-x T),  c = sigmoid(variance of x / 0.05 over the batch),  T = 0.9

    Args:
        beta: 0.05 in the paper.

    Needs: reference sums; the variance is unbiased and over the global batch. A lone example has variance 0.
    The official code computes a quantile that it never uses; it is not computed here.
    Reference: Lu et al. 2024, arXiv 2406.08414, appendix; official code as named in this module.
    """

    formula = "c log(1 + e^(-x/0.9)) + (1-c) e^(-0.9x), c = sigmoid(var(x/0.05)), x = beta*d"
    batchwise = True

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        x = self.scaled_margin(batch)
        _, variance, _ = global_moments(x / 0.05, self._weights(batch))
        blend = torch.sigmoid(variance)
        return blend * F.softplus(-x / 0.9) + (1 - blend) * capped_exp(-0.9 * x)


@register("aql")
class AQL(_Discovered):
    """Adaptive quantile loss: logistic below a moving quantile, hinge above.

    loss = a log(1 + e^-x) + (1 - a) relu(1 - x),  a = sigmoid(q - x / 0.05)
    q = 0.5 + 0.01 (sigmoid(mean of x / 0.05 over the batch) - 0.5)

    Args:
        beta: 0.05 in the paper.

    Needs: reference sums; the mean is over the global batch.
    Limits: not monotone; where policy = reference its gradient lowers the margin, as DiscoPOP's does.
    Reference: Lu et al. 2024, arXiv 2406.08414, appendix; official code as named in this module.
    """

    formula = "a log(1 + e^-x) + (1-a) relu(1 - x), a = sigmoid(q - x/0.05), q follows sigmoid(mean(x/0.05))"
    batchwise = True

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        x = self.scaled_margin(batch)
        mean, _, _ = global_moments(x / 0.05, self._weights(batch))
        quantile = 0.5 + 0.01 * (torch.sigmoid(mean) - 0.5)
        weight = torch.sigmoid(quantile - x / 0.05)
        return weight * F.softplus(-x) + (1 - weight) * torch.relu(1 - x)


@register("aqfl")
class AQFL(_Discovered):
    """Adaptive quantile feedback loss: logistic far from a moving quantile, hinge near it.

    loss = g log(1 + e^-x) + (1 - g) relu(1 - x),  g = sigmoid(0.1 |x / 0.05 - q|)
    q0 = std(x / 0.05) mean(sigmoid(-x / 0.05)),  q = q0 + 0.05 (sigmoid(mean(x / 0.05)) - q0)

    Args:
        beta: 0.05 in the paper.

    Needs: reference sums; mean and unbiased standard deviation are over the global batch.
    Reference: Lu et al. 2024, arXiv 2406.08414, appendix; official code as named in this module.
    """

    formula = "g log(1 + e^-x) + (1-g) relu(1 - x), g = sigmoid(0.1 |x/0.05 - q|), q from the batch"
    batchwise = True

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        x = self.scaled_margin(batch)
        y, weights = x / 0.05, self._weights(batch)
        mean, _, std = global_moments(y, weights)
        wrong, _, _ = global_moments(torch.sigmoid(-y), weights)
        start = std * wrong
        quantile = start + 0.05 * (torch.sigmoid(mean) - start)
        blend = torch.sigmoid(0.1 * (y - quantile).abs())
        return blend * F.softplus(-x) + (1 - blend) * torch.relu(1 - x)


@register("padll")
class PADLL(_Discovered):
    """Performance adaptive decay logistic loss: the logistic loss, halved for wrong pairs.

    loss = 0.9 (1 - 0.5 [d < 0]) log(1 + e^-x)

    Args:
        beta: 0.05 in the paper.

    Needs: reference sums.
    Limits: jumps at 0, from 0.45 log 2 below to 0.9 log 2 at and above.
    Reference: Lu et al. 2024, arXiv 2406.08414, appendix; official code as named in this module.
    """

    formula = "0.9 (1 - 0.5 [d < 0]) log(1 + e^-x), x = beta*d"

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        x = self.scaled_margin(batch)
        logistic = F.softplus(-x)
        return torch.where(x < 0, 0.45 * logistic, 0.9 * logistic)


@register("cell")
class CELL(_Discovered):
    """Combined exponential and logistic loss.

    loss = e^-x / 2 + log(1 + e^-x) / 2

    Args:
        beta: 0.05 in the paper.

    Needs: reference sums.
    Limits: convex and falling; above DPO's loss everywhere.
    Reference: Lu et al. 2024, arXiv 2406.08414, appendix; official code as named in this module.
    """

    formula = "e^-x/2 + log(1 + e^-x)/2, x = beta*d"

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        x = self.scaled_margin(batch)
        return 0.5 * (capped_exp(-x) + F.softplus(-x))


@register("pfl")
class PFL(_Discovered):
    """Policy focused loss: half the logistic loss where the policy prefers the chosen, twice the hinge elsewhere.

    loss = log(1 + e^-y) / 2 if p_w > p_l, else 2 relu(1 - y)
    y = beta d / 0.05 (form="paper"), d ("search"), or beta d ("repository")

    Args:
        beta: 0.05 in the paper, where "paper" and "search" are the same.
        form: "paper" is its general form. "search" is what the language model wrote, without a beta, and what the
            paper's score belongs to (policy_focused_loss_old in the repository). "repository" is the
            repository's other function, whose argument is 20 times smaller at beta 0.05: it hardly learns on IMDb.

    Needs: reference sums.
    Limits: half of DPO's loss at beta / 0.05 where p_w > p_l. The branch looks at the policy alone, not at the margin
        d, so the loss jumps as a pair crosses it.
    Reference: Lu et al. 2024, arXiv 2406.08414, appendix; official code as named in this module.
    """

    formula = (
        "log(1 + e^-y)/2 if p_w > p_l else 2 relu(1 - y), y = beta*d/0.05; d if form='search', beta*d if 'repository'"
    )

    def __init__(self, beta: float = 0.05, form: Literal["paper", "search", "repository"] = "paper"):
        super().__init__(beta)
        if form not in ("paper", "search", "repository"):
            raise LossError(f"form must be 'paper', 'search' or 'repository', got {form!r}")
        self.form = form

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        chosen, rejected = paired_roles(batch)
        y = self.scaled_margin(batch)
        if self.form != "repository":
            y = y / (self.beta if self.form == "search" else 0.05)
        return torch.where(chosen.logps > rejected.logps, F.softplus(-y) / 2, 2 * torch.relu(1 - y))
