"""The kernels of DPO-Kernels on unit vectors, in log space, with their parameters; and what they are computed from.

`rbf(bandwidth=0.5)` in a loss expression is `RBF(bandwidth=0.5)` here. Imports torch and its neighbours alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from prefopt.losses.checks import non_negative, positive, whole
from prefopt.losses.distributed import global_sum
from prefopt.losses.errors import LossError

SPECTRUM = "1:1, 0.5:0.1"
"""Weights and rates of the demonstration's two spectral components."""
SMALLEST_BASE = 1e-6
"""Lower bound of the polynomial's base: below it the kernel's logarithm is undefined or its slope unbounded."""


class Kernel:
    """A kernel with its parameters; 1 where its arguments are the same unit vector.

    That scale, a factor that a single kernel's ratio does not see, is what makes a mixture's weights comparable.
    """

    name: ClassVar[str]

    @classmethod
    def choices(cls) -> dict[str, type[Kernel]]:
        """What a loss expression can write for an argument of this type, by name."""
        return {kernel.name: kernel for kernel in cls.__subclasses__() or [cls]}

    def log(self, u: Tensor, v: Tensor, precision: Tensor | None = None) -> Tensor:
        """(N,) log K(u, v) of (N, H) unit vectors; `precision` (H,) is for the Mahalanobis kernel."""
        raise NotImplementedError

    def __repr__(self) -> str:
        arguments = ", ".join(f"{field.name}={getattr(self, field.name)!r}" for field in fields(self))  # type: ignore[arg-type]
        return f"{self.name}({arguments})"


@dataclass(frozen=True, repr=False)
class Polynomial(Kernel):
    """((u.v + offset) / (1 + offset))^degree; `offset` is the paper's c."""

    name: ClassVar[str] = "polynomial"
    degree: int = 2
    offset: float = 1.0

    def __post_init__(self) -> None:
        whole("degree", self.degree, least=1)
        non_negative("offset", self.offset)

    def log(self, u: Tensor, v: Tensor, precision: Tensor | None = None) -> Tensor:
        base = ((u * v).sum(-1) + self.offset).clamp(min=SMALLEST_BASE) / (1 + self.offset)
        return self.degree * base.log()


@dataclass(frozen=True, repr=False)
class RBF(Kernel):
    """exp(-|u - v|^2 / (2 bandwidth^2)); `bandwidth` is a standard deviation."""

    name: ClassVar[str] = "rbf"
    bandwidth: float = 1.0

    def __post_init__(self) -> None:
        positive("bandwidth", self.bandwidth)

    def log(self, u: Tensor, v: Tensor, precision: Tensor | None = None) -> Tensor:
        return -((u - v) ** 2).sum(-1) / (2 * self.bandwidth**2)


@dataclass(frozen=True, repr=False)
class Mahalanobis(Kernel):
    """exp(-(u - v)' M (u - v) / 2), M the `diagonal_precision` of the batch with this `shrinkage`, in (0, 1]."""

    name: ClassVar[str] = "mahalanobis"
    shrinkage: float = 0.5

    def __post_init__(self) -> None:
        positive("shrinkage", self.shrinkage, most=1.0)

    def log(self, u: Tensor, v: Tensor, precision: Tensor | None = None) -> Tensor:
        assert precision is not None
        return -((u - v) ** 2 * precision).sum(-1) / 2


@dataclass(frozen=True, repr=False)
class Spectral(Kernel):
    """sum_i w_i exp(-a_i |u - v|^2); `spectrum` is the text `w:a, w:a`, its weights are scaled to sum to 1."""

    name: ClassVar[str] = "spectral"
    spectrum: str = SPECTRUM

    def __post_init__(self) -> None:
        spectrum_of(self.spectrum)

    def log(self, u: Tensor, v: Tensor, precision: Tensor | None = None) -> Tensor:
        square = ((u - v) ** 2).sum(-1)
        parts = [math.log(weight) - rate * square for weight, rate in spectrum_of(self.spectrum)]
        return torch.logsumexp(torch.stack(parts), 0)


KERNELS = Kernel.choices()


def unit(vectors: Tensor) -> Tensor:
    """(N, H) vectors divided by their Euclidean norms; a null vector stays null.

    On the unit sphere a bandwidth or an offset means the same for any encoder, width and scale of its vectors, and
    the polynomial's base cannot run away.
    """
    return F.normalize(vectors, dim=-1, eps=1e-12)


def diagonal_precision(vectors: Tensor, shrinkage: float, weights: Tensor | None = None) -> Tensor:
    """(H,) inverse variances of the (M, H) vectors of all processes, scaled to a mean of 1, without gradient.

    Variances are shrunk towards their mean; equal ones give the identity, which is the radial kernel of bandwidth 1.

    Args:
        vectors: (M, H).
        shrinkage: in (0, 1]; 1 is the identity.
        weights: (M,) 0 for vectors that do not count, else 1.
    """
    vectors = vectors.detach()
    weights = vectors.new_ones(vectors.shape[0]) if weights is None else weights.to(vectors.dtype)
    count = global_sum(weights.sum()).clamp(min=1)
    mean = global_sum(weights @ vectors) / count
    variance = global_sum(weights @ (vectors - mean) ** 2) / count
    shrunk = (1 - shrinkage) * variance + shrinkage * variance.mean()
    # Vectors that are all the same have no variance in any direction, and no direction to prefer.
    inverse = torch.where(variance.mean() > 0, 1 / shrunk.clamp(min=torch.finfo(shrunk.dtype).tiny), 1.0)
    return inverse / inverse.mean()


def spectrum_of(text: str) -> tuple[tuple[float, float], ...]:
    """Weights, scaled to sum to 1, and rates from text such as `1:1, 0.5:0.1`.

    Raises:
        ValueError: naming the part that is not a `weight:rate` of positive numbers.
    """
    components = []
    for part in text.split(","):
        weight, _, rate = part.partition(":")
        try:
            components.append((positive("weight", float(weight)), positive("rate", float(rate))))
        except ValueError:
            raise LossError(
                f"spectrum holds {part.strip()!r}: write weight:rate for each component, both positive, as in "
                f"{SPECTRUM!r}"
            ) from None
    total = sum(weight for weight, _ in components)
    return tuple((weight / total, rate) for weight, rate in components)
