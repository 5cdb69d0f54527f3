"""Log-probability and entropy of given tokens under given logits, in float32 and without a second copy of the logits.

A log-softmax over (R, T, V) logits keeps its result for the backward pass, as large again as the logits. Here the
logits themselves are kept, rows are worked through one at a time, and positions outside the mask cost nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class TokenScores:
    """Scores of the tokens of R rows.

    Attributes:
        logps: (R, T) log-probability of each token, zero outside `mask`; with gradient, at least float32.
        entropy: (R, T) entropy of the distribution each token was drawn from, in nats, zero outside `mask`; detached.
        is_top1: (R, T) bool, whether the token was the most probable one, False outside `mask`.
        mask: (R, T) bool, True at the scored (completion) tokens.
    """

    logps: Tensor
    entropy: Tensor
    is_top1: Tensor
    mask: Tensor


class _TokenLogProbs(torch.autograd.Function):
    """(R, T, V) logits, (R, T) labels and mask -> (R, T) log-probabilities, entropies and whether the label is top."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        logps = logits.new_zeros(labels.shape, dtype=dtype)
        entropy = torch.zeros_like(logps)
        is_top1 = torch.zeros_like(mask)
        for row in range(logits.shape[0]):
            here = mask[row]
            scores = torch.log_softmax(logits[row, here].to(dtype), dim=-1)
            logps[row, here] = scores.gather(-1, labels[row, here].unsqueeze(-1)).squeeze(-1)
            is_top1[row, here] = scores.argmax(-1) == labels[row, here]
            # entr(p) = -p log p is 0 at p = 0, where p * log p would be NaN.
            entropy[row, here] = torch.special.entr(scores.exp_()).sum(-1)
        ctx.save_for_backward(logits, labels, mask)
        ctx.mark_non_differentiable(entropy, is_top1)
        return logps, entropy, is_top1

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logps: Tensor, *_: Tensor) -> tuple[Tensor, None, None]:
        logits, labels, mask = ctx.saved_tensors
        grad = torch.zeros_like(logits)
        for row in range(logits.shape[0]):
            here = mask[row]
            upstream = grad_logps[row, here].unsqueeze(-1)
            # d log p(y) / d logits = onehot(y) - softmax
            inner = torch.softmax(logits[row, here].to(grad_logps.dtype), dim=-1).mul_(-upstream)
            inner.scatter_add_(-1, labels[row, here].unsqueeze(-1), upstream)
            grad[row, here] = inner.to(logits.dtype)
        return grad, None, None


def token_scores(logits: Tensor, labels: Tensor, mask: Tensor) -> TokenScores:
    """Log-probabilities and entropies of `labels` under `logits`.

    Args:
        logits: (R, T, V), position t scores `labels[:, t]`: shift before calling.
        labels: (R, T) token ids; anything outside `mask` is ignored.
        mask: (R, T), true at the tokens to score.

    Raises:
        ValueError: if the shapes do not agree.
    """
    if logits.shape[:2] != labels.shape or labels.shape != mask.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)}, labels {tuple(labels.shape)} and mask {tuple(mask.shape)} must agree in "
            "rows and positions"
        )
    mask = mask.bool()
    logps, entropy, is_top1 = _TokenLogProbs.apply(logits, labels, mask)  # type: ignore[no-untyped-call]
    return TokenScores(logps, entropy, is_top1, mask)
