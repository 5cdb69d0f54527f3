"""A claim's lines as a small PNG. matplotlib (the `plot` extra) is imported only to draw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefopt.catalogue.plots import COLOURS, DASHES
from prefopt.reproduction.run import Result


def draw(result: Result, folder: Path) -> Path | None:
    """Write `PAPER_CLAIM.png`; None if matplotlib is not installed or the claim has no lines."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    picture = result.picture
    if picture is None:
        return None
    figure = Figure(figsize=(5.2, 3.2), dpi=100, layout="constrained")
    axes = figure.subplots()
    for number, (label, points) in enumerate(picture.lines.items()):
        across, up = zip(*points, strict=True)
        style: dict[str, Any] = {"color": COLOURS[number % len(COLOURS)], "linestyle": DASHES[number // len(COLOURS)]}
        axes.plot(across, up, label=label, marker="o" if len(points) <= 12 else "", markersize=3, **style)
    if "x" in picture.log:
        axes.set_xscale("log")
    if "y" in picture.log:
        axes.set_yscale("log")
    axes.set(title=picture.title, xlabel=picture.x, ylabel=picture.y)
    axes.title.set_fontsize(9)
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)
    path = folder / f"{result.paper}_{result.claim.id}.png"
    # Without the library's version in it, the same numbers give the same file.
    figure.savefig(path, metadata={"Software": None})
    return path
