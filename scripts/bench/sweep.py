"""Processor time of `prefopt sweep` against separate runs of `prefopt train`, on the bundled pairs.

    python scripts/bench/sweep.py                          # the bundled job as it is: about 40 minutes of one core
    python scripts/bench/sweep.py --steps 1 --rows 40 --heldout 8 --alone "dpo(beta=0.1)" "simpo(beta=2.0, gamma=1.0)"

Every program is a process of its own, and its user and system time are counted. With --alone only these losses are run
alone; the others are taken to cost what these do, losses with a reference and losses without one apart.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

from prefopt.demo.data import load_demo
from prefopt.losses import parse
from prefopt.recipe.arguments import DEMO_CONFIG
from prefopt.safety.shipped import SHIPPED

CONFIG = SHIPPED / "configs" / "sweeps" / "losses.yaml"


def cpu_seconds(words: list[str]) -> float:
    """User and system time of a prefopt command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryFile() as log:
        done = subprocess.run([sys.executable, "-m", "prefopt", *words], stdout=log, stderr=subprocess.STDOUT)
        if done.returncode:
            log.seek(0)
            raise SystemExit(f"prefopt {' '.join(words)} failed:\n{log.read().decode()}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, help="of training; those of the bundled job, if left out")
    parser.add_argument("--rows", type=int, help="training rows, instead of all bundled pairs")
    parser.add_argument("--heldout", type=int, default=8, help="held-out rows, with --rows")
    parser.add_argument("--alone", nargs="*", help="losses to run alone; all, if left out")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")

    section = yaml.safe_load(CONFIG.read_text())["sweep"]
    losses = section["axes"]["loss"]
    with tempfile.TemporaryDirectory() as scratch:
        folder, options = Path(scratch), {}
        if arguments.rows is not None:  # data of one's own get general settings, so the bundled job's are written out
            options = yaml.safe_load(DEMO_CONFIG.read_text()) | {"dataset_name": str(folder / "data")}
            (folder / "data").mkdir()
            load_demo("train").select(range(arguments.rows)).to_json(folder / "data" / "train.jsonl")
            load_demo("heldout").select(range(arguments.heldout)).to_json(folder / "data" / "test.jsonl")
        if arguments.steps is not None:
            options["max_steps"] = arguments.steps
        (folder / "alone.yaml").write_text(yaml.safe_dump(options))
        base = {name: value for name, value in options.items() if name != "seed"}
        (folder / "sweep.yaml").write_text(yaml.safe_dump({**base, "sweep": section}, sort_keys=False))

        times: dict[bool, list[float]] = {True: [], False: []}
        for number, loss in enumerate(arguments.alone or losses):
            out = str(folder / f"alone-{number}")
            words = ["train", "--config", str(folder / "alone.yaml"), "--loss", loss, "--output_dir", out]
            times[parse(loss).needs.compares].append(seconds := cpu_seconds(words))
            print(f"{seconds:7.1f} s  prefopt train --loss '{loss}'", flush=True)
        sweep = cpu_seconds(["sweep", str(folder / "sweep.yaml"), "--output_dir", str(folder / "sweep")])
        trials = json.loads((folder / "sweep" / "results.json").read_text())["trials"]
        assert all(trial["state"] == "finished" for trial in trials)
    mean = {kind: sum(of_kind) / len(of_kind) for kind, of_kind in times.items() if of_kind}
    separate = sum(mean[parse(loss).needs.compares] for loss in losses)
    print(f"{separate:7.1f} s  {len(losses)} separate runs")
    print(f"{sweep:7.1f} s  prefopt sweep: {sweep / separate:.0%}")


if __name__ == "__main__":
    main()
