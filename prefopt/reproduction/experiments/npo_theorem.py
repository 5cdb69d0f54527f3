"""NPO (2404.05868), theorem 2: how far the parameters move in logistic regression on near-orthogonal points."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from prefopt.losses import NPO, GradientAscent, Loss, PreferenceBatch, Scores
from prefopt.reproduction.experiments.npo import r_squared
from prefopt.reproduction.experiments.outcome import Outcome

WIDTH = 64
EVERY = 20
"""Steps between two measurements."""


def points(count: int, seed: int, overlap: float = 0.1) -> tuple[Tensor, Tensor]:
    """(count, WIDTH) near-orthogonal points of length about 1, and (count,) labels of -1 and 1."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64))[0][:count]
    noise = torch.randn(count, WIDTH, generator=generator, dtype=torch.float64) / math.sqrt(WIDTH)
    labels = torch.randint(2, (count,), generator=generator).double() * 2 - 1
    return basis + overlap * noise, labels


def distances(loss: Loss, count: int, eta: float, steps: int, seed: int = 0) -> Tensor:
    """(steps / EVERY,) distance from the start in the norm of X'X; gradient descent on pi = sigmoid(y <x, theta>)."""
    x, y = points(count, seed)
    start = torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64) / 8
    reference, ones = F.logsigmoid(y * (x @ start)), torch.ones(count, dtype=torch.long)
    theta, path = start, []
    for step in range(1, steps + 1):
        theta = theta.detach().requires_grad_()
        value = loss(PreferenceBatch(rejected=Scores(F.logsigmoid(y * (x @ theta)), ones, reference))).loss
        (gradient,) = torch.autograd.grad(value, theta)
        theta = theta.detach() - eta * gradient
        if step % EVERY == 0:
            path.append((x @ (theta - start)).norm())
    return torch.stack(path)


def times(path: Tensor) -> Tensor:
    return torch.arange(1, len(path) + 1, dtype=torch.float64) * EVERY


def fits(path: Tensor) -> tuple[float, float]:
    """R^2 of a line in t and in log t, without the first tenth."""
    late = times(path) > times(path)[-1] / 10
    return r_squared(times(path)[late], path[late]), r_squared(times(path)[late].log(), path[late])


def per_doubling(path: Tensor) -> float:
    """How much further the parameters are after twice as many steps, at the end."""
    return float(path[-1] - path[len(path) // 2 - 1])


def theorem(steps: int = 10000, eta: float = 0.5, counts: tuple[int, ...] = (4, 16)) -> list[Outcome]:
    largest = counts[-1]
    ascent = {n: distances(GradientAscent("sum"), n, eta, steps) for n in counts}
    npo = {n: distances(NPO(1.0), n, eta, steps) for n in counts}
    by_beta = {beta: distances(NPO(beta), largest, eta, steps) for beta in (0.25, 0.5)} | {1.0: npo[largest]}
    r2 = {"GA": fits(ascent[largest]), "NPO (beta 1)": fits(npo[largest])}
    slopes = {n: float(path[-1]) / (eta * steps) * math.sqrt(n) for n, path in ascent.items()}
    rates = {n: per_doubling(path) / math.sqrt(n) / math.log(2) for n, path in npo.items()}
    scaled = {beta: beta * per_doubling(path) / math.sqrt(largest) / math.log(2) for beta, path in by_beta.items()}
    settings = f"d = {WIDTH}, step {eta:g}, {steps} steps; R^2 without the first tenth"
    return [
        Outcome(
            "theorem-growth",
            f"{largest} points; R^2 of a line in t / in log t: "
            + "; ".join(f"{name} {a:.5f} / {b:.5f}" for name, (a, b) in r2.items())
            + f"; distance at the end {float(ascent[largest][-1]):.4g} and {float(npo[largest][-1]):.4g}",
            r2["GA"][0] > r2["GA"][1] and r2["NPO (beta 1)"][1] > r2["NPO (beta 1)"][0],
            settings,
        ),
        Outcome(
            "theorem-ascent-constant",
            "the constant by n_f: " + ", ".join(f"{n}: {value:.3f}" for n, value in slopes.items()),
            max(slopes.values()) < 1.1 * min(slopes.values()),
        ),
        Outcome(
            "theorem-npo-constant",
            "growth with log t over sqrt(n_f), by n_f: "
            + ", ".join(f"{n}: {value:.3f}" for n, value in rates.items()),
            max(rates.values()) < 1.1 * min(rates.values()),
        ),
        Outcome(
            "theorem-beta",
            "beta times the growth with log t over sqrt(n_f), by beta: "
            + ", ".join(f"{beta:g}: {value:.3f}" for beta, value in sorted(scaled.items())),
            all(b < 1.1 * a for a, b in pairwise(sorted(scaled.values()))),
        ),
    ]
