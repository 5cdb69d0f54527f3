"""Train every objective for a few steps on the bundled data with LoRA, and time a step of it against one of DPO.

    python scripts/bench/objectives.py --json objectives.json            # all of them, about an hour on two cores
    python scripts/bench/objectives.py --json objectives.json --only dpo simpo kto --steps 20
    python scripts/bench/objectives.py --json losses.json --only dpo "dpo(beta=0.5)" "ipo + 0.1*sft"
    python scripts/bench/objectives.py --json kernels.json --kernels     # 28 pairs of kernel and divergence, and hmk
    python scripts/bench/objectives.py --json objectives.json --table    # print what has been measured as Markdown

The job is the same for each: the bundled model, two pairs a step (groups of two answers for objectives on groups) cut
at --max_length tokens, two passes over them, the same seed. Time is processor time of a single thread, the median over
steps, so that other work on the machine hardly enters; DPO is measured again after every few objectives. Finished
objectives are in the JSON file and are not run again, so an interrupted run continues; several runs with
--share i/n divide the work.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import get_peft_config
from trl.trainer.model_config import ModelConfig

from prefopt import PreferenceConfig, PreferenceTrainer
from prefopt.catalogue.markdown import table as markdown_table
from prefopt.demo.data import load_demo, load_demo_groups
from prefopt.losses import available, parse, presets
from prefopt.losses.divergences import NAMES as DIVERGENCES
from prefopt.losses.kernel_functions import KERNELS
from prefopt.models.bundled import resolve_demo_model
from prefopt.safety.files import write_whole

WRAPPERS = {
    "conflict_free": "dpo + sft",
    "on_forget": "npo",
    "on_retain": "sft",
    **dict.fromkeys(
        ("dual", "humanline", "length_normalized", "noise_robust", "pair_normalized", "reweighted", "wpo"), "dpo"
    ),
}
"""What they are taken around."""
EVERY = 10
"""DPO is measured again after so many objectives."""


class Stopwatch(TrainerCallback):
    """Processor seconds of each optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._began = time.process_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.process_time() - self._began)


def expressions(only: list[str] | None, kernels: bool = False) -> dict[str, str]:
    """What to train by name; an expression is its own name."""
    pairs = [f"kernel_dpo({kernel!r}, {divergence!r})" for kernel in KERNELS for divergence in DIVERGENCES]
    names = [*(only or []), *(["hmk", *pairs] if kernels else [])] or [*available(), *presets()]
    return {name: f"{name}({WRAPPERS[name]})" if name in WRAPPERS else name for name in names}


def measure(expression: str, model: Any, tokenizer: Any, pairs: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Train one objective and take its adapter off the model again."""
    with tempfile.TemporaryDirectory() as folder:
        config = PreferenceConfig(
            output_dir=folder, loss=expression, max_steps=args.steps, per_device_train_batch_size=2,
            max_length=args.max_length, learning_rate=args.learning_rate, logging_steps=1, save_strategy="no",
            report_to="none", use_cpu=True, disable_tqdm=True, gradient_checkpointing=False, seed=0,
            sample_max_new_tokens=16,
        )  # fmt: skip
        adapter = get_peft_config(ModelConfig(use_peft=True, lora_r=16, lora_target_modules=["all-linear"]))
        watch = Stopwatch()
        trainer = PreferenceTrainer(
            model, args=config, train_dataset=pairs, processing_class=tokenizer, peft_config=adapter, callbacks=[watch]
        )
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    half = len(losses) // 2
    trainer.model.unload()
    return {
        "expression": str(parse(expression)),
        "seconds": statistics.median(watch.seconds[1:]),
        "first_pass": statistics.fmean(losses[:half]),
        "second_pass": statistics.fmean(losses[half:]),
        "steps": args.steps,
    }


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    path = resolve_demo_model(say=print)
    tokenizer = AutoTokenizer.from_pretrained(path)
    pairs, groups = (load("train").shuffle(seed=0).select(range(args.steps)) for load in (load_demo, load_demo_groups))
    numbers = {"margin": 0.5, "chosen_score": 0.9, "rejected_score": 0.2, "chosen_from_reference": 0.0}
    for name, value in numbers.items():
        pairs = pairs.add_column(name, [value] * len(pairs))
    pairs = pairs.add_column("forget", [n % 2 for n in range(len(pairs))])
    part, parts = (int(number) for number in args.share.split("/"))
    results: dict[str, Any] = json.loads(args.json.read_text()) if args.json.exists() else {}
    todo = [item for item in expressions(args.only, args.kernels).items() if item[0] not in results][part::parts]
    baseline = 0.0
    for i, (name, expression) in enumerate(todo):
        # The model is read again, so that nothing of the last objective is left in it.
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        if i % EVERY == 0:
            baseline = measure("dpo", model, tokenizer, pairs, argparse.Namespace(**{**vars(args), "steps": 6}))[
                "seconds"
            ]
            model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        rows = groups if parse(expression).grouped else pairs
        result = measure(expression, model, tokenizer, rows, args)
        result["over_dpo"] = result["seconds"] / baseline
        # Other shares write the same file: what they added since is kept.
        results = json.loads(args.json.read_text()) if args.json.exists() else {}
        results[name] = result
        text = json.dumps(results, indent=1) + "\n"
        write_whole(args.json, lambda file, text=text: file.write_text(text))
        print(
            f"{name}: {result['first_pass']:.4g} -> {result['second_pass']:.4g}, "
            f"{result['seconds']:.2f} s a step, {result['over_dpo']:.2f} of dpo's",
            flush=True,
        )
        del model
        gc.collect()


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    rows = []
    for name, result in sorted(results.items()):
        first, second = result["first_pass"], result["second_pass"]
        falls = "yes" if second < first else "no"
        name = name.replace("kernel=", "").replace("divergence=", "")
        rows.append((f"`{name}`", f"{first:.4g}", f"{second:.4g}", falls, f"{result['over_dpo']:.2f}"))
    return markdown_table(("objective", "first pass", "second pass", "falls", "time / DPO's"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="where results are kept")
    parser.add_argument("--only", nargs="+", help="objectives by name or as expressions; all of them if left out")
    parser.add_argument("--kernels", action="store_true", help="every kernel with every divergence, and their mixture")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--max_length", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--share", default="0/1", help="i/n: the i-th of n runs side by side")
    parser.add_argument("--table", action="store_true", help="print the results and run nothing")
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(args.json.read_text())))
    else:
        run(args)


if __name__ == "__main__":
    main()
