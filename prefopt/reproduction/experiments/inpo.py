"""INPO (2407.00617): rock, paper, scissors. Which last iterates settle, and does the loss find the exact update?"""

from __future__ import annotations

import torch
from torch import Tensor

from prefopt.losses import INPO
from prefopt.reproduction.experiments.outcome import Outcome, Picture
from prefopt.reproduction.experiments.tables import curve, minimise, numbers, tabular_pairs, total_variation

WINS = torch.tensor([[0.5, 1.0, 0.0], [0.0, 0.5, 1.0], [1.0, 0.0, 0.5]], dtype=torch.float64)
"""[i, j]: how often response i beats response j; here 1 beats 2 beats 3 beats 1."""
REFERENCE = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64).log()


def update(previous: Tensor, reference: Tensor, wins: Tensor, eta: float, tau: float) -> Tensor:
    """The exact next iterate: previous^(1 - tau/eta) ref^(tau/eta) exp(P(y beats previous) / eta), normalised."""
    share = tau / eta
    return torch.log_softmax((1 - share) * previous + share * reference + wins @ previous.exp() / eta, -1)


def iterate(eta: float, tau: float, steps: int, wins: Tensor = WINS, reference: Tensor = REFERENCE) -> Tensor:
    """(steps + 1, K) log-probabilities, the reference first."""
    path = [reference]
    for _ in range(steps):
        path.append(update(path[-1], reference, wins, eta, tau))
    return torch.stack(path)


def last_step(path: Tensor) -> float:
    """L1 distance of the last two iterates."""
    return float((path[-1].exp() - path[-2].exp()).abs().sum())


def fit(previous: Tensor, eta: float, tau: float, pairs: tuple[Tensor, Tensor], weight: Tensor | None) -> Tensor:
    loss = INPO(eta, tau)

    def objective(logits: Tensor) -> Tensor:
        logps = torch.log_softmax(logits, -1)
        value: Tensor = loss(tabular_pairs(logps, REFERENCE, *pairs, weight, previous)).loss
        return value

    return torch.log_softmax(minimise(objective, previous, rounds=5), -1)


def population(previous: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """All ordered pairs of two draws from `previous`, with the probability of the pair and of its label."""
    first, second = (grid.flatten() for grid in torch.meshgrid(torch.arange(3), torch.arange(3), indexing="ij"))
    p = previous.exp()
    weight = p[first] * p[second] * WINS[first, second]
    return (first, second), weight / weight.sum()


def sampled(previous: Tensor, count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(previous.exp(), 2 * count, replacement=True, generator=generator).reshape(2, count)
    wins = torch.rand(count, generator=generator, dtype=torch.float64) < WINS[drawn[0], drawn[1]]
    return torch.where(wins, drawn[0], drawn[1]), torch.where(wins, drawn[1], drawn[0])


def convergence(steps: int = 2000) -> list[Outcome]:
    one, closer = iterate(1.0, 0.1, steps), iterate(1.0, 0.05, steps)
    free, jumping = iterate(1.0, 0.0, steps), iterate(0.3, 0.1, steps)
    uniform = torch.full((3,), 1 / 3, dtype=torch.float64).log()
    nash = torch.tensor([0.4321, 0.2303, 0.3376], dtype=torch.float64)
    nearer = torch.tensor([0.3774, 0.2765, 0.3460], dtype=torch.float64)
    return [
        Outcome(
            "converges",
            f"after {steps} iterations {numbers(one[-1].exp(), '.4f')}, last step {last_step(one):.1g}",
            numbers={"last step": [last_step(one)], "error": [float((one[-1].exp() - nash).abs().max())]},
            picture=Picture(
                "smallest probability of rock, paper and scissors",
                "iteration",
                "probability",
                {
                    name: curve(path.exp().amin(1))
                    for name, path in {"tau 0.1": one, "tau 0.05": closer, "tau 0": free}.items()
                },
                log="xy",
            ),
        ),
        Outcome(
            "smaller-tau",
            f"{numbers(closer[-1].exp(), '.4f')}; total variation from it {total_variation(one[-1], uniform):.4f} "
            f"at tau 0.1, {total_variation(closer[-1], uniform):.4f} at 0.05",
            bool(((closer[-1].exp() - nearer).abs() < 1e-4).all())
            and total_variation(closer[-1], uniform) < total_variation(one[-1], uniform),
        ),
        Outcome(
            "tau-zero-cycles",
            f"smallest probability after {steps} iterations {float(free[-1].exp().min()):.1g}",
            numbers={"smallest probability": [float(free[-1].exp().min())]},
        ),
        Outcome(
            "large-step-jumps",
            f"L1 step after {steps} iterations {last_step(jumping):.2f}",
            numbers={"L1 step": [last_step(jumping)]},
        ),
    ]


def loss_finds_update(iterations: int = 25, pairs: int = 100_000) -> list[Outcome]:
    eta, tau, previous, gaps = 1.0, 0.1, REFERENCE, []
    for _ in range(iterations):
        exact = update(previous, REFERENCE, WINS, eta, tau)
        fitted = fit(previous, eta, tau, *population(previous))
        gaps.append(total_variation(fitted, exact))
        previous = fitted
    noisy = total_variation(
        fit(previous, eta, tau, sampled(previous, pairs), None), update(previous, REFERENCE, WINS, eta, tau)
    )
    return [
        Outcome(
            "exact-update",
            f"largest total variation over {iterations} iterations {max(gaps):.1g}",
            numbers={"total variation": [max(gaps)]},
        ),
        Outcome(
            "sampled-update",
            f"{pairs} pairs: {noisy:.4f}",
            numbers={"total variation": [noisy]},
        ),
    ]


def bradley_terry() -> Outcome:
    rewards = torch.tensor([0.5, -1.0, 0.2], dtype=torch.float64)
    wins = torch.sigmoid(rewards.unsqueeze(1) - rewards.unsqueeze(0))
    uniform = torch.full((3,), 1 / 3, dtype=torch.float64).log()
    found = iterate(1.0, 0.1, 2000, wins, uniform)[-1]
    return Outcome(
        "bradley-terry",
        f"rewards {numbers(rewards)}: policy {numbers(found.exp(), '.4f')}",
        found.argsort().tolist() == rewards.argsort().tolist(),
        "uniform reference, tau 0.1, eta 1",
    )
