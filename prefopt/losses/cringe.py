"""Cringe: learning from bad completions by contrast with tokens that the model finds likely.

At each position t of a rejected completion the token y_t is contrasted with one candidate drawn from the model's own k
likeliest other tokens: c_t = log(1 + e^(s(y_t) - s(candidate))), s the log-probability (or logit: the normaliser
cancels).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from prefopt.losses.base import Loss, PairLoss
from prefopt.losses.checks import finite, non_negative, positive, whole
from prefopt.losses.direct import paired_roles
from prefopt.losses.distributed import world_rank
from prefopt.losses.likelihood import Reduction, check_reduction, reduce_tokens
from prefopt.losses.needs import Need
from prefopt.losses.numerics import numbered_generator
from prefopt.losses.registry import register
from prefopt.losses.scores import PreferenceBatch, Scores

_EVALUATION = -1
"""Number of the draw that every evaluation uses, so that evaluations can be compared."""


def token_contrast(scores: Scores, k: int, generator: torch.Generator) -> Tensor:
    """(N, T) contrast c_t of every completion token with one drawn candidate, zero outside the completion.

    Args:
        scores: with at least k + 1 `top_logps`, `top_ids`, `token_ids`, `token_logps` and `token_mask`.
        k: number of candidates.
        generator: CPU generator for the draws. They are assigned to the rows by the order of their log-probabilities,
            so that the order of the rows does not matter.
    """
    assert scores.top_logps is not None
    assert scores.top_ids is not None
    assert scores.token_ids is not None
    assert scores.token_logps is not None
    assert scores.token_mask is not None
    # Another term of the objective may need more of them.
    top_logps, top_ids = scores.top_logps[..., : k + 1], scores.top_ids[..., : k + 1]
    same = top_ids == scores.token_ids.unsqueeze(-1)
    # Either the token itself is among the k + 1 likeliest, or the last of them is not needed.
    last = torch.zeros_like(same)
    last[..., -1] = ~same.any(-1)
    keys = top_logps.detach().masked_fill(same | last, -math.inf)
    if k > 1:
        # The largest of log-probability + Gumbel noise is a draw from the softmax over the candidates.
        noise = -torch.empty(keys.shape, dtype=torch.float64).exponential_(generator=generator).log()
        by_row = torch.empty_like(keys)
        by_row[torch.argsort(scores.logps.detach(), stable=True)] = noise.to(keys)
        keys = keys + by_row
    candidate = top_logps.gather(-1, keys.argmax(-1, keepdim=True)).squeeze(-1)
    return F.softplus(scores.token_logps - candidate) * scores.token_mask


class _Contrasting(Loss):
    """The part shared by both Cringe losses: the candidates and their numbered draws."""

    k: int
    seed: int
    draws: Tensor

    def _prepare(self, k: int, seed: int) -> None:
        self.k = whole("k", k, least=1)
        self.seed = whole("seed", seed)
        self.top_k = self.k + 1
        self.register_buffer("draws", torch.zeros((), dtype=torch.long))

    def _contrast(self, scores: Scores) -> Tensor:
        """(N,) contrasts summed over tokens."""
        number = int(self.draws) if self.training else _EVALUATION
        if self.training:
            self.draws.add_(1)
        return token_contrast(scores, self.k, numbered_generator(self.seed, number, world_rank())).sum(-1)


@register("cringe")
class Cringe(_Contrasting):
    """Binary Cringe: likelihood on chosen completions, token contrast on rejected ones.

    loss = -log pi(y_w|x) / n_w for chosen,  weight * (sum_t c_t) / n_l for rejected

    Args:
        k: number of candidates; 1 in ParlAI's code, which makes the draw the best other token.
        weight: of the contrast; 1 in ParlAI's code.
        reduction: "mean" per token of each completion, "sum", or "token": all terms over all tokens of the batch, as
            in ParlAI's code.
        seed: of the draws, which are numbered: a resumed run continues with the next one.

    Needs: the k + 1 largest log-probabilities at every completion position; no reference. Works on unpaired feedback.
    Gradient flows into the candidate as well, as in the official code. Limits: a tie gives log 2 at a token.
    Reference: Adolphs et al. 2022, arXiv 2211.05826, eq. 2 to 4; as facebookresearch/ParlAI,
        projects/cringe/cringe_loss.py.
    """

    formula = "-a_w for chosen, weight * mean_t log(1 + e^(s(y_t) - s(candidate))) for rejected"
    paper = "2211.05826"
    needs = Need.TOP_K

    def __init__(self, k: int = 1, weight: float = 1.0, reduction: Reduction = "mean", seed: int = 0):
        super().__init__()
        check_reduction("reduction", reduction)
        self.weight = non_negative("weight", weight)
        self.reduction = reduction
        self._prepare(k, seed)

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        assert batch.chosen is not None
        assert batch.rejected is not None
        sums = torch.cat([-batch.chosen.logps, self.weight * self._contrast(batch.rejected)])
        lengths = torch.cat([batch.chosen.lengths, batch.rejected.lengths])
        return reduce_tokens(sums, lengths, self.reduction, self._weights(batch))


@register("pairwise_cringe")
class PairwiseCringe(_Contrasting, PairLoss):
    """Pairwise Cringe: binary Cringe on a pair, faded out as the model separates the pair.

    loss = g (-log pi(y_w|x) / n_w + weight (sum_t c_t) / n_l),  g = sigmoid((margin - (p_w - p_l)) / temperature)

    Args:
        margin: b, the difference of summed log-probabilities at which the gate is half open, in nats.
        temperature: tau, the softness of the gate; towards 0 it is the hard gate [p_w - p_l < margin].
        k: number of candidates of the contrast.
        weight: of the contrast.
        gate_gradient: let gradient flow through the gate. Whether the paper does is unknown.
        seed: of the draws, which are numbered: a resumed run continues with the next one.

    Needs: the k + 1 largest log-probabilities at every completion position; no reference.
    Limits: margin to infinity is binary Cringe on pairs. The paper's margin, temperature and k are unknown to us;
        these defaults are ours.
    Reference: Xu et al. 2023, arXiv 2312.16682 (gate from memory; no official code was found).
    """

    formula = "g*(-a_w + weight * mean_t c_t(y_l)), g = sigmoid((margin - (p_w - p_l))/temperature)"
    paper = "2312.16682"
    needs = Need.TOP_K

    def __init__(
        self,
        margin: float = 10.0,
        temperature: float = 10.0,
        k: int = 5,
        weight: float = 1.0,
        gate_gradient: bool = False,
        seed: int = 0,
    ):
        super().__init__()
        self.margin = finite("margin", margin)
        self.temperature = positive("temperature", temperature)
        self.weight = non_negative("weight", weight)
        self.gate_gradient = gate_gradient
        self._prepare(k, seed)

    def reward(self, scores: Scores) -> Tensor:
        return scores.logps

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        chosen, rejected = paired_roles(batch)
        gate = torch.sigmoid((self.margin - (chosen.logps - rejected.logps)) / self.temperature)
        if not self.gate_gradient:
            gate = gate.detach()
        contrast = self._contrast(rejected) / rejected.lengths.clamp(min=1)
        return gate * (self.weight * contrast - chosen.mean_logps)
