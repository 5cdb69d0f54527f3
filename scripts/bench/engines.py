"""One recipe, unchanged, on one process and on several under each engine: final held-out loss and time, as Markdown.

    python scripts/bench/engines.py --json engines.json                                # bundled model and pairs, LoRA
    python scripts/bench/engines.py --json engines.json --engines ddp fsdp2 --steps 4

Every run has the same global batch, seed and data, so that all must end where one process does. Runs on a CPU with
gloo, a thread a process (one process alone gets as many threads as the others have together). What is in the JSON file
is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from prefopt.catalogue.markdown import table as markdown_table
from prefopt.safety.files import write_whole

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "dpo.py"
PAIRS = ROOT / "prefopt" / "demo" / "data" / "train.jsonl"
ENGINES = ("one", "ddp", "zero2", "zero3", "fsdp2")
NAMES = {
    "one": "1 process",
    "ddp": "{} processes, DDP",
    "zero2": "{} processes, DeepSpeed ZeRO-2",
    "zero3": "{} processes, DeepSpeed ZeRO-3",
    "fsdp2": "{} processes, FSDP2",
}
"""What the recipe must say that its model was really wrapped in."""


def arguments_of(options: argparse.Namespace, engine: str, folder: Path) -> list[str]:
    """The recipe's arguments: those that all runs share, the share of a batch, the engine's configuration."""
    processes = 1 if engine == "one" else options.processes
    shared = {
        "dataset_name": PAIRS,
        "eval_rows": options.eval_rows,
        "max_steps": options.steps,
        "per_device_train_batch_size": options.batch // processes,
        "per_device_eval_batch_size": options.batch // processes,
        "evaluate_first": False,
        "seed": 0,
        "output_dir": folder,
    }
    words = [word for name, value in shared.items() for word in (f"--{name}", str(value))]
    if engine.startswith("zero"):
        words += ["--deepspeed", str(_written(folder / "deepspeed.json", deepspeed_config(int(engine[-1]))))]
    if engine == "fsdp2":
        words += ["--fsdp", "--fsdp_config", str(_written(folder / "fsdp.json", {"version": 2}))]
    if processes > 1:
        words += ["--ddp_backend", "gloo"]
    return words


def deepspeed_config(stage: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
        # DeepSpeed's own optimizer for CPUs would compile an extension.
        "zero_force_ds_cpu_optimizer": False,
    }


def _written(path: Path, config: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(config))
    return path


def measure(options: argparse.Namespace, engine: str) -> dict[str, Any]:
    """Run the recipe once, and what it found.

    Raises:
        RuntimeError: if it failed, or ran under something else than was asked for.
    """
    processes = 1 if engine == "one" else options.processes
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        command = [sys.executable]
        if processes > 1:
            command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command += [str(ROOT / "scripts/bench/_on_cpu.py"), str(RECIPE), *arguments_of(options, engine, folder)]
        threads = options.processes // processes
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
        start = time.monotonic()
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        seconds = time.monotonic() - start
        if done.returncode:
            raise RuntimeError(f"{engine}: exit status {done.returncode}\n{done.stderr[-3000:]}")
        results = json.loads((folder / "results.json").read_text())
    if results["engine"] != NAMES[engine].format(processes):
        raise RuntimeError(f"{engine}: asked for {NAMES[engine].format(processes)}, ran on {results['engine']}")
    after = results["after"]
    return {
        "engine": results["engine"],
        "processes": processes,
        "loss": after["eval_loss"],
        "accuracy": after["eval_rewards/accuracies"],
        "margin": after["eval_rewards/margins"],
        "seconds": seconds,
    }


def table(found: dict[str, dict[str, Any]]) -> str:
    rows = []
    alone = found.get("one")
    for engine in ENGINES:
        if (row := found.get(engine)) is None:
            continue
        apart = "" if alone is None or engine == "one" else f"{row['loss'] - alone['loss']:+.1e}"
        measured = (f"{row['loss']:.6f}", f"{row['accuracy']:.0%}", f"{row['margin']:.4f}", f"{row['seconds']:.0f}")
        rows.append((row["engine"], *measured, apart))
    headings = ("run", "held-out loss", "reward accuracy", "reward margin", "seconds, all told")
    return markdown_table((*headings, "loss, from one process's"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="where results are kept")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=8, help="pairs a step, over all processes")
    parser.add_argument("--eval_rows", type=int, default=21)
    options = parser.parse_args()
    if options.batch % options.processes:
        parser.error(f"--batch {options.batch} cannot be dealt out evenly to --processes {options.processes}")
    found = json.loads(options.json.read_text()) if options.json.exists() else {}
    for engine in options.engines:
        if engine not in found:
            found[engine] = measure(options, engine)
            write_whole(options.json, lambda file: file.write_text(json.dumps(found, indent=2) + "\n"))
            print(f"{engine}: {found[engine]['seconds']:.0f} seconds", file=sys.stderr)
    print(table(found))


if __name__ == "__main__":
    main()
