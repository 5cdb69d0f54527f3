"""What is left of a search's candidates on problems that it did not see, beside DPO, with intervals over seeds.

Candidates are chosen by the search's own toy, before this; nothing here chooses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from prefopt.discovery.grammar import Node
from prefopt.discovery.levels import HELD_OUT, ToyLevel, run_level
from prefopt.discovery.ranking import reward_at_equal_kl
from prefopt.evaluation.arrays import Floats
from prefopt.evaluation.intervals import Interval, bootstrap

_REWARD, _KL, _LENGTH, _VALUE = range(4)
_RESAMPLES = 1000


def _value(rows: Floats) -> float:
    return float(rows[..., _VALUE].mean(0).min())


def _reward(rows: Floats) -> float:
    return float(rows[..., _REWARD].mean(0).min())


def _kl(rows: Floats) -> float:
    return float(rows[..., _KL].mean())


def _length(rows: Floats) -> float:
    return float(np.abs(rows[..., _LENGTH].mean(0)).mean())


def _reward_at_kl(rows: Floats) -> float:
    points = rows.mean(0)
    return reward_at_equal_kl(points[:, _KL], points[:, _REWARD])


MEASURES: dict[str, Callable[[Floats], float]] = {
    "value": _value, "reward": _reward, "reward_at_kl": _reward_at_kl, "kl": _kl, "length": _length,
}  # fmt: skip
"""Functions of (S, B, 4) rows: seeds, betas, and reward, KL, length and value. Reward and value are at the worst beta.
"""


@dataclass(frozen=True)
class HeldOut:
    """A loss on held-out problems of one kind.

    Attributes:
        name: of the loss.
        expression: its text.
        level: the problems.
        rows: (S, B, 4) of reward, KL, length and value; NaN where training broke.
        measures: each of `MEASURES`, with its interval over seeds; empty where training broke.
        against_dpo: the same, minus DPO's on the same seeds.
    """

    name: str
    expression: str
    level: ToyLevel
    rows: Floats
    measures: Mapping[str, Interval]
    against_dpo: Mapping[str, Interval]

    @property
    def beats_dpo(self) -> bool:
        """A higher value at the worst beta and a higher reward at equal KL, each with its whole interval above 0."""
        return bool(self.against_dpo) and all(self.against_dpo[name].low > 0 for name in ("value", "reward_at_kl"))


def compare(losses: Mapping[str, Node]) -> list[HeldOut]:
    """Train with each loss on every held-out problem; `losses` has one named "dpo"."""
    outcomes = []
    for level in HELD_OUT:
        dpo = _rows(level, losses["dpo"])
        for name, node in losses.items():
            rows = dpo if name == "dpo" else _rows(level, node)
            whole = bool(np.isfinite(rows).all())
            both = np.stack([rows, dpo], 1)
            measures, against = {}, {}
            for key, measure in MEASURES.items() if whole else ():
                measures[key] = bootstrap(measure, rows, resamples=_RESAMPLES)
                against[key] = bootstrap(_minus(measure), both, resamples=_RESAMPLES)
            outcomes.append(HeldOut(name, str(node), level, rows, measures, {} if name == "dpo" else against))
    return outcomes


def _minus(measure: Callable[[Floats], float]) -> Callable[[Floats], float]:
    return lambda both: measure(both[:, 0]) - measure(both[:, 1])


def _rows(level: ToyLevel, node: Node) -> Floats:
    results = {(result.seed, result.beta): result for result in run_level(level, node, 0)}

    def numbers(seed: int, beta: float) -> list[float]:
        result = results[seed, beta]
        values = (result.reward, result.kl, result.length, result.value)
        return [np.nan if value is None else value for value in values]

    rows: Floats = np.array([[numbers(seed, beta) for beta in level.betas] for seed in level.seeds])
    return rows
