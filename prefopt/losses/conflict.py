"""Sums whose terms have conflicting gradients: these are combined so that the step works against none of them.

Lives here: the methods, as coefficients of the terms' gradients, and `conflict_free`, the loss that uses them. The
gradients of a model's parameters, term by term, are computed by the trainer, or by `ConflictFree.backward` in your own
loop. Imports only torch and its neighbours.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from prefopt.losses.base import Loss, LossOutput, WeightedSum
from prefopt.losses.errors import LossError
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


@register("conflict_free")
class ConflictFree(Wrapper):
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
    outermost = True

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

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        return self.loss.per_example(batch)

    def forward(self, batch: PreferenceBatch) -> LossOutput:
        output: LossOutput = self.loss(batch)
        return output

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
