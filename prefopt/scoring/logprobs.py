"""Log-probability of given tokens under given logits, and what else losses ask of those logits, in float32.

A log-softmax over (R, T, V) logits keeps its result for the backward pass, as large again as the logits. Here the
logits themselves are kept, rows are worked through one at a time, and positions outside the mask cost nothing. Every
quantity comes from the same pass, and their gradients from one softmax.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class Extras:
    """What to compute besides log-probabilities.

    Attributes:
        top_k: how many of the largest log-probabilities to keep at every position.
        collision: log sum_v pi(v)^2.
        forward_kl: KL(reference || policy) and the reference's entropy; needs the reference's logits.
        reverse_kl: KL(policy || reference); needs the reference's logits.
        statistics: entropy and whether a token was the most probable one, for logging; zero where not asked for.
    """

    top_k: int = 0
    collision: bool = False
    forward_kl: bool = False
    reverse_kl: bool = False
    statistics: bool = True

    @property
    def full_reference(self) -> bool:
        """Whether the reference's logits are needed, not its log-probabilities alone."""
        return self.forward_kl or self.reverse_kl


NOTHING = Extras()
BARE = Extras(statistics=False)
"""For models whose numbers are not logged: the reference, the previous iterate."""


@dataclass(frozen=True)
class TokenScores:
    """Scores of the tokens of R rows.

    Attributes:
        logps: (R, T) log-probability of each token, zero outside `mask`; with gradient, at least float32.
        entropy: (R, T) entropy of the distribution each token was drawn from, in nats, zero outside `mask`; detached.
        is_top1: (R, T) bool, whether the token was the most probable one, False outside `mask`.
        mask: (R, T) bool, True at the scored (completion) tokens.
        tokens: (R, T) the tokens.
        top_logps: (R, T, K) the largest log-probabilities, zero outside `mask`; with gradient.
        top_ids: (R, T, K) the tokens they belong to.
        collision: (R, T) log sum_v pi(v)^2, zero outside `mask`; detached.
        forward_kl: (R, T) KL(reference || policy), zero outside `mask`; with gradient.
        reverse_kl: (R, T) KL(policy || reference), zero outside `mask`; with gradient.
        ref_entropy: (R, T) entropy of the reference's distribution, zero outside `mask`.
        logits: those of the scored positions, in the form of the layout that made them, where asked to keep them.
    """

    logps: Tensor
    entropy: Tensor
    is_top1: Tensor
    mask: Tensor
    tokens: Tensor | None = None
    top_logps: Tensor | None = None
    top_ids: Tensor | None = None
    collision: Tensor | None = None
    forward_kl: Tensor | None = None
    reverse_kl: Tensor | None = None
    ref_entropy: Tensor | None = None
    logits: Any = None


def _divergence(first: Tensor, second: Tensor) -> Tensor:
    """KL(first || second) of log-probabilities over the last axis; what is impossible under `first` adds nothing."""
    terms = first.exp() * (first - second)
    return torch.where(first == -torch.inf, torch.zeros_like(terms), terms).sum(-1)


class _TokenLogProbs(torch.autograd.Function):
    """(R, T, V) logits, (R, T) labels and mask -> what `TokenScores` holds, in the order of the return statement."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, mask: Tensor, ref_logits: Tensor | None, extras: Extras
    ) -> tuple[Tensor | None, ...]:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        logps = logits.new_zeros(labels.shape, dtype=dtype)
        entropy = torch.zeros_like(logps)
        is_top1 = torch.zeros_like(mask)
        top_logps = logps.new_zeros((*labels.shape, extras.top_k)) if extras.top_k else None
        top_ids = labels.new_zeros((*labels.shape, extras.top_k)) if extras.top_k else None
        collision = torch.zeros_like(logps) if extras.collision else None
        forward_kl, ref_entropy = (torch.zeros_like(logps) if extras.forward_kl else None for _ in range(2))
        reverse_kl = torch.zeros_like(logps) if extras.reverse_kl else None
        for row in range(logits.shape[0]):
            here = mask[row]
            scores = torch.log_softmax(logits[row, here].to(dtype), dim=-1)
            logps[row, here] = scores.gather(-1, labels[row, here].unsqueeze(-1)).squeeze(-1)
            if top_logps is not None and top_ids is not None:
                top_logps[row, here], top_ids[row, here] = scores.topk(extras.top_k, dim=-1)
            if collision is not None:
                collision[row, here] = torch.logsumexp(2 * scores, dim=-1)
            if ref_logits is not None:
                reference = torch.log_softmax(ref_logits[row, here].to(dtype), dim=-1)
                if reverse_kl is not None:
                    reverse_kl[row, here] = _divergence(scores, reference)
                if forward_kl is not None and ref_entropy is not None:
                    forward_kl[row, here] = _divergence(reference, scores)
                    ref_entropy[row, here] = torch.special.entr(reference.exp_()).sum(-1)
            if extras.statistics:
                is_top1[row, here] = scores.argmax(-1) == labels[row, here]
                # entr(p) = -p log p is 0 at p = 0, where p * log p would be NaN.
                entropy[row, here] = torch.special.entr(scores.exp_()).sum(-1)
        ctx.save_for_backward(logits, labels, mask, ref_logits, top_ids, reverse_kl)
        ctx.mark_non_differentiable(*(t for t in (entropy, is_top1, top_ids, collision, ref_entropy) if t is not None))
        ctx.set_materialize_grads(False)
        return logps, entropy, is_top1, top_logps, top_ids, collision, forward_kl, reverse_kl, ref_entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, None, None, None, None]:
        logits, labels, mask, ref_logits, top_ids, reverse_kl = ctx.saved_tensors
        for_logps, for_top, for_forward, for_reverse = grads[0], grads[3], grads[6], grads[7]
        grad = torch.zeros_like(logits)
        given = [upstream for upstream in (for_logps, for_top, for_forward, for_reverse) if upstream is not None]
        if not given:
            return grad, None, None, None, None
        for row in range(logits.shape[0]):
            here = mask[row]
            probs = torch.softmax(logits[row, here].to(given[0].dtype), dim=-1)
            total = torch.zeros_like(probs)
            share = torch.zeros_like(probs[:, :1])  # of the softmax, which every quantity but the reverse KL asks for
            if for_logps is not None:
                # d log p(y) / d logits = onehot(y) - softmax
                upstream = for_logps[row, here].unsqueeze(-1)
                total.scatter_add_(-1, labels[row, here].unsqueeze(-1), upstream)
                share -= upstream
            if for_top is not None:
                total.scatter_add_(-1, top_ids[row, here], for_top[row, here])
                share -= for_top[row, here].sum(-1, keepdim=True)
            if for_forward is not None or for_reverse is not None:
                reference = torch.log_softmax(ref_logits[row, here].to(probs.dtype), dim=-1)
                if for_reverse is not None:
                    # d KL(p || r) / d logits = p (log p - log r - KL)
                    gap = probs.log().sub_(reference).sub_(reverse_kl[row, here].unsqueeze(-1))
                    gap.masked_fill_(probs == 0, 0.0)
                    total.addcmul_(gap.mul_(probs), for_reverse[row, here].unsqueeze(-1))
                if for_forward is not None:
                    # d KL(r || p) / d logits = p - r
                    upstream = for_forward[row, here].unsqueeze(-1)
                    total.addcmul_(reference.exp_(), upstream, value=-1)
                    share += upstream
            grad[row, here] = total.addcmul_(probs, share).to(logits.dtype)
        return grad, None, None, None, None


def token_scores(
    logits: Tensor, labels: Tensor, mask: Tensor, extras: Extras = NOTHING, ref_logits: Tensor | None = None
) -> TokenScores:
    """Log-probabilities and entropies of `labels` under `logits`, and what `extras` asks for.

    Args:
        logits: (R, T, V), position t scores `labels[:, t]`: shift before calling.
        labels: (R, T) token ids; anything outside `mask` is ignored.
        mask: (R, T), true at the tokens to score.
        extras: further quantities to compute.
        ref_logits: (R, T, V) of the reference, for those that compare the two distributions.

    Raises:
        ValueError: if the shapes do not agree, or `ref_logits` is needed and missing.
    """
    if logits.shape[:2] != labels.shape or labels.shape != mask.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)}, labels {tuple(labels.shape)} and mask {tuple(mask.shape)} must agree in "
            "rows and positions"
        )
    if extras.full_reference and (ref_logits is None or ref_logits.shape != logits.shape):
        got = None if ref_logits is None else tuple(ref_logits.shape)
        raise ValueError(f"a KL needs ref_logits of the policy's shape {tuple(logits.shape)}, got {got}")
    if extras.top_k > logits.shape[-1]:
        raise ValueError(f"top_k={extras.top_k} exceeds the vocabulary of {logits.shape[-1]} tokens")
    mask = mask.bool()
    logps, entropy, is_top1, top_logps, top_ids, collision, forward_kl, reverse_kl, ref_entropy = _TokenLogProbs.apply(
        logits, labels, mask, ref_logits if extras.full_reference else None, extras
    )  # type: ignore[no-untyped-call]
    return TokenScores(
        logps, entropy, is_top1, mask, labels, top_logps, top_ids, collision, forward_kl, reverse_kl, ref_entropy
    )
