"""A picture of the curves of compared runs, for cards. Imports matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from prefopt.report.folder import Curve
from prefopt.safety.files import write_whole

COLORS = ("#0b6bb8", "#cf4e00", "#007d5c", "#a8478a", "#8a6a00", "#4b4fc4", "#3d7f8c", "#a33a4e")


def draw_curves(charts: Sequence[tuple[str, str, Mapping[str, Sequence[Curve]]]], file: Path) -> None:
    """Draw charts side by side as PNG.

    Args:
        charts: title, unit, and the curves of each group by its label.
        file: to write.
    """
    figure = Figure(figsize=(4.6 * len(charts), 3.4), layout="constrained")
    for place, (title, unit, groups) in enumerate(charts):
        axes = figure.add_subplot(1, len(charts), place + 1)
        for color, (label, curves) in enumerate(groups.items()):
            for number, curve in enumerate(curves):
                # A dollar sign would begin a formula, and a leading underscore hides an entry.
                name = None if number else label.replace("$", r"\$").lstrip("_")[:60]
                axes.plot(curve.steps, curve.values, color=COLORS[color % 8], label=name, linewidth=1.4)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step")
        axes.set_ylabel(unit)
        axes.grid(alpha=0.25)
        if place == 0:
            axes.legend(fontsize=7)
    write_whole(file, lambda unfinished: figure.savefig(unfinished, dpi=110, format="png"))
