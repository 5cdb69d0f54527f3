"""Wrappers that change the log-probabilities of single tokens before a loss sees them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from prefopt.losses.base import Loss
from prefopt.losses.checks import finite
from prefopt.losses.errors import LossError
from prefopt.losses.needs import PER_TOKEN, Need
from prefopt.losses.registry import register
from prefopt.losses.scores import PreferenceBatch, Scores
from prefopt.losses.wrappers import Wrapper


@register("humanline")
class Humanline(Wrapper):
    """Humanline: the log-ratio of every token is clamped, so that tokens far from the reference stop training.

    loss evaluated where each token's log pi - log ref is replaced by clamp(log pi - log ref, low, high)

    Args:
        loss: a loss that compares with a reference, on sums or token by token.
        low: smallest log-ratio of a token, in nats; -1 in the authors' code.
        high: largest one; 1.5 there.

    Needs: what `loss` needs, and per-token log-probabilities of policy and reference.
    The authors also copy the policy into the reference before every optimizer step: `sync_ref_model` with
    `sync_ref_before_step`, `ref_model_sync_steps=1` and `ref_model_mixup_alpha=1.0`. With a fixed reference a token
    that has moved that far has no gradient any more.
    Limits: with clamps that no token reaches it is the loss itself; a token beyond them has no gradient.
    Reference: Liu et al. 2025, arXiv 2509.24207; as ContextualAI/HALOs, train/trainers.py (get_sequence_rewards).
    """

    formula = "loss with every token's log pi - log ref clamped to [low, high]"
    paper = "2509.24207"

    def __init__(self, loss: Loss, low: float = -1.0, high: float = 1.5):
        super().__init__(loss)
        if Need.REFERENCE not in loss.needs or loss.needs & (PER_TOKEN & ~Need.TOKENS | Need.MISMATCHED | Need.HIDDEN):
            raise LossError(
                f"loss must need a reference and log-probabilities alone, under their own prompts, but {loss} needs "
                f"{loss.needs.words}"
            )
        self.low, self.high = finite("low", low), finite("high", high)
        if not low < high:
            raise LossError(f"low must be less than high, got {low!r} and {high!r}")
        self.needs = loss.needs | Need.TOKENS

    def reward(self, scores: Scores) -> Tensor | None:
        return self.loss.reward(self._clamped(scores))

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        clamped = {role: self._clamped(scores) for role in self.roles if (scores := batch.role(role)) is not None}
        return self.inner(replace(batch, **clamped))  # type: ignore[arg-type]

    def _clamped(self, scores: Scores) -> Scores:
        assert scores.token_logps is not None
        assert scores.ref_token_logps is not None
        assert scores.token_mask is not None
        assert scores.ref_logps is not None
        ratios = (scores.token_logps - scores.ref_token_logps).clamp(self.low, self.high) * scores.token_mask
        tokens = torch.where(scores.token_mask, scores.ref_token_logps + ratios, scores.token_logps)
        return replace(scores, logps=scores.ref_logps + ratios.sum(-1), token_logps=tokens)
