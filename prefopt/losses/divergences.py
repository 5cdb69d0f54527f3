"""Divergences between the policy's and the reference's next-token distributions, and their slopes.

Lives here: the divergences of DPO-Kernels by name, as functions of (..., V) log-probabilities. The scorer computes
them chunk by chunk and pulls gradients back with `slope`; in your own loop, `divergence` is
differentiable. Imports torch alone. p is the policy's distribution, r the reference's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from prefopt.losses.errors import LossError

DivergenceName = Literal["kl", "js", "hellinger", "renyi", "bhattacharyya", "wasserstein", "f"]
Generator = Literal["forward_kl", "total_variation", "triangular"]
NAMES: tuple[str, ...] = get_args(DivergenceName)
GENERATORS: tuple[str, ...] = get_args(Generator)
"""The generators of "f": f(t) = -log t, |t - 1| / 2 and (t - 1)^2 / (2 (t + 1))."""

_TEXT = re.compile(r"(?P<name>[a-z]+)(?:\((?P<argument>[^()]+)\))?")
_SAME = 32.0
"""Cumulated probabilities that differ by fewer units of rounding than this count as equal."""


@dataclass(frozen=True)
class Divergence:
    """Which divergence, with its parameter.

    Attributes:
        name: one of `NAMES`.
        order: of "renyi"; positive, 1 is KL.
        f: generator of "f", one of `GENERATORS`.
    """

    name: str
    order: float | None = None
    f: str | None = None

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise LossError(f"divergence must be one of {', '.join(NAMES)}, got {self.name!r}")
        if (self.order is None) == (self.name == "renyi"):
            needed = "needs an order" if self.name == "renyi" else "takes no order"
            raise LossError(f"order: the divergence {self.name!r} {needed}, got {self.order!r}")
        if self.order is not None and not (math.isfinite(self.order) and self.order > 0):
            raise LossError(f"order must be a positive finite number, got {self.order!r}")
        if (self.f is None) == (self.name == "f"):
            needed = f"needs one of {', '.join(GENERATORS)}" if self.name == "f" else "takes none"
            raise LossError(f"f: the divergence {self.name!r} {needed}, got {self.f!r}")
        if self.f is not None and self.f not in GENERATORS:
            raise LossError(f"f must be one of {', '.join(GENERATORS)}, got {self.f!r}")

    @staticmethod
    def choices() -> dict[str, Callable[..., Divergence]]:
        """What a loss expression can write for an argument of this type, by name."""
        return {name: _without_parameters(name) for name in NAMES} | {"renyi": renyi, "f": f}

    def __repr__(self) -> str:
        argument = "" if self.order is None else f"order={self.order!r}"
        return f"{self.name}({argument if self.f is None else f'generator={self.f!r}'})"

    def __str__(self) -> str:
        argument = self.f if self.order is None else repr(float(self.order))
        return self.name if argument is None else f"{self.name}({argument})"


def renyi(order: float = 0.9) -> Divergence:
    """The Renyi divergence; order 1 is KL, 0.5 twice Bhattacharyya."""
    return Divergence("renyi", order=order)


def f(generator: Generator = "forward_kl") -> Divergence:
    """The f-divergence of a generator."""
    return Divergence("f", f=generator)


def _without_parameters(name: str) -> Callable[[], Divergence]:
    return lambda: Divergence(name)


def named(text: str) -> Divergence:
    """The divergence from its text form: `kl`, `renyi(0.9)`, `f(triangular)`.

    Raises:
        ValueError: if the text names no divergence.
    """
    found = _TEXT.fullmatch(text)
    name, argument = (text, None) if found is None else found.group("name", "argument")
    if name != "renyi":
        return Divergence(name, f=argument)
    try:
        order = None if argument is None else float(argument)
    except ValueError:
        raise LossError(f"order must be a positive finite number, got {argument!r}") from None
    return Divergence(name, order=order)


def divergence(kind: Divergence, log_p: Tensor, log_r: Tensor) -> Tensor:
    """(...) D(p || r) of (..., V) log-probabilities, in nats if it has a unit, differentiable in both.

    kl             sum p log(p/r)
    js             (KL(p||m) + KL(r||m)) / 2, m = (p + r)/2; at most log 2
    hellinger      H^2 = 1 - sum sqrt(p r); at most 1. The square, because H has no slope at p = r.
    renyi          log(sum p^a r^(1-a)) / (a - 1)
    bhattacharyya  -log sum sqrt(p r)
    wasserstein    the cost of moving p onto r along a line on which tokens stand in the order of the reference's
                   probability, the k-th likeliest at log k: sum_k |P_k - R_k| log((k+1)/k), P and R cumulated. Where
                   probabilities fall with rank as in Zipf's law, that is distance in surprisal. No two tokens
                   share a place, so it is 0 only for equal distributions. Its slope at 0 is set to 0.
    f              sum r f(p/r) with f of `GENERATORS`: KL(r||p), total variation, or half of sum (p-r)^2 / (p+r)
    """
    match kind.name:
        case "kl":
            return _kl(log_p, log_r)
        case "js":
            middle = torch.logaddexp(log_p, log_r) - math.log(2)
            return (_kl(log_p, middle) + _kl(log_r, middle)) / 2
        case "hellinger":
            # With expm1, because 1 - sum sqrt(pr) loses all digits where the two are close.
            return -torch.expm1(_overlap(log_p, log_r, 0.5))
        case "bhattacharyya":
            return -_overlap(log_p, log_r, 0.5)
        case "renyi":
            assert kind.order is not None
            return _kl(log_p, log_r) if kind.order == 1 else _overlap(log_p, log_r, kind.order) / (kind.order - 1)
        case "wasserstein":
            gaps, spacing, _ = _cumulated(log_p, log_r)
            return (gaps.abs() * spacing).sum(-1)
    if kind.f == "forward_kl":
        return _kl(log_r, log_p)
    gap, total = log_p.exp() - log_r.exp(), log_p.exp() + log_r.exp()
    if kind.f == "total_variation":
        return gap.abs().sum(-1) / 2
    return (gap * (gap / total.clamp(min=torch.finfo(total.dtype).tiny))).sum(-1) / 2


def slope(kind: Divergence, log_p: Tensor, log_r: Tensor) -> Tensor:
    """(..., V) derivative of D(p || r) with respect to the logits of p, which sums to 0 over the vocabulary."""
    p, r = log_p.exp(), log_r.exp()
    match kind.name:
        case "kl":
            raw = p * _gap(log_p, log_r)
        case "js":
            raw = p * _gap(log_p, torch.logaddexp(log_p, log_r) - math.log(2)) / 2
        case "hellinger":
            raw = -((log_p + log_r) / 2).exp() / 2
        case "bhattacharyya":
            raw = -torch.softmax(_weighted(log_p, log_r, 0.5), -1) / 2
        case "renyi":
            assert kind.order is not None
            if kind.order == 1:
                raw = p * _gap(log_p, log_r)
            else:
                raw = torch.softmax(_weighted(log_p, log_r, kind.order), -1) * (kind.order / (kind.order - 1))
        case "wasserstein":
            gaps, spacing, order = _cumulated(log_p, log_r)
            steps = gaps.sign() * spacing
            # What a token's mass adds at its own place and at every later one.
            onwards = steps.flip(-1).cumsum(-1).flip(-1)
            raw = p * torch.zeros_like(p).scatter(-1, order, onwards)
        case _:
            raw = _slope_of_f(str(kind.f), p, r)
    return raw - p * raw.sum(-1, keepdim=True)


def _slope_of_f(f: str, p: Tensor, r: Tensor) -> Tensor:
    if f == "forward_kl":
        return -r
    if f == "total_variation":
        return p * (p - r).sign() / 2
    share = (p - r) / (p + r).clamp(min=torch.finfo(p.dtype).tiny)
    # d/dp of (p - r)^2 / (p + r) is t (2 - t) with t = (p - r) / (p + r).
    return p * share * (2 - share) / 2


def _gap(log_p: Tensor, log_r: Tensor) -> Tensor:
    """log p - log r, 0 where p is 0."""
    return torch.where(log_p == -torch.inf, torch.zeros_like(log_p), log_p - log_r)


def _kl(log_p: Tensor, log_r: Tensor) -> Tensor:
    return (log_p.exp() * _gap(log_p, log_r)).sum(-1)


def _weighted(log_p: Tensor, log_r: Tensor, order: float) -> Tensor:
    """log(p^a r^(1-a)), -inf where p is 0."""
    impossible = log_p == -torch.inf
    terms = order * log_p + (1 - order) * log_r
    return torch.where(impossible, torch.full_like(terms, -torch.inf), terms)


def _overlap(log_p: Tensor, log_r: Tensor, order: float) -> Tensor:
    """(...) log sum p^a r^(1-a), 0 where the distributions are equal."""
    # For close distributions the sum is 1 up to rounding over the vocabulary. So sum the difference from 1 instead,
    # sum p ((r/p)^(1-a) - 1).
    tilt = -(1 - order) * _gap(log_p, log_r)
    near = tilt < 1
    small = log_p.exp() * torch.expm1(torch.where(near, tilt, torch.zeros_like(tilt)))
    large = (log_p + torch.where(near, torch.zeros_like(tilt), tilt)).exp() - log_p.exp()
    missing = torch.where(near, small, large).sum(-1)
    close = missing > -0.5
    exact = torch.log1p(torch.where(close, missing, torch.zeros_like(missing)))
    return torch.where(close, exact, torch.logsumexp(_weighted(log_p, log_r, order), -1))


def _cumulated(log_p: Tensor, log_r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(..., V) P_k - R_k of cumulated probabilities, (V,) distance to the next place, (..., V) order of the tokens."""
    order = log_r.detach().argsort(dim=-1, descending=True, stable=True)
    # The difference is cumulated, not differenced: two sums close to 1 would lose it.
    gaps = (log_p.exp() - log_r.exp()).gather(-1, order).cumsum(-1)
    gaps = torch.where(gaps.abs() <= _SAME * torch.finfo(gaps.dtype).eps, torch.zeros_like(gaps), gaps)
    ranks = torch.arange(1, log_p.shape[-1] + 1, dtype=gaps.dtype, device=gaps.device)
    # There is no place after the last one, and both sums are 1.
    spacing = torch.log1p(1 / ranks)
    spacing[-1] = 0
    return gaps, spacing, order
