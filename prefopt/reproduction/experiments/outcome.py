"""What an experiment returns: for each claim that it measures, the numbers and, for some, its own decision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Picture:
    """Lines to draw for a claim.

    Attributes:
        title: one line above the picture.
        x: label of the horizontal axis.
        y: label of the vertical axis.
        lines: points (x, y) of each line, by its label.
        log: the axes with a logarithmic scale: "", "x", "y" or "xy".
    """

    title: str
    x: str
    y: str
    lines: Mapping[str, Sequence[tuple[float, float]]]
    log: str = ""


@dataclass(frozen=True)
class Outcome:
    """What came of one claim.

    Attributes:
        claim: its id in the paper's file.
        measured: the numbers that decide, in words.
        holds: the experiment's decision; None where the paper's file has a `check` over `numbers`.
        settings: what the paper leaves open and was chosen here before the first run, or "".
        numbers: by name, one value for each seed, or a single one.
        picture: lines to draw, or None.
    """

    claim: str
    measured: str
    holds: bool | None = None
    settings: str = ""
    numbers: Mapping[str, Sequence[float]] = field(default_factory=dict)
    picture: Picture | None = None
