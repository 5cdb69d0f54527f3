"""The parts of scripts/gpu/check.sh, those of most worth first, each under a time limit of its own.

After every part summary.json and the part's log are complete in the folder: a run that is cut off keeps what it had.
Parts: environment (card, driver, versions, rates of a product and a copy), tests (`pytest -m gpu`), speed (the jobs of
docs/gpu.md against TRL), variants (layouts and attentions of the packed rows against each other).
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LIMITS = {"environment": 40, "tests": 160, "speed": 210, "variants": 60}
"""Seconds of each part; 470 in all."""
REHEARSED = {"environment": 120, "tests": 2400, "speed": 600, "variants": 300}
"""The same on a CPU, which may have other work."""
TESTS = ("layouts", "head", "training", "memory", "synchronisations", "losses", "compiled")
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "triton", "tokenizers", "numpy")
COMPARED = "prefopt/padded,prefopt/tree/sdpa,prefopt/tree/flex_attention"


def environment(options: argparse.Namespace) -> dict[str, Any]:
    """What the machine is, and what it does in a large product and a large copy."""
    made: dict[str, Any] = {"python": platform.python_version(), "date": f"{datetime.datetime.now():%Y-%m-%d %H:%M}"}
    made["packages"] = {name: _version(name) for name in PACKAGES}
    made["commit"] = _output("git", "rev-parse", "--short", "HEAD")
    if options.device == "cuda":
        made["driver"] = _output("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
    code = "import json, sys; sys.path.insert(0, 'scripts/gpu'); import check; print(json.dumps(check.rates()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100)
    if done.returncode:
        raise RuntimeError(done.stderr[-1500:])
    return made | json.loads(done.stdout.splitlines()[-1])


def rates() -> dict[str, Any]:
    """Floating-point operations and bytes a second; medians of ten, random numbers."""
    import torch

    gpu = torch.cuda.is_available()
    device, size = ("cuda", 8192) if gpu else ("cpu", 512)
    made: dict[str, Any] = {"device": torch.cuda.get_device_name() if gpu else "CPU", "cpus": os.cpu_count()}

    def median(work: Callable[[], Any]) -> float:
        for _ in range(3):
            work()
        seconds = []
        for _ in range(10):
            if gpu:
                torch.cuda.synchronize()
            began = time.perf_counter()
            work()
            if gpu:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        return sorted(seconds)[5]

    for dtype in (torch.bfloat16, torch.float32):
        one, two = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        made[f"TFLOP/s, {str(dtype)[6:]}"] = round(2e-12 * size**3 / median(lambda a=one, b=two: a @ b), 2)
    source = torch.empty(2**30 if gpu else 2**24, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    made["copy, GB/s read and written"] = round(2e-9 * source.numel() / median(lambda: target.copy_(source)))
    if gpu:
        free, total = torch.cuda.mem_get_info()
        made["memory, GiB"] = {"free": round(free / 2**30, 1), "total": round(total / 2**30, 1)}
        made["capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
    return made


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def run(command: Sequence[str], log: Path, seconds: float, **environment: str) -> str:
    """Run a command with its output in a log, and end it with all it started when its time is up; says how it went."""
    began = time.monotonic()
    with log.open("a", encoding="utf-8") as stream:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT, env=os.environ | environment,
            start_new_session=True,
        )  # fmt: skip
        try:
            code: int | None = process.wait(max(seconds, 1))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = None
    took = f"{time.monotonic() - began:.0f} s"
    return f"cut off after {took}" if code is None else f"{'ok' if code == 0 else f'exit status {code}'} in {took}"


def tests(options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    report = options.out / "tests.jsonl"
    files = [f"tests/gpu/test_{name}.py" for name in TESTS]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "-s", "-p", "no:cacheprovider", *files]
    where = {"PREFOPT_GPU_TESTS": options.device, "PREFOPT_GPU_REPORT": str(report)}
    how = run(command, options.out / "tests.log", seconds, **where)
    entries = [json.loads(line) for line in report.read_text().splitlines()] if report.exists() else []
    outcomes = [entry["outcome"] for entry in entries]
    return {
        "how": how,
        **{name: outcomes.count(name) for name in ("passed", "failed", "skipped")},
        "failures": [entry["test"] for entry in entries if entry["outcome"] == "failed"],
        "waits": {e["test"].split("[")[1]: e["total"] for e in entries if "test_waits" in e["test"] and "total" in e},
        "plan": {e["test"].split("[")[1]: e["MB"] for e in entries if "test_memory" in e["test"] and "MB" in e},
    }


def speed(options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """TRL and prefopt in turns."""
    return _measure(options, seconds, "speed", [])


def variants(options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """Further layouts of the jobs that `speed` measured, into the same file."""
    # FlexAttention has no backward pass on a CPU.
    compared = COMPARED if options.device == "cuda" else COMPARED.rpartition(",")[0]
    return _measure(options, seconds, "variants", ["--variants", f"trl,prefopt,{compared}"])


def _measure(options: argparse.Namespace, seconds: float, name: str, more: Sequence[str]) -> dict[str, Any]:
    results, until = options.out / "speed.json", time.monotonic() + seconds
    command = [sys.executable, "scripts/bench/speed.py", "--device", options.device, "--sweep", "gpu", "--json"]
    command += [str(results), "--repeats", "1" if options.rehearse else "2", *more]
    if options.rehearse:
        command += ["--model", "random:tiny", "--steps", "3", "--threads", "1"]
    how: list[str] = []
    # A kernel that ends the process ends that measurement; the next process goes on after it.
    for _ in range(3):
        left = until - time.monotonic()
        if left < 15:
            break
        how.append(run([*command, "--seconds", str(round(left - 10))], options.out / f"{name}.log", left))
        if how[-1].startswith("ok"):
            break
    held = json.loads(results.read_text())["session"] if results.exists() else []
    return {
        "how": how,
        "measured": {_name(entry): {v: len(turns) for v, turns in entry["turns"].items()} for entry in held},
        "failed": {_name(entry): entry["failed"] for entry in held if entry["failed"]},
    }


def _name(entry: dict[str, Any]) -> str:
    job = entry["job"]
    return f"{job['model']} {job['data']}{' full' if job['full'] else ''}, {job['pairs']} pairs"


PARTS: dict[str, Callable[..., dict[str, Any]]] = {
    "environment": lambda options, seconds: environment(options),
    "tests": tests,
    "speed": speed,
    "variants": variants,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for logs and results")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes; with --device cpu")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {','.join(PARTS)}, in this order")
    parser.add_argument("--scale", type=float, default=1.0, help="of every part's time limit")
    options = parser.parse_args()
    if options.device == "cpu":
        # One thread each: with more, tiny products on a busy processor wait for one another.
        os.environ.update(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
        if not options.rehearse:
            parser.error("--device cpu is for --rehearse")
    if unknown := set(options.parts.split(",")) - set(PARTS):
        parser.error(f"there is no part {sorted(unknown)[0]}: {', '.join(PARTS)}")
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    summary: dict[str, Any] = {"rehearsal": options.rehearse}
    began = time.monotonic()
    for name in options.parts.split(","):
        limit = (REHEARSED if options.rehearse else LIMITS)[name] * options.scale
        started = time.monotonic()
        try:
            summary[name] = PARTS[name](options, limit)
        except Exception as error:
            summary[name] = {"error": f"{type(error).__name__}: {str(error)[-1500:]}"}
        summary[name]["seconds"] = round(time.monotonic() - started, 1)
        (options.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        print(f"== {name}\n{json.dumps(summary[name], indent=1)}", flush=True)
    table = options.out / "speed.md"
    if table.exists():
        print(table.read_text(encoding="utf-8"))
    print(f"{time.monotonic() - began:.0f} s in all")
    bad = [name for name in options.parts.split(",") if not _went_well(summary[name])]
    sys.exit(f"look at: {', '.join(bad)}" if bad else 0)


def _went_well(part: dict[str, Any]) -> bool:
    how = part.get("how", "ok")
    last = how if isinstance(how, str) else (how or ["not begun"])[-1]
    return "error" not in part and not part.get("failed") and last.startswith("ok")


if __name__ == "__main__":
    main()
