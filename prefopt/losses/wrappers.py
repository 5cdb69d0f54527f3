"""Objectives made from other objectives: example weights, length normalisation, robustness to wrong labels.

Each takes a loss as its first argument, in Python (`WPO(DPO(0.1))`) and in text (`wpo(dpo(beta=0.1))`), and needs
what that loss needs, and sometimes more.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from prefopt.losses.base import Loss, LossOutput
from prefopt.losses.checks import finite, non_negative, positive, whole
from prefopt.losses.distributed import global_mean, global_sum, present, world_size
from prefopt.losses.errors import LossError
from prefopt.losses.grouped import metrics_of
from prefopt.losses.needs import PER_TOKEN, Need
from prefopt.losses.registry import register
from prefopt.losses.scores import PreferenceBatch, Scores
from prefopt.losses.values import values_of


class Wrapper(Loss):
    """A loss around another one. It has the needs, roles, columns and rewards of the inner loss."""

    def __init__(self, loss: Loss):
        super().__init__()
        if loss.outermost:
            raise LossError(f"loss cannot be {loss._label}, which must be the outermost one")
        if not self.outermost and not loss.paired and len({term.roles for _, _, term in loss.terms()}) > 1:
            raise LossError(
                f"loss must give one value a completion, but the terms of {loss} are about different completions: put "
                f"each of them into a {self._label}(...) of its own and add these up"
            )
        self.loss = loss
        self.needs = loss.needs
        self.roles = loss.roles
        self.paired = loss.paired
        self.grouped = loss.grouped
        self.reads_scores = loss.reads_scores
        self.columns = loss.columns
        self.limits = dict(loss.limits)
        self.top_k = loss.top_k
        self.divergences = loss.divergences
        self.layers = loss.layers

    def needs_of(self, role: str) -> Need:
        needs = self.loss.needs_of(role)
        return needs | (self.needs & ~self.loss.needs) if role in self.roles else needs

    def reward(self, scores: Scores) -> Tensor | None:
        return self.loss.reward(scores)

    def _metrics(self, batch: PreferenceBatch) -> dict[str, Tensor]:
        return metrics_of(self, batch) if self.grouped else super()._metrics(batch)

    def inner(self, batch: PreferenceBatch) -> Tensor:
        """(N,) values of the inner loss, checked in its own name."""
        return values_of(self.loss, batch, self.loss.absent())


@register("wpo")
class WPO(Wrapper):
    """Weighted preference optimization: examples are weighted by how likely the policy would produce them.

    loss = W_w W_l * loss of the pair, W without gradient; the W of the completion for unpaired losses
    W = exp(mean over tokens of [log pi(y_t) - log sum_v pi(v)^2])       (aligned=True)
    W = exp(mean over tokens of log pi(y_t))                             (aligned=False)

    Args:
        loss: the loss to weight; the paper weights DPO, beta 0.01.
        aligned: divide each token's probability by the expected probability under its distribution.
        clamp: limit weights to 1, as the official script does; TRL does not.

    Needs: what `loss` needs, and the per-token sum of squared probabilities over the vocabulary.
    Limits: deterministic or uniform next-token distributions give W = 1 if aligned.
    Reference: Zhou et al. 2024, arXiv 2406.11827, eq. 2 and section 3.2; as TRL's `use_weighting`; clamp as in
        wzhouad/WPO, scripts/run_wpo.py.
    """

    formula = "W_w W_l * loss, W = exp(mean_t [log pi(y_t) - log sum_v pi(v)^2])"
    paper = "2406.11827"

    def __init__(self, loss: Loss, aligned: bool = True, clamp: bool = False):
        super().__init__(loss)
        if loss.grouped:
            raise LossError(f"loss must give one value a pair or a completion, and {loss} gives one a group")
        self.aligned = aligned
        self.clamp = clamp
        if aligned:
            self.needs = loss.needs | Need.COLLISION

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        weights = [self._likelihood(scores) for role in self.roles if (scores := batch.role(role)) is not None]
        joined = torch.stack(weights).sum(0) if self.paired else torch.cat(weights)
        weight = torch.exp(joined.clamp(max=0) if self.clamp else joined).detach()
        return weight * self.inner(batch)

    def _likelihood(self, scores: Scores) -> Tensor:
        """(N,) log W."""
        if not self.aligned:
            return scores.mean_logps
        assert scores.token_logps is not None
        assert scores.token_collision is not None
        assert scores.token_mask is not None
        sums = ((scores.token_logps - scores.token_collision) * scores.token_mask).sum(-1)
        return sums / scores.lengths.clamp(min=1)


@register("length_normalized")
class LengthNormalized(Wrapper):
    """Any loss on per-token averages in place of sums.

    loss evaluated at log pi / n, log ref / n, log prev / n

    Args:
        loss: a loss on summed log-probabilities; one that works token by token, or that uses lengths in another way
            than to average (rdpo's alpha, nll="token"), is refused.

    Needs: what `loss` needs, and lengths.
    Limits: length_normalized(dpo(beta)) is dpo_norm(beta); length_normalized(cpo(beta)) is simpo(beta, gamma=0).
    Reference: as in Meng et al. 2024, arXiv 2405.14734, section 2.2, for any objective.
    """

    formula = "loss at per-token averages of all log-probabilities"
    paper = "2405.14734"

    def __init__(self, loss: Loss):
        super().__init__(loss)
        if loss.needs & (PER_TOKEN | Need.MISMATCHED):
            raise LossError(f"loss must work on summed log-probabilities, but {loss} asks for more")
        for part in loss.modules():
            if isinstance(part, Loss) and part.by_length:
                raise LossError(
                    f"loss must use lengths to average alone, but {part.by_length} of {part} does more with them and "
                    "would have no effect here: set it to another value, or leave length_normalized out"
                )

    def reward(self, scores: Scores) -> Tensor | None:
        return self.loss.reward(self._averaged(scores))

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        averaged = {role: self._averaged(scores) for role in self.roles if (scores := batch.role(role)) is not None}
        return self.inner(replace(batch, **averaged))  # type: ignore[arg-type]

    @staticmethod
    def _averaged(scores: Scores) -> Scores:
        n = scores.lengths.clamp(min=1)
        return replace(
            scores,
            logps=scores.logps / n,
            ref_logps=None if scores.ref_logps is None else scores.ref_logps / n,
            prev_logps=None if scores.prev_logps is None else scores.prev_logps / n,
            lengths=torch.ones_like(scores.lengths),
        )


@register("noise_robust")
class NoiseRobust(Wrapper):
    """A pair loss made robust to swapped labels, by using both orders of each pair.

    With L the loss as labelled and L' the loss with chosen and rejected swapped:
    normalized   L / (L + L'): its values over the two orders sum to 1, the symmetry that makes a loss noise tolerant
    unbiased     ((1 - rate) L - rate L') / (1 - 2 rate): its mean over flips at `rate` is L
    smoothed     (1 - rate) L + rate L'

    Args:
        loss: a pair loss without state; not negative for "normalized".
        method: one of the above.
        rate: assumed share of swapped labels, in [0, 0.5); unused by "normalized".

    Needs: what `loss` needs.
    Limits: on dpo, "unbiased" is `robust` and "smoothed" is conservative DPO; rate = 0 is the loss itself. Normalised
        losses train slowly: the gradient is divided by L + L'.
    Reference: normalized: Ma et al. 2020, arXiv 2006.13554, eq. 2; unbiased: Natarajan et al. 2013, eq. 3, and
        Chowdhury et al. 2024, arXiv 2403.00409.
    """

    formula = "L/(L + L') (normalized), ((1-e) L - e L')/(1-2e) (unbiased), (1-e) L + e L' (smoothed); L' swapped"
    paper = "2006.13554"

    def __init__(
        self, loss: Loss, method: Literal["normalized", "unbiased", "smoothed"] = "normalized", rate: float = 0.1
    ):
        super().__init__(loss)
        if method not in ("normalized", "unbiased", "smoothed"):
            raise LossError(f"method must be 'normalized', 'unbiased' or 'smoothed', got {method!r}")
        if not loss.paired or set(loss.roles) != {"chosen", "rejected"} or loss.state_dict():
            raise LossError(f"loss must be a pair loss without state, so that a pair can be swapped, got {loss}")
        self.method = method
        self.rate = non_negative("rate", rate, below=0.5)

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        given = self.inner(batch)
        swapped = self.inner(replace(batch, chosen=batch.rejected, rejected=batch.chosen))
        if self.method == "normalized":
            return given / (given + swapped).clamp(min=1e-12)
        if self.method == "unbiased":
            return ((1 - self.rate) * given - self.rate * swapped) / (1 - 2 * self.rate)
        return (1 - self.rate) * given + self.rate * swapped


@register("reweighted")
class Reweighted(Wrapper):
    """Examples weighted by their own loss in every batch: trust small losses, or focus on large ones.

    loss_i * w_i,  w = N softmax(-loss / temperature) over the global batch (trust="small"), + for "large"; no gradient

    Args:
        loss: the loss to reweight.
        trust: "small" gives large losses less weight, for data with wrong labels; "large" gives them more.
        temperature: in units of the loss; towards infinity all weights are 1.

    Needs: what `loss` needs.
    The gradient is that of the tilted risk, -+temperature log mean exp(-+loss / temperature).
    Reference: Li et al. 2020, arXiv 2007.01162 (tilted empirical risk minimization), eq. 2 and lemma 1.
    """

    formula = "w_i loss_i, w = N softmax(-loss/T) (trust='small') or N softmax(loss/T) ('large')"
    paper = "2007.01162"
    batchwise = True

    def __init__(self, loss: Loss, trust: Literal["small", "large"] = "small", temperature: float = 1.0):
        super().__init__(loss)
        if trust not in ("small", "large"):
            raise LossError(f"trust must be 'small' or 'large', got {trust!r}")
        self.trust = trust
        self.temperature = positive("temperature", temperature)

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        values = self.inner(batch)
        counted = present(values, self._weights(batch))
        tilt = (values / self.temperature).detach() * (1 if self.trust == "large" else -1)
        tilt = tilt.masked_fill(counted == 0, -math.inf)
        weights = torch.exp(tilt - _global_max(tilt))
        mean = global_sum(weights.sum()) / global_sum(counted.sum()).clamp(min=1)
        return values * (weights / mean.clamp(min=1e-12))


@register("dual")
class Dual(Wrapper):
    """A loss as a constraint: its weight rises while its mean is above a limit and falls while it is below.

    value = m (loss - limit);  after each training batch  m <- max(0, m + step (mean loss of the batch - limit))

    Args:
        loss: what must stay below the limit, such as the likelihood of the retain set: `flatten + dual(sft, 0.5)`.
        limit: of the mean loss; choose one somewhat above its value before training.
        weight: m at the start.
        step: of the dual ascent; 0 keeps the weight.
        warmup: number of training batches before m first moves.

    Needs: what `loss` needs. The mean is over the batch of all processes; a batch without an example leaves m alone.
    Limits: step = 0 is weight * loss, up to a constant. With accumulated batches m moves after each of them.
    m is saved in checkpoints and logged as `dual/weight`, the mean less the limit as `dual/excess`.
    Reference: Entesari et al. 2025, arXiv 2506.05314 (PDU, dual ascent); as locuslab/open-unlearning,
        trainer/unlearn/pdu.py with dual_update_upon: step.
    """

    formula = "m (loss - limit), m <- max(0, m + step (mean loss - limit))"
    paper = "2506.05314"

    def __init__(self, loss: Loss, limit: float = 0.0, weight: float = 1.0, step: float = 1.0, warmup: int = 0):
        super().__init__(loss)
        self.limit = finite("limit", limit)
        self.weight = non_negative("weight", weight)
        self.step = non_negative("step", step)
        self.warmup = whole("warmup", warmup)
        self.multiplier: Tensor
        self.batches: Tensor
        self.excess: Tensor
        self.register_buffer("multiplier", torch.tensor(float(weight)))
        self.register_buffer("batches", torch.zeros((), dtype=torch.long))
        self.register_buffer("excess", torch.zeros(()), persistent=False)

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        excess = self.inner(batch) - self.limit
        values = self.multiplier.clone().to(excess) * excess  # a copy, since the multiplier moves before backward
        weights = self._weights(batch)
        self.excess = global_mean(excess, weights).to(self.multiplier)
        if self.training and bool(global_sum(present(excess, weights).sum()) > 0):
            if int(self.batches) >= self.warmup:
                self.multiplier.add_(self.step * self.excess).clamp_(min=0)
            self.batches.add_(1)
        return values

    def forward(self, batch: PreferenceBatch) -> LossOutput:
        output = super().forward(batch)
        output.metrics["dual/weight"] = self.multiplier.detach().clone().reshape(1)
        output.metrics["dual/excess"] = self.excess.reshape(1)
        return output


def _global_max(values: Tensor) -> Tensor:
    top = values.max() if values.numel() else values.new_tensor(-math.inf)
    if world_size() > 1:
        top = top.clone()
        dist.all_reduce(top, op=dist.ReduceOp.MAX)
    return torch.where(torch.isfinite(top), top, torch.zeros_like(top))
