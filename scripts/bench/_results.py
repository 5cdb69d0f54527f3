"""Results of scripts/bench/speed.py as they are kept: one job's numbers out of its turns, and the JSON file."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from _job import ROLES, Job

from prefopt.safety.files import write_whole


class ReportError(RuntimeError):
    """A file, table or picture that cannot be made or read; the message says what to do."""


# ---- one job --------------------------------------------------------------------------------------------------------


def summarise(role: str, turns: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One trainer's numbers over its turns; of each, the first step is left out unless it is the only one."""
    timed = [step for turn in turns for step in (turn["seconds"][1:] or turn["seconds"])]
    busy = [step for turn in turns for step in (turn["cpu_seconds"][1:] or turn["cpu_seconds"])]
    return {
        "role": role,
        "step": statistics.median(timed),
        "fastest": min(timed),
        "cpu_step": statistics.median(busy),
        "peak_bytes": max(turn["peak_bytes"] for turn in turns),
        "limit": statistics.median(turn["limit"] for turn in turns),
        "seconds": [turn["seconds"] for turn in turns],
        **{name: turns[0][name] for name in ("loss", "tokens", "digest")},
    }


def gradient_difference(theirs: Path, ours: Path) -> float:
    """|ours - TRL's| / |TRL's| of the first step's gradients in two files, all trained weights in one vector."""
    import torch

    one, two = (torch.load(path, weights_only=True).double() for path in (theirs, ours))
    return float((two - one).norm() / one.norm())


def assemble(
    job: Job, repeats: int, runs: Mapping[str, dict[str, Any]], failed: Mapping[str, str], difference: float | None
) -> dict[str, Any]:
    """The result of a job, with its ratios where both trainers ran."""
    theirs, ours = (runs.get(role) for role in ROLES)
    both = theirs is not None and ours is not None
    return {
        "job": job.settings,
        "repeats": repeats,
        **runs,
        "failed": dict(failed),
        "speedup": theirs["step"] / ours["step"] if both else None,
        "memory": ours["peak_bytes"] / theirs["peak_bytes"] if both else None,
        "share_of_limit": ours["limit"] / ours["step"] if ours is not None else None,
        "gradient": difference,
        "same_tokens": theirs["digest"] == ours["digest"] if both else None,
    }


# ---- the file -----------------------------------------------------------------------------------------------------


def read_results(path: Path | None) -> dict[str, list[dict[str, Any]]]:
    empty: dict[str, list[dict[str, Any]]] = {"jobs": [], "lengths": [], "gradients": [], "session": []}
    if path is None or not path.exists():
        return empty
    read = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(read, dict) or not set(read) <= set(empty):
        raise ReportError(f"{path} is not a file of this script's results; give --json or --table another name")
    return empty | read


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    """All or nothing, so that an interruption leaves the file as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda file: file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8"))


def find(results: Sequence[dict[str, Any]], job: Job, repeats: int) -> dict[str, Any] | None:
    """The result of a job that was measured with at least so many turns."""
    return next((r for r in results if r["job"] == job.settings and r["repeats"] >= repeats), None)


def put(results: list[dict[str, Any]], result: dict[str, Any]) -> None:
    """Add a result, in the place of an earlier one of the same job."""
    for place, other in enumerate(results):
        if other["job"] == result["job"]:
            results[place] = result
            return
    results.append(result)
