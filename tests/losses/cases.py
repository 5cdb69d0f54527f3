"""One row per registered loss: expressions to try, and an independent formula for each in plain Python floats.

The formulas are written out again here, with `math` alone, so that a slip in a loss cannot hide in shared code.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from prefopt.losses import PreferenceBatch, Scores


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


@dataclass(frozen=True)
class Row:
    """One pair as plain numbers; `z0` is what the mismatched completions of the batch average to."""

    pw: float
    pl: float
    rw: float
    rl: float
    nw: int
    nl: int
    z0: float = 0.0

    @property
    def d(self) -> float:
        return (self.pw - self.rw) - (self.pl - self.rl)

    @property
    def per_token(self) -> float:
        return (self.pw - self.rw) / self.nw - (self.pl - self.rl) / self.nl


@dataclass(frozen=True)
class Case:
    """An expression, its value for each role of a row in order, and what section 9's reference vector gives."""

    expression: str
    values: Callable[[Row], tuple[float, ...]]
    at_reference_vector: float
    """Sum of `values` at pw=-10, pl=-12, rw=-11, rl=-11.5, nw=5, nl=8 (z0=0.3 where one is used)."""
    at_equality: float | None = None
    """Each value where policy and reference agree (pw=rw, pl=rl); None where it depends on the log-probabilities."""


CASES = [
    Case("dpo(beta=0.1)", lambda r: (softplus(-0.1 * r.d),), 0.620957, math.log(2)),
    Case(
        "dpo(beta=0.1, label_smoothing=0.1)",
        lambda r: (0.9 * softplus(-0.1 * r.d) + 0.1 * softplus(0.1 * r.d),),
        0.635957,
        math.log(2),
    ),
    Case("ipo(beta=0.1)", lambda r: ((r.per_token - 5) ** 2,), 22.443906, 25.0),
    Case("ipo(beta=0.1, average=False)", lambda r: ((r.d - 5) ** 2,), 12.25, 25.0),
    Case("hinge(beta=0.1)", lambda r: (max(0.0, 1 - 0.1 * r.d),), 0.85, 1.0),
    Case("simpo(beta=2.5, gamma=1.25)", lambda r: (softplus(1.25 - 2.5 * (r.pw / r.nw - r.pl / r.nl)),), 2.578890),
    Case("sft", lambda r: (-r.pw / r.nw,), 2.0),
    Case("sft(nll='sum')", lambda r: (-r.pw,), 10.0),
    Case(
        "kto(beta=0.1)",
        lambda r: (sigmoid(0.1 * (r.z0 - r.pw + r.rw)), sigmoid(0.1 * (r.pl - r.rl - r.z0))),
        0.962518,
        None,
    ),
    Case(
        "kto(beta=0.2, desirable_weight=1.5, undesirable_weight=0.5)",
        lambda r: (1.5 * sigmoid(0.2 * (r.z0 - r.pw + r.rw)), 0.5 * sigmoid(0.2 * (r.pl - r.rl - r.z0))),
        1.5 * sigmoid(0.2 * (0.3 - 1)) + 0.5 * sigmoid(0.2 * (-0.5 - 0.3)),
    ),
]

REFERENCE_VECTOR = Row(pw=-10, pl=-12, rw=-11, rl=-11.5, nw=5, nl=8, z0=0.3)


def make_batch(
    rows: list[Row],
    dtype: torch.dtype = torch.float64,
    weight: list[float] | None = None,
    requires_grad: bool = False,
) -> PreferenceBatch:
    """The batch that holds these rows; its mismatched ratios average to the rows' z0."""

    def column(values: list[float], grad: bool = False) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, requires_grad=grad)

    columns = {} if weight is None else {"weight": column(weight)}
    return PreferenceBatch(
        chosen=Scores(
            column([r.pw for r in rows], requires_grad),
            torch.tensor([r.nw for r in rows]),
            column([r.rw for r in rows]),
            columns=columns,
        ),
        rejected=Scores(
            column([r.pl for r in rows], requires_grad),
            torch.tensor([r.nl for r in rows]),
            column([r.rl for r in rows]),
            columns=columns,
        ),
        mismatched=Scores(
            column([r.z0 for r in rows]), torch.ones(len(rows), dtype=torch.long), column([0.0] * len(rows))
        ),
    )


def random_rows(n: int, seed: int = 0, z0: float = 0.2) -> list[Row]:
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> float:
        return float(low + (high - low) * torch.rand((), generator=generator, dtype=torch.float64))

    return [
        Row(
            uniform(-60, -5), uniform(-60, -5), uniform(-60, -5), uniform(-60, -5),
            int(uniform(2, 40)), int(uniform(2, 40)), z0,
        )
        for _ in range(n)
    ]  # fmt: skip
