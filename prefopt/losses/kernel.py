"""Kernelized objectives: the log-ratio's margin plus the margin of a kernel between prompt and completion.

Lives here: the four kernels of DPO-Kernels in log space, the objective of one kernel, and their learned mixture.
The paper's text was not at hand: what is written here follows its abstract and a public demonstration, and what is our
own reading is marked so. Imports torch and its neighbours alone.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prefopt.losses.base import LossOutput, Need, PairLoss
from prefopt.losses.checks import non_negative, positive, whole
from prefopt.losses.direct import paired_roles
from prefopt.losses.distributed import global_sum, present
from prefopt.losses.divergences import Divergence
from prefopt.losses.errors import LossError
from prefopt.losses.numerics import masked_mean
from prefopt.losses.registry import register
from prefopt.losses.scores import PreferenceBatch, Scores

KERNELS = ("polynomial", "rbf", "mahalanobis", "spectral")
SPECTRUM = "1:1, 0.5:0.1"
"""Weights and rates of the demonstration's two spectral components."""
SMALLEST_BASE = 1e-6
"""What the polynomial's base is clamped to: below it the kernel's logarithm has no value or no bounded slope."""

Kernel = Literal["polynomial", "rbf", "mahalanobis", "spectral"]
DivergenceName = Literal["kl", "js", "hellinger", "renyi", "bhattacharyya", "wasserstein", "f"]
Generator = Literal["forward_kl", "total_variation", "triangular"]


# ---- kernels -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kernels:
    """The four kernels with their parameters; every one is 1 where its arguments are the same unit vector.

    That scale, a factor that a single kernel's ratio does not see, is what makes a mixture's weights comparable.

    Attributes:
        degree: of the polynomial.
        offset: added to the polynomial's inner product; the paper's c.
        bandwidth: standard deviation of the radial kernel.
        spectrum: (weight, rate) of each spectral component; weights sum to 1.
        shrinkage: of the Mahalanobis kernel's variances towards their mean.
    """

    degree: int = 2
    offset: float = 1.0
    bandwidth: float = 1.0
    spectrum: tuple[tuple[float, float], ...] = ((2 / 3, 1.0), (1 / 3, 0.1))
    shrinkage: float = 0.5

    def log(self, name: str, u: Tensor, v: Tensor, precision: Tensor | None = None) -> Tensor:
        """(N,) log K(u, v) of (N, H) unit vectors; `precision` (H,) is for the Mahalanobis kernel."""
        if name == "polynomial":
            base = ((u * v).sum(-1) + self.offset).clamp(min=SMALLEST_BASE) / (1 + self.offset)
            return self.degree * base.log()
        squares = (u - v) ** 2
        if name == "rbf":
            return -squares.sum(-1) / (2 * self.bandwidth**2)
        if name == "mahalanobis":
            assert precision is not None
            return -(squares * precision).sum(-1) / 2
        parts = [math.log(weight) - rate * squares.sum(-1) for weight, rate in self.spectrum]
        return torch.logsumexp(torch.stack(parts), 0)


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
        ValueError: naming the part that is no `weight:rate` of positive numbers.
    """
    found = []
    for part in text.split(","):
        weight, _, rate = part.partition(":")
        try:
            found.append((positive("weight", float(weight)), positive("rate", float(rate))))
        except ValueError:
            raise LossError(
                f"spectrum holds {part.strip()!r}: write weight:rate for each component, both positive, as in "
                f"{SPECTRUM!r}"
            ) from None
    total = sum(weight for weight, _ in found)
    return tuple((weight / total, rate) for weight, rate in found)


# ---- objectives ----------------------------------------------------------------------------------------------------


class Kernelized(PairLoss):
    """What the objective of one kernel and that of their mixture share; subclasses say what log K is."""

    def __init__(
        self,
        divergence: DivergenceName,
        beta: float,
        gamma: float,
        alpha: float,
        link: Literal["logistic", "linear"],
        embeddings: Literal["hidden", "given"],
        gradient: bool,
        order: float | None,
        f: Generator | None,
    ):
        super().__init__()
        if link not in ("logistic", "linear"):
            raise LossError(f"link must be 'logistic' or 'linear', got {link!r}")
        if embeddings not in ("hidden", "given"):
            raise LossError(f"embeddings must be 'hidden' or 'given', got {embeddings!r}")
        kind = Divergence(
            divergence,
            order=0.9 if order is None and divergence == "renyi" else order,
            f="forward_kl" if f is None and divergence == "f" else f,
        )
        self.divergence, self.link, self.embeddings, self.gradient = divergence, link, embeddings, gradient
        self.beta = positive("beta", beta)
        self.gamma = non_negative("gamma", gamma)
        self.alpha = non_negative("alpha", alpha)
        self.order, self.f = order, f
        self._logged: dict[str, Tensor] = {}  # of the batch at hand, until its metrics are asked for
        self.needs = Need.NONE
        if link == "logistic":
            self.needs |= Need.REFERENCE
        if gamma:
            self.needs |= Need.HIDDEN if embeddings == "hidden" else Need.EMBEDDINGS
        if alpha:
            self.needs |= Need.DIVERGENCE
            self.divergences = (str(kind),)

    @abstractmethod
    def log_kernel(self, u: Tensor, v: Tensor, precision: Tensor | None) -> Tensor:
        """(N,) log K(u, v) of (N, H) unit vectors."""

    @property
    def _shrinkage(self) -> float | None:
        """Of the Mahalanobis kernel; None if it takes no part."""
        return None

    def reward(self, scores: Scores) -> Tensor:
        """beta times the log-ratio; the kernel's part of the margin is logged as `kernel/margins`."""
        return self.beta * (scores.ratios if self.link == "logistic" else scores.logps)

    def kernel_margin(self, batch: PreferenceBatch) -> Tensor:
        """(N,) log K(e_x, e_w) - log K(e_x, e_l)."""
        chosen, rejected = paired_roles(batch)
        vectors = [*self._vectors(chosen), *self._vectors(rejected)]
        precision = None
        if self._shrinkage is not None:
            weights = self._weights(batch)
            counted = None if weights is None else present(weights, weights).repeat(len(vectors))
            precision = diagonal_precision(torch.cat(vectors), self._shrinkage, counted)
        before_chosen, up, before_rejected, down = vectors
        return self.log_kernel(before_chosen, up, precision) - self.log_kernel(before_rejected, down, precision)

    def _vectors(self, scores: Scores) -> tuple[Tensor, Tensor]:
        """(N, H) unit vectors of prompt and completion."""
        if self.embeddings == "hidden":
            pair = scores.prompt_hidden, scores.hidden
        else:
            pair = scores.prompt_embedding, scores.embedding
        assert pair[0] is not None  # `_check` has seen to that
        assert pair[1] is not None
        prompt, completion = (vectors.to(scores.logps.dtype) for vectors in pair)  # type: ignore[union-attr]
        if not self.gradient:
            prompt, completion = prompt.detach(), completion.detach()
        return unit(prompt), unit(completion)

    def distance(self, batch: PreferenceBatch) -> Tensor:
        """(N,) the divergence, averaged over the positions of each completion and over the two."""
        means = []
        for scores in paired_roles(batch):
            assert scores.token_mask is not None
            means.append(masked_mean(scores.token_divergence(self.divergences[0]), scores.token_mask))
        return (means[0] + means[1]) / 2

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        chosen, rejected = paired_roles(batch)
        self._logged = {}
        z = self.reward(chosen) - self.reward(rejected)
        if self.gamma:
            margin = self._logged["kernel/margins"] = self.kernel_margin(batch)
            z = z + self.gamma * margin
        values = -F.logsigmoid(z) if self.link == "logistic" else -z
        if self.alpha:
            distance = self._logged["kernel/divergence"] = self.distance(batch)
            values = values + self.alpha * distance
        return values

    def _metrics(self, batch: PreferenceBatch) -> dict[str, Tensor]:
        # Not computed anew: the Mahalanobis kernel's variances are exchanged between processes.
        logged, self._logged = self._logged, {}
        return super()._metrics(batch) | {name: value.detach() for name, value in logged.items()}


@register("kernel_dpo")
class KernelDPO(Kernelized):
    """DPO with a kernel: the margin gains what a kernel on embeddings says of prompt and completions.

    loss = -log sigmoid(beta d + gamma k) + alpha D(pi || ref),  k = log K(e_x, e_w) - log K(e_x, e_l)
    link="linear", as printed:  loss = -(beta (pw - pl) + gamma k) + alpha D(pi || ref), unbounded below

    On unit vectors, each kernel scaled to K(u, u) = 1:
    polynomial   ((u.v + offset) / (1 + offset))^degree
    rbf          exp(-|u - v|^2 / (2 bandwidth^2))
    mahalanobis  exp(-(u - v)' M (u - v) / 2), M the batch's inverse variances (diagonal, shrunk), of mean 1
    spectral     sum_i w_i exp(-a_i |u - v|^2)

    Args:
        kernel: one of the above.
        divergence: between next-token distributions, see `prefopt.losses.divergences`; the mean over a completion's
            positions, and over the two completions (our reading).
        beta: scale of the log-ratio; unknown for the paper, DPO's 0.1 here.
        gamma: weight of the kernel's margin; 0 leaves it, and what it needs, away.
        alpha: weight of the divergence; 0 leaves it away.
        link: "logistic" or "linear".
        embeddings: "hidden" pools the policy's own last hidden states, "given" takes those that come with the data.
        gradient: let hidden states learn from the kernel's margin.
        degree: of the polynomial; 2 if None.
        offset: of the polynomial; 1 if None.
        bandwidth: of the radial kernel; 1 if None.
        spectrum: weight:rate of each spectral component; "1:1, 0.5:0.1" if None.
        shrinkage: of the Mahalanobis kernel's variances towards their mean, in (0, 1]; 0.5 if None.
        order: of the Renyi divergence; 0.9 if None. 1 is KL, 0.5 twice Bhattacharyya.
        f: generator of the f-divergence: "forward_kl" (if None), "total_variation" or "triangular".

    Needs: sums; reference sums for the logistic link; pooled hidden states or embeddings; next-token distributions of
        both models while alpha > 0.
    Limits: gamma = alpha = 0 is `dpo(beta)`. With embeddings that do not learn (`given`, or gradient=False) k is a
        constant: under the linear link its gradient is 0 whatever gamma is, under the logistic one it moves the target
        of each pair. shrinkage = 1 is the radial kernel of bandwidth 1.
    Numerics: kernels stay in log space, where far vectors do not underflow. Vectors are divided by their norm.
    Reference: Das et al. 2025, arXiv 2501.03271; kernels, their parameters and order 0.9 from an unattributed
        demonstration, not from the paper. Ours: the logistic link, M from the batch, the positions averaged, defaults.
    """

    formula = "-log sigmoid(beta*d + gamma*(log K(x,w) - log K(x,l))) + alpha*D(pi || ref); or -(beta*(pw-pl) + ...)"
    paper = "2501.03271"
    batchwise = False

    def __init__(
        self,
        kernel: Kernel = "rbf",
        divergence: DivergenceName = "kl",
        beta: float = 0.1,
        gamma: float = 1.0,
        alpha: float = 0.1,
        link: Literal["logistic", "linear"] = "logistic",
        embeddings: Literal["hidden", "given"] = "hidden",
        gradient: bool = True,
        degree: int | None = None,
        offset: float | None = None,
        bandwidth: float | None = None,
        spectrum: str | None = None,
        shrinkage: float | None = None,
        order: float | None = None,
        f: Generator | None = None,
    ):
        super().__init__(divergence, beta, gamma, alpha, link, embeddings, gradient, order, f)
        if kernel not in KERNELS:
            raise LossError(f"kernel must be one of {', '.join(KERNELS)}, got {kernel!r}")
        self.kernel = kernel
        self.degree, self.offset, self.bandwidth = degree, offset, bandwidth
        self.spectrum, self.shrinkage = spectrum, shrinkage
        for name, owner in _OWNERS.items():
            if getattr(self, name) is not None and owner != kernel:
                raise LossError(f"{name} is of the {owner} kernel, this one is {kernel}")
        self._kernels = _kernels(degree, offset, bandwidth, spectrum, shrinkage)
        self.batchwise = kernel == "mahalanobis" and gamma > 0

    @property
    def _shrinkage(self) -> float | None:
        return self._kernels.shrinkage if self.kernel == "mahalanobis" else None

    def log_kernel(self, u: Tensor, v: Tensor, precision: Tensor | None) -> Tensor:
        return self._kernels.log(self.kernel, u, v, precision)


@register("hmk")
class HMK(Kernelized):
    """The hierarchical mixture of kernels: `kernel_dpo` with a learned mixture of all four.

    K = t_1 (a_1 K_rbf + a_2 K_polynomial) + t_2 (b_1 K_spectral + b_2 K_mahalanobis)
    loss = -log sigmoid(beta d + gamma k) + alpha D(pi || ref) - entropy (H(t) + H(a) + H(b)),  k of K

    t, a and b are softmaxes of free logits, parameters of the loss, that start at 1/2 each; H is the entropy.

    Args:
        divergence: as in `kernel_dpo`.
        beta: as in `kernel_dpo`.
        gamma: as in `kernel_dpo`; positive, since the mixture learns by it.
        alpha: as in `kernel_dpo`.
        entropy: weight of the term that keeps the mixture from collapsing onto one kernel; its form is our reading.
        link: as in `kernel_dpo`.
        embeddings: as in `kernel_dpo`. The weights learn from embeddings of either kind.
        gradient: as in `kernel_dpo`.
        degree: of the polynomial.
        offset: of the polynomial.
        bandwidth: of the radial kernel.
        spectrum: weight:rate of each spectral component.
        shrinkage: of the Mahalanobis kernel's variances, in (0, 1].
        order: of the Renyi divergence; 0.9 if None.
        f: generator of the f-divergence; "forward_kl" if None.

    Needs: as `kernel_dpo`; an optimizer that is given `loss.parameters()` too.
    Limits: logits that pick one kernel give `kernel_dpo` of it, but for the entropy term. Weights are logged as
        `weights/<kernel>`.
    Reference: Das et al. 2025, arXiv 2501.03271; the hierarchy from an unattributed demonstration. Ours: the entropy
        term's form and weight, kernels of the same scale.
    """

    formula = "-log sigmoid(beta*d + gamma*k) + alpha*D(pi || ref) - entropy*(H(t) + H(a) + H(b)), K a learned mixture"
    paper = "2501.03271"
    batchwise = True

    def __init__(
        self,
        divergence: DivergenceName = "kl",
        beta: float = 0.1,
        gamma: float = 1.0,
        alpha: float = 0.1,
        entropy: float = 0.1,
        link: Literal["logistic", "linear"] = "logistic",
        embeddings: Literal["hidden", "given"] = "hidden",
        gradient: bool = True,
        degree: int = 2,
        offset: float = 1.0,
        bandwidth: float = 1.0,
        spectrum: str = SPECTRUM,
        shrinkage: float = 0.5,
        order: float | None = None,
        f: Generator | None = None,
    ):
        super().__init__(divergence, beta, positive("gamma", gamma), alpha, link, embeddings, gradient, order, f)
        self.entropy = non_negative("entropy", entropy)
        self.degree, self.offset, self.bandwidth = degree, offset, bandwidth
        self.spectrum, self.shrinkage = spectrum, shrinkage
        self._kernels = _kernels(degree, offset, bandwidth, spectrum, shrinkage)
        self.groups = nn.Parameter(torch.zeros(2))
        self.local = nn.Parameter(torch.zeros(2))
        self.broad = nn.Parameter(torch.zeros(2))

    @property
    def _shrinkage(self) -> float | None:
        return self._kernels.shrinkage

    def _log_shares(self) -> list[Tensor]:
        """(2,) log of t, a and b."""
        return [torch.log_softmax(logits, 0) for logits in (self.groups, self.local, self.broad)]

    def log_weights(self) -> dict[str, Tensor]:
        """Scalar log-weight of each kernel in the mixture; the weights sum to 1."""
        groups, local, broad = self._log_shares()
        return {
            "rbf": groups[0] + local[0],
            "polynomial": groups[0] + local[1],
            "spectral": groups[1] + broad[0],
            "mahalanobis": groups[1] + broad[1],
        }

    def mixture_entropy(self) -> Tensor:
        """Scalar H(t) + H(a) + H(b), at most 3 log 2."""
        return -torch.stack([(part.exp() * part).sum() for part in self._log_shares()]).sum()

    def log_kernel(self, u: Tensor, v: Tensor, precision: Tensor | None) -> Tensor:
        parts = [weight + self._kernels.log(name, u, v, precision) for name, weight in self.log_weights().items()]
        return torch.logsumexp(torch.stack(parts), 0)

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        return super().per_example(batch) - self.entropy * self.mixture_entropy()

    def forward(self, batch: PreferenceBatch) -> LossOutput:
        output = super().forward(batch)
        for name, weight in self.log_weights().items():
            output.metrics[f"weights/{name}"] = weight.detach().exp().reshape(1)
        return output


_OWNERS = {
    "degree": "polynomial", "offset": "polynomial", "bandwidth": "rbf", "spectrum": "spectral",
    "shrinkage": "mahalanobis",
}  # fmt: skip
"""Which kernel a parameter belongs to."""


def _kernels(
    degree: int | None, offset: float | None, bandwidth: float | None, spectrum: str | None, shrinkage: float | None
) -> Kernels:
    """The kernels with these parameters, or the demonstration's for those that are None."""
    return Kernels(
        degree=whole("degree", 2 if degree is None else degree, least=1),
        offset=non_negative("offset", 1.0 if offset is None else offset),
        bandwidth=positive("bandwidth", 1.0 if bandwidth is None else bandwidth),
        spectrum=spectrum_of(SPECTRUM if spectrum is None else spectrum),
        shrinkage=positive("shrinkage", 0.5 if shrinkage is None else shrinkage, most=1.0),
    )
