"""Quantities computed from the logits of N positions in one pass, and their gradient from one softmax.

A table says which fields of `Scores` follow from which distributions. `logprobs` uses it on whole logits, `head` on
those of a chunk of positions.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prefopt.losses.divergences import Divergence, divergence, slope
from prefopt.losses.needs import NEED_OF, QUANTITIES, Need


@dataclass(frozen=True)
class Extras:
    """What to compute besides log-probabilities.

    Attributes:
        needs: those of a loss; needs that a model's output cannot fill are ignored here.
        top_k: how many of the largest log-probabilities to keep at every position, with `Need.TOP_K`.
        divergences: which, with `Need.DIVERGENCE`.
        layers: after which ones to keep hidden states, with `Need.STATES`.
        statistics: entropy and whether a token was the most probable one, for logging; zero where not asked for.
        distribution: the most probable token of every position (`predicted_ids`), and the mean and standard deviation
            of the log-probability of a token drawn there (`mean_logps`, `logp_deviations`); for evaluations.
    """

    needs: Need = Need.NONE
    top_k: int = 0
    divergences: tuple[Divergence, ...] = ()
    layers: tuple[int, ...] = ()
    statistics: bool = True
    distribution: bool = False

    @property
    def full_reference(self) -> bool:
        """Whether the reference's logits are needed, not its log-probabilities alone."""
        return bool(self.needs & (Need.FORWARD_KL | Need.REVERSE_KL | Need.DIVERGENCE))

    @property
    def beside_reference(self) -> bool:
        """Whether the reference has to be run beside the policy: its log-probabilities alone are not enough."""
        return self.full_reference or (Need.STATES in self.needs and Need.REFERENCE in self.needs)

    @property
    def several_gradients(self) -> bool:
        """Whether something other than the log-probabilities has a gradient for the logits."""
        return any(need in self.needs for need in _WITH_GRADIENT)

    @property
    def hidden(self) -> bool:
        """Whether hidden states are averaged."""
        return Need.HIDDEN in self.needs


NOTHING = Extras()
BARE = Extras(statistics=False)
"""For models whose numbers are not logged: the reference, the previous iterate."""


def _kl(first: Tensor, second: Tensor) -> Tensor:
    """KL(first || second) of log-probabilities over the last axis; what is impossible under `first` adds nothing."""
    terms = first.exp() * (first - second)
    return torch.where(first == -torch.inf, torch.zeros_like(terms), terms).sum(-1)


def _divergences(scores: Tensor, reference: Tensor, extras: Extras) -> tuple[Tensor, ...]:
    return (torch.stack([divergence(kind, scores, reference) for kind in extras.divergences], dim=-1),)


def _forward_kl(scores: Tensor, reference: Tensor, _: Extras) -> tuple[Tensor, ...]:
    kl = _kl(reference, scores)
    return kl, torch.special.entr(reference.exp_()).sum(-1)


def _others(scores: Tensor, labels: Tensor) -> Tensor:
    """(N, V) `scores` with minus infinity at the labels."""
    return scores.scatter(-1, labels.unsqueeze(-1), -torch.inf)


def _peak(scores: Tensor) -> Tensor:
    """(N,) the largest score less the mean one, of those that are not ruled out (minus infinity)."""
    possible = scores > -torch.inf
    mean = scores.masked_fill(~possible, 0).sum(-1) / possible.sum(-1)
    return scores.amax(-1) - mean


_OF_POLICY: dict[tuple[str, ...], Callable[[Tensor, Tensor, Extras], tuple[Tensor, ...]]] = {
    ("top_logps", "top_ids"): lambda scores, _, extras: scores.topk(extras.top_k, dim=-1),
    ("token_collision",): lambda scores, *_: (torch.logsumexp(2 * scores, dim=-1),),
    ("token_others",): lambda scores, labels, _: (torch.logsumexp(_others(scores, labels), dim=-1),),
    ("token_peak",): lambda scores, *_: (_peak(scores),),
}
_OF_BOTH: dict[tuple[str, ...], Callable[[Tensor, Tensor, Extras], tuple[Tensor, ...]]] = {
    ("token_divergences",): _divergences,
    ("token_reverse_kl",): lambda scores, reference, _: (_kl(scores, reference),),
    ("token_forward_kl", "ref_token_entropy"): _forward_kl,  # last, as it overwrites the reference's
}
"""Fields of `Scores`, and how they follow from (N, V) log-probabilities of the policy and (N,) labels, and of the
reference. Their gradients are in `pull_back`."""

Measured = dict[str, Tensor]
"""What is read off the logits of N positions, N values each: `logps`, `entropy`, `is_top1` as in `TokenScores`, and
fields of `Scores`. A call of a model adds the `states` of its layers."""
_COMPUTED = tuple(name for names in (*_OF_POLICY, *_OF_BOTH) for name in names)
LOOKED_AT = ("top_ids", "token_reverse_kl")
"""Values that the backward pass needs too."""
_DISTRIBUTION = ("predicted_ids", "mean_logps", "logp_deviations")
MEASURED = ("logps", "entropy", "is_top1", *_DISTRIBUTION, *_COMPUTED)
_OVER_VOCABULARY = functools.reduce(operator.or_, (NEED_OF[name] for name in _COMPUTED))
DIFFERENTIABLE = ("logps", *(name for name in _COMPUTED if name in QUANTITIES[NEED_OF[name]].gradient))
_WITH_GRADIENT = {NEED_OF[name] for name in DIFFERENTIABLE if name != "logps"}


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
    values: Measured = {"logps": (at_label - normaliser).squeeze(-1)}
    if extras.statistics:
        values["is_top1"] = (at_label == highest).squeeze(-1)
        # A product of rows and columns, because elementwise products would fill a tensor of the logits' size.
        expected = torch.bmm(powers.unsqueeze(1), logits.unsqueeze(2)).squeeze(-1) / total
        entropy = (normaliser - expected).squeeze(-1)
        # Masked tokens (-inf) have probability 0, and 0 * inf is NaN.
        ruled_out = entropy.isnan()
        if bool(ruled_out.any()):
            entropy[ruled_out] = torch.special.entr(powers[ruled_out] / total[ruled_out]).sum(-1)
        values["entropy"] = entropy
    if extras.distribution:
        values |= zip(_DISTRIBUTION, _distribution(logits, softmax), strict=True)
    if extras.needs & _OVER_VOCABULARY:
        scores = logits - normaliser
        for names, of_policy in _OF_POLICY.items():
            if NEED_OF[names[0]] in extras.needs:
                values |= zip(names, of_policy(scores, labels, extras), strict=True)
        if extras.full_reference and ref_logits is not None:
            reference = torch.log_softmax(ref_logits, dim=-1)
            for names, of_both in _OF_BOTH.items():
                if NEED_OF[names[0]] in extras.needs:
                    values |= zip(names, of_both(scores, reference, extras), strict=True)
    return values


def _distribution(logits: Tensor, softmax: Softmax) -> tuple[Tensor, ...]:
    """(N,) most probable token, mean and standard deviation of the log-probabilities of (N, V) logits."""
    # From the largest logit: both moments vanish together where a model is certain, and nothing cancels. Below the
    # clamp probabilities are 0, and 0 * inf would be NaN.
    gaps = (logits - softmax.highest).clamp_(min=-1000)
    weighted = softmax.powers * gaps
    mean = weighted.sum(-1, keepdim=True) / softmax.total
    square = torch.bmm(weighted.unsqueeze(1), gaps.unsqueeze(2)).squeeze(-1) / softmax.total
    deviation = (square - mean**2).clamp_(min=0).sqrt_()
    return logits.argmax(-1), (mean - softmax.total.log()).squeeze(-1), deviation.squeeze(-1)


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
        measured: what `measure` gave; its `top_ids` and `token_reverse_kl` are looked at.
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
    if "top_logps" in grads:
        total.scatter_add_(-1, measured["top_ids"], grads["top_logps"])
        share -= grads["top_logps"].sum(-1, keepdim=True)
    if "token_others" in grads:
        # d log(1 - p(y)) / d logits = the softmax without y, less the softmax: bounded where p(y) is 1 to rounding
        upstream = grads["token_others"].unsqueeze(-1)
        total.addcmul_(torch.softmax(_others(logits, labels), dim=-1), upstream)
        share -= upstream
    if "token_peak" in grads:
        upstream = grads["token_peak"].unsqueeze(-1)
        possible = logits > -torch.inf
        total.scatter_add_(-1, logits.argmax(-1, keepdim=True), upstream)
        total.sub_(possible * (upstream / possible.sum(-1, keepdim=True)))
    if ref_logits is not None and any(name in grads for names in _OF_BOTH for name in names):
        reference = torch.log_softmax(ref_logits, dim=-1)
        if "token_divergences" in grads:
            scores = torch.log_softmax(logits, dim=-1)
            for kind, upstream in zip(divergences, grads["token_divergences"].unbind(-1), strict=True):
                total.addcmul_(slope(kind, scores, reference), upstream.unsqueeze(-1))
        if "token_reverse_kl" in grads:
            # d KL(p || r) / d logits = p (log p - log r - KL)
            gap = probs.log().sub_(reference).sub_(measured["token_reverse_kl"].unsqueeze(-1))
            gap.masked_fill_(probs == 0, 0.0)
            total.addcmul_(gap.mul_(probs), grads["token_reverse_kl"].unsqueeze(-1))
        if "token_forward_kl" in grads:
            # d KL(r || p) / d logits = p - r
            upstream = grads["token_forward_kl"].unsqueeze(-1)
            total.addcmul_(reference.exp_(), upstream, value=-1)
            share += upstream
    return total.addcmul_(probs, share)


def part_of(looked_at: Sequence[Tensor | None], part: slice) -> Measured:
    """What `pull_back` looks at of some positions, from what was saved of all."""
    return {name: value[part] for name, value in zip(LOOKED_AT, looked_at, strict=True) if value is not None}


def joined(parts: Sequence[Measured]) -> Measured:
    """The same quantities of the positions of all parts, in order."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def detached_where_constant(ctx: Any, measured: Measured) -> tuple[Tensor | None, ...]:
    """What an autograd function returns for `measured`, in the order of `MEASURED`."""
    ctx.mark_non_differentiable(*(value for name, value in measured.items() if name not in DIFFERENTIABLE))
    ctx.set_materialize_grads(False)
    return tuple(measured.get(name) for name in MEASURED)


def by_name(values: Sequence[Tensor | None]) -> Measured:
    """What `detached_where_constant` made a tuple of."""
    return {name: value for name, value in zip(MEASURED, values, strict=True) if value is not None}


def gradients(grads: Sequence[Tensor | None]) -> Measured:
    """Those that arrived in a backward pass, by the name of what they are of."""
    return {name: grad for name, grad in by_name(grads).items() if name in DIFFERENTIABLE}
