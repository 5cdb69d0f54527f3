"""Speed, memory and gradient of `PreferenceTrainer` against `trl.DPOTrainer`, on the same pairs and model.

One job:
    python scripts/bench/speed.py --data pairs.jsonl                       # real pairs
    python scripts/bench/speed.py --prompt 1024 --completion 64            # made-up pairs of these lengths
    python scripts/bench/speed.py --completions 4 --pairs 6                # one chosen over three others, two prompts
    python scripts/bench/speed.py --groups --completions 8 --pairs 7       # 8 answers as a group, and as 7 pairs
    python scripts/bench/speed.py --data pairs.jsonl --cached_reference --full --repeats 3 --json speed.json
Many jobs, each written to the JSON file when it is done; the same command goes on after an interruption:
    python scripts/bench/speed.py --sweep --json speed.json --data pairs.jsonl --plot speed.png
    python scripts/bench/speed.py --lengths --json speed.json              # time per token of longer and longer rows
Nothing measured:
    python scripts/bench/speed.py --table speed.json --plot speed.png      # Markdown and picture of what there is
On a GPU, in one process whose peak memory the device counts, from random weights and made-up pairs (no download):
    python scripts/bench/speed.py --device cuda --sweep gpu --json gpu.json     # the jobs of docs/gpu.md
    python scripts/bench/speed.py --device cuda --model random:llama-8b --data lengths:hh --pairs 8 \\
        --variants trl,prefopt,prefopt/padded,prefopt/tree/flex_attention
    python scripts/bench/speed.py --device cpu --sweep gpu --model random:tiny  # a rehearsal of the first
Is a difference of the gradients rounding?
    python scripts/bench/speed.py --gradient_only --dtype float64 --prompt 64 --completion 64 --pairs 2

Every measurement is a process of its own, so that peak memory is its own; the two trainers take turns. Both get the
same pairs in the same order, the same LoRA with the same initial weights, no dropout, float32 on a CPU. Time is the
median step over all turns, without the first step of each process, which also sets things up (ours compares its
layouts in it). A reference computed ahead (--cached_reference) is outside the timed steps of both. The share of the
matmul limit is the time that the matrix products of the job need (each prompt once, each completion once, the head on
completions, forward, backward, reference) at the rate that this machine reaches in the same process, over the time
taken.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import _groups as groups
import _session as session
from _job import ROLES, Job
from _report import NAMES, check_picture, describe, draw, lengths_markdown, lengths_table, markdown, terminal_table
from _results import ReportError, assemble, find, gradient_difference, put, read_results, summarise, write_results
from _session import MAIN, VARIANTS
from rich.console import Console

console = Console(highlight=False)
ROWS = (256, 512, 1024, 2048)
"""Real tokens a row, for --lengths."""

# ---- the jobs -------------------------------------------------------------------------------------------------------


def sweep_jobs(kind: str, data: str | None, **common: Any) -> list[Job]:
    """The jobs of --sweep; those of `quick` come first in `full`. Jobs on real pairs need `data`."""

    def real(**options: Any) -> list[Job]:
        return [Job(data=data, **options, **common)] if data is not None else []

    def made(prompt: int, completion: int, completions: int = 2, **options: Any) -> Job:
        # As many prompts as keep TRL, with two whole rows for each pair, near 10 GiB for the bundled model.
        prompts = 4 if prompt + completion <= 512 else 2 if prompt + completion <= 1280 else 1
        pairs = 2 * (completions - 1) if completions > 2 else prompts
        return Job(
            prompt=prompt, completion=completion, completions=completions, pairs=pairs, **options, **common
        )  # fmt: skip

    quick = [
        *real(), *real(cached_reference=True), made(1024, 64), made(64, 256), made(256, 64), made(256, 64, full=True),
        made(256, 64, completions=4), made(1792, 128),
    ]  # fmt: skip
    if kind == "quick":
        return quick
    jobs = list(quick)
    for full in (False, True):
        for cached in (False, True):
            options = {"full": full, "cached_reference": cached}
            jobs += real(**options)
            jobs += [made(prompt, completion, **options) for prompt in (64, 256, 1024) for completion in (64, 256)]
    jobs += [made(64, 64, completions=4), made(256, 64, completions=4, cached_reference=True)]
    return list(dict.fromkeys(jobs))


def length_jobs(**common: Any) -> dict[int, Job]:
    """For each row of real tokens a job: three quarters prompt, the rest two completions; 2048 tokens a step."""
    return {
        row: Job(prompt=3 * row // 4, completion=row // 8, pairs=max(ROWS) // row, **common) for row in ROWS
    }  # fmt: skip


# ---- measuring ------------------------------------------------------------------------------------------------------


class MeasurementError(RuntimeError):
    """A measuring process that failed; the message is its reason in a few words."""


def start(role: str, job: Job, folder: Path, verbose: bool) -> dict[str, Any]:
    """Run one measurement in a process of its own; its gradient lies in `folder` afterwards."""
    folder.mkdir(exist_ok=True)
    log = folder / "log.txt"
    command = [sys.executable, str(Path(__file__).with_name("_job.py"))]
    command += [role, json.dumps(dataclasses.asdict(job)), str(folder)]
    with log.open("w", encoding="utf-8") as stream, tempfile.TemporaryDirectory() as datasets:
        # A dataset of an earlier process must not be found again: its reference would not be computed.
        environment = {**os.environ, "HF_DATASETS_CACHE": datasets}
        output = None if verbose else stream
        code = subprocess.run(command, stdout=output, stderr=output, env=environment, check=False).returncode
    if code != 0:
        raise MeasurementError(reason(code, log.read_text(encoding="utf-8", errors="replace")))
    result: dict[str, Any] = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    return result


def reason(code: int, log: str) -> str:
    """Why a measuring process ended, from its exit status and what it printed."""
    if code == -9:
        return "killed, most likely out of memory"
    last = next((line.strip() for line in reversed(log.splitlines()) if line.strip()), f"exit status {code}")
    if any(sign in last for sign in ("MemoryError", "OutOfMemoryError", "out of memory", "can't allocate memory")):
        return "out of memory"
    return last[:300]


def compare(job: Job, repeats: int, verbose: bool) -> dict[str, Any]:
    """The two trainers in turns. One that fails has its reason in `failed`; the other is measured all the same."""
    turns: dict[str, list[dict[str, Any]]] = {role: [] for role in ROLES}
    failed: dict[str, str] = {}
    difference = None
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(repeats):
            for role in ROLES:
                if role in failed:
                    continue
                name = f"{describe(job.settings)}; {NAMES[role]}, turn {turn + 1} of {repeats}"
                try:
                    with console.status(name):
                        run = start(role, job, Path(folder) / role, verbose)
                except MeasurementError as error:
                    failed[role] = str(error)
                    console.print(f"{name}: failed: {error}", markup=False, soft_wrap=True)
                    continue
                turns[role].append(run)
                steps = run["seconds"][1:] or run["seconds"]
                console.print(
                    f"{name}: {statistics.median(steps):.3g} s a step ({len(steps)} timed), "
                    f"{run['peak_bytes'] / 2**30:.1f} GiB", markup=False, soft_wrap=True,
                )  # fmt: skip
        if not failed:
            difference = gradient_difference(*(Path(folder) / role / "gradient.pt" for role in ROLES))
    return assemble(
        job, repeats, {r: summarise(r, turns[r]) for r in ROLES if r not in failed}, failed, difference
    ) | {"machine": next((runs[0]["machine"] for runs in turns.values() if runs), None)}


# ---- the commands ---------------------------------------------------------------------------------------------------


def measure_jobs(jobs: Sequence[Job], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Compare the trainers on each job that the JSON file does not hold yet; returns the results of all of them."""
    results = read_results(args.json)
    made = []
    for number, job in enumerate(jobs):
        found = find(results["jobs"], job, args.repeats) if args.sweep and not args.again else None
        if len(jobs) > 1:
            known = "" if found is None else ": measured before"
            console.rule(f"{number + 1} of {len(jobs)}: {describe(job.settings)}{known}", align="left")
        result = found or compare(job, args.repeats, args.verbose)
        made.append(result)
        if found is None and args.json is not None:
            put(results["jobs"], result)
            write_results(args.json, results)
    console.print(terminal_table(made))
    if args.plot is not None:
        draw(made, args.plot)
    return made


def measure_lengths(args: argparse.Namespace, common: Mapping[str, Any]) -> None:
    """Ours alone on rows of more and more tokens."""
    results = read_results(args.json)
    made = []
    for row, job in length_jobs(**common).items():
        found = find(results["lengths"], job, args.repeats) if not args.again else None
        if found is None:
            turns = []
            with tempfile.TemporaryDirectory() as folder, console.status(f"rows of {row} tokens"):
                turns = [start("prefopt", job, Path(folder), args.verbose) for _ in range(args.repeats)]
            run = summarise("prefopt", turns)
            found = {
                "job": job.settings, "row": row, "repeats": args.repeats, "machine": turns[0]["machine"],
                "prefopt": run, "microseconds": 1e6 * run["step"] / run["tokens"],
            }  # fmt: skip
            if args.json is not None:
                put(results["lengths"], found)
                write_results(args.json, results)
        made.append(found)
        console.print(f"rows of {row} tokens: {found['microseconds']:.1f} µs a token")
    console.print(lengths_table(made))


def measure_gradient(job: Job, args: argparse.Namespace) -> None:
    """One step of each, for the difference of the gradients alone."""
    result = compare(job, 1, args.verbose)
    if result["failed"]:
        sys.exit(1)
    tokens = "the same" if result["same_tokens"] else "different"
    console.print(f"{job.dtype}: the gradients differ by {result['gradient']:.1e}; {tokens} tokens in both")
    if args.json is not None:
        results = read_results(args.json)
        put(results["gradients"], result)
        write_results(args.json, results)


JOB_OPTIONS = ("prompt", "completion", "completions", "pairs", "full", "cached_reference")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="pairs to train on; made-up ones of --prompt and --completion tokens without")
    parser.add_argument("--prompt", type=int, help="tokens of a made-up prompt (256)")
    parser.add_argument("--completion", type=int, help="tokens of a made-up completion, end token included (64)")
    parser.add_argument("--completions", type=int, help="completions a made-up prompt; the first is chosen (2)")
    parser.add_argument("--pairs", type=int, help="pairs a step (4)")
    parser.add_argument("--steps", type=int, help="steps of each process, the untimed first one included (4)")
    parser.add_argument("--repeats", type=int, default=1, help="turns of the two trainers (1)")
    parser.add_argument("--max_length", type=int, help="longest row of --data (512)")
    parser.add_argument("--model", help="a folder, a Hub name, random:llama-1b or -8b; the bundled one without")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float64"], help="float32, on a GPU bfloat16")
    parser.add_argument("--full", action="store_true", default=None, help="train all weights instead of LoRA")
    parser.add_argument("--cached_reference", action="store_true", default=None, help="precompute_ref_log_probs")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="in both (TRL's default is on)")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="measure there, in one process")
    parser.add_argument("--variants", help=f"with --device: some of {','.join(VARIANTS)} ({','.join(MAIN)})")
    parser.add_argument("--seconds", type=float, help="with --device: begin nothing that would end later than this")
    parser.add_argument("--threads", type=int, help="of the processor; all it has without")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--sweep", nargs="?", const="quick", choices=["quick", "full", "gpu"], help="many jobs (quick)")
    kinds.add_argument("--lengths", action="store_true", help="time per token of ours alone by length of row")
    kinds.add_argument("--gradient_only", action="store_true", help="one step each, compare the gradients")
    kinds.add_argument("--groups", action="store_true", help="ours alone: K answers as a group, and as K - 1 pairs")
    kinds.add_argument("--table", type=Path, metavar="JSON", help="print results as Markdown, measure nothing")
    parser.add_argument("--json", type=Path, help="where results are kept")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw speed and memory of the jobs")
    parser.add_argument("--again", action="store_true", help="measure again what the JSON file has")
    parser.add_argument("--verbose", action="store_true", help="show what the measuring processes print")
    args = parser.parse_args(arguments)
    if problem := problem_with(args):
        parser.error(problem)
    return args


def problem_with(args: argparse.Namespace) -> str | None:
    """What is wrong with the options, None if nothing is: one without effect is an error."""

    def given(*names: str) -> str:
        return ", ".join(f"--{name}" for name in names if getattr(args, name) not in (None, False))

    many = given("sweep", "lengths")
    if many and (extra := given(*JOB_OPTIONS)):
        return f"{many} chooses its own jobs, so {extra} has no effect: leave it out"
    if args.lengths and (extra := given("data", "max_length", "plot")):
        return f"--lengths works on made-up rows and draws nothing, so {extra} has no effect: leave it out"
    if args.data and (extra := given("prompt", "completion", "completions")):
        return f"{extra} describes made-up pairs and has no effect on --data: leave one of them out"
    if args.max_length is not None and not args.data:
        return "--max_length is for --data; made-up pairs are never cut: leave it out"
    if args.gradient_only and (extra := given("steps", "plot")):
        return f"--gradient_only takes one step and draws nothing, so {extra} has no effect: leave it out"
    if args.groups and (extra := given("data", "device", "json", "plot", "verbose")):
        return f"--groups works on made-up rows and prints a table, so {extra} has no effect: leave it out"
    if args.groups and (args.completions or 2) < 3:
        return "--groups compares a group with its pairs: give --completions, 3 or more"
    if args.device is None and (extra := given("variants", "seconds")):
        return f"{extra} is for --device: leave it out"
    if args.device is None and args.sweep == "gpu":
        return "--sweep gpu needs --device"
    if args.device and (extra := given("lengths", "gradient_only", "table", "plot", "again", "verbose")):
        return f"{extra} has no effect with --device: leave it out"
    if args.device and args.sweep not in (None, "gpu"):
        return "with --device the sweep is --sweep gpu"
    if unknown := set((args.variants or "trl").split(",")) - set(VARIANTS):
        return f"there is no variant {sorted(unknown)[0]}: {', '.join(VARIANTS)}"
    if args.again and not many:
        return "--again is for --sweep and --lengths; a single job is always measured"
    if args.sweep and args.json is None and args.sweep != "gpu":
        return "--sweep needs --json, where each result is kept as soon as it is there"
    if args.table and (extra := given("data", "json", "model", "steps", *JOB_OPTIONS)):
        return f"--table measures nothing, so {extra} has no effect: leave it out"
    if args.repeats < 1 or (args.steps is not None and args.steps < 2):
        return "--repeats must be at least 1 and --steps at least 2, since the first step is not timed"
    return None


def job_options(args: argparse.Namespace) -> dict[str, Any]:
    """What every job of these arguments has in common."""
    import torch

    if args.model is None:
        from prefopt.models.bundled import resolve_demo_model

        args.model = str(resolve_demo_model(say=console.print))
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "model": args.model,
        "dtype": args.dtype or ("bfloat16" if torch.accelerator.is_available() else "float32"),
        "threads": args.threads or processors,
        "gradient_checkpointing": args.gradient_checkpointing,
        **({} if args.steps is None else {"steps": args.steps}),
        **({"steps": 1} if args.gradient_only else {}),
        **({} if args.max_length is None else {"max_length": args.max_length}),
    }


def one_job(args: argparse.Namespace, common: Mapping[str, Any]) -> Job:
    own = {name: getattr(args, name) for name in JOB_OPTIONS if getattr(args, name) is not None}
    return Job(data=args.data, **own, **common)


def measure_on_device(args: argparse.Namespace) -> None:
    """One job, or those of docs/gpu.md, in this process."""
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        raise MeasurementError("--device cuda: there is none that PyTorch can use here")
    if args.sweep == "gpu":
        args.model, model = args.model or "random:llama-8b", args.model
        common = job_options(args)
        del common["model"]
        jobs = session.card_jobs(model, **{"steps": 9, **common})
    else:
        jobs = [one_job(args, job_options(args))]
    variants = args.variants.split(",") if args.variants else MAIN
    entries = session.run(jobs, variants, args.repeats, args.json, args.seconds, lambda line: print(line, flush=True))
    print(session.markdown(entries))
    if args.json is not None:
        (args.json.parent / f"{args.json.stem}.md").write_text(session.markdown(entries) + "\n", encoding="utf-8")


def show(path: Path, picture: Path | None) -> None:
    """Print what has been measured as Markdown."""
    if not path.exists():
        raise ReportError(f"there is no {path}; measure with --json {path} first")
    results = read_results(path)
    print(markdown(results["jobs"]))
    if results["lengths"]:
        print("\n" + lengths_markdown(results["lengths"]))
    if picture is not None:
        draw(results["jobs"], picture)


def run(args: argparse.Namespace) -> None:
    if args.plot is not None:
        check_picture(args.plot)
    if args.table is not None:
        show(args.table, args.plot)
        return
    if args.device is not None:
        measure_on_device(args)
        return
    common = job_options(args)
    if args.lengths:
        measure_lengths(args, common)
        return
    if args.sweep:
        measure_jobs(sweep_jobs(args.sweep, args.data, **common), args)
        return
    job = one_job(args, common)
    if args.groups:
        print(groups.markdown(job, groups.run(job, args.repeats, lambda line: print(line, flush=True))))
        return
    if args.gradient_only:
        measure_gradient(job, args)
    elif measure_jobs([job], args)[0]["failed"]:
        sys.exit(1)


def main() -> None:
    args = parse()
    try:
        run(args)
    except (ReportError, MeasurementError, ValueError) as error:
        sys.exit(f"speed.py: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped" + ("; the same command continues from here" if args.sweep or args.lengths else ""))


if __name__ == "__main__":
    main()
