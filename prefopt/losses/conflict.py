"""Sums whose terms fight each other: the gradients of the terms are combined so that none of them is worked against.

Lives here: the methods, as coefficients of the terms' gradients; `TermMoments`, for one term's gradient a step; and
`conflict_free`, the loss that asks for either. What computes the gradients of a model's parameters, term by term, is
the trainer, or `ConflictFree.backward` in a loop of one's own. Imports torch and its neighbours alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from prefopt.losses.base import Loss, LossOutput, WeightedSum
from prefopt.losses.checks import non_negative
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
    made = torch.zeros_like(lengths)
    if not bool(alive.any()):
        return made
    chosen = {"config": _config, "pcgrad": _pcgrad, "balance": _balance}[method]
    # A term without a gradient has no say in the direction.
    made[alive] = chosen(gram[alive][:, alive], lengths[alive])
    return made


def _config(gram: Tensor, lengths: Tensor) -> Tensor:
    cosines = gram / (lengths[:, None] * lengths)
    # The shortest vector whose product with every unit gradient is 1 lies in their span: U^T (U U^T)^-1 1.
    weights = torch.linalg.pinv(cosines, hermitian=True, atol=SMALLEST).sum(1)
    length = (weights @ cosines @ weights).clamp(min=0).sqrt()
    if not float(length) > 0:
        return torch.zeros_like(lengths)
    projections = (lengths * (cosines @ weights)).sum() / length
    made: Tensor = weights / lengths / length * projections
    return made


def _pcgrad(gram: Tensor, lengths: Tensor) -> Tensor:
    count = len(lengths)
    kept = torch.eye(count, dtype=gram.dtype, device=gram.device)  # row i: what is left of gradient i, in terms of all
    for i in range(count):
        for j in range(count):
            product = kept[i] @ gram[:, j]
            if j != i and bool(product < 0):
                kept[i, j] -= product / gram[j, j]
    return kept.sum(0)


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
    made: list[Tensor | None] = []
    for parts in zip(*gradients, strict=True):
        present = [(float(weight), part) for weight, part in zip(weights, parts, strict=True) if part is not None]
        made.append(torch.stack([weight * part for weight, part in present]).sum(0) if present else None)
    return made


class TermMoments:
    """A first moment, as Adam keeps one, of every term's gradient: a step renews one of them and combines all.

    With one term k = t mod K a step, counted from 0, and t_i the times that term i was taken:

    m_k <- beta m_k + (1 - beta) g_k
    d = sum_i c_i m_i / (1 - beta^t_i), c as `coefficients` has it for the corrected moments
    given to plain SGD: d;  to Adam: (M - beta M') / (1 - beta), M = (1 - beta^n) d in the n-th combined step, M' = M
    of the step before. It is the gradient of which Adam, with beta1 = beta, makes d as its own corrected first moment.

    Nothing is combined before every term was taken once: the first K - 1 steps give no gradient. Moments are float32,
    or float64 with such gradients; they are all the memory this takes.

    Reference: Liu et al. 2024, arXiv 2408.11104, algorithm 1; with Adam underneath, ten steps equal those of
        tum-pbs/ConFIG (`PseudoMomentumOperator` of conflictfree 0.1.8, with SGD underneath) to 1e-12.

    Args:
        count: K terms.
        method: as `coefficients` takes it.
        momentum: beta, in [0, 1).

    Attributes:
        taken: steps so far.
        gram: (K, K) inner products of the corrected moments; None before every term was taken once.
    """

    def __init__(self, count: int, method: Method, momentum: float):
        self.count, self.method, self.momentum = count, method, momentum
        self.reset()

    def reset(self) -> None:
        """Start over, with no moment."""
        self.taken = 0
        self.gram: Tensor | None = None
        self._moments: list[list[Tensor | None]] = [[] for _ in range(self.count)]
        self._factors = torch.zeros(self.count, dtype=torch.float64)  # of the moments, in M of the step before

    @property
    def turn(self) -> int:
        """The term whose gradient the next step takes."""
        return self.taken % self.count

    def step(self, gradient: Sequence[Tensor | None], adam: bool = True) -> list[Tensor | None]:
        """Take the gradient of the term whose turn it is.

        Args:
            gradient: of that term, a tensor, or None for zero, per parameter; the same parameters in every step.
            adam: whether the optimizer underneath is Adam or AdamW with beta1 = `momentum`; else plain SGD.

        Returns:
            What to give to the optimizer, a tensor or None per parameter.
        """
        k, beta = self.turn, self.momentum
        earlier = self._moments[k] or [None] * len(gradient)
        if len(earlier) != len(gradient):
            raise ValueError(f"the moments are of {len(earlier)} parameters, but {len(gradient)} gradients were given")
        self._moments[k] = [_averaged(moment, g, beta) for moment, g in zip(earlier, gradient, strict=True)]
        self.taken += 1
        combinations = self.taken - self.count + 1
        if combinations < 1:
            return [None] * len(gradient)
        times = torch.tensor([(self.taken - i + self.count - 1) // self.count for i in range(self.count)])
        correction = 1 / (1 - beta ** times.double())
        self.gram = gram_of(self._moments) * correction * correction[:, None]
        factors = coefficients(self.gram, self.method) * correction
        if not adam:
            return combined(self._moments, factors)
        factors = factors * (1 - beta**combinations)
        # M' in terms of the moments as they are now: beta times the earlier m_k is m_k less (1 - beta) g_k.
        carried = beta * self._factors
        carried[k] = self._factors[k]
        weights = torch.cat([(factors - carried) / (1 - beta), self._factors[k : k + 1]])
        self._factors = factors
        return combined([*self._moments, gradient], weights)

    def state_dict(self, names: Sequence[str]) -> dict[str, Tensor]:
        """What a resumed run needs, as tensors by name.

        Args:
            names: of the parameters, in the order in which their gradients are given.
        """
        moments = {
            f"{number}.{name}": moment
            for number, moments in enumerate(self._moments)
            for name, moment in zip(names, moments or [None] * len(names), strict=True)
            if moment is not None
        }
        return {"taken": torch.tensor(self.taken), "factors": self._factors, **moments}

    def load_state_dict(self, tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
        """Read `state_dict` back.

        Args:
            parameters: by name, in order; the moments go to their devices.

        Raises:
            ValueError: if the tensors are of other parameters or of another number of terms.
        """
        known = {"taken", "factors", *(f"{i}.{name}" for i in range(self.count) for name in parameters)}
        if len(tensors["factors"]) != self.count or (strangers := sorted(set(tensors) - known)):
            found = f"{len(tensors['factors'])} terms" if len(tensors["factors"]) != self.count else strangers[0]
            raise ValueError(f"the moments saved do not belong to these {self.count} terms and parameters: {found}")
        self.reset()
        self.taken = int(tensors["taken"])
        self._factors = tensors["factors"].cpu().clone()
        for number in range(min(self.taken, self.count)):
            saved = [(tensors.get(f"{number}.{name}"), parameter) for name, parameter in parameters.items()]
            self._moments[number] = [None if moment is None else moment.to(p.device).clone() for moment, p in saved]


def _averaged(moment: Tensor | None, gradient: Tensor | None, beta: float) -> Tensor | None:
    """beta moment + (1 - beta) gradient, None for zero."""
    if gradient is None:
        return None if moment is None else beta * moment
    new = (1 - beta) * gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    return new if moment is None else beta * moment + new


@register("conflict_free")
class ConflictFree(Wrapper):
    """A sum of losses whose terms' gradients are combined without conflict in place of being added up.

    loss = sum_i w_i loss_i;  gradient = sum_i c_i w_i grad loss_i, c as `coefficients` has it

    Args:
        loss: a sum of at least two losses. Their weights scale the gradients, and with them how long the step is;
            for "config" the direction does not depend on them.
        method: "config" (the same angle with every term), "pcgrad" (projections), "balance" (equal lengths).
        momentum: None computes every term's gradient in every step. A number, 0.9 in the paper, computes one term's a
            step, in turn, and combines moving averages of them that forget at this rate: `TermMoments`. The optimizer
            must be Adam or AdamW with this beta1, or plain SGD.

    Needs: what its terms need. It must be the outermost loss. Without momentum it costs one backward pass a term and
        one copy of the trained parameters' gradients a term; with it one backward pass in all, and a float32 moment a
        term and trained parameter. The trainer logs the cosine between every two terms, or their moments, as
        `conflict/...`.
    Limits: terms with one gradient direction give "config" and "pcgrad" the plain sum; so do terms at right angles and
        of equal length to "config", and all at right angles to "pcgrad". Gradients that never change give the same
        direction with momentum as without.
    Reference: Liu et al. 2024, arXiv 2408.11104, as tum-pbs/ConFIG (equal weights, projected length; momentum as in
        algorithm 1); Yu et al. 2020, arXiv 2001.06782.
    """

    formula = "sum_i w_i loss_i, its terms' gradients combined without conflict"
    paper = "2408.11104"
    outermost = True

    def __init__(self, loss: Loss, method: Method = "config", momentum: float | None = None):
        super().__init__(loss)
        if not isinstance(loss, WeightedSum) or len(list(loss.terms())) < 2:
            raise ValueError(f"loss must be a sum of two losses or more, so that there is a conflict, got {loss}")
        if method not in ("config", "pcgrad", "balance"):
            raise ValueError(f"method must be 'config', 'pcgrad' or 'balance', got {method!r}")
        self.method = method
        self.momentum = None if momentum is None else non_negative("momentum", momentum, below=1.0)
        self.moments = self.new_moments()

    def new_moments(self) -> TermMoments | None:
        """What momentum keeps between steps, empty; None without momentum. `backward` uses the loss's `moments`."""
        return None if self.momentum is None else TermMoments(len(self.labels), self.method, self.momentum)

    @property
    def labels(self) -> list[str]:
        """What the terms are called in logs."""
        return [label for _, label, _ in self.loss.terms()]

    def per_example(self, batch: PreferenceBatch) -> Tensor:
        return self.loss.per_example(batch)

    def forward(self, batch: PreferenceBatch) -> LossOutput:
        output: LossOutput = self.loss(batch)
        return output

    def backward(self, batch: PreferenceBatch, parameters: Iterable[Tensor], adam: bool = True) -> LossOutput:
        """Score a batch and add the combined gradient to `.grad` of the parameters: a loop's loss and `backward()`.

        With momentum each call is a step of its own, so a batch cannot be accumulated from several calls, and the
        first calls, one fewer than there are terms, leave `.grad` as it is.

        Args:
            batch: with gradient, as a loss is called with.
            parameters: what is trained; with momentum the same in every call.
            adam: with momentum, whether the optimizer is Adam or AdamW with beta1 = `momentum`, or else plain SGD.
        """
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        output: LossOutput = self(batch)
        if self.moments is None:
            gradients = [_gradient(term, trained, keep=True) for term in output.terms if term.requires_grad]
            made = combined(gradients, coefficients(gram_of(gradients), self.method))
        else:
            made = self.moments.step(_gradient(output.terms[self.moments.turn], trained), adam)
        for parameter, gradient in zip(trained, made, strict=True):
            if gradient is not None:
                gradient = gradient.to(parameter.dtype)
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        return output


def _gradient(term: Tensor, trained: list[Tensor], keep: bool = False) -> Sequence[Tensor | None]:
    if not term.requires_grad:
        return [None] * len(trained)
    return torch.autograd.grad(term, trained, retain_graph=keep, allow_unused=True)
