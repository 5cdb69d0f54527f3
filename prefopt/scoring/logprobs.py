"""Log-probability of given tokens under given logits, and what else losses ask of those logits, in float32.

A log-softmax over (R, T, V) logits keeps its result for the backward pass, as large again as the logits. Here the
logits themselves are kept, rows are worked through one at a time, and positions outside the mask cost nothing. Every
quantity comes from the same pass, and their gradients from one softmax.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from prefopt.losses.divergences import Divergence, divergence, slope
from prefopt.safety.errors import UsageError


@dataclass(frozen=True)
class Extras:
    """What to compute besides log-probabilities.

    Attributes:
        top_k: how many of the largest log-probabilities to keep at every position.
        collision: log sum_v pi(v)^2.
        forward_kl: KL(reference || policy) and the reference's entropy; needs the reference's logits.
        reverse_kl: KL(policy || reference); needs the reference's logits.
        divergences: any others between policy and reference; need the reference's logits.
        hidden: mean hidden states of completions and prompts.
        statistics: entropy and whether a token was the most probable one, for logging; zero where not asked for.
    """

    top_k: int = 0
    collision: bool = False
    forward_kl: bool = False
    reverse_kl: bool = False
    divergences: tuple[Divergence, ...] = ()
    hidden: bool = False
    statistics: bool = True

    @property
    def full_reference(self) -> bool:
        """Whether the reference's logits are needed, not its log-probabilities alone."""
        return self.forward_kl or self.reverse_kl or bool(self.divergences)


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
        divergences: (R, T, D) those of the extras, zero outside `mask`; with gradient.
        hidden: (R, H) mean last hidden state of the positions that predict a row's completion; with gradient, at
            least float32. Zero for rows without a completion.
        prompt_hidden: (R, H) the same of the row's prompt.
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
    divergences: Tensor | None = None
    hidden: Tensor | None = None
    prompt_hidden: Tensor | None = None
    logits: Any = None


def _divergence(first: Tensor, second: Tensor) -> Tensor:
    """KL(first || second) of log-probabilities over the last axis; what is impossible under `first` adds nothing."""
    terms = first.exp() * (first - second)
    return torch.where(first == -torch.inf, torch.zeros_like(terms), terms).sum(-1)


@dataclass(frozen=True)
class Measured:
    """What is read off the logits of N positions; the fields of `TokenScores` of the same names, with N for (R, T)."""

    logps: Tensor
    entropy: Tensor | None = None
    is_top1: Tensor | None = None
    top_logps: Tensor | None = None
    top_ids: Tensor | None = None
    collision: Tensor | None = None
    forward_kl: Tensor | None = None
    reverse_kl: Tensor | None = None
    ref_entropy: Tensor | None = None
    divergences: Tensor | None = None


DIFFERENTIABLE = ("logps", "top_logps", "forward_kl", "reverse_kl", "divergences")
MEASURED = tuple(part.name for part in fields(Measured))


@dataclass(frozen=True)
class Softmax:
    """A softmax in pieces: `powers` / `total` are the probabilities of N positions.

    Attributes:
        highest: (N, 1) the largest logit.
        powers: (N, V) exp(logit - highest).
        total: (N, 1) their sum.
    """

    highest: Tensor
    powers: Tensor
    total: Tensor

    @classmethod
    def of(cls, logits: Tensor, out: Tensor | None = None) -> Softmax:
        """Of (N, V) logits; the powers are written into `out` where it is given."""
        highest = logits.amax(-1, keepdim=True)
        powers = torch.sub(logits, highest, out=None if out is None else out[: len(logits)]).exp_()
        return cls(highest, powers, powers.sum(-1, keepdim=True))


def measure(
    logits: Tensor,
    labels: Tensor,
    extras: Extras,
    ref_logits: Tensor | None = None,
    softmax: Softmax | None = None,
) -> Measured:
    """Everything that `extras` asks of the logits of N positions, without gradient.

    Args:
        logits: (N, V), at least float32.
        labels: (N,) the tokens.
        extras: what to compute besides log-probabilities.
        ref_logits: (N, V) of the reference, in the same precision, for what compares the two distributions.
        softmax: of the logits, where it is known.
    """
    softmax = Softmax.of(logits) if softmax is None else softmax
    highest, powers, total = softmax.highest, softmax.powers, softmax.total
    at_label = logits.gather(-1, labels.unsqueeze(-1))
    normaliser = highest + total.log()
    made: dict[str, Tensor] = {"logps": (at_label - normaliser).squeeze(-1)}
    if extras.statistics:
        made["is_top1"] = (at_label == highest).squeeze(-1)
        # A product of rows and columns, because elementwise products would fill a tensor of the logits' size.
        expected = torch.bmm(powers.unsqueeze(1), logits.unsqueeze(2)).squeeze(-1) / total
        entropy = (normaliser - expected).squeeze(-1)
        # Tokens that are ruled out (-inf) have probability 0, and 0 * inf is no number.
        ruled_out = entropy.isnan()
        if bool(ruled_out.any()):
            entropy[ruled_out] = torch.special.entr(powers[ruled_out] / total[ruled_out]).sum(-1)
        made["entropy"] = entropy
    if extras.top_k or extras.collision or extras.full_reference:
        scores = logits - normaliser
        if extras.top_k:
            made["top_logps"], made["top_ids"] = scores.topk(extras.top_k, dim=-1)
        if extras.collision:
            made["collision"] = torch.logsumexp(2 * scores, dim=-1)
        if extras.full_reference and ref_logits is not None:
            reference = torch.log_softmax(ref_logits, dim=-1)
            if extras.divergences:
                values = [divergence(kind, scores, reference) for kind in extras.divergences]
                made["divergences"] = torch.stack(values, dim=-1)
            if extras.reverse_kl:
                made["reverse_kl"] = _divergence(scores, reference)
            if extras.forward_kl:
                made["forward_kl"] = _divergence(reference, scores)
                made["ref_entropy"] = torch.special.entr(reference.exp_()).sum(-1)
    return Measured(**made)


def pull_back(
    logits: Tensor,
    labels: Tensor,
    measured: Measured,
    grads: Mapping[str, Tensor],
    ref_logits: Tensor | None = None,
    divergences: Sequence[Divergence] = (),
) -> Tensor:
    """(N, V) gradient of the logits, from one softmax for all quantities.

    Args:
        logits: (N, V), at least float32, as `measure` got them.
        labels: (N,).
        measured: what `measure` gave; its `top_ids` and `reverse_kl` are looked at.
        grads: the gradient of each of `DIFFERENTIABLE` that has one.
        ref_logits: (N, V) of the reference.
        divergences: those of the extras, in order.
    """
    probs = torch.softmax(logits, dim=-1)
    total = torch.zeros_like(probs)
    share = torch.zeros_like(probs[:, :1])  # of the softmax, which every quantity but the reverse KL asks for
    if "logps" in grads:
        # d log p(y) / d logits = onehot(y) - softmax
        upstream = grads["logps"].unsqueeze(-1)
        total.scatter_add_(-1, labels.unsqueeze(-1), upstream)
        share -= upstream
    if "top_logps" in grads and measured.top_ids is not None:
        total.scatter_add_(-1, measured.top_ids, grads["top_logps"])
        share -= grads["top_logps"].sum(-1, keepdim=True)
    if not grads.keys().isdisjoint(("forward_kl", "reverse_kl", "divergences")) and ref_logits is not None:
        reference = torch.log_softmax(ref_logits, dim=-1)
        if "divergences" in grads:
            scores = torch.log_softmax(logits, dim=-1)
            for kind, upstream in zip(divergences, grads["divergences"].unbind(-1), strict=True):
                total.addcmul_(slope(kind, scores, reference), upstream.unsqueeze(-1))
        if "reverse_kl" in grads and measured.reverse_kl is not None:
            # d KL(p || r) / d logits = p (log p - log r - KL)
            gap = probs.log().sub_(reference).sub_(measured.reverse_kl.unsqueeze(-1))
            gap.masked_fill_(probs == 0, 0.0)
            total.addcmul_(gap.mul_(probs), grads["reverse_kl"].unsqueeze(-1))
        if "forward_kl" in grads:
            # d KL(r || p) / d logits = p - r
            upstream = grads["forward_kl"].unsqueeze(-1)
            total.addcmul_(reference.exp_(), upstream, value=-1)
            share += upstream
    return total.addcmul_(probs, share)


class _TokenLogProbs(torch.autograd.Function):
    """(R, T, V) logits, (R, T) labels and mask -> (M, ...) values of the M positions in the mask, as `MEASURED`."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, mask: Tensor, ref_logits: Tensor | None, extras: Extras
    ) -> tuple[Tensor | None, ...]:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        rows = []
        for row in range(logits.shape[0]):
            here = mask[row]
            reference = None if ref_logits is None else ref_logits[row, here].to(dtype)
            rows.append(measure(logits[row, here].to(dtype), labels[row, here], extras, reference))
        made = joined(rows)
        ctx.save_for_backward(logits, labels, mask, ref_logits, made.top_ids, made.reverse_kl)
        ctx.divergences = extras.divergences
        return detached_where_constant(ctx, made)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, None, None, None, None]:
        logits, labels, mask, ref_logits, top_ids, reverse_kl = ctx.saved_tensors
        given = gradients(grads)
        grad = torch.zeros_like(logits)
        start = 0
        for row in range(logits.shape[0] if given else 0):
            here = mask[row]
            part = slice(start, start + int(here.sum()))
            start = part.stop
            dtype = next(iter(given.values())).dtype
            measured = Measured(
                logits, top_ids=None if top_ids is None else top_ids[part],
                reverse_kl=None if reverse_kl is None else reverse_kl[part],
            )  # fmt: skip
            reference = None if ref_logits is None else ref_logits[row, here].to(dtype)
            grad[row, here] = pull_back(
                logits[row, here].to(dtype), labels[row, here], measured,
                {name: value[part] for name, value in given.items()}, reference, ctx.divergences,
            ).to(logits.dtype)  # fmt: skip
        return grad, None, None, None, None


def joined(parts: Sequence[Measured]) -> Measured:
    """The same quantities of the positions of all parts, in order."""
    made: dict[str, Any] = {}
    for name in MEASURED:
        values = [getattr(part, name) for part in parts]
        made[name] = None if values[0] is None else torch.cat(values)
    return Measured(**made)


def detached_where_constant(ctx: Any, measured: Measured) -> tuple[Tensor | None, ...]:
    """What an autograd function returns for `measured`, in the order of `MEASURED`."""
    values = {name: getattr(measured, name) for name in MEASURED}
    ctx.mark_non_differentiable(*(v for name, v in values.items() if v is not None and name not in DIFFERENTIABLE))
    ctx.set_materialize_grads(False)
    return tuple(values.values())


def gradients(grads: Sequence[Tensor | None]) -> dict[str, Tensor]:
    """Those of `MEASURED` that arrived in a backward pass, by name."""
    named = zip(MEASURED, grads, strict=True)
    return {name: grad for name, grad in named if grad is not None and name in DIFFERENTIABLE}


def spread(measured: Measured, mask: Tensor, tokens: Tensor | None) -> TokenScores:
    """The values of M positions at their places in (R, T): zero elsewhere."""
    made: dict[str, Any] = {}
    for name in MEASURED:
        value = getattr(measured, name)
        if value is not None:
            made[name] = value.new_zeros((*mask.shape, *value.shape[1:])).index_put((mask,), value)
    logps = made["logps"]
    made.setdefault("entropy", torch.zeros_like(logps))
    made.setdefault("is_top1", torch.zeros_like(mask))
    return TokenScores(**made, mask=mask, tokens=tokens)


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
    return spread(scores_of_logits(logits, labels, mask.bool(), extras, ref_logits), mask.bool(), labels)


def scores_of_logits(
    logits: Tensor, labels: Tensor, mask: Tensor, extras: Extras = NOTHING, ref_logits: Tensor | None = None
) -> Measured:
    """What `token_scores` computes, for the M positions in the mask alone, in order; same arguments, same errors."""
    _check_shapes(logits, labels, mask, extras, ref_logits)
    reference = ref_logits if extras.full_reference else None
    return Measured(*_TokenLogProbs.apply(logits, labels, mask, reference, extras))  # type: ignore[no-untyped-call]


def _check_shapes(logits: Tensor, labels: Tensor, mask: Tensor, extras: Extras, ref_logits: Tensor | None) -> None:
    if logits.shape[:2] != labels.shape or labels.shape != mask.shape:
        raise UsageError(
            f"logits {tuple(logits.shape)}, labels {tuple(labels.shape)} and mask {tuple(mask.shape)} must agree in "
            "rows and positions"
        )
    if extras.full_reference and (ref_logits is None or ref_logits.shape != logits.shape):
        got = None if ref_logits is None else tuple(ref_logits.shape)
        raise UsageError(f"a KL needs ref_logits of the policy's shape {tuple(logits.shape)}, got {got}")
    if extras.top_k > logits.shape[-1]:
        raise UsageError(f"top_k={extras.top_k} exceeds the vocabulary of {logits.shape[-1]} tokens")
