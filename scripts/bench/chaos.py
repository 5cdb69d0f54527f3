"""Kill training runs at random places, resume them, and count what is lost: the table of docs/notes/faults.md.

    python scripts/bench/chaos.py --json chaos.json      # 3 jobs x 3 runs x 20 faults, about 10 minutes on two cores
    python scripts/bench/chaos.py --json chaos.json --runs 1 --jobs full

Each run is trained once undisturbed and once with faults: an attempt is killed (SIGKILL, and SIGTERM now and then),
and the next resumes with "auto". What is lost is every weight, log entry and number of the objective's state that
differs in a single bit at the end. Models are tiny and random; nothing but the processor is used. Runs that are in the
JSON file are not made again. Exits with 1 if anything is lost.
"""

from __future__ import annotations

import argparse
import itertools
import json
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # faults are shared with the tests

from prefopt.safety.files import write_whole
from tests.reliability.faults import CHAOS_JOBS, Fault, chaos, draw


def kind(fault: Fault) -> str:
    name = signal.Signals(fault.signum).name
    return f"{name} at a random time" if fault.place == "time" else f"{name} {fault.place}"


def measure(name: str, number: int, faults: int) -> dict[str, Any]:
    """One run of a job; `number` draws its faults."""
    job = CHAOS_JOBS[name]
    # Other faults for every job.
    seed = number * len(CHAOS_JOBS) + list(CHAOS_JOBS).index(name)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        run = chaos(Path(folder), job, draw(faults, seed, terms=faults // 5, cache=job.cache))
    return {
        "met": [kind(fault) for fault in run.hits],
        "lost": run.differing,
        "steps": run.steps,
        "whole": run.whole,
        "seconds": time.monotonic() - started,
    }


def table(done: list[dict[str, Any]]) -> str:
    """As Markdown: of each fault, how often it was injected, in how many runs, how many survived it, what was lost."""
    lines = ["| fault | injected | runs | survived | data lost |", "| --- | --- | --- | --- | --- |"]
    for name in [*sorted({name for run in done for name in run["met"]}), None]:
        runs = [run for run in done if name is None or name in run["met"]]
        times = sum(len(run["met"]) if name is None else run["met"].count(name) for run in runs)
        survived, lost = sum(not run["lost"] for run in runs), sum(len(run["lost"]) for run in runs)
        lines.append(f"| {name or 'all'} | {times} | {len(runs)} | {survived} | {lost} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="where results are kept")
    parser.add_argument("--jobs", nargs="+", choices=CHAOS_JOBS, default=list(CHAOS_JOBS))
    parser.add_argument("--runs", type=int, default=3, help="runs of each job, each with faults of its own")
    parser.add_argument("--faults", type=int, default=20, help="faults of each run")
    arguments = parser.parse_args()
    # Children are forked, which threads do not survive.
    torch.set_num_threads(1)
    done: dict[str, Any] = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
    for name, number in itertools.product(arguments.jobs, range(arguments.runs)):
        key = f"{name}, run {number}, {arguments.faults} faults"
        if key not in done:
            run = done[key] = measure(name, number, arguments.faults)
            write_whole(arguments.json, lambda path: path.write_text(json.dumps(done, indent=1) + "\n"))
            print(
                f"{key}: {len(run['met'])} met, {run['steps']} steps taken for {run['whole']}, "
                f"lost: {', '.join(run['lost'][:3]) or 'nothing'} ({run['seconds']:.0f} s)",
                flush=True,
            )
    print()
    print(table(list(done.values())))
    if any(run["lost"] for run in done.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
