"""Pairwise objectives in which the examples of a batch, or of the run so far, act on one another.

Symbols as in `direct` and `reference_free`. Batches are global: statistics and sorts span all processes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from prefopt.losses.base import Loss
from prefopt.losses.checks import finite, non_negative, positive, whole
from prefopt.losses.direct import ReferencePairLoss, paired_roles
from prefopt.losses.distributed import global_concat, global_moments, global_sum, present, world_rank
from prefopt.losses.needs import Need
from prefopt.losses.numerics import numbered_generator
from prefopt.losses.registry import register
from prefopt.losses.scores import PreferenceBatch, Scores


def _smoothed_logistic(z: Tensor, label_smoothing: float) -> Tensor:
    return -(1 - label_smoothing) * F.logsigmoid(z) - label_smoothing * F.logsigmoid(-z)


def match_quantiles(values: Tensor, others: Tensor, counted: Tensor, others_counted: Tensor) -> Tensor:
    """For each of (N,) `values`, the entry of `others` at the same quantile of its global batch; no gradient.

    Args:
        values: (N,) local values.
        others: (M,) local values of the other kind. If N and M are globally equal, this matches by rank.
        counted: (N,) bool, false for values of weight 0, which are left out; they are matched with themselves.
        others_counted: (M,) bool, the same for `others`.
    """
    everyone = global_concat(values[counted])
    pool = global_concat(others[others_counted])
    matched = values.detach().clone()
    if not len(pool) or not len(everyone):
        return matched
    # Ties are broken by position, so that equal values are matched with different entries.
    order = torch.empty(len(everyone), dtype=torch.long, device=values.device)
    order[torch.argsort(everyone, stable=True)] = torch.arange(len(everyone), device=values.device)
    counts = global_concat(counted.sum().reshape(1))
    start = int(counts[: world_rank()].sum())
    ranks = order[start : start + int(counted.sum())]
    places = (ranks * len(pool) + len(pool) // 2) // len(everyone) if len(pool) != len(everyone) else ranks
    matched[counted] = torch.sort(pool).values[places.clamp(max=len(pool) - 1)]
    return matched


@register("aot")
class AOT(ReferencePairLoss):
    """Alignment via optimal transport on pairs: sorted margins of the policy against sorted margins of the reference.

    loss = mean over ranks i of -log sigmoid(beta (sorted(p_w - p_l)_i - sorted(r_w - r_l)_i))

    Args:
        beta: 0.01 in the paper; 0.1 is TRL's default.
        label_smoothing: e in [0, 0.5], as in DPO.

    Needs: reference sums; sorts run over the global batch, so it works better with larger micro-batches.
    Limits: a batch of one pair is DPO. Pairs of weight 0 are left out of the sorts.
    Rewards are DPO's.
    Reference: Melnyk et al. 2024, arXiv 2406.05882, algorithm 2; as TRL's `aot`.
    """

    formula = "-log sigmoid(beta*(sorted(p_w - p_l) - sorted(r_w - r_l)))"
    paper = "2406.05882"
    batchwise = True
    trl_name = "aot"

    def __init__(self, beta: float = 0.1, label_smoothing: float = 0.0):
        super().__init__()
        self.beta = positive("beta", beta)
        self.label_smoothing = non_negative("label_smoothing", label_smoothing, most=0.5)

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        chosen, rejected = paired_roles(batch)
        assert chosen.ref_logps is not None
        assert rejected.ref_logps is not None
        margins = chosen.logps - rejected.logps
        counted = present(margins, self._weights(batch)).bool()
        targets = match_quantiles(margins, chosen.ref_logps - rejected.ref_logps, counted, counted)
        return _smoothed_logistic(self.beta * (margins - targets), self.label_smoothing)


@register("aot_unpaired")
class AOTUnpaired(Loss):
    """Alignment via optimal transport without pairs: chosen log-ratios, sorted, against rejected ones, sorted.

    loss = mean over ranks i of -log sigmoid(beta (sorted(u_w)_i - sorted(u_l)_i))

    Args:
        beta: 0.01 in the paper; 0.1 is TRL's default.
        label_smoothing: e in [0, 0.5], as in DPO.

    Needs: reference sums; sorts run over the global batch.
    Classes of different size are matched by quantile. Limits: one chosen and one rejected completion are DPO; the
        order of the rejected completions does not matter. Completions of weight 0 are left out of the sorts.
    Reference: Melnyk et al. 2024, arXiv 2406.05882, algorithm 1; as TRL's `aot_unpaired`.
    """

    formula = "-log sigmoid(beta*(sorted(u_w) - sorted(u_l)))"
    paper = "2406.05882"
    batchwise = True
    trl_name = "aot_unpaired"
    needs = Need.REFERENCE

    def __init__(self, beta: float = 0.1, label_smoothing: float = 0.0):
        super().__init__()
        self.beta = positive("beta", beta)
        self.label_smoothing = non_negative("label_smoothing", label_smoothing, most=0.5)

    def reward(self, scores: Scores) -> Tensor:
        return self.beta * scores.ratios

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        assert batch.chosen is not None
        assert batch.rejected is not None
        up, down = batch.chosen.ratios, batch.rejected.ratios
        counted = present(torch.cat([up, down]), self._weights(batch)).bool()
        here, there = counted[: len(up)], counted[len(up) :]
        # A match may be on another process, which computes its own gradient. So each side has the gradient of its
        # own completion only, and twice, because every matched pair is counted on both sides.
        chosen = up - match_quantiles(up, down, here, there)
        rejected = match_quantiles(down, up, there, here) - down
        values = _smoothed_logistic(self.beta * torch.cat([chosen, rejected]), self.label_smoothing)
        return 2 * values - values.detach()


@register("beta_dpo")
class BetaDPO(ReferencePairLoss):
    """Beta-DPO: one beta per batch, larger for larger margins, on the pairs with typical margins.

    loss = -log sigmoid(beta_b d) over the selected pairs
    beta_b = max(1e-3, beta (1 + a (mean of selected d - M))), no gradient
    selected: a share `keep` of the batch, drawn without replacement with weights exp(-(d - M)^2 / (2 s^2))
    M, s: running mean and standard deviation of d

    Args:
        beta: 0.1 in the paper.
        a: how strongly beta follows the margins; 0.6 in the paper (from memory), 0 in the official configuration.
        keep: share of the pairs that is drawn; 0.8 in the paper.
        momentum: of the running statistics; 0.9 in the paper.
        seed: of the draws, which are numbered: a resumed run continues with the next one.

    Needs: reference sums; statistics are over the global batch, each process draws from its own pairs.
    Unselected pairs have value 0 and the selected ones are scaled up, so that the mean is that of the selected pairs.
    Evaluation drops nothing and does not change the statistics. Limits: a = 0 and keep = 1 is DPO. The official
    running statistics start at 0; here they start at the first batch's, because the official deviation is 0 where the
    policy is the reference.
    Reference: Wu et al. 2024, arXiv 2407.08639, eq. 7 to 9; order of updates as in junkangwu/beta-DPO, trainers.py.
    """

    formula = "-log sigmoid(beta_b*d) on typical pairs, beta_b = beta*(1 + a*(mean(d) - M))"
    paper = "2407.08639"

    def __init__(self, beta: float = 0.1, a: float = 0.6, keep: float = 0.8, momentum: float = 0.9, seed: int = 0):
        super().__init__()
        self.beta = positive("beta", beta)
        self.a = finite("a", a)
        self.keep = positive("keep", keep, most=1)
        self.momentum = non_negative("momentum", momentum, below=1)
        self.seed = whole("seed", seed)
        self.margin_mean: Tensor
        self.margin_std: Tensor
        self.draws: Tensor
        self.register_buffer("margin_mean", torch.zeros(()))
        self.register_buffer("margin_std", torch.zeros(()))
        self.register_buffer("draws", torch.zeros((), dtype=torch.long))

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        chosen, rejected = paired_roles(batch)
        d = chosen.ratios - rejected.ratios
        weights = self._weights(batch)
        weights = torch.ones_like(d) if weights is None else weights.to(d)
        selected = torch.ones_like(d)
        if self.training:
            self._follow(d.detach(), weights)
            selected = self._select(d.detach(), weights > 0)
        total = global_sum((weights * selected * d).sum())
        count = global_sum((weights * selected).sum())
        mean = total / count.clamp(min=1e-12)
        beta = (self.beta * (1 + self.a * (mean - self.margin_mean.to(mean)))).clamp(min=1e-3)
        scale = global_sum(present(d, weights).sum()) / global_sum(selected.sum()).clamp(min=1)
        return -F.logsigmoid(beta * d) * selected * scale

    def _follow(self, d: Tensor, weights: Tensor) -> None:
        mean, _, std = global_moments(d, weights)
        first = int(self.draws) == 0
        for buffer, now in ((self.margin_mean, mean), (self.margin_std, std)):
            kept = 0.0 if first else self.momentum
            buffer.mul_(kept).add_((1 - kept) * now.to(buffer))

    def _select(self, d: Tensor, counted: Tensor) -> Tensor:
        generator = numbered_generator(self.seed, int(self.draws), world_rank())
        self.draws.add_(1)
        count = max(1, math.floor(self.keep * int(counted.sum())))
        if self.keep == 1 or not bool(counted.any()):
            return counted.to(d)
        spread = self.margin_std.to(d).clamp(min=1e-6)
        logits = -((d - self.margin_mean.to(d)) ** 2) / (2 * spread**2)
        # The `count` largest of logit + Gumbel noise are a draw without replacement. Noise is assigned by rank, so
        # that the order of the examples does not matter.
        noise = -torch.empty(len(d), dtype=torch.float64).exponential_(generator=generator).log()
        keys = logits.masked_fill(~counted, -math.inf)
        order = torch.argsort(keys, descending=True)
        ranked = torch.empty_like(keys)
        ranked[order] = noise.to(keys)
        selected = torch.zeros_like(d)
        selected[torch.topk(keys + ranked, count).indices] = 1.0
        return selected


@register("alpha_dpo")
class AlphaDPO(ReferencePairLoss):
    """Alpha-DPO: SimPO with a margin for each pair, larger where the policy is further ahead of the reference.

    loss = -log sigmoid(beta (a_w - a_l) - gamma - beta alpha Z)
    Z = (m - mean(m)) / std(m), no gradient,  m = u_w / n_w - u_l / n_l, the policy's lead over the reference

    Args:
        beta: 2.5 in the paper (10 for Gemma-2).
        gamma: SimPO's margin in units of the logit; the paper gives gamma / beta: 0.6 for Llama-3-Instruct, 0.15 for
            Mistral, 0.4 for Gemma-2.
        alpha: weight of the margin of each pair, 0.05 to 0.2 in the paper. 0 is SimPO.
        momentum: of the running mean and standard deviation of m.

    Needs: reference sums, lengths; statistics are over the global batch and the run so far. They include the current
        batch and do not change during evaluation.
    Limits: alpha = 0 is SimPO. Not to be confused with `alpha_po`.
    In the official code the running statistics start at 0 and are a divisor, which gives 0 / 0 where the policy is the
    reference; here they start at the first batch's.
    Reference: Wu et al. 2024, arXiv 2410.10148, eq. 11; as junkangwu/alpha-DPO, scripts/dpo_trainer.py.
    """

    formula = "-log sigmoid(beta*(a_w - a_l) - gamma - beta*alpha*Z), Z the standardised lead over the reference"
    paper = "2410.10148"

    def __init__(self, beta: float = 2.5, gamma: float = 1.5, alpha: float = 0.1, momentum: float = 0.9):
        super().__init__()
        self.beta = positive("beta", beta)
        self.gamma = finite("gamma", gamma)
        self.alpha = finite("alpha", alpha)
        self.momentum = non_negative("momentum", momentum, below=1)
        self.lead_mean: Tensor
        self.lead_std: Tensor
        self.updates: Tensor
        self.register_buffer("lead_mean", torch.zeros(()))
        self.register_buffer("lead_std", torch.zeros(()))
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))

    def reward(self, scores: Scores) -> Tensor:
        return self.beta * scores.mean_logps

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        chosen, rejected = paired_roles(batch)
        up, down = (scores.ratios / scores.lengths.clamp(min=1) for scores in (chosen, rejected))
        lead = (up - down).detach()
        if self.training:
            mean, _, std = global_moments(lead, self._weights(batch))
            kept = 0.0 if int(self.updates) == 0 else self.momentum
            self.lead_mean.mul_(kept).add_((1 - kept) * mean.to(self.lead_mean))
            self.lead_std.mul_(kept).add_((1 - kept) * std.to(self.lead_std))
            self.updates.add_(1)
        spread = self.lead_std.to(lead)
        z = torch.where(spread > 0, (lead - self.lead_mean.to(lead)) / spread.clamp(min=1e-12), 0 * lead)
        return -F.logsigmoid(self.scaled_margin(batch) - self.gamma - self.beta * self.alpha * z)
