"""One margin, many shapes: generalized preference optimization, and a random ensemble of its convex members.

Symbols as in `direct`; z = beta d.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from prefopt.losses.checks import positive, whole
from prefopt.losses.direct import ReferencePairLoss
from prefopt.losses.errors import LossError
from prefopt.losses.numerics import capped_exp, numbered_generator
from prefopt.losses.registry import register
from prefopt.losses.scores import PreferenceBatch


def _focal(z: Tensor) -> Tensor:
    # (1 - q)^2 (-log q) with q = sigmoid(z), focusing parameter 2.
    return torch.sigmoid(-z) ** 2 * F.softplus(-z)


SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "logistic": lambda z: F.softplus(-z),
    "hinge": lambda z: torch.relu(1 - z),
    "squared": lambda z: (1 - z) ** 2,
    "exponential": lambda z: capped_exp(-z),
    "truncated_quadratic": lambda z: torch.relu(1 - z) ** 2,
    "savage": lambda z: torch.sigmoid(-z) ** 2,
    "tangent": lambda z: (2 * torch.atan(z) - 1) ** 2,
    "poly1": lambda z: F.softplus(-z) + torch.sigmoid(-z),
    "focal": _focal,
    "pseudo_huber": lambda z: torch.sqrt(1 + (1 - z) ** 2) - 1,
    "squentropy": lambda z: F.softplus(-z) + (z / 2) ** 2,
}
"""f(z) by name."""

SLOPES_AT_ZERO = {
    "logistic": 0.5,
    "hinge": 1.0,
    "squared": 2.0,
    "exponential": 1.0,
    "truncated_quadratic": 2.0,
    "savage": 0.25,
    "tangent": 4.0,
    "poly1": 0.75,
    "focal": 0.125 + math.log(2) / 4,
    "pseudo_huber": 1 / math.sqrt(2),
    "squentropy": 0.5,
}
"""-f'(0): dividing by it makes one beta comparable between shapes."""

CONVEX = ("logistic", "hinge", "squared", "exponential", "truncated_quadratic", "pseudo_huber")
"""Shapes that are convex and fall at 0, from which `surrogate_ensemble` draws."""


@register("gpo")
class GPO(ReferencePairLoss):
    """Generalized preference optimization: any loss of the scaled margin.

    loss = f(z), z = beta d:
    logistic log(1 + e^-z) (DPO);  hinge relu(1 - z);  squared (1 - z)^2;  exponential e^-z;
    truncated_quadratic relu(1 - z)^2;  savage sigmoid(-z)^2;  tangent (2 atan z - 1)^2;
    poly1 log(1 + e^-z) + sigmoid(-z);  focal sigmoid(-z)^2 log(1 + e^-z);
    pseudo_huber sqrt(1 + (1 - z)^2) - 1;  squentropy log(1 + e^-z) + z^2 / 4

    Args:
        beta: scale of the margin; 0.1.
        shape: f, one of the names above.
        normalize: divide by -f'(0), so that one beta means the same first step for every shape.

    Needs: reference sums.
    Limits: logistic is DPO, hinge RSO's, squared with beta = 2 tau is 4 tau^2 times summed IPO. savage and tangent are
        bounded: pairs far on the wrong side have little gradient (tangent even rises again past z = tan 1/2).
        squentropy and squared pull large margins back. The exponential continues as its tangent below z = -30.
    Reference: Tang et al. 2024, arXiv 2402.05749, table 1 (first six; savage: Masnadi-Shirazi and Vasconcelos 2008).
        Tangent: Masnadi-Shirazi et al. 2010. Poly-1, epsilon 1: Leng et al. 2022, arXiv 2204.12511. Focal, gamma 2:
        Lin et al. 2017, arXiv 1708.02002. Squentropy on logits (z/2, -z/2): Hui et al. 2023, arXiv 2302.03952.
    """

    formula = "f(beta*d), f by name"
    paper = "2402.05749"

    def __init__(
        self,
        beta: float = 0.1,
        shape: Literal[
            "logistic",
            "hinge",
            "squared",
            "exponential",
            "truncated_quadratic",
            "savage",
            "tangent",
            "poly1",
            "focal",
            "pseudo_huber",
            "squentropy",
        ] = "logistic",
        normalize: bool = False,
    ):
        super().__init__()
        if shape not in SHAPES:
            raise LossError(f"shape must be one of {', '.join(SHAPES)}, got {shape!r}")
        self.beta = positive("beta", beta)
        self.shape = shape
        self.normalize = normalize

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        values = SHAPES[self.shape](self.scaled_margin(batch))
        return values / SLOPES_AT_ZERO[self.shape] if self.normalize else values


@register("surrogate_ensemble")
class SurrogateEnsemble(ReferencePairLoss):
    """A random mixture of convex surrogates, drawn at every call, so that no single shape dominates.

    loss = sum_i w_i f_i(beta d) / -f_i'(0),  w uniform on the simplex,  f_i the convex shapes of `gpo`

    Args:
        beta: scale of the margin.
        seed: of the draws, which are numbered: a resumed run continues with the next one.

    Needs: reference sums.
    During evaluation the equal mixture is used, which is also the mean over draws.
    Reference: our construction, in the spirit of loss ensembles for noisy labels; it has no paper.
    """

    formula = "sum_i w_i f_i(beta*d)/-f_i'(0), w drawn from the simplex, f_i the convex shapes of gpo"

    def __init__(self, beta: float = 0.1, seed: int = 0):
        super().__init__()
        self.beta = positive("beta", beta)
        self.seed = whole("seed", seed)
        self.draws: Tensor
        self.register_buffer("draws", torch.zeros((), dtype=torch.long))

    def weights(self) -> list[float]:
        """The mixture of this call; the same on every process."""
        if not self.training:
            return [1 / len(CONVEX)] * len(CONVEX)
        generator = numbered_generator(self.seed, int(self.draws))
        self.draws.add_(1)
        parts = torch.empty(len(CONVEX), dtype=torch.float64).exponential_(generator=generator)
        weights: list[float] = (parts / parts.sum()).tolist()
        return weights

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        z = self.scaled_margin(batch)
        parts = [w * SHAPES[name](z) / SLOPES_AT_ZERO[name] for w, name in zip(self.weights(), CONVEX, strict=True)]
        return torch.stack(parts).sum(0)
