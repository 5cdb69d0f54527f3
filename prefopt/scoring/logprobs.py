"""Log-probability of given tokens under given logits, and what else losses ask of those logits, in float32.

A log-softmax over (R, T, V) logits keeps its result for the backward pass, as large again as the logits. Here the
logits themselves are kept, rows are worked through one at a time, and positions outside the mask cost nothing. Every
quantity comes from the same pass, and their gradients from one softmax.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from prefopt.safety.errors import UsageError
from prefopt.scoring.measure import (
    LOOKED_AT,
    NOTHING,
    Extras,
    Measured,
    by_name,
    detached_where_constant,
    gradients,
    joined,
    measure,
    part_of,
    pull_back,
)


@dataclass(frozen=True)
class TokenScores:
    """Scores of the tokens of R rows.

    Attributes:
        logps: (R, T) log-probability of each token, zero outside `mask`; with gradient, at least float32.
        entropy: (R, T) entropy of the distribution each token was drawn from, in nats, zero outside `mask`; detached.
        is_top1: (R, T) bool, whether the token was the most probable one, False outside `mask`.
        mask: (R, T) bool, True at the scored (completion) tokens.
        tokens: (R, T) the tokens.
        quantities: what a loss needs besides, as in `Scores` and by the name of its field there, with R for N; zero
            outside `mask`.
        logits: those of the scored positions, in the form of the layout that made them, where asked to keep them.
    """

    logps: Tensor
    entropy: Tensor
    is_top1: Tensor
    mask: Tensor
    tokens: Tensor | None = None
    quantities: Mapping[str, Tensor] = field(default_factory=dict)
    logits: Any = None


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
        measured = joined(rows)
        ctx.save_for_backward(logits, labels, mask, ref_logits, *(measured.get(name) for name in LOOKED_AT))
        ctx.divergences = extras.divergences
        return detached_where_constant(ctx, measured)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, None, None, None, None]:
        logits, labels, mask, ref_logits, *looked_at = ctx.saved_tensors
        grads_by_name = gradients(grads)
        grad = torch.zeros_like(logits)
        start = 0
        for row in range(logits.shape[0] if grads_by_name else 0):
            here = mask[row]
            part = slice(start, start + int(here.sum()))
            start = part.stop
            dtype = next(iter(grads_by_name.values())).dtype
            measured = part_of(looked_at, part)
            reference = None if ref_logits is None else ref_logits[row, here].to(dtype)
            grad[row, here] = pull_back(
                logits[row, here].to(dtype), labels[row, here], measured,
                {name: value[part] for name, value in grads_by_name.items()}, reference, ctx.divergences,
            ).to(logits.dtype)  # fmt: skip
        return grad, None, None, None, None


def spread(
    measured: Measured, mask: Tensor, tokens: Tensor | None, places: Sequence[Tensor] | None = None
) -> TokenScores:
    """The values of M positions at their places in (R, T): zero elsewhere.

    Args:
        measured: M values of each quantity.
        mask: (R, T) bool, true at the M positions.
        tokens: (R, T) the tokens.
        places: (M,) rows and (M,) columns of the values where known; else they are in the order of the mask.
    """
    places = mask.nonzero(as_tuple=True) if places is None else places
    values = {
        name: value.new_zeros((*mask.shape, *value.shape[1:])).index_put(tuple(places), value)
        for name, value in measured.items()
    }
    logps = values.pop("logps")
    entropy, is_top1 = (values.pop(name, None) for name in ("entropy", "is_top1"))
    return TokenScores(
        logps,
        torch.zeros_like(logps) if entropy is None else entropy,
        torch.zeros_like(mask) if is_top1 is None else is_top1,
        mask,
        tokens,
        values,
    )


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
    return by_name(_TokenLogProbs.apply(logits, labels, mask, reference, extras))  # type: ignore[no-untyped-call]


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
