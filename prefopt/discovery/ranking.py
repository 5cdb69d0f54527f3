"""How candidates compare: by Pareto layers of gold reward, KL and length over all betas, not by one number.

A candidate's betas are points of a curve of reward, and of length, over KL. Three numbers of a candidate make the
layers: the reward at equal KL, the change of length at equal KL, and the value at the worst beta. The last one is what
DiscoPOP lacked, which chose its winner at one beta; at a smaller one that winner collapses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from prefopt.discovery.archive import Result
from prefopt.evaluation.arrays import Floats
from prefopt.report.pareto import dominated

KL_BUDGETS = (0.25, 0.5, 1.0, 1.5)
"""Nats, at which losses are compared at equal KL."""


@dataclass(frozen=True)
class Point:
    """What a candidate scored at one beta, means over seeds.

    Attributes:
        beta: of the loss.
        reward: gold reward; higher is better.
        kl: from the reference, in nats; lower is better.
        length: distance between the answers' mean length and the reference's; lower is better.
        value: as in `toy.Outcome`.
    """

    beta: float
    reward: float
    kl: float
    length: float
    value: float


@dataclass(frozen=True)
class Score:
    """What a candidate scored at one level.

    Attributes:
        points: one for each beta.
        value: at the worst beta.
        reward: at the worst beta.
        reward_at_kl: mean over `KL_BUDGETS` of the reward that some beta reaches within the budget.
        length_at_kl: the same of the change of length.
    """

    points: tuple[Point, ...]
    value: float
    reward: float
    reward_at_kl: float
    length_at_kl: float

    @classmethod
    def of(cls, points: Sequence[Point]) -> Score:
        kl, reward, length = (
            np.array(column) for column in zip(*((p.kl, p.reward, p.length) for p in points), strict=True)
        )
        return cls(
            tuple(points),
            min(point.value for point in points),
            min(point.reward for point in points),
            reward_at_equal_kl(kl, reward),
            -reward_at_equal_kl(kl, -length, best=False),
        )


def reward_at_equal_kl(kl: Floats, reward: Floats, best: bool = True) -> float:
    """Mean over `KL_BUDGETS` of the reward within the budget.

    Between the points of two betas, and between the reference and the first, the reward is taken as linear in the
    root of KL: such curves are nearly straight there (Gao et al. 2022, arXiv 2210.10760). Linear in KL, a loss whose
    betas lie close together would win.

    Args:
        kl: (B,) at each beta, in nats.
        reward: (B,) at each beta; the reference has 0.
        best: whether a point of less KL counts where it has more reward.
    """
    kl = kl.clip(min=0)  # exact, but for rounding
    order = np.argsort(kl, kind="stable")
    x, y = np.concatenate([[0.0], kl[order]]), np.concatenate([[0.0], reward[order]])
    at = np.interp(np.sqrt(KL_BUDGETS), np.sqrt(x), y)
    if best:
        at = np.maximum(at, [y[x <= budget].max() for budget in KL_BUDGETS])
    return float(at.mean())


def scores(results: Sequence[Result]) -> dict[int, Score]:
    """The score of every candidate of one level, but for those whose training became NaN or infinite."""
    by_candidate: dict[int, dict[float, list[Result]]] = {}
    for result in results:
        by_candidate.setdefault(result.candidate, {}).setdefault(result.beta, []).append(result)
    return {
        number: Score.of([_point(beta, runs) for beta, runs in by_beta.items()])
        for number, by_beta in by_candidate.items()
        if all(run.reward is not None for runs in by_beta.values() for run in runs)
    }


def _point(beta: float, runs: Sequence[Result]) -> Point:
    rows = [(run.reward or 0.0, run.kl or 0.0, run.length or 0.0, run.value or 0.0) for run in runs]
    reward, kl, length, value = (sum(column) / len(rows) for column in zip(*rows, strict=True))
    return Point(beta, reward, kl, abs(length), value)


def layers(scored: Mapping[int, Score]) -> dict[int, int]:
    """The Pareto layer of each candidate: 0 for the frontier, 1 for that of the rest, and so on."""
    numbers = np.array(list(scored), dtype=np.int64)
    points = np.array([(score.value, score.reward_at_kl, -score.length_at_kl) for score in scored.values()])
    layer: dict[int, int] = {}
    depth = 0
    while len(numbers):
        inner = dominated(points)
        layer |= dict.fromkeys(numbers[~inner].tolist(), depth)
        numbers, points, depth = numbers[inner], points[inner], depth + 1
    return layer


def ranking(scored: Mapping[int, Score]) -> list[int]:
    """All candidates, best first: by layer, then by the value at the worst beta."""
    layer = layers(scored)
    return sorted(scored, key=lambda number: (layer[number], -scored[number].value, number))


def frontier(scored: Mapping[int, Score]) -> list[tuple[int, Point]]:
    """The points of reward, KL and length that no other one dominates, with their candidates, by falling reward."""
    named = [(number, point) for number, score in scored.items() for point in score.points]
    behind = dominated([(point.reward, -point.kl, -point.length) for _, point in named])
    front = (pair for pair, is_behind in zip(named, behind, strict=True) if not is_behind)
    return sorted(front, key=lambda pair: -pair[1].reward)
