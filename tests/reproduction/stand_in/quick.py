"""Experiments whose outcomes depend on the seed that the runner sets, and on what a test does to them."""

from __future__ import annotations

import torch

from prefopt.reproduction.experiments.outcome import Outcome, Picture

CALLS: list[str] = []
STOPS: list[str] = []
"""Names of experiments that Ctrl-C ends, once for each time they are here."""


def _called(name: str) -> None:
    CALLS.append(name)
    if name in STOPS:
        STOPS.remove(name)
        raise KeyboardInterrupt


def first() -> list[Outcome]:
    _called("first")
    value = float(torch.rand(()))
    line = Picture("a line", "step", "value", {"one": [(0.0, 1.0), (1.0, value)]})
    numbers = {"value": [value, value + 1]}
    return [Outcome("drawn", f"drawn {value:.6f}", numbers=numbers, picture=line), Outcome("never", "1 < 0", False)]


def second() -> Outcome:
    _called("second")
    return Outcome("half", "0.5 and 2", numbers={"value": [0.5, 2.0]})


def failing() -> Outcome:
    _called("failing")
    raise RuntimeError("no luck")


def stray() -> Outcome:
    return Outcome("nobody asked", "", True)
