"""Methods of unlearning compared: forget quality, model utility and answers over the steps of each.

On the bundled authors, and on a part of TOFU's forget05 where its files are given: its first authors, and as many
questions about others to retain.

    python scripts/bench/unlearning.py --out unlearning
    python scripts/bench/unlearning.py --out unlearning --tofu FOLDER   # of forget05_perturbed.json, retain95.json ...

Every method starts from the same learned model, with the same batches and steps, and is measured with the same
questions against the same gold model. The two main methods run with three seeds. A run that is finished is not made
again, so an interrupted command goes on where it stopped. `unlearning/table.md`, `unlearning/NAME.png` (the paper's
picture: quality against utility, one curve a method) and `unlearning/results.json` are written after each run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefopt.recipe.unlearning import main as run_recipe
from prefopt.unlearning.report import draw_curves

MAIN = ("NPO+RT", "GA+RT")
SEEDS = (0, 1, 2)
METHODS: dict[str, tuple[str, Mapping[str, str]]] = {
    "GA": ("ga", {}),
    "GA+RT": ("gradient_difference", {}),
    "GA+KL": ("ga + kl_retain", {}),
    "IDK+RT": ("idk", {}),
    "NPO": ("npo(beta=0.1)", {}),
    "NPO+RT": ("npo_rt(beta=0.1)", {}),
    "NPO+KL": ("npo_kl(beta=0.1)", {}),
    "SimNPO+RT": ("simnpo_rt", {}),
    "RMU": ("rmu_paper(layer=7, scale=6.5, retain=1.0)", {}),
}
"""Each method's loss expression, and options that differ from the others'."""

COMMON = (
    "--learn", "true", "--learn_epochs", "6", "--learn_learning_rate", "5e-5", "--learning_rate", "2e-5",
    "--num_train_epochs", "8", "--per_device_train_batch_size", "10", "--evaluate_every", "2", "--max_length", "256",
    "--gradient_checkpointing", "false", "--logging_steps", "4", "--save_strategy", "no", "--warmup_steps", "0.1",
    "--disable_tqdm", "true", "--overwrite_output_dir", "true",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One method on one set with one seed."""

    method: str
    data: str
    seed: int
    sets: tuple[str, ...] = field(default=(), repr=False)

    @property
    def name(self) -> str:
        return f"{self.data}-{self.method.lower().replace('+', '-')}-{self.seed}"


def runs(tofu: Path | None, out: Path, rows: int, methods: list[str]) -> Iterator[Run]:
    """The main methods first, so that an interrupted comparison has them."""
    data = {"bundled": (), **({} if tofu is None else {"tofu": tofu_sets(tofu, out, rows)})}
    ordered = sorted(methods, key=lambda name: name not in MAIN)
    for name, sets in data.items():
        for method in ordered:
            for seed in SEEDS if method in MAIN else SEEDS[:1]:
                yield Run(method, name, seed, sets)


def tofu_sets(folder: Path, out: Path, rows: int) -> tuple[str, ...]:
    """Options that name a part of TOFU: whole authors, twenty questions each."""

    def part(name: str, start: int = 0) -> str:
        lines = (folder / f"{name}.json").read_text(encoding="utf-8").splitlines()[start : start + rows]
        path = out / "tofu" / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return str(path)

    sets = {
        "forget_set": part("forget05_perturbed"), "retain_set": part("retain95"),
        "retain_eval_set": part("retain_perturbed"), "real_authors_set": part("real_authors_perturbed"),
        "world_facts_set": part("world_facts_perturbed"),
    }  # fmt: skip
    return tuple(word for name, value in sets.items() for word in (f"--{name}", value))


def result_of(run: Run, out: Path, more: list[str]) -> dict[str, Any]:
    """The run's `results.json`, made now unless it is there."""
    folder = out / "runs" / run.name
    path = folder / "results.json"
    if not path.is_file():
        loss, options = METHODS[run.method]
        own = [word for name, value in options.items() for word in (f"--{name}", value)]
        started = time.monotonic()
        run_recipe(
            argv=[
                *COMMON, "--loss", loss, "--seed", str(run.seed), "--output_dir", str(folder), "--models_dir",
                str(out / "models"), *run.sets, *own, *more,
            ]
        )  # fmt: skip
        (folder / "seconds.txt").write_text(f"{time.monotonic() - started:.0f}\n")
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return results


def points_of(result: Mapping[str, Any]) -> list[dict[str, float]]:
    """The numbers before forgetting and at each evaluation."""
    steps = [{name.removeprefix("eval_"): value for name, value in one.items()} for one in result["evaluations"]]
    return [{**result["before"], "step": 0}, *steps]


def table(results: Mapping[Run, Mapping[str, Any]], data: str) -> str:
    """Markdown: the numbers at the last step, means over seeds with their range, beside start and gold model."""
    columns = {
        "forget_quality": "forget quality", "model_utility": "utility", "forget_probability": "forget probability",
        "forget_rouge": "forget ROUGE", "retain_probability": "retain probability", "retain_rouge": "retain ROUGE",
    }  # fmt: skip
    mine = {run: result for run, result in results.items() if run.data == data}
    lines = [f"| method | seeds | {' | '.join(columns.values())} |", "|---|---|" + "---|" * len(columns)]
    any_result = next(iter(mine.values()))
    for name, values in (("before", any_result["before"]), ("gold model", any_result["gold"])):
        lines.append(f"| {name} | | " + " | ".join(f"{values[key]:.3g}" for key in columns) + " |")
    for method in dict.fromkeys(run.method for run in mine):
        last = [result["after"] for run, result in mine.items() if run.method == method]
        cells = [_range([values[key] for values in last]) for key in columns]
        lines.append(f"| {method} | {len(last)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _range(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.3g}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.2g} to {max(values):.2g})"


def write(results: Mapping[Run, Mapping[str, Any]], out: Path) -> None:
    parts = []
    for data in dict.fromkeys(run.data for run in results):
        mine = {run: result for run, result in results.items() if run.data == data}
        parts.append(f"## {data}\n\n{table(results, data)}\n")
        curves = {run.method: points_of(result) for run, result in mine.items() if run.seed == SEEDS[0]}
        draw_curves(curves, next(iter(mine.values()))["gold"], out / f"{data}.png")
    (out / "table.md").write_text("\n".join(parts), encoding="utf-8")
    everything = {run.name: {"method": run.method, **result} for run, result in results.items()}
    (out / "results.json").write_text(json.dumps(everything, indent=1), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the folder for models, runs, table and pictures")
    parser.add_argument("--tofu", type=Path, help="a folder with TOFU's JSON files")
    parser.add_argument("--rows", type=int, default=60, help="of TOFU: rows of each set")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--more", nargs=argparse.REMAINDER, default=[], help="options for every run, last")
    args = parser.parse_args()
    results: dict[Run, dict[str, Any]] = {}
    for run in runs(args.tofu, args.out, args.rows, args.methods):
        print(f"== {run.name}", flush=True)
        results[run] = result_of(run, args.out, args.more)
        write(results, args.out)
    print((args.out / "table.md").read_text())


if __name__ == "__main__":
    main()
