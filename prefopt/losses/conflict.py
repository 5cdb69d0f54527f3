"""Losses with conflicting gradients, of their terms or of a pair's two answers: the step works against none of them.

Lives here: the methods, as coefficients of the terms' gradients, and `conflict_free`, the loss that uses them. The
gradients of a model's parameters, term by term, are computed by the trainer, or by `ConflictFree.backward` in your own
loop. `pair_normalized` does the same with the gradients of the two answers of each pair. Imports only torch and its
neighbours.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from prefopt.losses.base import Loss, LossOutput, WeightedSum
from prefopt.losses.errors import LossError
from prefopt.losses.needs import Need
from prefopt.losses.registry import register
from prefopt.losses.scores import PreferenceBatch
from prefopt.losses.wrappers import Wrapper

Method = Literal["config", "pcgrad", "balance"]

SMALLEST = 1e-12
"""Eigenvalues of the cosines below this are taken as 0: gradients that are opposed, or parallel, to rounding."""


def coefficients(gram: Tensor, method: Method = "config") -> Tensor:
    """What to multiply each term's gradient with before they are added up, (K,).

    "config": the direction that has the same cosine with every term's gradient, positive wherever one exists, and the
    length of the gradients' projections on it (Liu et al. 2024, arXiv 2408.11104, eq. 2 to 4). Two gradients that are
    exactly opposed leave no direction: 0.
    "pcgrad": from each gradient the part that goes against another one is taken off, one after the other in the order
    of the terms, and the rest is added up (Yu et al. 2020, arXiv 2001.06782, algorithm 1, whose order is random; with
    two terms order plays no part).
    "balance": every gradient is brought to the mean of their lengths; ours.

    Args:
        gram: (K, K) inner products of the K gradients.
        method: one of the above.
    """
    gram = gram.double()
    lengths = gram.diagonal().clamp(min=0).sqrt()
    alive = lengths > 0
    factors = torch.zeros_like(lengths)
    if not bool(alive.any()):
        return factors
    chosen = {"config": _config, "pcgrad": _pcgrad, "balance": _balance}[method]
    # A term without a gradient does not affect the direction.
    factors[alive] = chosen(gram[alive][:, alive], lengths[alive])
    return factors


def _config(gram: Tensor, lengths: Tensor) -> Tensor:
    cosines = gram / (lengths[:, None] * lengths)
    # The shortest vector whose product with every unit gradient is 1 lies in their span: U^T (U U^T)^-1 1.
    weights = torch.linalg.pinv(cosines, hermitian=True, atol=SMALLEST).sum(1)
    length = (weights @ cosines @ weights).clamp(min=0).sqrt()
    if not float(length) > 0:
        return torch.zeros_like(lengths)
    projections = (lengths * (cosines @ weights)).sum() / length
    factors: Tensor = weights / lengths / length * projections
    return factors


def _pcgrad(gram: Tensor, lengths: Tensor) -> Tensor:
    count = len(lengths)
    remainders = torch.eye(
        count, dtype=gram.dtype, device=gram.device
    )  # row i: what is left of gradient i, in terms of all
    for i in range(count):
        for j in range(count):
            product = remainders[i] @ gram[:, j]
            if j != i and bool(product < 0):
                remainders[i, j] -= product / gram[j, j]
    return remainders.sum(0)


def _balance(gram: Tensor, lengths: Tensor) -> Tensor:
    return lengths.mean() / lengths


def gram_of(gradients: Sequence[Sequence[Tensor | None]]) -> Tensor:
    """(K, K) inner products, in float64, of K gradients given as a tensor, or None for zero, per parameter."""
    count = len(gradients)
    gram = torch.zeros(count, count, dtype=torch.float64)
    for i in range(count):
        for j in range(i, count):
            pairs = zip(gradients[i], gradients[j], strict=True)
            products = [(a.double() * b.double()).sum() for a, b in pairs if a is not None and b is not None]
            if products:
                gram[i, j] = gram[j, i] = torch.stack(products).sum().cpu()
    return gram


def combined(gradients: Sequence[Sequence[Tensor | None]], weights: Tensor) -> list[Tensor | None]:
    """The sum over the terms of weight times gradient, parameter by parameter."""
    sums: list[Tensor | None] = []
    for parts in zip(*gradients, strict=True):
        present = [(float(weight), part) for weight, part in zip(weights, parts, strict=True) if part is not None]
        sums.append(torch.stack([weight * part for weight, part in present]).sum(0) if present else None)
    return sums


class OwnGradient(Wrapper):
    """A loss whose step is not along the gradient of its value, and needs whole gradients of the parameters."""

    outermost = True

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        return self.loss.per_example(batch)

    def forward(self, batch: PreferenceBatch) -> LossOutput:
        output: LossOutput = self.loss(batch)
        return output


@register("conflict_free")
class ConflictFree(OwnGradient):
    """A sum of losses whose terms' gradients are combined without conflict instead of being added up.

    loss = sum_i w_i loss_i;  gradient = sum_i c_i w_i grad loss_i, c as `coefficients` has it

    Args:
        loss: a sum of at least two losses. Their weights scale the gradients, and with them how long the step is;
            for "config" the direction does not depend on them.
        method: "config" (the same angle with every term), "pcgrad" (projections), "balance" (equal lengths).

    Needs: what its terms need. It must be the outermost loss. It costs one backward pass a term and one copy of the
        trained parameters' gradients a term. The trainer logs the cosine between every two terms as `conflict/...`.
    Limits: terms with one gradient direction give "config" and "pcgrad" the plain sum; so do terms at right angles and
        of equal length to "config", and all at right angles to "pcgrad".
    Reference: Liu et al. 2024, arXiv 2408.11104, as tum-pbs/ConFIG (equal weights, projected length); Yu et al. 2020,
        arXiv 2001.06782.
    """

    formula = "sum_i w_i loss_i, its terms' gradients combined without conflict"
    paper = "2408.11104"

    def __init__(self, loss: Loss, method: Method = "config"):
        super().__init__(loss)
        if not isinstance(loss, WeightedSum) or len(list(loss.terms())) < 2:
            raise LossError(f"loss must be a sum of two losses or more, so that there is a conflict, got {loss}")
        if method not in ("config", "pcgrad", "balance"):
            raise LossError(f"method must be 'config', 'pcgrad' or 'balance', got {method!r}")
        self.method = method

    @property
    def labels(self) -> list[str]:
        """What the terms are called in logs."""
        return [label for _, label, _ in self.loss.terms()]

    def backward(self, batch: PreferenceBatch, parameters: Iterable[Tensor]) -> LossOutput:
        """Score a batch and add the combined gradient to `.grad` of the parameters: a loop's loss and `backward()`.

        Args:
            batch: with gradient, as a loss is called with.
            parameters: the trained parameters.

        Raises:
            ValueError: if no term has a gradient.
        """
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        output: LossOutput = self(batch)
        terms = [term for term in output.terms if term.requires_grad]
        if not terms:
            raise LossError(
                f"no term of {self} has a gradient ({', '.join(self.labels)}): compute the batch's log-probabilities "
                "with gradient, without detach() or no_grad()"
            )
        gradients = [torch.autograd.grad(term, trained, retain_graph=True, allow_unused=True) for term in terms]
        weights = coefficients(gram_of(gradients), self.method)
        for parameter, gradient in zip(trained, combined(gradients, weights), strict=True):
            if gradient is not None:
                gradient = gradient.to(parameter.dtype)
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        return output


@register("pair_normalized")
class PairNormalized(OwnGradient):
    """A pair loss whose step weights each answer's gradient by its inverse norm, against gradient entanglement.

    loss = that of the pair;  gradient = -(d_w g_w / |g_w| - d_l g_l / |g_l|) in place of -(d_w g_w - d_l g_l)
    g_w, g_l = gradients of the pair's two log-probabilities; d_w, d_l = the loss's derivatives for them

    Args:
        loss: a mean over pairs on log-probabilities of chosen and rejected answers, without state.

    Needs: what `loss` needs. It must be the outermost loss. It costs a backward pass an answer, one pair after the
        other, and two copies of the trained parameters' gradients.
    Limits: gradients of length 1 give the loss itself. A step on one pair raises the chosen answer where
        d_w > d_l cos(g_w, g_l) and lowers the rejected one where d_l > d_w cos(g_w, g_l): both, to first order, where
        d_w = d_l > 0, as in dpo, and the gradients are not parallel. Each pair's own step, not the batch's sum.
        The step's length no longer follows the gradients': choose the learning rate again with SGD.
    Reference: Yuan et al. 2024, arXiv 2410.13828, names the remedy ("pairwise normalized gradient descent"); the
        formula, with the loss's own d_w and d_l, is our reading: no code of the authors' was found.
    """

    formula = "loss of the pair; step along d_w g_w/|g_w| - d_l g_l/|g_l|, g the answers' gradients"
    paper = "2410.13828"

    def __init__(self, loss: Loss):
        super().__init__(loss)
        if not loss.paired or set(loss.roles) != {"chosen", "rejected"}:
            raise LossError(f"loss must compare the chosen and the rejected answer of a pair, and {loss} does not")
        if other := loss.needs & ~(Need.REFERENCE | Need.PREVIOUS | Need.EMBEDDINGS):
            raise LossError(
                f"loss must work on log-probabilities of whole answers, whose gradients can be normalised, but {loss} "
                f"needs {other.words}"
            )
        if not loss.separable or next(loss.parameters(), None) is not None:
            raise LossError(f"loss must be a mean over pairs, without state or parameters of its own, got {loss}")

    def normalized(self, batch: PreferenceBatch, parameters: Iterable[Tensor]) -> LossOutput:
        """Score a batch; `backward()` on the output's loss adds the normalised gradient to that of the parameters.

        Args:
            batch: with gradient, as a loss is called with.
            parameters: the trained parameters.

        Raises:
            LossError: if the log-probabilities have no gradient.
        """
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        output: LossOutput = self(batch)
        assert batch.chosen is not None
        assert batch.rejected is not None
        sides = [scores.logps for scores in (batch.chosen, batch.rejected)]
        if not all(logps.requires_grad for logps in sides):
            raise LossError(
                f"the log-probabilities have no gradient, so {self} has none to normalise: compute them without "
                "detach() or no_grad()"
            )
        total: list[Tensor | None] = [None] * len(trained)
        for logps, slopes in zip(sides, torch.autograd.grad(output.loss, sides, retain_graph=True), strict=True):
            for logp, slope in zip(logps, slopes.tolist(), strict=True):
                # Past a hinge, or with weight 0, nothing is left to scale.
                if slope != 0:
                    _add_unit(total, torch.autograd.grad(logp, trained, retain_graph=True, allow_unused=True), slope)
        if all(part is None for part in total):
            total = [torch.zeros_like(parameter) for parameter in trained]  # as the loss itself gives, for DDP too
        loss: Tensor = _WithGradient.apply(output.loss.detach(), total, *trained)  # type: ignore[no-untyped-call]
        return replace(output, loss=loss)


def _add_unit(total: list[Tensor | None], gradient: Sequence[Tensor | None], scale: float) -> None:
    """Add scale * gradient / |gradient|."""
    norms = [torch.linalg.vector_norm(part, dtype=_at_least_float32(part)) for part in gradient if part is not None]
    norm = torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())
    if not bool(norm > 0):
        return
    for i, part in enumerate(gradient):
        if part is not None:
            scaled = part.to(_at_least_float32(part)) * (scale / norm)
            total[i] = scaled if (before := total[i]) is None else before.add_(scaled)


def _at_least_float32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


class _WithGradient(torch.autograd.Function):
    """A value whose gradient for some parameters is given."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor | None], *parameters: Tensor) -> Tensor:
        ctx.gradients, ctx.dtypes = gradients, [parameter.dtype for parameter in parameters]
        return value.clone()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        found = zip(ctx.gradients, ctx.dtypes, strict=True)
        return None, None, *(None if part is None else (slope * part).to(dtype) for part, dtype in found)
