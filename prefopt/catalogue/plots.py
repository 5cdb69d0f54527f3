"""Pictures of objectives: the curves of `prefopt.catalogue.curves`, drawn for any set of loss expressions.

matplotlib (the `plot` extra) is imported only to draw.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from torch import Tensor

from prefopt.catalogue.curves import MOVES, SPAN, TOKENS, VOCABULARY, Curve, Line, PlotError, reach, trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["SPAN", "Curve", "Line", "PlotError", "draw", "scale_hints", "trace"]

COLOURS = ("#000000", "#E69F00", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9")
"""Okabe and Ito's palette, which is readable with any colour vision, without its yellow."""

DASHES = ("-", "--", "-.", (0, (1.2, 1.2)))

DPI = 110


def scale_hints(lines: Sequence[Line]) -> list[str]:
    """A sentence for every line so steep that the others look flat."""
    hints = []
    for axis in _axes(lines):
        reaches = {line.label: reach(line.curves[axis].loss) for line in lines if axis in line.curves}
        for line in lines:
            others = [value for label, value in reaches.items() if label != line.label]
            typical = median(others) if others else 0.0
            if typical > 0 and axis in line.curves and reaches[line.label] > 10 * typical:
                ratio = reaches[line.label] / typical
                hints.append(
                    f"{line.names[0]} changes {ratio:.0f} times as much as the others; to compare shapes, scale it: "
                    f'"{1 / ratio:.1g}*{line.names[0]}"'
                )
    return list(dict.fromkeys(hints))


def draw(lines: Sequence[Line], path: Path) -> None:
    """Write a picture of two panels per axis; the ending of `path` decides the format.

    Raises:
        PlotError: if matplotlib is not installed or cannot write this format.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise PlotError("plots need matplotlib: pip install 'prefopt-trainer[plot]'") from None
    if not path.suffix:
        raise PlotError(f"{path} has no ending that names a format; use .png")
    axes = _axes(lines)
    legend_rows = math.ceil(len(lines) / _legend_columns(lines))
    figure = Figure(figsize=(10, 3.3 * len(axes) + 0.19 * legend_rows + 0.5), layout="constrained")
    panels = figure.subplots(len(axes), 2, squeeze=False)
    cut = False
    for axis, (left, right) in zip(axes, panels, strict=True):
        cut = _row(left, right, axis, lines) or cut
    _annotate(figure, lines, cut)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=DPI)
        if path.suffix.lower() == ".png":
            _shrink(path)
    except (OSError, ValueError) as error:
        raise PlotError(f"cannot write {path}: {error}") from None


def _shrink(path: Path) -> None:
    """Saves the picture at a third of the size: line art has few colours."""
    from PIL import Image  # matplotlib depends on it

    with Image.open(path) as image:
        small = image.convert("RGB").quantize(128, dither=Image.Dither.NONE)
    small.save(path, optimize=True)


def _axes(lines: Sequence[Line]) -> list[str]:
    return [axis for axis in MOVES if any(axis in line.curves for line in lines)]


def _x_label(axis: str, lines: Sequence[Line]) -> str:
    drawn = [line for line in lines if axis in line.curves]
    some, none = any(any(line.reference) for line in drawn), any(not all(line.reference) for line in drawn)
    if axis == "margin":
        what, ratio, plain, rest = "margin", "$d = u_w - u_l$", "$p_w - p_l$", ", half from each side"
    else:
        letter = {"chosen": "w", "rejected": "l", "sampled": "s"}[axis]
        what, ratio, plain = axis, f"$u_{letter}$", f"change of $p_{letter}$"
        other = {"chosen": "rejected", "rejected": "chosen"}.get(axis)
        # A loss on one role has no other side.
        rest = f", {other} held" if any(len(line.curves) > 1 for line in drawn) else ""
    return f"{what}: " + (f"{ratio} = {plain}" if some and none else ratio if some else plain) + " (nats)" + rest


def _limits(curves: Sequence[Tensor], origin: float | None) -> tuple[float, float]:
    """A y-range with the starts of all curves, and with all of those that are not far steeper than most."""
    reaches = [reach(values, origin) for values in curves]
    typical = median(reaches)
    low, high = (math.inf, -math.inf) if origin is None else (origin, origin)
    starts = [float(values[len(values) // 2]) if origin is None else origin for values in curves]
    cap = max(
        min(float((values - start).abs().max()), 3 * reach)
        for values, start, reach in zip(curves, starts, reaches, strict=True)
        if reach <= 4 * typical
    )
    for values, start in zip(curves, starts, strict=True):
        cut = values.clamp(start - cap, start + cap)
        low, high = min(low, float(cut.min())), max(high, float(cut.max()))
    pad = 0.06 * (high - low) or 0.5
    return low - pad, high + pad


def _row(left: Axes, right: Axes, axis: str, lines: Sequence[Line]) -> bool:
    """Draw the two panels of one axis; returns whether a curve leaves the panels."""
    drawn = [(place, line) for place, line in enumerate(lines) if axis in line.curves]
    cut = False
    for panel, field, title, origin in (
        (left, "loss", "loss", None),
        (right, "gradient", "gradient of the loss with respect to x", 0.0),
    ):
        values = [getattr(line.curves[axis], field) for _, line in drawn]
        low, high = _limits(values, origin)
        for (place, line), y in zip(drawn, values, strict=True):
            panel.plot(
                line.curves[axis].x.numpy(),
                y.numpy(),
                color=COLOURS[place % len(COLOURS)],
                linestyle=DASHES[place % len(DASHES)],
                linewidth=1.8,
                label=line.label,
                # A solid line would hide a dashed one under it.
                zorder=2 + 0.1 * (place % len(DASHES)),
            )
            cut = cut or bool(((y < low) | (y > high)).any())
        panel.set_ylim(low, high)
        panel.set_xlim(float(drawn[0][1].curves[axis].x[0]), float(drawn[0][1].curves[axis].x[-1]))
        panel.set_title(title, fontsize=10)
        panel.set_xlabel(_x_label(axis, lines), fontsize=8.5)
        panel.tick_params(labelsize=8)
        panel.grid(color="0.9")
        panel.axvline(0, color="0.6", linewidth=0.8, zorder=1)
        if low < 0 < high:
            panel.axhline(0, color="0.6", linewidth=0.8, zorder=1)
    return cut


def _legend_columns(lines: Sequence[Line]) -> int:
    longest = max(len(line.label) for line in lines)
    return max(1, min(4, len(lines), 150 // (longest + 8)))


def _annotate(figure: Figure, lines: Sequence[Line], cut: bool) -> None:
    notes = [f"One pair; {TOKENS} tokens a side, each one of {VOCABULARY} that the reference finds equally likely."]
    if cut:
        notes.append("Steep curves leave the panels.")
    if any(line.batch for line in lines):
        notes.append("* depends on the rest of its batch; here the pair is alone.")
    if any(line.held for line in lines):
        notes.append("† gradients are stopped on purpose: what is shown is the gradient that trains.")
    figure.supxlabel("\n".join(notes), fontsize=7.5, color="0.35")
    handles: dict[str, Any] = {}
    for panel in figure.axes:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    # In the order of the lines, for both rows.
    order = [line.label for line in lines]
    figure.legend(
        [handles[label] for label in order],
        order,
        loc="outside upper center",
        ncols=_legend_columns(lines),
        fontsize=8,
        frameon=False,
        handlelength=3,
    )
