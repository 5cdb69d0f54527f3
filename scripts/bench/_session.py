"""Many measurements in one process, for a device that counts its own memory; `speed.py --device` runs them.

The trainers take turns, each on a new model, and every result is written at once: a run that is cut off keeps what it
had, and the same command continues from there. A measurement during which the process died is not tried again. Where
memory runs out for TRL or prefopt, both are measured with half the pairs.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from _job import Job, measure
from _report import describe
from _results import gradient_difference, read_results, summarise, write_results

BASELINE = "trl"
VARIANTS = ("trl", "prefopt", "prefopt/padded", "prefopt/tree/sdpa", "prefopt/tree/flex_attention")
"""What can be compared: a trainer, its layout, the attention that its model is loaded with."""
MAIN = VARIANTS[:2]
RATES = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bfloat16 operations a second of NVIDIA's data sheets, by what the name of a card contains."""
DIED = "the process died"

Entry = dict[str, Any]


def card_jobs(model: str | None, steps: int, **common: Any) -> list[Job]:
    """The jobs of docs/gpu.md, those of most worth first.

    Args:
        model: in place of the models that the jobs have; their pairs are then tiny too.
        steps: a run.
        common: further fields of every job.
    """
    eight, one, tiny = model or "random:llama-8b", model or "random:llama-1b", model is not None
    return [
        Job(model=eight, data="lengths:tiny" if tiny else "lengths:hh", pairs=8, steps=steps, **common),
        Job(model=eight, data="lengths:96+8" if tiny else "lengths:1024+64", pairs=4, steps=steps, **common),
        Job(model=eight, data="lengths:24+24" if tiny else "lengths:ultrafeedback", pairs=4, steps=steps, **common),
        Job(
            model=one, data="lengths:24+24" if tiny else "lengths:ultrafeedback", pairs=8, steps=steps, full=True,
            **common,
        ),
    ]  # fmt: skip


def schedule(jobs: int, variants: Sequence[str], repeats: int) -> list[tuple[int, str, int]]:
    """Which job is measured with which variant in which turn: first what the ratios need, of every job."""
    main = [(j, v, t) for t in range(repeats) for j in range(jobs) for v in variants if v in MAIN]
    # One turn of the others, and TRL's first for each job is there to compare with.
    return main + [(j, v, 0) for j in range(jobs) for v in variants if v not in MAIN]


def run(
    jobs: Sequence[Job], variants: Sequence[str], repeats: int, path: Path | None, seconds: float | None,
    say: Callable[[str], None],
) -> list[Entry]:  # fmt: skip
    """Measure what the file does not hold yet.

    Args:
        jobs: what is trained on.
        variants: names of `VARIANTS`.
        repeats: turns of TRL and prefopt; other variants have one.
        path: of the results; None to keep none.
        seconds: no measurement is begun that would end later, going by the longest so far.
        say: prints a line.

    Returns:
        An entry a job.
    """
    began, longest = time.monotonic(), 0.0
    results = read_results(path)
    entries = results["session"]
    while len(entries) < len(jobs):
        entries.append(_new(jobs[len(entries)]))
    jobs = [_halved(job, entry["job"]["pairs"]) for job, entry in zip(jobs, entries, strict=False)]
    if [entry["job"] for entry in entries] != [job.settings for job in jobs]:
        raise ValueError(f"{path} holds other jobs; give --json another name")

    def save() -> None:
        if path is not None:
            write_results(path, results)

    for entry in entries:
        if entry["running"] is not None:
            entry["failed"][entry["running"]], entry["running"] = DIED, None
    with tempfile.TemporaryDirectory() as folder:
        queue = schedule(len(jobs), variants, repeats)
        while queue:
            number, variant, turn = queue.pop(0)
            entry, job = entries[number], jobs[number]
            if variant in entry["failed"] or len(entry["turns"].get(variant, [])) > turn:
                continue
            if seconds is not None and time.monotonic() - began + longest > seconds:
                say(f"no time is left for {describe(job.settings)}; {variant}")
                continue
            entry["running"], started = variant, time.monotonic()
            save()
            result = _measured(variant, job, Path(folder), say)
            longest = max(longest, time.monotonic() - started)
            entry["running"] = None
            if isinstance(result, str) and "out of memory" in result and variant in MAIN and job.pairs > 1:
                jobs = [*jobs[:number], replace(job, pairs=job.pairs // 2), *jobs[number + 1 :]]
                say(f"{describe(job.settings)}; {variant}: {result}; {job.pairs // 2} pairs from here on")
                entries[number] = results["session"][number] = _new(jobs[number])
                queue = schedule(len(jobs), variants, repeats)
            elif isinstance(result, str):
                entry["failed"][variant] = result
                say(f"{describe(job.settings)}; {variant}: {result}")
            else:
                _put(entry, variant, result, Path(folder), number)
                steps = result["seconds"][1:] or result["seconds"]
                say(
                    f"{describe(job.settings)}; {variant}, turn {turn + 1}: {statistics.median(steps):.3g} s a step, "
                    f"{result['peak_bytes'] / 2**30:.1f} GiB, {time.monotonic() - started:.0f} s in all"
                )
            save()
    return entries


def _new(job: Job) -> Entry:
    return {"job": job.settings, "turns": {}, "failed": {}, "gradient": {}, "running": None, "machine": None}


def _halved(job: Job, pairs: int) -> Job:
    """The job as the file has it, which may have run out of memory before."""
    return replace(job, pairs=pairs) if pairs < job.pairs else job


def _measured(variant: str, job: Job, folder: Path, say: Callable[[str], None]) -> dict[str, Any] | str:
    """A result, or why there is none. What was made for it is gone afterwards."""
    import torch

    role, layout, attention = (*variant.split("/"), "", "")[:3]
    options = {"layout": layout or "auto"} if role != BASELINE else {}
    place = folder / variant.replace("/", "-")
    place.mkdir(exist_ok=True)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    result: dict[str, Any] | str
    try:
        result = measure(role, job, place, attention or "sdpa", **options)
    except Exception as error:
        memory = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        result = "out of memory" if memory else f"{type(error).__name__}: {str(error).strip()[:300]}"
        if not memory:
            say(traceback.format_exc())
    # Compiled graphs of one model would be taken for another's, and count against the limit of recompilations.
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        left = torch.cuda.memory_allocated()
        if left > 2**30:
            say(f"{variant}: {left / 2**30:.1f} GiB are still allocated after it")
    return result


def _put(entry: Entry, variant: str, result: dict[str, Any], folder: Path, number: int) -> None:
    """Add a turn, and how the first step's gradient differs from TRL's of the same job."""
    own, theirs = folder / variant.replace("/", "-") / "gradient.pt", folder / f"{BASELINE}-{number}.pt"
    entry["machine"] = result.pop("machine")
    entry["turns"].setdefault(variant, []).append(result)
    if variant == BASELINE:
        own.replace(theirs)
    elif theirs.exists():
        entry["gradient"][variant] = gradient_difference(theirs, own)


# ---- what came out --------------------------------------------------------------------------------------------------


def card_rate(name: str) -> float | None:
    """Bfloat16 operations a second that a card's data sheet names."""
    return next((rate for part, rate in RATES.items() if part in name), None)


def rows(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each job and variant: step, pairs and tokens a second, ratios to TRL, shares of what the card does."""
    made = []
    for entry in entries:
        runs = {variant: summarise(variant, turns) for variant, turns in entry["turns"].items() if turns}
        base = runs.get(BASELINE)
        rate = card_rate(entry["machine"]["device"]) if entry["machine"] else None
        for variant, run in runs.items():
            operations = entry["turns"][variant][0]["operations"]
            made.append({
                "job": describe(entry["job"]), "model": entry["job"]["model"], "pairs": entry["job"]["pairs"],
                "variant": variant, "turns": len(entry["turns"][variant]), "step": run["step"],
                "pairs_per_second": entry["job"]["pairs"] / run["step"], "tokens": run["tokens"],
                "peak_bytes": run["peak_bytes"],
                "speedup": base["step"] / run["step"] if base else None,
                "memory": run["peak_bytes"] / base["peak_bytes"] if base else None,
                "share_of_measured_rate": run["limit"] / run["step"],
                "mfu": operations / run["step"] / rate if rate else None,
                "gradient": entry["gradient"].get(variant),
                "same_tokens": run["digest"] == base["digest"] if base else None,
            })  # fmt: skip
        for variant, why in entry["failed"].items():
            made.append({"job": describe(entry["job"]), "model": entry["job"]["model"], "variant": variant,
                         "pairs": entry["job"]["pairs"], "failed": why})  # fmt: skip
    return made


def markdown(entries: Sequence[Mapping[str, Any]]) -> str:
    """The table of docs/gpu.md."""
    lines = [
        "| model, job, pairs a step | variant | s a step | pairs/s | peak GiB | speed | memory | MFU "
        "| of the measured rate | gradient differs |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]

    def text(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    for row in rows(entries):
        name = f"{row['model'].removeprefix('random:')}, {row['job']}, {row['pairs']}"
        if "failed" in row:
            why = row["failed"].replace("|", "\\|").replace("\n", " ")
            lines.append(f"| {name} | {row['variant']} | {why} | | | | | | | |")
            continue
        ratio = row["variant"] != BASELINE
        cells = [
            name, row["variant"], text(row["step"], ".3g"), text(row["pairs_per_second"], ".3g"),
            text(row["peak_bytes"] / 2**30, ".1f"), text(row["speedup"] if ratio else None, ".2f"),
            text(row["memory"] if ratio else None, ".2f"), text(row["mfu"], ".0%"),
            text(row["share_of_measured_rate"], ".0%"),
            text(row["gradient"], ".1e") + ("" if row["same_tokens"] is not False else " (other tokens)"),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
