"""The order of structures, drawn: a line downwards leads to a structure whose loss is never higher.

Imports matplotlib (the `plot` extra) only to draw.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefopt.logic.structure import NAMED, Structure, name_of_rows, named
from prefopt.safety.errors import PrefoptError

ENDINGS = (".png", ".svg", ".pdf")
LINES: dict[bool, dict[str, Any]] = {
    True: {"color": "0.85", "linewidth": 0.5},
    False: {"color": "0.6", "linewidth": 1.2},
}


class LatticeError(PrefoptError, ValueError):
    """Why the order cannot be drawn."""


def below(structures: list[Structure]) -> dict[Structure, list[Structure]]:
    """For every structure the ones directly below it."""
    lower = {s: [t for t in structures if s != t and s.at_least_as_demanding_as(t)] for s in structures}
    return {s: [t for t in mine if not any(t in lower[u] for u in mine)] for s, mine in lower.items()}


def every_structure() -> list[Structure]:
    """All 256 structures over M(w) and M(l), trivial ones included."""
    rows = [",".join(f"{row:02b}" for row in range(4) if bits >> row & 1) for bits in range(16)]
    return [Structure(T, B) for T in rows for B in rows]


def draw(path: Path, everything: bool = False) -> str:
    """Draw the paper's structures, or all 256 with those marked, and return a sentence on what was drawn.

    Raises:
        LatticeError: if the ending is not an image format, or matplotlib is missing.
    """
    if path.suffix.lower() not in ENDINGS:
        raise LatticeError(f"{path}: write to a file that ends in {', '.join(ENDINGS)}")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise LatticeError('drawing needs matplotlib: pip install "prefopt-trainer[plot]"') from error
    structures = every_structure() if everything else [named(name) for name in NAMED]
    covers = below(structures)
    places = _places(structures, covers)
    figure = Figure(figsize=(16, 10) if everything else (8, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.axis("off")
    for structure, lower in covers.items():
        for other in lower:
            (x, y), (u, v) = places[structure], places[other]
            axes.plot([x, u], [y, v], zorder=1, **LINES[everything])
    for structure, (x, y) in places.items():
        name = name_of_rows(structure)
        if everything and not name:
            axes.plot(x, y, "o", color="0.7", markersize=2.5, zorder=2)
            continue
        label = name if everything else f"{name}\n{structure.core}\n{structure.odds}"
        box = {"boxstyle": "round,pad=0.3", "facecolor": "white", "edgecolor": "tab:blue"}
        axes.text(x, y, label, ha="center", va="center", fontsize=8, bbox=box, zorder=3)
    axes.margins(0.12)
    axes.set_title("Higher asks for more: its loss is never below that of what it leads down to")
    figure.savefig(path, dpi=150)
    return f"{path}: {len(structures)} structures, {sum(map(len, covers.values()))} steps"


def _places(
    structures: list[Structure], covers: dict[Structure, list[Structure]]
) -> dict[Structure, tuple[float, float]]:
    """x and y of every structure: its height shows how strict it is, each level is spread evenly."""
    if len(structures) > len(NAMED):
        heights = {s: s.B.count(",") + bool(s.B) - s.T.count(",") - bool(s.T) for s in structures}
    else:
        heights = {}
        for _ in structures:
            heights = {s: 1 + max((heights.get(t, 0) for t in covers[s]), default=0) for s in structures}
    places = {}
    for height in set(heights.values()):
        level = [s for s in structures if heights[s] == height]
        for number, structure in enumerate(level):
            places[structure] = ((number - (len(level) - 1) / 2) / max(len(level), 4), float(height))
    return places
