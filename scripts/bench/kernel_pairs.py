"""Train the bundled model with every pair of kernel and divergence, and compare with a trial on cached states.

    prefopt select-kernel --embeddings hidden --verify --json trial.json
    python scripts/bench/kernel_pairs.py --json trained.json --trial trial.json     # a minute a pair on two cores

`prefopt select-kernel --verify` ranks the 28 pairs by a stand-in that trains for seconds. This trains the model
itself: LoRA on the bundled pairs, the same seed and rows for every pair, and the same yardstick on the held-out pairs,
the loss -log sigmoid(0.1 d). Finished pairs are in the JSON file and are not trained again; the report is of those
that are there. `--kernels polynomial` trains seven of the 28.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import get_peft_config
from trl.trainer.model_config import ModelConfig

from prefopt import PreferenceConfig, PreferenceTrainer
from prefopt.analysis.kernel_choice.trial import BASELINE, PAIRS, expression
from prefopt.catalogue.markdown import table
from prefopt.demo.data import load_demo
from prefopt.losses.kernel_functions import KERNELS
from prefopt.models.bundled import resolve_demo_model
from prefopt.safety.files import write_whole


def settings(folder: str, loss: str, args: argparse.Namespace) -> PreferenceConfig:
    return PreferenceConfig(
        output_dir=folder, loss=loss, max_steps=args.steps, per_device_train_batch_size=2,
        per_device_eval_batch_size=14, max_length=args.max_length, learning_rate=args.learning_rate,
        logging_steps=1000, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True,
        gradient_checkpointing=False, seed=0,
    )  # fmt: skip


def measure(loss: str, path: Path, tokenizer: Any, args: argparse.Namespace) -> dict[str, float]:
    """Held-out loss and accuracy after training with `loss`."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    adapter = get_peft_config(ModelConfig(use_peft=True, lora_r=16, lora_target_modules=["all-linear"]))
    pairs = load_demo("train").shuffle(seed=0).select(range(2 * args.steps))
    with tempfile.TemporaryDirectory() as folder:
        trainer = PreferenceTrainer(
            model, args=settings(folder, loss, args), train_dataset=pairs, processing_class=tokenizer,
            peft_config=adapter,
        )  # fmt: skip
        trainer.train()
        # Merged, because an adapter that is handed in is its own reference.
        judge = PreferenceTrainer(
            trainer.model.merge_and_unload(), AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
            args=settings(folder, expression(*BASELINE, "hidden"), args), train_dataset=pairs,
            eval_dataset=load_demo("heldout"), processing_class=tokenizer,
        )  # fmt: skip
        found = judge.evaluate()
    return {"loss": found["eval_loss"], "accuracy": found["eval_rewards/accuracies"]}


def run(args: argparse.Namespace) -> None:
    path = resolve_demo_model(say=print)
    tokenizer = AutoTokenizer.from_pretrained(path)
    for pair in (BASELINE, *(pair for pair in PAIRS if pair[0] in args.kernels)):
        results: dict[str, Any] = json.loads(args.json.read_text()) if args.json.exists() else {}
        name = " ".join(pair).strip()
        if name in results:
            continue
        results[name] = measure(expression(*pair, "hidden"), path, tokenizer, args)
        text = json.dumps(results, indent=1) + "\n"
        write_whole(args.json, lambda file, text=text: file.write_text(text))
        print(f"{name}: {results[name]['loss']:.4f}, {results[name]['accuracy']:.3f}", flush=True)
        gc.collect()


def ranks(losses: dict[str, float]) -> dict[str, int]:
    return {name: place for place, name in enumerate(sorted(losses, key=lambda name: losses[name]), 1)}


def agreement(first: dict[str, int], second: dict[str, int]) -> float:
    """Spearman's rank correlation."""
    count = len(first)
    squares = sum((first[name] - second[name]) ** 2 for name in first)
    return 1 - 6 * squares / (count * (count**2 - 1))


def report(results: dict[str, dict[str, float]], trial: dict[str, Any]) -> str:
    baseline = results["dpo"]
    trained = {name: found["loss"] for name, found in results.items() if name != "dpo"}
    tried = {f"{found['kernel']} {found['divergence']}": found["losses"] for found in trial["trial"]["outcomes"]}
    order = ranks(trained)
    guessed = ranks({name: sum(tried[name]) / len(tried[name]) for name in trained})
    rows = [
        (str(order[name]), f"`{name}`", f"{trained[name]:.4f}", f"{results[name]['accuracy']:.3f}", str(guessed[name]))
        for name in sorted(order, key=lambda name: order[name])
    ]
    words = f"Plain dpo: {baseline['loss']:.4f}, accuracy {baseline['accuracy']:.3f}. Rank correlation of the two "
    words += f"orders: {agreement(order, guessed):.2f}."
    return table(("rank", "pair", "held-out loss", "accuracy", "rank on cached states"), rows) + f"\n\n{words}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="where results are kept")
    parser.add_argument(
        "--trial", type=Path, help="what `prefopt select-kernel --verify --json` wrote, to compare with"
    )
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=KERNELS, help="those to train with")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--max_length", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    args = parser.parse_args()
    run(args)
    if args.trial:
        print(report(json.loads(args.json.read_text()), json.loads(args.trial.read_text())))


if __name__ == "__main__":
    main()
