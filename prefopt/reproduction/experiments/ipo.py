"""IPO (2310.12036): a finite answer to a certain preference, where DPO has none, and what its two forms share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from prefopt.losses import DPO, IPO, Loss, PreferenceBatch, Scores
from prefopt.reproduction.experiments.outcome import Outcome
from prefopt.reproduction.experiments.tables import descend, minimise, numbers, tabular_pairs

TAUS = (0.1, 0.5, 1.0)
BOTH = (torch.tensor([0, 1]), torch.tensor([1, 0]))


def two_arms(loss: Loss, p: float) -> float:
    """log pi(y1) / pi(y2) at the minimum, where y1 beats y2 with probability p and the reference is uniform."""
    weight = torch.tensor([p, 1 - p], dtype=torch.float64)
    reference = torch.full((2,), -math.log(2), dtype=torch.float64)

    def objective(logits: Tensor) -> Tensor:
        value: Tensor = loss(tabular_pairs(torch.log_softmax(logits, -1), reference, *BOTH, weight)).loss
        return value

    logits = minimise(objective, torch.zeros(2, dtype=torch.float64))
    return float(logits[0] - logits[1])


def population_minimiser() -> list[Outcome]:
    settings = [(tau, p) for tau in TAUS for p in (0.6, 0.75, 0.9, 1.0)]
    ipo = max(abs(two_arms(IPO(tau, average=False), p) - (2 * p - 1) / (2 * tau)) for tau, p in settings)
    dpo = max(abs(two_arms(DPO(b), p) - math.log(p / (1 - p)) / b) for b, p in settings if p < 1)

    def certain(logits: Tensor) -> Tensor:
        reference = torch.full((2,), -math.log(2), dtype=torch.float64)
        pairs = tabular_pairs(torch.log_softmax(logits, -1), reference, torch.tensor([0]), torch.tensor([1]))
        value: Tensor = DPO(1.0)(pairs).loss
        return value

    path = descend(certain, torch.zeros(2, dtype=torch.float64), lr=1.0, steps=4000)
    d = (path[:, 0] - path[:, 1])[[250, 1000, 4000]]
    return [
        Outcome(
            "minimiser",
            f"largest error over tau 0.1, 0.5, 1 and p 0.6 to 1: IPO {ipo:.2g}; DPO, p < 1: {dpo:.2g}",
            ipo < 1e-6 and dpo < 1e-4,
        ),
        Outcome(
            "dpo-grows",
            f"beta 1, d after 250, 1000, 4000 steps: {numbers(d)}",
            bool(d[0] < d[1] < d[2]),
        ),
    ]


def bandit(loss: Loss, steps: int, seeds: int = 10) -> Tensor:
    """(seeds, 3) policies after training on y1 > y2 > y3, uniform reference, Adam, lr 0.01, mini-batches of 9."""
    generator = torch.Generator().manual_seed(0)
    winners, losers = torch.tensor([0, 0, 1]), torch.tensor([1, 2, 2])
    logits = torch.zeros(seeds, 3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.01)
    reference = torch.full((seeds * 3,), -math.log(3), dtype=torch.float64)
    offsets = 3 * torch.arange(seeds).unsqueeze(1)
    for _ in range(steps):
        drawn = torch.randint(3, (seeds, 9), generator=generator)
        pairs = ((side[drawn] + offsets).flatten() for side in (winners, losers))
        optimizer.zero_grad()
        # Seeds share no parameter and Adam ignores the scale of a gradient, so one loss trains them all apart.
        loss(tabular_pairs(torch.log_softmax(logits, -1).flatten(), reference, *pairs)).loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return torch.softmax(logits.detach(), -1)


def three_arms(steps: int = 18000) -> list[Outcome]:
    ipo = [bandit(IPO(tau), steps)[:, 0] for tau in TAUS]
    dpo = [bandit(DPO(beta), steps)[:, 0] for beta in TAUS]
    # Least squares: log-ratios 2/3, 0, -2/3 times the target 1 / (2 tau).
    exact = [1 / (1 + math.exp(-1 / (3 * tau)) + math.exp(-2 / (3 * tau))) for tau in TAUS]
    means = [float(values.mean()) for values in ipo]
    return [
        Outcome(
            "dpo-certain",
            f"smallest pi(y1) of 10 seeds at beta 0.1, 0.5, 1: {numbers([float(v.min()) for v in dpo], '.6f')}",
            all(float(values.min()) > 0.99 for values in dpo),
            "Adam, lr 0.01, batches of 9, 18000 steps (the paper's, from memory)",
        ),
        Outcome(
            "ipo-regularised",
            f"mean pi(y1) at tau 0.1, 0.5, 1: {numbers(means, '.4f')}; least squares: {numbers(exact, '.4f')}",
            means[0] > means[1] > means[2] > 1 / 3
            and all(abs(a - b) < 0.02 for a, b in zip(means, exact, strict=True)),
        ),
    ]


def two_forms() -> list[Outcome]:
    generator = torch.Generator().manual_seed(1)
    logps = (10 * torch.randn(4, 64, generator=generator, dtype=torch.float64)).requires_grad_()
    n = 7
    lengths = torch.full((64,), n)
    batch = PreferenceBatch(
        chosen=Scores(logps=logps[0], lengths=lengths, ref_logps=logps[1]),
        rejected=Scores(logps=logps[2], lengths=lengths, ref_logps=logps[3]),
    )
    averaged = IPO(0.3).per_example(batch)
    summed = IPO(0.3 / n, average=False).per_example(batch) / n**2
    value = float(((averaged - summed) / summed).detach().abs().max())
    slopes = []
    for d in (0.5, 1.5):  # the target of tau = 0.5 is d = 1
        p = torch.tensor([d], dtype=torch.float64, requires_grad=True)
        one, zero = torch.ones(1, dtype=torch.long), torch.zeros(1, dtype=torch.float64)
        pair = PreferenceBatch(Scores(p, one, zero), Scores(zero, one, zero))
        slopes.append(float(torch.autograd.grad(IPO(0.5)(pair).loss, p)[0]))
    return [
        Outcome(
            "two-forms",
            f"largest relative difference over 64 pairs, n = 7: {value:.1g}",
            value < 1e-9,
        ),
        Outcome(
            "pushed-back",
            f"slope in log pi(y_w) below and above the target: {numbers(slopes)}",
            slopes[0] < 0 < slopes[1],
        ),
    ]
