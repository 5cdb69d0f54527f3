"""The log of a run, read line by line: of each metric the first and the latest values, never all of them.

Reads our names and those of `trl.DPOTrainer` (docs/numbers.md). Imports the standard library alone.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

FIRST = 10
"""Values of a metric's beginning that are stored."""
_WHOLE = 2**1023  # larger whole numbers do not fit into a float
FEW = 5
"""Values of a mean that does not hang on one batch."""
LATEST = 40
"""Latest values that are stored: the longest window of a rule, so a line costs the same however long the run is."""

MEASURED = "entanglement/"
"""Beginning of the names in lines that `EntanglementCallback` logs."""


@dataclass(frozen=True)
class Settings:
    """Options of the run that the rules and their remedies use; None where they are not known.

    Attributes:
        learning_rate: its highest value; otherwise the highest that was logged.
        max_steps: steps of the whole run.
        max_grad_norm: the norm to which gradients are clipped; 0 for never.
        fp16: whether it trains in float16 with a loss scale.
        beta: `rewards / beta` are log-ratios in nats. Only for logs without `ratios/...`: those of TRL.
        loss: the loss expression.
    """

    learning_rate: float | None = None
    max_steps: int | None = None
    max_grad_norm: float | None = None
    fp16: bool | None = None
    beta: float | None = None
    loss: str | None = None

    @classmethod
    def of(cls, args: Any, max_steps: int | None = None) -> Settings:
        """Read a trainer's arguments; those that it does not have stay None."""
        loss = getattr(args, "loss", None)
        return cls(
            learning_rate=getattr(args, "learning_rate", None),
            max_steps=max_steps if max_steps and max_steps > 0 else None,
            max_grad_norm=getattr(args, "max_grad_norm", None),
            fp16=getattr(args, "fp16", None),
            beta=None if loss else getattr(args, "beta", None),
            loss=loss,
        )


@dataclass(frozen=True)
class Value:
    """A logged number and its optimizer step."""

    step: int
    number: float


class Series:
    """One metric of a run.

    Attributes:
        count: values so far.
        first: the first `FIRST` of them.
        latest: the latest `LATEST` of them.
        lowest: the smallest; None before the first value.
        highest: the largest.
    """

    def __init__(self) -> None:
        self.count = 0
        self.first: list[Value] = []
        self.latest: deque[Value] = deque(maxlen=LATEST)
        self.lowest: Value | None = None
        self.highest: Value | None = None

    def add(self, step: int, number: float) -> None:
        value = Value(step, number)
        self.count += 1
        if len(self.first) < FIRST:
            self.first.append(value)
        self.latest.append(value)
        if self.lowest is None or number < self.lowest.number:
            self.lowest = value
        if self.highest is None or number > self.highest.number:
            self.highest = value

    def start(self, count: int = FEW) -> list[float]:
        """The first `count` numbers, at most `FIRST`."""
        return [value.number for value in self.first[:count]]

    def last(self, count: int) -> list[float]:
        """The latest `count` numbers, oldest first; fewer if there are fewer."""
        latest, size = self.latest, len(self.latest)
        return [latest[place].number for place in range(max(0, size - count), size)]

    def change(self, count: int = FEW) -> tuple[float, float]:
        """Mean of the latest `count` values minus that of the first `count`, and its standard error.

        (0, inf) while the two overlap.
        """
        if self.count < 2 * count:
            return 0.0, math.inf
        old, new = self.start(count), self.last(count)
        error = math.sqrt(standard_error(old) ** 2 + standard_error(new) ** 2)
        return mean(new) - mean(old), error


@dataclass
class History:
    """The log of a run up to now.

    Attributes:
        settings: of the run.
        step: of the latest line.
        lines: log lines of training so far.
        series: by the name under which a metric is logged (`loss`, `eval_loss`).
        not_finite: metrics that were NaN or infinite -> how many lines in a row, up to the latest.
    """

    settings: Settings = field(default_factory=Settings)
    step: int = 0
    lines: int = 0
    series: dict[str, Series] = field(default_factory=dict)
    not_finite: dict[str, int] = field(default_factory=dict)

    def add(self, line: Mapping[str, Any], step: int) -> bool:
        """Add a log line of training, an evaluation or a measurement; returns False for others (`train_runtime`)."""
        training = "loss" in line
        if not training and not any(name.startswith(("eval_", MEASURED)) for name in line):
            return False
        self.step = step
        self.lines += training
        for name, number in line.items():
            if not isinstance(number, float) and not (isinstance(number, int) and -_WHOLE < number < _WHOLE):
                continue  # a tensor would have to wait for its device
            if not math.isfinite(number):
                self.not_finite[name] = self.not_finite.get(name, 0) + 1
                continue
            if self.not_finite:
                self.not_finite.pop(name, None)
            if (series := self.series.get(name)) is None:
                series = self.series[name] = Series()
            series.add(step, float(number))
        return True

    def get(self, name: str, least: int = 1) -> Series | None:
        """A metric with at least so many values."""
        series = self.series.get(name)
        return series if series is not None and series.count >= least else None

    @property
    def progress(self) -> float | None:
        """The part of the run that is over; None if its length is not known."""
        return self.step / self.settings.max_steps if self.settings.max_steps else None

    @property
    def learning_rate(self) -> float | None:
        """The highest learning rate of the run."""
        logged = self.get("learning_rate")
        highest = logged.highest.number if logged is not None and logged.highest is not None else None
        return self.settings.learning_rate or highest or None


def mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)


def standard_error(numbers: Sequence[float]) -> float:
    """Of their mean; the standard library's variance is exact, and far too slow for every log line."""
    middle, count = mean(numbers), len(numbers)
    return math.sqrt(sum((number - middle) ** 2 for number in numbers) / (count - 1) / count)
