"""What `conflict_free` costs over the plain sum, a step, and what each of them has made of the same processor time.

    python scripts/bench/conflict.py --json conflict.json            # both sums, about twenty minutes on one core
    python scripts/bench/conflict.py --json conflict.json --optim sgd --learning_rate 0.02 --only npo
    python scripts/bench/conflict.py --json conflict.json --table    # print what has been measured as Markdown

The job is the same for each: the bundled model with LoRA, batches of four out of sixteen bundled pairs cut at
--max_length tokens, the same seed, hence the same batches in the same order. Time is processor time of one thread. A
step's cost is compared with that of the plain sum's step on the same batch, in --rounds short runs of each by turns;
the median of these ratios is the cost. Then the plain sum takes --steps steps, and the others as many as cost the
same. What comes of it is the change of each term over all sixteen pairs. Finished sums are in the JSON file and are
not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from objectives import Stopwatch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback

from prefopt import PreferenceConfig, PreferenceTrainer
from prefopt.catalogue.markdown import table as markdown_table
from prefopt.demo.data import load_demo
from prefopt.models.bundled import resolve_demo_model
from prefopt.safety.files import write_whole

SUMS = {"npo": "npo(beta=0.1) + sft(nll='mean')", "dpo": "dpo(beta=0.1) + sft(nll='mean')"}
WAYS = {
    "plain sum": "{}",
    "config": "conflict_free({})",
    "pcgrad": "conflict_free({}, method='pcgrad')",
}
PAIRS, BATCH, SHORT = 16, 4, 5
SETTINGS = ("optim", "learning_rate", "steps", "rounds", "max_length", "seed")


def train(loss: str, steps: int, args: argparse.Namespace) -> tuple[list[float], PreferenceTrainer]:
    """Processor seconds of every step, and the trainer that took them."""
    folder = resolve_demo_model(say=lambda line: None)
    pairs = load_demo("train").shuffle(seed=args.seed).select(range(PAIRS))
    watch = Stopwatch()
    with tempfile.TemporaryDirectory() as output:
        config = PreferenceConfig(
            output, loss=loss, max_steps=steps, per_device_train_batch_size=BATCH, per_device_eval_batch_size=BATCH,
            max_length=args.max_length, learning_rate=args.learning_rate, optim=args.optim, logging_steps=1,
            lr_scheduler_type="constant", save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True,
            gradient_checkpointing=False, seed=args.seed,
        )  # fmt: skip
        trainer = PreferenceTrainer(
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
            args=config,
            train_dataset=pairs,
            eval_dataset=pairs,
            processing_class=AutoTokenizer.from_pretrained(folder),
            peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[watch],
        )
        trainer.remove_callback(PrinterCallback)
        if steps:
            trainer.train()
    return watch.seconds, trainer


def terms(trainer: PreferenceTrainer) -> dict[str, float]:
    """Both terms over all pairs."""
    measured = trainer.evaluate()
    return {term: measured[f"eval_{term}/loss"] for term in (*SUMS, "sft") if f"eval_{term}/loss" in measured}


def measure(total: str, args: argparse.Namespace) -> dict[str, Any]:
    """One sum, in every way."""
    losses = {way: form.format(total) for way, form in WAYS.items() if way in args.ways}
    seconds: dict[str, list[float]] = {way: [] for way in losses}
    for _ in range(args.rounds):
        for way, loss in losses.items():
            # Without the first step, which also pays for what is made once.
            seconds[way] += train(loss, SHORT, args)[0][1:]
    before = terms(train(total, 0, args)[1])
    found: dict[str, Any] = {}
    for way, loss in losses.items():
        ratios = [own / plain for own, plain in zip(seconds[way], seconds["plain sum"], strict=True)]
        cost = statistics.median(ratios)
        steps = round(args.steps / cost)
        taken, trainer = train(loss, steps, args)
        change = {term: value - before[term] for term, value in terms(trainer).items()}
        found[way] = {
            "cost": cost, "from": min(ratios), "to": max(ratios), "step": statistics.median(seconds[way]),
            "steps": steps, "seconds": sum(taken), "change": change,
        }  # fmt: skip
        print(f"{total}: {way}: {json.dumps(found[way])}", flush=True)
    return found


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    rows = [
        (
            f"`{result['sum']}`, {result['settings']['seed']}", way,
            f"{found['cost']:.2f} ({found['from']:.2f} to {found['to']:.2f})", str(found["steps"]),
            *(f"{value:+.3f}" for value in found["change"].values()),
        )
        for result in results.values()
        for way, found in result["ways"].items()
    ]  # fmt: skip
    return markdown_table(("sum, seed", "way", "a step's cost", "steps in the same time", "first term", "sft"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="where results are kept")
    parser.add_argument("--only", nargs="+", choices=SUMS, default=list(SUMS), help="sums by their first term")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS)[:2])
    parser.add_argument("--steps", type=int, default=20, help="of the plain sum")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--max_length", type=int, default=128)
    parser.add_argument("--optim", default="adamw_torch")
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    parser.add_argument("--seed", type=int, default=0, help="of the sixteen pairs, their order and the adapter")
    parser.add_argument("--table", action="store_true", help="print the results and run nothing")
    args = parser.parse_args()
    if "plain sum" not in args.ways:
        parser.error("--ways must hold 'plain sum', which the others are compared with")
    results: dict[str, Any] = json.loads(args.json.read_text()) if args.json.exists() else {}
    if args.table:
        print(table(results))
        return
    torch.set_num_threads(1)
    settings = {name: getattr(args, name) for name in SETTINGS}
    for name in args.only:
        key = json.dumps({"sum": name, **settings, "ways": args.ways})
        if key not in results:
            results[key] = {"sum": SUMS[name], "settings": settings, "ways": measure(SUMS[name], args)}
            write_whole(args.json, lambda file: file.write_text(json.dumps(results, indent=1) + "\n"))
    print(table(results))


if __name__ == "__main__":
    main()
