"""The logic of preference losses (2412.17696): structures, their order, what the less demanding ones leave open."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from prefopt.logic import named
from prefopt.logic.lattice import every_structure
from prefopt.losses import Loss, PreferenceBatch, Scores, parse
from prefopt.reproduction.experiments.outcome import Outcome, Picture
from prefopt.reproduction.experiments.tables import curve, descend, numbers, tabular_pairs


def pairs(points: int) -> PreferenceBatch:
    """Pairs of one token with random probabilities, float64."""
    draw = torch.Generator().manual_seed(0)
    one = torch.ones(points, dtype=torch.long)
    w, l = (torch.rand(points, generator=draw, dtype=torch.float64) * 0.98 + 0.01 for _ in "wl")  # noqa: E741
    return PreferenceBatch(Scores(w.log(), one), Scores(l.log(), one))


def identities(points: int = 4000) -> Outcome:
    batch = pairs(points)
    known = {"CE": "sft(nll='mean')", "CEUnl": "asft", "CPO": "cpo(beta=1.0)", "ORPO": "orpo"}
    gaps = [
        float((named(name).loss().per_example(batch) - parse(text).per_example(batch)).abs().max())
        for name, text in known.items()
    ]
    return Outcome(
        "known-formulas",
        f"largest difference at {points} random pairs: "
        + "; ".join(f"{name} {gap:.0e}" for name, gap in zip(known, gaps, strict=True)),
        numbers={"difference": [max(gaps)]},
    )


def order(points: int = 4000) -> Outcome:
    batch = pairs(points)
    structures = [structure for structure in every_structure() if not structure.trivial]
    values = {structure: structure.loss().per_example(batch) for structure in structures}
    ordered = [(a, b) for a, b in itertools.permutations(structures, 2) if a.at_least_as_demanding_as(b)]
    broken = sum(bool((values[a] < values[b] - 1e-12).any()) for a, b in ordered)
    return Outcome(
        "order",
        f"{len(ordered)} ordered pairs among {len(structures)} structures at {points} random pairs: {broken} broken",
        numbers={"broken": [float(broken)]},
    )


def spare_arms(steps: int = 4000) -> Outcome:
    """A bandit with six responses, one chosen, one rejected, four spare; all start alike."""
    start = torch.zeros(6, dtype=torch.float64)
    chosen, rejected = torch.tensor([0]), torch.tensor([1])
    reached, lines = {}, {}
    for name in ("unCPO", "cCPO", "CEUnl"):
        loss = named(name).loss()

        def objective(logits: Tensor, loss: Loss = loss) -> Tensor:
            logps = torch.log_softmax(logits, -1)
            value: Tensor = loss(tabular_pairs(logps, logps.detach(), chosen, rejected)).loss
            return value

        path = torch.softmax(descend(objective, start, lr=0.5, steps=steps), -1)
        reached[name], lines[name] = path[-1], curve(path[:, 0])
    likelihoods = [float(probabilities[0]) for probabilities in reached.values()]
    return Outcome(
        "spare-responses",
        f"P(chosen) after {steps} steps: "
        + "; ".join(f"{name} {likelihood:.3f}" for name, likelihood in zip(reached, likelihoods, strict=True))
        + f"; P(rejected): {numbers([float(p[1]) for p in reached.values()], '.1e')}",
        likelihoods == sorted(likelihoods) and likelihoods[1] - likelihoods[0] > 1e-3,
        "six responses with equal start, gradient descent at 0.5",
        picture=Picture("probability of the chosen response", "step", "probability", lines, log="x"),
    )
