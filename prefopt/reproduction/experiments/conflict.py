"""Sums without conflict (ConFIG 2408.11104, PCGrad 2001.06782): bowls whose sum forgets one of them."""

from __future__ import annotations

import torch
from torch import Tensor

from prefopt.losses.conflict import coefficients, combined, gram_of
from prefopt.reproduction.experiments.outcome import Outcome
from prefopt.reproduction.experiments.tables import numbers

RATE, STEPS = 0.002, 20


def bowls(x: Tensor) -> list[Tensor]:
    """A steep bowl in the first coordinate and a flat one in both; both are at their lowest at no common point."""
    return [50 * x[0] ** 2, ((x - torch.tensor([1.0, 2.0], dtype=x.dtype)) ** 2).sum() / 2]


def descend(method: str | None) -> Tensor:
    """(STEPS + 1, 2) values of the two bowls on the way down; the plain sum without a method."""
    x = torch.tensor([0.5, 3.0], dtype=torch.float64)
    values = []
    for _ in range(STEPS + 1):
        x.requires_grad_()
        terms = bowls(x)
        values.append(torch.stack(terms).detach())
        gradients = [list(torch.autograd.grad(term, [x])) for term in terms]
        weights = torch.ones(2) if method is None else coefficients(gram_of(gradients), method)  # type: ignore[arg-type]
        (step,) = combined(gradients, weights)
        assert step is not None
        x = (x - RATE * step).detach()
    return torch.stack(values)


def bowls_apart() -> list[Outcome]:
    paths = {name: descend(name) for name in ("config", "pcgrad")}
    plain = descend(None)
    lowered = {name: bool((path[-1] < path[0]).all()) for name, path in paths.items()}
    always = bool((paths["config"].diff(dim=0) < 0).all())
    ends = "; ".join(f"{name} {numbers(path[-1])}" for name, path in {"sum": plain, **paths}.items())
    settings = f"minima that exclude one another, curvatures 100 and 1, {STEPS} steps of {RATE}"
    return [
        Outcome(
            "plain-sum-forgets",
            f"start {numbers(plain[0])}; end: {ends}",
            bool(plain[-1, 1] > plain[0, 1]) and all(lowered.values()),
            settings,
        ),
        Outcome(
            "every-step-lowers-all",
            f"largest change of a term in a step: {float(paths['config'].diff(dim=0).max()):.2g}",
            always,
            settings,
        ),
    ]
