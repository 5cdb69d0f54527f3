"""Methods of unlearning compared: forget quality, model utility and answers over the steps of each.

On the bundled authors, and on a part of TOFU's forget05 where its files are given: its first author, and as many
questions about others to retain.

    python scripts/bench/unlearning.py --out unlearning
    python scripts/bench/unlearning.py --out unlearning --tofu FOLDER   # of forget05_perturbed.json, retain95.json ...

Every method starts from the same learned model, makes as many steps of ten rows at the same rate, and is measured
with the same questions against the same gold model. With a retain term, half of the rows are rows to retain. The two
main methods run with three seeds, of learning and of forgetting. A run that is finished is not made again, so an
interrupted command continues where it stopped. `unlearning/table.md`, `unlearning/NAME.png` (the paper's picture:
quality against utility, one curve a method) and `unlearning/results.json` are written after each run.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from prefopt.models.bundled import resolve_demo_model
from prefopt.recipe.unlearning import main as run_recipe
from prefopt.unlearning.report import draw_curves

MAIN = ("NPO+RT", "GA+RT")
SEEDS = (0, 1, 2)
METHODS = {
    "GA": "ga",
    "GA+RT": "gradient_difference",
    "GA+KL": "ga_kl",
    "IDK+RT": "idk",
    "NPO": "npo(beta=0.1)",
    "NPO+RT": "npo_rt(beta=0.1)",
    "NPO+KL": "npo_kl(beta=0.1)",
    "SimNPO+RT": "simnpo_rt",
    "RMU": "rmu_paper(layer=7, scale=6.5, retain=1.0)",
}
"""Each method's loss expression, with a retain term of weight 1."""
WEIGHTS = {
    "NPO+0.5 RT": "npo_rt(beta=0.1, retain=0.5)",
    "NPO+2 RT": "npo_rt(beta=0.1, retain=2)",
    "NPO+4 RT": "npo_rt(beta=0.1, retain=4)",
}
"""NPO+RT with other weights, measured at the end alone; NPO and NPO+RT are the weights 0 and 1."""
WITHOUT_RETAIN = ("GA", "NPO")
STEPS, BATCH = 32, 10

COMMON = (
    "--learn", "true", "--learn_epochs", "7", "--learn_learning_rate", "1e-4", "--learning_rate", "3e-5",
    "--lr_scheduler_type", "linear", "--max_steps", str(STEPS), "--per_device_train_batch_size", str(BATCH),
    "--max_length", "256", "--gradient_checkpointing", "false", "--logging_steps", "4", "--save_strategy", "no",
    "--best", "none", "--warmup_steps", "0.1", "--disable_tqdm", "true", "--overwrite_output_dir", "true",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One method on one set with one seed.

    Attributes:
        forget_rows: of the set, which decide how many steps an epoch has.
        sets: options that name the set.
    """

    method: str
    data: str
    seed: int
    forget_rows: int = 20
    sets: tuple[str, ...] = field(default=(), repr=False)

    @property
    def name(self) -> str:
        return f"{self.data}-{self.method.lower().replace('+', '-').replace(' ', '-')}-{self.seed}"

    @property
    def words(self) -> tuple[str, ...]:
        """Its own options."""
        rows = self.forget_rows if self.method in WITHOUT_RETAIN else 2 * self.forget_rows
        every = self.every / math.ceil(rows / BATCH)  # in epochs
        loss = {**METHODS, **WEIGHTS}[self.method]
        return ("--loss", loss, "--seed", str(self.seed), "--evaluate_every", str(every), *self.sets)

    @property
    def every(self) -> int:
        """Steps between measurements, each of which takes as long as ten steps."""
        if self.method in WEIGHTS:
            return STEPS
        return STEPS // 4 if self.method in (*MAIN, *WITHOUT_RETAIN) and self.seed == SEEDS[0] else STEPS // 2


def runs(args: argparse.Namespace) -> Iterator[Run]:
    """The main methods first, so that an interrupted comparison has them."""
    ordered = sorted(args.methods, key=lambda name: name not in MAIN)
    for method in ordered:
        for seed in SEEDS if method in MAIN else SEEDS[:1]:
            yield Run(method, "bundled", seed)
    for method in WEIGHTS if "NPO+RT" in ordered else ():
        yield Run(method, "bundled", SEEDS[0])
    if args.tofu is not None:
        sets = tofu_sets(args.tofu, args.out, args.rows)
        for method in ordered:
            if method in args.tofu_methods:
                yield Run(method, "tofu", SEEDS[0], args.rows, sets)


def tofu_sets(folder: Path, out: Path, rows: int) -> tuple[str, ...]:
    """Options that name a part of TOFU: whole authors, twenty questions each."""

    def part(name: str) -> str:
        lines = (folder / f"{name}.json").read_text(encoding="utf-8").splitlines()[:rows]
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
        own = ("--demo",) if run.data == "bundled" else ("--model_name_or_path", str(resolve_demo_model(say=print)))
        started = time.process_time()
        run_recipe(
            argv=[
                *own, *COMMON, *run.words, "--output_dir", str(folder), "--models_dir", str(out / "models"), *more,
            ]
        )  # fmt: skip
        (folder / "processor_seconds.txt").write_text(f"{time.process_time() - started:.0f}\n")
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


def at_equal_forgetting(one: Sequence[Mapping[str, float]], other: Sequence[Mapping[str, float]]) -> list[float]:
    """A forget probability that two runs pass, and the utility of each there, between its two evaluations around it.

    The probability lies half way down, as a logarithm, to the deepest that both reach.
    """
    lowest = max(min(point["forget_probability"] for point in points) for points in (one, other))
    level = math.sqrt(lowest * one[0]["forget_probability"])
    values = [level]
    for points in (one, other):
        after = next(n for n, point in enumerate(points) if point["forget_probability"] <= level)
        left, right = points[max(after - 1, 0)], points[after]
        drop = left["forget_probability"] - right["forget_probability"]
        share = (left["forget_probability"] - level) / drop if drop else 1.0
        values.append(left["model_utility"] + share * (right["model_utility"] - left["model_utility"]))
    return values


def equal_forgetting(results: Mapping[Run, Mapping[str, Any]], data: str) -> str:
    """Markdown: NPO beside gradient ascent, with the same retain term and seed, where both have forgotten as much."""
    points = {(run.method, run.seed): points_of(result) for run, result in results.items() if run.data == data}
    lines = ["| NPO, GA | seed | forget probability | utility NPO | utility GA |", "|---|---|---|---|---|"]
    for (method, seed), of_npo in points.items():
        rival = method.replace("NPO", "GA", 1)
        if method in METHODS and method.startswith("NPO") and (rival, seed) in points:
            cells = " | ".join(f"{value:.3f}" for value in at_equal_forgetting(of_npo, points[rival, seed]))
            lines.append(f"| {method}, {rival} | {seed} | {cells} |")
    return "\n".join(lines)


def write(results: Mapping[Run, Mapping[str, Any]], out: Path) -> None:
    parts = []
    for data in dict.fromkeys(run.data for run in results):
        mine = {run: result for run, result in results.items() if run.data == data}
        parts.append(f"## {data}\n\n{table(results, data)}\n\n{equal_forgetting(results, data)}\n")
        curves = {
            run.method: points_of(result)
            for run, result in mine.items()
            if run.seed == SEEDS[0] and run.method in METHODS
        }
        draw_curves(curves, next(iter(mine.values()))["gold"], out / f"{data}.png")
    (out / "table.md").write_text("\n".join(parts), encoding="utf-8")
    everything = {run.name: {"method": run.method, **result} for run, result in results.items()}
    (out / "results.json").write_text(json.dumps(everything, indent=1), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the folder for models, runs, table and pictures")
    parser.add_argument("--tofu", type=Path, help="a folder with TOFU's JSON files")
    parser.add_argument("--rows", type=int, default=20, help="of TOFU: rows of each set")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--tofu_methods", nargs="+", choices=list(METHODS), default=list(MAIN), help="of --methods")
    parser.add_argument("--only", nargs="+", default=["*"], help="names of runs, such as 'bundled-*-0'")
    parser.add_argument("--more", nargs=argparse.REMAINDER, default=[], help="options for every run, last")
    args = parser.parse_args()
    results: dict[Run, dict[str, Any]] = {}
    for run in runs(args):
        if not any(fnmatch(run.name, pattern) for pattern in args.only):
            continue
        print(f"== {run.name}", flush=True)
        results[run] = result_of(run, args.out, args.more)
        write(results, args.out)
    print((args.out / "table.md").read_text())
    seconds = [float(path.read_text()) for path in args.out.glob("runs/*/processor_seconds.txt")]
    print(f"{len(seconds)} runs, {sum(seconds) / 60:.0f} minutes of processor time")


if __name__ == "__main__":
    main()
