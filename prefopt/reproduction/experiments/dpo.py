"""DPO (2305.18290) and the hinge: the optimum of a table, a pair without a minimum, and what smoothing does to it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from prefopt.losses import DPO, Hinge, Loss
from prefopt.reproduction.experiments.outcome import Outcome
from prefopt.reproduction.experiments.tables import (
    bradley_terry_optimum,
    descend,
    numbers,
    tabular_pairs,
    total_variation,
)

UNIFORM = torch.full((2,), -math.log(2), dtype=torch.float64)


def optimum() -> Outcome:
    generator = torch.Generator().manual_seed(0)
    rewards, reference = torch.randn((2, 6), generator=generator, dtype=torch.float64)
    reference = torch.log_softmax(reference, -1)
    distances = []
    for beta in (0.1, 0.5, 1.0):
        trained = bradley_terry_optimum(DPO(beta), rewards, reference)
        distances.append(total_variation(trained, torch.log_softmax(reference + rewards / beta, -1)))
    return Outcome(
        "optimum",
        f"total variation at beta 0.1, 0.5, 1: {numbers(distances)}",
        max(distances) < 1e-3,
        "6 responses, rewards and reference logits N(0, 1)",
    )


def margins_of_one_pair(loss: Loss, lr: float, steps: int) -> Tensor:
    """(steps + 1,) margin d of gradient descent on a single pair, both responses free."""
    first, second = torch.tensor([0]), torch.tensor([1])

    def objective(logits: Tensor) -> Tensor:
        value: Tensor = loss(tabular_pairs(torch.log_softmax(logits, -1), UNIFORM, first, second)).loss
        return value

    path = descend(objective, torch.zeros(2, dtype=torch.float64), lr, steps)
    return path[:, 0] - path[:, 1]


def growth(steps: int = 8000) -> list[Outcome]:
    d = margins_of_one_pair(DPO(1.0), lr=1.0, steps=steps)
    times = [steps // 16, steps // 8, steps // 4, steps // 2]
    grows = bool((d[1:] > d[:-1]).all())
    doublings = [float(d[2 * t] - d[t]) for t in times]
    smoothed = margins_of_one_pair(DPO(1.0, label_smoothing=0.1), lr=1.0, steps=steps // 4)
    hinge = margins_of_one_pair(Hinge(0.5), lr=0.1, steps=steps // 4)
    return [
        Outcome(
            "no-minimum",
            f"d at {times}: {numbers(d[times])}; growth per doubling {numbers(doublings, '.4f')} (log 2 = 0.6931)",
            grows and abs(doublings[-1] - math.log(2)) < 0.01,
        ),
        Outcome(
            "smoothed-minimum",
            f"e = 0.1: d = {float(smoothed[-1]):.6f}, log 9 = {math.log(9):.6f}",
            abs(float(smoothed[-1]) - math.log(9)) < 1e-6,
        ),
        Outcome(
            "hinge-stops",
            f"beta 0.5: d = {float(hinge[-1]):.3f}, 1 / beta = 2, a step moves d by 0.1",
            2.0 <= float(hinge[-1]) <= 2.1 + 1e-9,
        ),
    ]
