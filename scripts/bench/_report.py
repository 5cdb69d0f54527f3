"""Results of scripts/bench/speed.py for people: names of jobs, a table on the terminal, Markdown rows, a picture."""

from __future__ import annotations

import importlib.util
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from _results import ReportError
from rich.box import SIMPLE
from rich.table import Table

Result = Mapping[str, Any]
NAMES = {"trl": "TRL", "prefopt": "prefopt"}
BUNDLED = "SmolLM2-135M-Instruct"


def describe(job: Mapping[str, Any]) -> str:
    """A job in a few words."""
    if job["data"] is not None:
        words = f"{job['data'].split('.')[0]}, up to {job['max_length']} tokens"
    else:
        words = f"prompt {job['prompt']}, completions {job['completions']}×{job['completion']}"
    words += ", full fine-tuning" if job["full"] else ""
    words += ", cached reference" if job["cached_reference"] else ""
    words += ", checkpointing" if job["gradient_checkpointing"] else ""
    return words


def command(job: Mapping[str, Any]) -> str:
    """What to type to measure the job again."""
    words = ["python", "scripts/bench/speed.py"]
    if job["data"] is not None:
        words += ["--data", job["data"], "--max_length", str(job["max_length"])]
    else:
        words += ["--prompt", str(job["prompt"]), "--completion", str(job["completion"])]
        words += ["--completions", str(job["completions"])] if job["completions"] != 2 else []
    words += ["--pairs", str(job["pairs"]), "--steps", str(job["steps"])]
    words += [f"--{name}" for name in ("full", "cached_reference", "gradient_checkpointing") if job[name]]
    words += ["--model", job["model"]] if job["model"].split("/")[-1] != BUNDLED else []
    words += ["--dtype", job["dtype"]] if job["dtype"] == "float64" else []
    return shlex.join(words)


# ---- tables ---------------------------------------------------------------------------------------------------------


def _run(result: Result, role: str) -> str:
    if role in result["failed"]:
        return result["failed"][role].replace("|", "\\|")
    run = result[role]
    pairs = result["job"]["pairs"] / run["step"]
    return f"{run['step']:.3g} s, {pairs:.3g} pairs/s, {run['peak_bytes'] / 2**30:.1f} GiB"


def _ratios(result: Result) -> list[str]:
    """Speed, memory, share of the limit and difference of the gradients."""
    made = [f"{result[name]:.2f}x" if result[name] is not None else "" for name in ("speedup", "memory")]
    share, gradient = result["share_of_limit"], result["gradient"]
    made.append("" if share is None else f"{100 * share:.0f}%")
    note = "" if result["same_tokens"] is not False else " (other tokens)"
    return [*made, "" if gradient is None else f"{gradient:.1e}{note}"]


def terminal_table(results: Sequence[Result]) -> Table:
    note = "TRL / prefopt; medians over the steps of all turns, the first step of each process left out."
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0), caption=note)
    table.add_column("job; pairs a step", min_width=18)
    for title in ("seconds\na step", "speed", "peak\nGiB", "memory", "of\nlimit", "gradient\ndiffers"):
        table.add_column(title, justify="right")
    for result in results:
        runs = [result.get(role) for role in NAMES]
        seconds = " / ".join("failed" if run is None else f"{run['step']:.3g}" for run in runs)
        memory = " / ".join("-" if run is None else f"{run['peak_bytes'] / 2**30:.1f}" for run in runs)
        speed, less, share, gradient = _ratios(result)
        name = f"{describe(result['job'])}; {result['job']['pairs']}"
        table.add_row(name, seconds, speed, memory, less, share, gradient)
    return table


def markdown(results: Sequence[Result]) -> str:
    """Rows for docs/performance.md."""
    lines = [
        "| job | command | TRL, a step | prefopt, a step | speed | peak memory | share of the matmul limit "
        "| gradient differs by |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        job = result["job"]
        speed, memory, share, gradient = _ratios(result)
        speed, memory = (f"**{text}**" if text else "" for text in (speed, memory))
        name = f"{describe(job)}; {job['pairs']} pair{'s' if job['pairs'] > 1 else ''}"
        cells = [
            name, f"`{command(job)}`", *(_run(result, role) for role in NAMES),
            speed, memory, share, gradient,
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def lengths_table(results: Sequence[Result]) -> Table:
    table = Table(caption="prefopt alone; a row is a prompt and its two completions.")
    for title in ("real tokens a row", "prompt", "completions", "rows a step", "µs a token", "of the shortest"):
        table.add_column(title, justify="right")
    shortest = min(results, key=lambda result: result["row"])["microseconds"]
    for result in sorted(results, key=lambda result: result["row"]):
        job = result["job"]
        table.add_row(
            str(result["row"]), str(job["prompt"]), f"2×{job['completion']}", str(job["pairs"]),
            f"{result['microseconds']:.1f}", f"{result['microseconds'] / shortest:.2f}x",
        )  # fmt: skip
    return table


def lengths_markdown(results: Sequence[Result]) -> str:
    """The same as Markdown."""
    shortest = min(results, key=lambda result: result["row"])["microseconds"]
    lines = ["| real tokens a row | µs a token | of the shortest |", "|---|---|---|"]
    for result in sorted(results, key=lambda result: result["row"]):
        lines.append(f"| {result['row']} | {result['microseconds']:.1f} | {result['microseconds'] / shortest:.2f}x |")
    return "\n".join(lines)


# ---- the picture ----------------------------------------------------------------------------------------------------

SPEED, MEMORY = "#0072B2", "#D55E00"  # of Okabe and Ito's palette, as in prefopt/catalogue/plots.py


def _panel(axes: Any, results: Sequence[Result], name: str, colour: str, label: str) -> None:
    values = [result[name] for result in results]
    end = 1.12 * max([1.0, *(value for value in values if value is not None)])
    axes.barh(range(len(values)), [value or 0.0 for value in values], height=0.62, color=colour)
    axes.axvline(1.0, color="0.15", linewidth=1.0, linestyle="--")
    axes.annotate(
        "TRL", (1.0, 1.0), xycoords=("data", "axes fraction"), xytext=(0, 3), textcoords="offset points",
        ha="center", fontsize=8.5, color="0.15",
    )  # fmt: skip
    # On the bar where there is room beside the line, else behind it.
    behind = {"color": "0.2", "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 1}}
    for place, (result, value) in enumerate(zip(results, values, strict=True)):
        if value is None:
            failures = [f"{NAMES[role]}: {_short(why)}" for role, why in result["failed"].items()]
            axes.text(0.015 * end, place, ", ".join(failures), va="center", fontsize=8.5, **behind)
        elif value > 0.2 * end and not value - 0.2 * end < 1 < value:
            axes.text(value - 0.015 * end, place, f"{value:.2f}x", va="center", ha="right", fontsize=8.5, color="w")
        else:
            axes.text(value + 0.015 * end, place, f"{value:.2f}x", va="center", fontsize=8.5, **behind)
    axes.set_xlim(0, end)
    axes.set_xlabel(label, fontsize=9)
    axes.tick_params(labelsize=8.5, length=0)
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _short(why: str) -> str:
    return "out of memory" if "out of memory" in why else "failed"


def check_picture(path: Path) -> None:
    """Raise `ReportError` if a picture could not be made, before hours of measuring for it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ReportError("a picture needs matplotlib: pip install 'prefopt-trainer[plot]'")
    if not path.suffix:
        raise ReportError(f"{path} has no ending that names a format; use .png")


def draw(results: Sequence[Result], path: Path) -> None:
    """Speed and memory of every job against TRL's, as bars.

    Raises:
        ReportError: if matplotlib is missing, there is nothing to draw, or the file cannot be written.
    """
    check_picture(path)
    from matplotlib.figure import Figure

    if not any("prefopt" in result for result in results):
        raise ReportError("there is nothing to draw: no job has been measured")
    figure = Figure(figsize=(9, 0.3 * len(results) + 1.0), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _panel(left, results, "speedup", SPEED, "speed relative to TRL\nlonger is faster")
    _panel(right, results, "memory", MEMORY, "peak memory relative to TRL\nshorter is less")
    left.set_yticks(range(len(results)), [describe(result["job"]) for result in results])
    left.set_ylim(len(results) - 0.5, -0.5)  # the first job on top
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise ReportError(f"cannot write {path}: {error}") from None
