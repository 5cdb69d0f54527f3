"""Kernelized objectives: the log-ratio's margin plus the margin of a kernel between prompt and completion.

Lives here: the objective of one kernel of DPO-Kernels, and their learned mixture. The paper's text was not available:
this follows its abstract and a public demonstration, and our own choices are marked as such. Imports only torch and
its neighbours.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prefopt.losses.base import LossOutput, PairLoss
from prefopt.losses.checks import non_negative, positive
from prefopt.losses.direct import paired_roles
from prefopt.losses.distributed import present
from prefopt.losses.divergences import Divergence, DivergenceName
from prefopt.losses.errors import LossError
from prefopt.losses.kernel_functions import RBF, Kernel, Mahalanobis, Polynomial, Spectral, diagonal_precision, unit
from prefopt.losses.needs import Need
from prefopt.losses.numerics import masked_mean
from prefopt.losses.registry import register
from prefopt.losses.scores import PreferenceBatch, Scores

KernelName = Literal["polynomial", "rbf", "mahalanobis", "spectral"]
Link = Literal["logistic", "linear"]
Embeddings = Literal["hidden", "given"]
T = TypeVar("T", Kernel, Divergence)


class Kernelized(PairLoss):
    """Base of the objective of one kernel and that of their mixture; subclasses compute log K."""

    def __init__(
        self,
        kernels: tuple[Kernel, ...],
        divergence: DivergenceName | Divergence,
        beta: float,
        gamma: float,
        alpha: float,
        link: Link,
        embeddings: Embeddings,
        gradient: bool,
        inside: bool = False,
    ):
        super().__init__()
        if link not in ("logistic", "linear"):
            raise LossError(f"link must be 'logistic' or 'linear', got {link!r}")
        if embeddings not in ("hidden", "given"):
            raise LossError(f"embeddings must be 'hidden' or 'given', got {embeddings!r}")
        self.divergence, self.link, self.embeddings, self.gradient = divergence, link, embeddings, gradient
        self.inside = inside
        self.beta = positive("beta", beta)
        self.gamma = non_negative("gamma", gamma)
        self.alpha = non_negative("alpha", alpha)
        self._kernels = kernels
        self._mahalanobis = next((kernel for kernel in kernels if isinstance(kernel, Mahalanobis)), None)
        self._logged: dict[str, Tensor] = {}  # of the current batch, until its metrics are read
        self.needs = Need.NONE
        if link == "logistic":
            self.needs |= Need.REFERENCE
        if gamma:
            self.needs |= Need.HIDDEN if embeddings == "hidden" else Need.EMBEDDINGS
        if alpha:
            self.needs |= Need.DIVERGENCE
            self.divergences = (str(_chosen("divergence", divergence, Divergence)),)

    @abstractmethod
    def log_kernel(self, u: Tensor, v: Tensor, precision: Tensor | None) -> Tensor:
        """(N,) log K(u, v) of (N, H) unit vectors."""

    def reward(self, scores: Scores) -> Tensor:
        """beta times the log-ratio; the kernel's part of the margin is logged as `kernel/margins`."""
        return self.beta * (scores.ratios if self.link == "logistic" else scores.logps)

    def kernel_margin(self, batch: PreferenceBatch) -> Tensor:
        """(N,) log K(e_x, e_w) - log K(e_x, e_l)."""
        chosen, rejected = paired_roles(batch)
        vectors = [*self._vectors(chosen), *self._vectors(rejected)]
        precision = None
        if self._mahalanobis is not None:
            weights = self._weights(batch)
            counted = None if weights is None else present(weights, weights).repeat(len(vectors))
            precision = diagonal_precision(torch.cat(vectors), self._mahalanobis.shrinkage, counted)
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
        """(N,) the divergence, averaged over the positions of each completion; of the two the mean, or w less l."""
        means = []
        for scores in paired_roles(batch):
            assert scores.token_mask is not None
            means.append(masked_mean(scores.token_divergence(self.divergences[0]), scores.token_mask))
        return means[0] - means[1] if self.inside else (means[0] + means[1]) / 2

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        chosen, rejected = paired_roles(batch)
        self._logged = {}
        z = self.reward(chosen) - self.reward(rejected)
        if self.gamma:
            margin = self._logged["kernel/margins"] = self.kernel_margin(batch)
            z = z + self.gamma * margin
        penalty = 0 * z
        if self.alpha:
            distance = self._logged["kernel/divergence"] = self.distance(batch)
            penalty = self.alpha * distance
        if self.inside:
            z, penalty = z - penalty, 0 * z
        return (-F.logsigmoid(z) if self.link == "logistic" else -z) + penalty

    def _metrics(self, batch: PreferenceBatch) -> dict[str, Tensor]:
        # Not computed again: the Mahalanobis kernel's variances are exchanged between processes.
        logged, self._logged = self._logged, {}
        return super()._metrics(batch) | {name: value.detach() for name, value in logged.items()}


@register("kernel_dpo")
class KernelDPO(Kernelized):
    """DPO with a kernel: a kernel on embeddings of prompt and completions adds to the margin.

    loss = -log sigmoid(beta d + gamma k) + alpha D(pi || ref),  k = log K(e_x, e_w) - log K(e_x, e_l)
    link="linear", as printed:  loss = -(beta (pw - pl) + gamma k) + alpha D(pi || ref), unbounded below

    On unit vectors, each kernel scaled to K(u, u) = 1:
    polynomial   ((u.v + offset) / (1 + offset))^degree
    rbf          exp(-|u - v|^2 / (2 bandwidth^2))
    mahalanobis  exp(-(u - v)' M (u - v) / 2), M the batch's inverse variances (diagonal, shrunk), of mean 1
    spectral     sum_i w_i exp(-a_i |u - v|^2)

    Args:
        kernel: one of the above by name, or with parameters: polynomial(degree=2, offset=1.0), rbf(bandwidth=1.0),
            mahalanobis(shrinkage=0.5) or spectral(spectrum="1:1, 0.5:0.1"). A spectrum is weight:rate of each
            component; shrinkage of the variances towards their mean is in (0, 1].
        divergence: between next-token distributions, see `prefopt.losses.divergences`; the mean over a completion's
            positions, and over the two completions (our reading). By name, or with parameters: renyi(order=0.9), 1 is
            KL and 0.5 twice Bhattacharyya; f(generator="forward_kl"), "total_variation" or "triangular".
        beta: scale of the log-ratio; unknown for the paper, DPO's 0.1 here.
        gamma: weight of the kernel's margin; 0 removes it and its needs.
        alpha: weight of the divergence; 0 removes it.
        link: "logistic" or "linear".
        embeddings: "hidden" pools the policy's own last hidden states, "given" takes those that come with the data.
        gradient: let hidden states learn from the kernel's margin.
        inside: subtract alpha (D_w - D_l) from the margin, in place of the term alpha D (`kernel_dpo_detonate`).

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
        kernel: KernelName | Kernel = "rbf",
        divergence: DivergenceName | Divergence = "kl",
        beta: float = 0.1,
        gamma: float = 1.0,
        alpha: float = 0.1,
        link: Link = "logistic",
        embeddings: Embeddings = "hidden",
        gradient: bool = True,
        inside: bool = False,
    ):
        chosen = _chosen("kernel", kernel, Kernel)
        super().__init__((chosen,), divergence, beta, gamma, alpha, link, embeddings, gradient, inside)
        self.kernel = kernel
        self.batchwise = self._mahalanobis is not None and gamma > 0

    def log_kernel(self, u: Tensor, v: Tensor, precision: Tensor | None) -> Tensor:
        return self._kernels[0].log(u, v, precision)


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
        rbf: the kernels with their parameters, as in `kernel_dpo`.
        polynomial: likewise.
        spectral: likewise.
        mahalanobis: likewise.

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
        divergence: DivergenceName | Divergence = "kl",
        beta: float = 0.1,
        gamma: float = 1.0,
        alpha: float = 0.1,
        entropy: float = 0.1,
        link: Link = "logistic",
        embeddings: Embeddings = "hidden",
        gradient: bool = True,
        rbf: RBF = RBF(),
        polynomial: Polynomial = Polynomial(),
        spectral: Spectral = Spectral(),
        mahalanobis: Mahalanobis = Mahalanobis(),
    ):
        kernels = (rbf, polynomial, spectral, mahalanobis)
        super().__init__(kernels, divergence, beta, positive("gamma", gamma), alpha, link, embeddings, gradient)
        self.entropy = non_negative("entropy", entropy)
        self.rbf, self.polynomial, self.spectral, self.mahalanobis = kernels
        self.groups = nn.Parameter(torch.zeros(2))
        self.local = nn.Parameter(torch.zeros(2))
        self.broad = nn.Parameter(torch.zeros(2))

    def _log_shares(self) -> list[Tensor]:
        """(2,) log of t, a and b."""
        return [torch.log_softmax(logits, 0) for logits in (self.groups, self.local, self.broad)]

    def log_weights(self) -> dict[str, Tensor]:
        """Scalar log-weight of each kernel in the mixture; the weights sum to 1."""
        groups, local, broad = self._log_shares()
        weights = (groups[0] + local[0], groups[0] + local[1], groups[1] + broad[0], groups[1] + broad[1])
        return {kernel.name: weight for kernel, weight in zip(self._kernels, weights, strict=True)}

    def mixture_entropy(self) -> Tensor:
        """Scalar H(t) + H(a) + H(b), at most 3 log 2."""
        return -torch.stack([(part.exp() * part).sum() for part in self._log_shares()]).sum()

    def log_kernel(self, u: Tensor, v: Tensor, precision: Tensor | None) -> Tensor:
        weights = self.log_weights()
        parts = [weights[kernel.name] + kernel.log(u, v, precision) for kernel in self._kernels]
        return torch.logsumexp(torch.stack(parts), 0)

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        return super().per_example(batch) - self.entropy * self.mixture_entropy()

    def forward(self, batch: PreferenceBatch) -> LossOutput:
        output = super().forward(batch)
        for name, weight in self.log_weights().items():
            output.metrics[f"weights/{name}"] = weight.detach().exp().reshape(1)
        return output


def _chosen(argument: str, value: str | T, family: type[T]) -> T:
    """`value`, or for a name the kernel or divergence of that name with its defaults.

    Raises:
        ValueError: if there is none of that name.
    """
    if isinstance(value, family):
        return value
    choices = family.choices()
    if value not in choices:
        raise LossError(f"{argument} must be one of {', '.join(choices)}, got {value!r}")
    return choices[value]()
